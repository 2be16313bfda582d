"""The protocol of the paper's reference code: its prompts, its order and its scores, each written here again."""

import csv
import json
import math
import random
from dataclasses import fields

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError
from spd_lens.sandbox import available, passes_tests
from spd_lens.tasks import REFERENCE_SUBTASKS, Task
from spd_lens.tasks.scoring import reference
from tests.helpers import refused

NAMES = ("gsm8k", "svamp", "mbpp", "mmlu", "bbh", "codealpaca")
OWN = {"mmlu": {"train_source": "dev+val"}, "bbh": {"subtasks": list(REFERENCE_SUBTASKS)}}


def bare(name: str, path=None, **options) -> Task:
    """A task in the reference template and in file order, from local files or the hub."""
    return tasks.get(name, path=path, **{"prompt_template": "reference", "order": "file", **options})


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gsm8k_texts(row):
    completion = " " + row["answer"]
    place = completion.find("#### ") + 5
    return "Question: " + row["question"] + "\nAnswer:", completion, [completion[place:]], []


def svamp_texts(row):
    answer = str(row["Answer"])
    return "Question: " + row["Body"] + " " + row["Question"] + "\nAnswer:", " " + answer, [answer], []


def mbpp_texts(row):
    prompt = "Instruction: " + row.get("text", row.get("prompt")) + "\nYour code should pass these tests:\n"
    return prompt + "\n".join(row["test_list"]) + "\nCode:", " " + row["code"], [], row["test_list"]


def mmlu_texts(row):
    question, a, b, c, d, answer = row
    prompt = "Question: " + question + "\nA. " + a + "\nB. " + b + "\nC. " + c + "\nD. " + d + "\nAnswer:"
    return prompt, " " + answer, [" " + answer], []


def bbh_texts(row):
    return row["input"] + "\nAnswer:", " " + row["target"], [" " + row["target"]], []


def codealpaca_texts(row):
    return "Instruction: " + row["instruction"] + "\nCode:", " " + row["output"], [" " + row["output"]], []


def texts(example):
    """Prompt, completion, and the texts of the spans in the completion and in the prompt."""
    return (
        example.prompt,
        example.completion,
        [example.completion[start:end] for start, end in example.spans],
        [example.prompt[start:end] for start, end in example.prompt_spans],
    )


def published(name, data):
    """Both sides of the published records in file order, as they are in the files."""
    if name == "gsm8k":
        return json_lines(data / "gsm8k/train.jsonl"), json_lines(data / "gsm8k/test.jsonl")
    if name == "mbpp":
        full = json_lines(data / "mbpp/mbpp.jsonl")
        test = json.loads((data / "mbpp/sanitized-mbpp.json").read_text())
        by_id = {row["task_id"]: row for row in full}
        train = [by_id[id] for id in [*range(601, 975), *range(511, 601)]]
        return train, [row for row in test if 11 <= row["task_id"] <= 510]
    if name == "bbh":
        rows = [json.loads((data / f"bbh/{name}.json").read_text())["examples"] for name in REFERENCE_SUBTASKS]
        return [row for of_one in rows for row in of_one[50:]], [row for of_one in rows for row in of_one[:50]]
    rows = json.loads((data / "codealpaca/code_alpaca_2k.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["output"].strip()]
    return rows[:-100], rows[-100:]


@pytest.mark.parametrize("name", ["gsm8k", "mbpp", "bbh", "codealpaca"])
def test_texts_and_order_of_the_published_files(data, name):
    """Every record, character by character, in the order of the files."""
    task, make = bare(name, data, **OWN.get(name, {})), globals()[f"{name}_texts"]
    train, test = published(name, data)
    for seed in (42, 7):  # which decides nothing
        assert [texts(example) for example in task.train(None, seed)] == [make(row) for row in train]
        assert [texts(example) for example in task.calibration(50, seed)] == [make(row) for row in train[:50]]
        assert [texts(example) for example in task.test(None, seed)] == [make(row) for row in test]


def test_published_svamp(data):
    """The local file has no split: the sides are those of seeded draws, each in the order of the file."""
    rows = json.loads((data / "svamp/SVAMP.json").read_text())
    task, seeded = bare("svamp", data), tasks.get("svamp", path=data)
    for side in ("train", "test"):
        ids = {example.id for example in seeded.pool(side)}
        expected = [row for row in rows if f"svamp-{row['ID']}" in ids]
        assert [texts(example) for example in task.pool(side)] == [svamp_texts(row) for row in expected]


def test_published_mmlu(data):
    """Subject after subject, then shuffled by what `datasets` itself does."""
    import datasets

    def side(*splits):
        rows = []
        for split in splits:
            for path in sorted((data / "mmlu" / split).glob("*.csv")):
                with path.open(encoding="utf-8", newline="") as file:
                    rows += list(csv.reader(file))
        order = datasets.Dataset.from_dict({"place": list(range(len(rows)))}).shuffle(seed=42)["place"]
        return [mmlu_texts(rows[place]) for place in order]

    task = bare("mmlu", data, train_source="dev+val")
    assert [texts(example) for example in task.test(200)] == side("test")[:200]
    assert [texts(example) for example in task.train(None)] == side("dev", "val")
    assert task.choices(task.test(1)[0]) == (" A", " B", " C", " D")
    assert task.calibration(50) == task.train(50)


def test_the_examples_of_the_table(write):
    """Small records, written out."""
    write("train.jsonl", [{"question": "6 times 7? ", "answer": "6*7=<<6*7=42>>42\n#### 42"}])
    task = bare("gsm8k", write("test.jsonl", [{"question": "Why?", "answer": "#### 1,000"}]))
    assert texts(task.train(1)[0]) == ("Question: 6 times 7? \nAnswer:", " 6*7=<<6*7=42>>42\n#### 42", ["42"], [])
    record = {"ID": "chal-1", "Body": "A pen costs 2 dollars", "Question": "And 3?", "Equation": "( 2 * 3 )"}
    rows = [{**record, "ID": f"chal-{n}", "Answer": 6.0} for n in (3, 1, 2)]
    svamp = bare("svamp", write("SVAMP.json", rows))
    assert texts(svamp.test(1)[0]) == ("Question: A pen costs 2 dollars And 3?\nAnswer:", " 6.0", ["6.0"], [])
    alpaca = [{"instruction": f"Print {n}.", "input": "not shown", "output": f"print({n})\r\n"} for n in range(102)]
    code = bare("codealpaca", write("code_alpaca_2k.json", alpaca))
    assert texts(code.test(100)[0]) == ("Instruction: Print 2.\nCode:", " print(2)\r\n", [" print(2)\r\n"], [])
    assert [example.id for example in code.train(None)] == ["codealpaca-0", "codealpaca-1"]
    full = {"task_id": 601, "text": "Add one. ", "code": "def f(x):\r\n\treturn x + 1", "test_setup_code": ""}
    full["test_list"] = ["assert f(1) == 2 ", "assert f(2) == 3"]
    write("mbpp.jsonl", [{**full, "task_id": id} for id in (1, 511, 10, 602, 601)])
    mbpp = bare("mbpp", write("sanitized-mbpp.json", [{**full, "task_id": 11, "prompt": "Add.", "test_imports": []}]))
    prompt = "Instruction: Add one. \nYour code should pass these tests:\nassert f(1) == 2 \nassert f(2) == 3\nCode:"
    assert texts(mbpp.train(1)[0]) == (prompt, " def f(x):\r\n\treturn x + 1", [], full["test_list"])
    assert [example.id for example in mbpp.train(None)] == ["mbpp-full-602", "mbpp-full-601", "mbpp-full-511"]


def test_nothing_is_removed_in_file_order(write):
    question = {"question": "Again?", "answer": "#### 1"}
    write("train.jsonl", [question, question, {"question": "Once?", "answer": "#### 2"}])
    path = write("test.jsonl", [{"question": "once", "answer": "#### 2"}])
    task = bare("gsm8k", path)
    assert [example.id for example in task.train(None)] == ["gsm8k-train-0", "gsm8k-train-1", "gsm8k-train-2"]
    assert (task.card()["repeats_kept"], task.card()["duplicates_removed"]) == (2, 0)
    seeded = tasks.get("gsm8k", path=path, prompt_template="reference")
    assert [example.id for example in seeded.train(None)] == ["gsm8k-train-0"]
    assert "repeats_kept" not in seeded.card() and seeded.duplicates_removed == 2
    with pytest.raises(SPDError, match="4 train examples of gsm8k were asked for, and there are 3"):
        task.train(4)
    with pytest.raises(SPDError, match="seed"):
        task.train(1, seed="x")


def test_mmlu_of_the_hub(hub):
    """Calibration and training are the first of `auxiliary_train`, shuffled with seed 42; nothing regroups the hub."""
    import datasets

    def row(n, subject):
        return {
            "question": f"{subject or 'other'} {n} ?",
            "subject": subject or "x",
            "choices": list("wxyz"),
            "answer": n % 4,
        }

    splits = {
        "auxiliary_train": [row(n, "") for n in range(40)],
        "test": [row(n, "virology" if n % 2 else "anatomy") for n in range(30)],
    }
    hub(splits)
    task = bare("mmlu")
    assert task.options()["train_source"] == "auxiliary"
    for side, split in (("train", "auxiliary_train"), ("calibration", "auxiliary_train"), ("test", "test")):
        order = datasets.Dataset.from_list(splits[split]).shuffle(seed=42)["question"]
        assert [example.meta["question"] for example in task.draw(side, None, 1)] == list(order)
    assert texts(task.test(1)[0])[0].endswith("?\nA. w\nB. x\nC. y\nD. z\nAnswer:")


def test_mmlu_has_no_auxiliary_questions_in_files(tmp_path):
    with pytest.raises(SPDError, match=r"read from the hub only; leave path away; or say train_source=dev\+val"):
        bare("mmlu", tmp_path)
    assert tasks.get("mmlu", path=tmp_path).options()["train_source"] == "dev+val"


def test_svamp_of_the_hub_keeps_its_split(hub):
    row = {"Body": "He had 2", "Question": "Why?", "Equation": "( 2.0 + 1.0 )", "Answer": "3.0", "Type": "Addition"}
    hub({"train": [{**row, "ID": "chal-9"}, {**row, "ID": "chal-2"}], "test": [{**row, "ID": "chal-10"}]})
    task = bare("svamp")
    assert [example.id for example in task.train(None)] == ["svamp-chal-9", "svamp-chal-2"]
    assert [example.id for example in task.test(None)] == ["svamp-chal-10"]
    assert task.test(1)[0].completion == " 3.0"


def test_mbpp_of_the_hub(hub):
    row = {"text": "Add.", "code": "def f(x): return x", "test_setup_code": "", "test_list": ["assert f(1) == 1"]}
    sanitized = {**row, "prompt": "Add.", "test_imports": []}
    asked = hub({
        "full/train": [{**row, "task_id": id} for id in (603, 601)],
        "full/validation": [{**row, "task_id": 511}],
        "sanitized/test": [{**sanitized, "task_id": id} for id in (12, 11)],
    })  # fmt: skip
    task = bare("mbpp")
    assert [example.id for example in task.train(None)] == ["mbpp-full-603", "mbpp-full-601", "mbpp-full-511"]
    assert [example.id for example in task.test(None)] == ["mbpp-sanitized-12", "mbpp-sanitized-11"]
    assert "prompt" not in [split for _, _, split, _ in asked]


def test_bbh_takes_the_first_fifty_of_each_subtask(write):
    names = ["navigate", "boolean_expressions"]
    for name in names:
        path = write(f"{name}.json", {"examples": [{"input": f"{name} {n}", "target": "Yes"} for n in range(55)]})
    task = bare("bbh", path, subtasks=names)
    assert [e.prompt for e in task.test(None)] == [f"{name} {n}\nAnswer:" for name in names for n in range(50)]
    assert [e.prompt for e in task.train(None)] == [f"{name} {n}\nAnswer:" for name in names for n in range(50, 55)]
    assert len(tasks.get("bbh", path=path, subtasks=names).test(None)) == 66


@pytest.mark.parametrize("name", NAMES)
def test_records_hold_the_options_only_where_they_are_set(name):
    given = {"prompt_template": "reference", "order": "file", "scoring": "reference"}
    assert not given.keys() & tasks.get(name).options().keys()
    for option, value in given.items():
        assert tasks.get(name, **{option: value}).options().keys() & given.keys() == {option}
        with pytest.raises(SPDError, match=f"{name} has no {option} 'other'; choose one of"):
            tasks.get(name, **{option: "other"})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("gsm8k", "span", "line"), ("bbh", "span", "line"), ("mbpp", "span", "asserts"), ("codealpaca", "span", "code"),
     ("mbpp", "asserts_in_prompt", True)],
)  # fmt: skip
def test_the_reference_template_has_spans_of_its_own(name, option, value):
    with pytest.raises(SPDError, match=f"{name}'s {option} .* 'instruct' only; leave {option} away"):
        bare(name, **{option: value})


def test_seeded_draws_from_the_reference_template_are_the_same_problems(data):
    for name in NAMES:
        options = OWN.get(name, {})
        one, other = tasks.get(name, data, **options), tasks.get(name, data, prompt_template="reference", **options)
        assert [e.id for e in one.test(30, seed=3)] == [e.id for e in other.test(30, seed=3)]
        assert one.duplicates_removed == other.duplicates_removed or name == "codealpaca"  # inputs are not shown


def plain_number(text):
    """Reads from the end, character by character."""
    text = text.replace(",", "")
    end = len(text)
    while end and text[end - 1] not in "0123456789":
        end -= 1
    begin = end
    while begin and text[begin - 1] in "0123456789":
        begin -= 1
    if begin > 1 and text[begin - 1] == "." and text[begin - 2] in "0123456789":
        begin -= 1
        while begin and text[begin - 1] in "0123456789":
            begin -= 1
    if begin and text[begin - 1] == "-":
        begin -= 1
    return text[begin:end] or None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 42", "42"),
        ("#### 1,234.50 dollars", "1234.50"),
        ("so -7.", "-7"),
        ("It is 12.\nQuestion: Ann has 5 pens and 3 books", "3"),  # the last number of the text, wherever it is
        ("<think>9</think> 8 and <think>7", "7"),
        ("no number", None),
        ("", None),
        ("3.5.", "3.5"),
        ("x = .5", "5"),
        ("5-3", "-3"),
        ("$1,000,000", "1000000"),
        ("10%", "10"),
        ("1/2", "2"),
        ("२", None),  # a digit, and not one of 0-9
    ],
)
def test_the_last_number(text, number):
    assert reference.last_number(text) == number == plain_number(text)


def test_the_last_number_of_random_texts():
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices("0123456789,.- \nx#", k=draw.randint(0, 14)))
        if text.replace(",", "").count(".") < 2:  # "1.2.3" is two numbers from the left, and others from the right
            assert reference.last_number(text) == plain_number(text), text


@pytest.mark.parametrize(
    ("gold", "text", "same"),
    [("42", "42.00009", True), ("42", "42.0002", False), ("1,000", "1000", True), ("51.0", "51", True),
     ("42", "", False), ("-1", "1", False), ("1", "9" * 400, False)],
)  # fmt: skip
def test_numbers_are_the_same_within_a_tolerance(gold, text, same):
    assert reference.same_number(gold, text) is same
    assert math.isclose(reference.TOLERANCE, 1e-4)


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" B", "B"), ("(C) because A", "C"), ("The Answer is B", "A"), ("abcd", None), ("E, F", None), ("", None),
     ("I think D", "D"), ("Because of A", "B")],
)  # fmt: skip
def test_the_first_letter(text, letter):
    assert reference.first_letter(text) == letter == next((c for c in text if c in "ABCD"), None)


@pytest.mark.parametrize(
    ("gold", "text", "same"),
    [("(A)", " (A)\nQ: next", True), ("(A)", " a", False), ("(A)", "(a)", True), ("True", "\n\n TRUE \nFalse", True),
     ("Yes", "Yes.", False), ("no", "No\r\nyes", True), ("no", "", False), ("no", "So no", False)],
)  # fmt: skip
def test_the_first_line(gold, text, same):
    assert reference.same_line(gold, text) is same


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (" def f():\n    return 1", "def f():\n    return 1"),
        ("Here:\n```python\ndef f(): pass\n```\n```\ndef g(): pass\n```", "def f(): pass"),
        ("```\na = 1\n```", "a = 1"),
        ("x = 1\nclass A: pass", "x = 1"),
        ("class A: pass\ny = 2", "class A: pass\ny = 2"),  # nothing stands before it
        ("x = 1\nif __name__ == '__main__':\n    x()", "x = 1"),
        ("x = 1\n\n\nprint(x)", "x = 1"),
        ("x = 1\n\ny = 2\n\n\nclass A: pass", "x = 1\n\ny = 2"),
        ("\n\n\nx = 1", "x = 1"),
        ("x = 1\r\n\r\n\r\ny", "x = 1"),
        ("```python\nx = 1", "```python\nx = 1"),  # a fence that does not close is no block
        ("  \n", None),
        ("```\n```", None),
    ],
)
def test_the_program(text, code):
    assert reference.program(text) == code


@pytest.mark.parametrize(
    ("text", "parses"),
    [(" print(1)\n", True), ("x = ", False), ("Use print(1).", False), ("", True), ("\x00", False),
     ("(" * 5000, False), ("return 1", True), ("```\nx\n```", False)],
)  # fmt: skip
def test_what_parses(text, parses):
    assert reference.parses(text) is parses


def test_scored_by_shares_what_was_read(write):
    write("train.jsonl", [{"question": "Six?", "answer": "#### 6"}])
    task = bare("gsm8k", write("test.jsonl", [{"question": "Seven?", "answer": "#### 7"}]))
    item = task.test(1)[0]
    (task.path / "test.jsonl").unlink()
    plain = task.scored_by("reference")
    text = " 7 pens.\n#### 7\nQuestion: and 8?"
    assert (task.score(item, text), plain.score(item, text)) == (1.0, 0.0)
    assert (task.extract(text), plain.extract(text)) == ("7", "8")
    assert plain.test(1)[0] is item and (task.scoring, plain.scoring) == ("final", "reference")
    assert plain.scored_by("final").score(item, text) == 1.0
    with pytest.raises(SPDError, match="gsm8k has no scoring 'x'; choose one of final, reference"):
        task.scored_by("x")


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("7", True),
        ("-3.5", True),
        ("1,000", True),
        ("1/2", False),
        ("1e+20", False),
        ("seven", False),
        ("7 pens", False),
    ],
)
def test_gold_answers_that_the_plain_rules_would_read_as_another_number_are_refused(write, answer, plain):
    rows = [{"question": f"{n}?", "answer": f"#### {answer}"} for n in range(2)]
    write("train.jsonl", rows[:1])
    task = bare("gsm8k", write("test.jsonl", rows[1:]))
    task.check_scorable()  # the careful rules have their own way
    if plain:
        return task.scored_by("reference").check_scorable()
    with refused(repr(answer), "gsm8k-test-0", "not a plain number", "scoring='final'"):
        task.scored_by("reference").check_scorable()


def test_an_answer_of_several_lines_is_refused_where_one_line_is_read(write):
    rows = [{"input": f"{n}?", "target": "yes\nno" if n == 3 else "yes"} for n in range(60)]
    path = write("boolean_expressions.json", {"examples": rows})
    task = bare("bbh", path, subtasks=["boolean_expressions"])
    task.check_scorable()
    with refused("'yes\\nno'", "bbh-boolean_expressions-3", "not one line"):
        task.scored_by("reference").check_scorable()


def test_tasks_with_rules_of_their_own(write):
    own = tasks.get(str(write("mine.jsonl", [{"prompt": "a", "completion": "b", "answer": "b"}]) / "mine.jsonl"))
    assert own.scored_by("final") is own
    with pytest.raises(SPDError, match="jsonl has no scoring 'reference'; it has one set of rules"):
        own.scored_by("reference")
    made = tasks.get("synthetic-math").scored_by("reference")
    assert made.score(made.test(1)[0], "no") == 0.0


@pytest.mark.parametrize("name", sorted({*NAMES} - {"mbpp"}))
def test_gold_completions_are_right_in_both_ways(data, name):
    task = bare(name, data, **OWN.get(name, {}))
    for scored in (task, task.scored_by("reference")):
        wrong = [e.id for e in task.test(None) if scored.score(e, e.completion) != 1.0]
        assert not wrong or name == "codealpaca" and scored.scoring == "reference" and len(wrong) == 36  # no Python
    assert all(task.in_asked_form(e.completion) for e in task.test(20))


def test_programs_get_five_seconds(data):
    calls = []

    def executor(code, tests, setup, timeout_s=15.0):
        calls.append((code, timeout_s))
        return True

    task = bare("mbpp", data, executor=executor)
    item = task.test(1)[0]
    text = " def f():\n    return 1\nassert f() == 2\n\n\nprint(f())"
    assert task.scored_by("reference").score(item, text) == task.score(item, text) == 1.0
    assert calls[0] == ("def f():\n    return 1\nassert f() == 2", 5.0)  # with the model's own asserts
    assert calls[1][1] == 15.0
    task.executor = lambda code, tests, setup: code.startswith("def")
    assert task.scored_by("reference").score(item, text) == 1.0
    assert task.scored_by("reference").score(item, "") == 0.0


def test_reference_solutions_pass_in_both_ways(data):
    if not available():
        pytest.skip("no sandbox works on this machine")
    task = bare("mbpp", data, executor=passes_tests)
    for item in [e for e in task.test(None) if e.completion.count("\n") < 4][:6]:
        assert task.score(item, item.completion) == task.scored_by("reference").score(item, item.completion) == 1.0


def test_the_options_are_those_of_the_papers_benchmarks():
    """A task of one's own with published records gets no option that it would not heed."""
    with_template = {n for n in tasks.names() if "prompt_template" in {f.name for f in fields(type(tasks_class(n)))}}
    assert with_template - {"jsonl"} == set(NAMES)


def tasks_class(name):
    return tasks.get(name, path="x.jsonl" if name == "jsonl" else None)
