"""Marks: what a completion computes, what its answer copies, and the spans and forms that follow from them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.tasks.gsm8k import without_marks
from spd_lens.tasks.marks import copies, firsts, stands_in, value_of
from spd_lens.tasks.mutants import exercised, mutants
from tests.helpers import refused

CALCULATED = {
    "question": "Two of 20,000 and 5?",
    "answer": "He has 2*20000=<<2*20000=40000>>40,000.\nThat is $<<5*1=5>>5 and 40,000-5=$<<40000-5=39995>>39,995 "
    "<<note>> left.\n#### 39,995",
}


def texts(example, spans):
    return [example.completion[start:end] for start, end in spans]


@pytest.fixture
def gsm8k(write):
    write("train.jsonl", [CALCULATED, {"question": "Half of 2?", "answer": "No steps.\n#### 1"}])
    return tasks.get("gsm8k", path=write("test.jsonl", [{"question": "And 1 of 1?", "answer": "1 is 1.\n#### 1"}]))


# --- values that stand earlier


@pytest.mark.parametrize(
    ("value", "text", "there"),
    [
        ("5", "5 apples", True),
        ("5", "15, 1.5, 5,000 and 5.1", False),
        ("1,000", "so 1000 of them", True),
        ("1000", "$1,000.00", True),
        ("5", "[4,5,6]", True),
        ("0.5", "it is .5", True),
        ("37", "def times_37(x)", False),
        ("'r'", "replace('r', 'd')", True),
        ("True", "== True", True),
        ("True", "Truest", False),
        ("", "anything", False),
        ("5%", "grew by 1.5%", False),
        ("5%", "grew by 5% a year", True),
        ("€5", "€5,000", False),
        ("€5", "€5, then", True),
        ("5 km", "1.5 km", False),
        ("-5", "= -5.5", False),
        ("1e400000", "1", False),
    ],
)
def test_stands_in(value, text, there):
    assert stands_in(value, text) == there


def test_a_value_is_its_size_not_its_spelling():
    assert value_of("$1,000.0") == value_of(" 1000 ") != value_of("1001")
    assert value_of("1,00") == "1,00" and value_of("x") == "x"


def test_copies_are_those_spans_whose_value_came_before():
    text = "6 * 7 = 42, 42 - 2 = 40"
    spans = [(8, 10), (12, 14), (21, 23)]
    assert copies(text, spans) == ((12, 14),)
    assert firsts(text, [*spans[::-1], spans[0]]) == ((8, 10), (21, 23))


# --- number tasks


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_results_of_synthetic_math_are_the_values_of_its_calculations(difficulty):
    for example in tasks.get("synthetic-math", difficulty=difficulty).test(60, seed=3):
        wanted = []
        for step in re.finditer(r"(\d+) ([-+*/]) (\d+) = (\d+)", example.completion):
            one, sign, other, result = step.groups()
            assert {"+": int(one) + int(other), "-": int(one) - int(other), "*": int(one) * int(other),
                    "/": Fraction(int(one), int(other))}[sign] == int(result)  # fmt: skip
            if int(result) not in map(int, re.findall(r"\d+", example.completion[: step.start(4)])):
                wanted.append(step.span(4))
        assert list(example.marks.get("results", ())) == wanted
        assert example.marks["copies"] == example.spans  # the answer repeats the last result


def test_results_of_gsm8k_stand_behind_the_calculators_marks(gsm8k):
    example, none = sorted(gsm8k.train(2), key=lambda example: example.id)
    assert example.completion == re.sub(r"<<[^<>]*>>", "", CALCULATED["answer"])
    assert texts(example, example.marks["results"]) == ["40,000", "5", "39,995"]
    assert texts(example, example.marks["copies"]) == ["39,995"]
    assert texts(none, none.marks["results"]) == ["1"] and "copies" not in none.marks  # computed where it is given


def test_a_negative_result_is_marked_without_its_sign():
    working, results = without_marks("-21/3 = <<-21/3=-7>>-7 degrees, or $-<<1-8=-7>>$7")
    assert working == "-21/3 = -7 degrees, or $-$7"
    assert [working[slice(*span)] for span in results] == ["7", "7"]


def test_in_the_reference_template_the_result_is_in_the_calculators_mark(gsm8k):
    task = tasks.get("gsm8k", path=gsm8k.path, prompt_template="reference", span="results")
    example = next(e for e in task.train(2) if e.id == "gsm8k-train-0")
    assert example.completion == f" {CALCULATED['answer']}"
    assert texts(example, example.spans) == ["40000", "39995"]  # the 5 stands in 5*1 before it
    assert all(example.completion[end : end + 2] == ">>" for _, end in example.spans)


def test_published_gsm8k(data):
    task = tasks.get("gsm8k", path=data)
    rows = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    for row, example in zip(rows, task.pool("train"), strict=True):
        solution, _, answer = row["answer"].rpartition("####")
        assert example.completion == f"{re.sub('<<[^<>]*>>', '', solution).strip()}\n####{answer}".strip()
        for value in texts(example, example.marks.get("results", ())):
            assert re.fullmatch(r"[\d,]*\.?\d+", value)
    assert sum("copies" in example.marks for example in task.pool("train")) == 7456  # 99.8 % of 7,473


def test_results_of_svamp(write):
    record = {"ID": "chal-1", "Body": "He had 8 and 3.", "Question": "What?", "Answer": 5.0, "Type": "Sum"}
    plain = {**record, "ID": "chal-2", "Question": "Which?", "Equation": "5.0"}
    path = write("SVAMP.json", [{**record, "Equation": "( 8.0 - 3.0 )"}, plain, {**plain, "ID": "3", "Body": "Or 5?"}])
    task = tasks.get("svamp", path=path)
    found = {example.id: example for side in ("train", "test") for example in task.pool(side)}
    one, other = found["svamp-chal-1"], found["svamp-chal-2"]
    assert (one.completion, one.marks) == ("8 - 3 = 5\n#### 5", {"results": ((8, 9),), "copies": ((15, 16),)})
    assert (other.completion, other.marks) == ("#### 5", {"results": ((5, 6),)})


@pytest.mark.parametrize("span", ["results", "answer-only"])
def test_another_span_is_of_the_same_items(gsm8k, span):
    for task in (gsm8k, tasks.get("synthetic-math")):
        other = task.spanned(span)
        assert (other.span, task.span, other.options()["span"]) == (span, "number", span)
        for one, same in zip(task.test(1), other.test(1), strict=True):
            assert (one.id, task.problem(one)) == (same.id, other.problem(same))
            assert task.answer_only(one) == other.answer_only(same)
        assert task.spanned(None) is task
        assert task.draw("test", 1, 0) == other.spanned("number").draw("test", 1, 0)


def test_an_example_without_new_results_does_not_calibrate(gsm8k):
    task = gsm8k.spanned("results")
    assert len(task.calibration(None)) == 2 and [e.spans for e in task.test(None)] == [()]
    drawn = tasks.get("synthetic-math", span="results").calibration(200)
    assert all(example.spans and not copies(example.completion, example.spans) for example in drawn)


def test_the_answer_alone(gsm8k):
    example = next(e for e in gsm8k.train(2) if e.id == "gsm8k-train-0")
    alone = gsm8k.answer_only(example)
    assert alone.prompt == "Two of 20,000 and 5?\n\nGive the answer alone, without any working: one line that says " \
        "'#### ' followed by the final number."  # fmt: skip
    assert (alone.completion, texts(alone, alone.spans), alone.id) == ("#### 39,995", ["39,995"], example.id)
    assert alone.marks == {"results": alone.spans} and gsm8k.answer_only(alone) == alone
    assert gsm8k.score(alone, alone.completion) == 1.0
    bare = tasks.get("gsm8k", path=gsm8k.path, prompt_template="reference")
    item = bare.test(1)[0]
    assert (bare.answer_only(item).prompt, bare.answer_only(item).completion) == (item.prompt, " #### 1")


def test_choices_are_answers_alone_and_programs_have_no_such_form():
    qa, code = tasks.get("synthetic-qa"), tasks.get("synthetic-code")
    assert qa.answer_only(item := qa.test(1)[0]) is item
    assert code.answer_only(code.test(1)[0]) is None


@pytest.mark.parametrize(
    ("name", "span", "words"),
    [
        ("synthetic-qa", "results", "has no span 'results'; choose one of letter, line"),
        ("synthetic-code", "answer-only", "has no span 'answer-only'"),
        ("synthetic-math", "copies", "has no span 'copies'"),
    ],
)
def test_a_span_that_a_task_does_not_have(name, span, words):
    with refused(words):
        tasks.get(name).spanned(span)


# --- programs


def run_here(code, tests, setup):
    program = "\n".join([code, setup, *tests])
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=30).returncode == 0


def passes(*tests):
    def run(code):
        try:
            exec("\n".join([code, *tests]), {})
        except Exception:
            return False
        return True

    return run


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("def f(x):\n    return x + 1", {"+": "-", "1": "2"}),
        ("def f(é):\n    '''doc 1'''\n    return 'ü' if é else f'{é}1'", {"'ü'": "'üx'"}),
        ("def f(a, b):\n    return not a", {"not": "", "a": "b"}),
        ("def f(a):\n    return a is not None and a not in (True, 2.5)", {"and": "or", "True": "False", "2.5": "3.5"}),
        ("f = lambda a: max(-a, 0) // 2", {"max": "min", "a": "f", "-": "", "0": "1", "//": "*", "2": "3"}),
        ("def f(n):\n    n -= (3)\n    return n <= 4", {"-": "+", "3": "4", "<=": ">", "4": "5"}),
    ],
)
def test_mutants_change_one_place(code, changed):
    found = mutants(code)
    assert {
        code[start:end]: text[start : len(text) - len(code) + end] for (start, end), text in found.items()
    } == changed
    for (start, end), text in found.items():
        assert text[:start] == code[:start] and text.endswith(code[end:])


def test_a_place_counts_where_a_change_of_it_fails_an_assert():
    code = "def f(x, y):\n    if x > 100:\n        return 7\n    return x * 2 + 0 * y"
    found = exercised(code, passes("assert f(3, 4) == 6", "assert f(5, 5) == 10"))
    # the 7 is never run, and another bound or sign before 0 makes no difference to these asserts
    assert [code[slice(*span)] for span in found] == [">", "x", "*", "2", "0", "*"]
    assert exercised(code, passes("assert f(3, 4) == 7")) == ()


@pytest.fixture
def mbpp(write):
    record = {"task_id": 601, "text": "Add one.", "code": "def add(x):\r\n\treturn x + 1\r\n", "test_setup_code": "",
              "test_list": ["assert add(1) == 2", "assert add(-1) == 0", "assert add(0) == 1"]}  # fmt: skip
    write("mbpp.jsonl", [record, {**record, "task_id": 602, "text": "Wrong.", "test_list": ["assert add(1) == 3"]}])
    tested = {
        "task_id": 11,
        "prompt": "Halve.",
        "code": "def halve(x):\n  return x / 2",
        "test_imports": ["import math"],
    }
    tested["test_list"] = ["assert math.isclose(halve(3), 1.5)"]
    return write("sanitized-mbpp.json", [tested])


@pytest.mark.parametrize("template", ["instruct", "reference"])
def test_results_of_programs(mbpp, template):
    runs = []
    task = tasks.get("mbpp", path=mbpp, span="results", prompt_template=template,
                     executor=lambda *given: runs.append(given) or run_here(*given))  # fmt: skip
    (example,) = task.calibration(2)  # the other solution fails its own asserts
    assert texts(example, example.spans) == ["+", "1"] and example.prompt_spans == ()
    assert example.marks["results"] == example.spans
    assert [texts(item, item.spans) for item in task.test(1)] == [["/", "2"]]
    n = len(runs)
    assert task.calibration(2) == [example] and len(runs) == n  # kept
    assert all(not item.spans for item in task.train(2)) and len(runs) == n  # only their prompts are used
    assert task.finds_results and not replace(task, executor=None).finds_results
    shuffled = replace(example, completion=example.completion.replace("+ 1", "* 3"), marks={})
    assert task.kept("calibration", [shuffled])[0].spans == example.spans


def test_programs_are_not_run_without_leave(mbpp):
    with refused("running its solutions", "--allow-code-execution"):
        tasks.get("mbpp", path=mbpp, span="results").calibration(1)


def test_results_of_synthetic_code():
    task = tasks.get("synthetic-code", difficulty="hard")
    item = task.test(1, seed=1)[0]
    found = task.with_results(item)
    assert task.finds_results
    assert found.spans == item.spans
    code = item.completion.split("\n\nassert")[0]
    for span, text in mutants(code).items():
        assert (span in found.marks["results"]) == (not run_here(text, item.meta["tests"], ""))
    assert task.spanned("results").test(1, seed=1)[0].spans == found.marks["results"]


def test_copies_of_expected_values():
    task = tasks.get("synthetic-code")
    example = task.example(
        "", "p", "def f(x):\n    return x + 1", ["assert f(1) == 2", "assert f(2) == 3", "assert f(1) == 2"]
    )
    assert texts(example, example.marks["copies"]) == ["2"] and example.marks["copies"] == example.spans[2:]


# --- own data


def own(tmp_path, record, **options):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "6 * 7 - 2?", "completion": "  42, 40. So 40", "answer": "40", **record}))
    return tasks.get(str(path), test_share=0, **options)


def test_results_of_own_data(tmp_path):
    task = own(tmp_path, {"results": [[2, 4], [6, 8]]}, span="results")
    (example,) = task.calibration(1)
    assert texts(example, example.spans) == ["42", "40"] and texts(example, example.marks["copies"]) == ["40"]
    assert example.marks["copies"] == ((11, 13),) and task.options()["span"] == "results"
    assert task.score(example, "It is 40") == 1.0 and task.score(example, "It is 42") == 0.0
    given = task.spanned("given")
    assert given.calibration(1)[0].spans == ((11, 13),) and "span" not in given.options()


@pytest.mark.parametrize(
    ("record", "words"),
    [({}, "needs the field 'results'"), ({"results": [[0, 99]]}, "does not lie"), ({"results": []}, "list of")],
)
def test_faulty_results_of_own_data(tmp_path, record, words):
    with pytest.raises(SPDError, match=words):
        own(tmp_path, record, span="results").calibration(1)


def test_an_example_without_marks_is_equal_to_one_with():
    assert Example("q", "4", ((0, 1),)) == Example("q", "4", ((0, 1),), marks={"results": [(0, 1)]})
