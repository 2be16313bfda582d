"""Own data: the three ways to say where correctness lies, splits, scores, and every bad record by file and line."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.tasks import sources
from tests.helpers import refused

SPANS = {"prompt": "1 + 1?", "completion": "It is 2.", "spans": [[6, 7]]}
ANSWER = {"prompt": "2 + 2?", "completion": "4 is what it is: 4", "answer": "4"}
PATTERN = {"prompt": "Color of the sky?", "completion": "It is <blue>", "pattern": r"<(?P<answer>\w+)>"}
PROMPT = {"prompt": "What is up?"}


def load(write, *records, **options):
    return tasks.get("jsonl", path=write("mine.jsonl", list(records)) / "mine.jsonl", **options)


def covered(example):
    return [example.completion[start:end] for start, end in example.spans]


def test_the_three_forms(write):
    task = load(write, SPANS, ANSWER, PATTERN, test_share=0)
    examples = {e.id: e for e in task.pool("train")}
    assert [covered(examples[f"mine-{n}"]) for n in (1, 2, 3)] == [["2"], ["4"], ["blue"]]
    assert examples["mine-2"].spans == ((17, 18),)  # the last occurrence, not the first


def test_by_file_name(write):
    path = write("mine.jsonl", [SPANS, {**ANSWER, "id": "two"}]) / "mine.jsonl"
    assert {e.id for e in tasks.get(str(path), test_share=0).pool("train")} == {"mine-1", "two"}


def test_leading_space_of_a_completion_moves_the_span(write):
    task = load(write, {"prompt": "1 + 1?\n", "completion": "  It is 2.", "spans": [[8, 9]]}, test_share=0)
    example = task.calibration(1)[0]
    assert (example.prompt, example.completion, covered(example)) == ("1 + 1?", "It is 2.", ["2"])


def test_prompts_alone_serve_for_training_only(write):
    task = load(write, PROMPT, {"prompt": "And down?"})
    assert len(task.train(2)) == 2
    with pytest.raises(SPDError, match="1 calibration examples of mine were asked for, and 0 of its 2 records have a"):
        task.calibration(1)
    with pytest.raises(SPDError, match="there are 0"):
        task.test(1)


def test_calibration_skips_prompts_without_completion(write):
    task = load(write, PROMPT, SPANS, ANSWER, test_share=0)
    assert {e.id for e in task.calibration(2)} == {"mine-2", "mine-3"}
    assert {e.id for e in task.calibration(None)} == {"mine-2", "mine-3"}
    assert len(task.train(3)) == 3


def test_the_test_side_is_held_out(write):
    records = [{"prompt": f"{n} + 1?", "completion": f"#### {n + 1}", "answer": str(n + 1)} for n in range(20)]
    task = load(write, *records)
    assert (len(task.pool("train")), len(task.pool("test"))) == (14, 6)
    assert not {e.prompt for e in task.pool("train")} & {e.prompt for e in task.pool("test")}


def test_named_splits(write):
    open_records = [{**ANSWER, "prompt": f"{n} + 2?"} for n in range(10)]
    task = load(write, {**SPANS, "split": "test"}, {**PATTERN, "split": "calibration"}, *open_records)
    assert [e.id for e in task.pool("test")] == ["mine-1"]  # with a test set named, nothing else is held out
    assert [e.id for e in task.pool("calibration")] == ["mine-2"]
    assert len(task.pool("train")) == 10


def test_a_test_problem_leaves_a_calibration_file_too(write):
    write("train.jsonl", [PROMPT])
    write("calibration.jsonl", [SPANS, {**ANSWER, "prompt": "2 + 2  ?"}])
    task = tasks.get("jsonl", path=write("test.jsonl", [{**ANSWER, "prompt": "2 + 2 ?"}]))
    assert [e.prompt for e in task.pool("calibration")] == ["1 + 1?"]
    assert task.duplicates_removed == 1


def test_directory(write):
    write("train.jsonl", [PROMPT, SPANS, {**ANSWER, "prompt": "2 +  2 ?"}])
    task = tasks.get("jsonl", path=write("test.jsonl", [ANSWER, {**ANSWER, "prompt": "2 + 2 ?"}]))
    assert len(task.pool("train")) == 2 and task.duplicates_removed == 1  # the test problem went
    assert [e.id for e in task.calibration(1)] == [f"{task.label}-train-2"]
    assert sorted(task.sources()) == ["test.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("record", "text", "score"),
    [
        (SPANS, "It is 2.0", 1.0),
        (SPANS, "Well.\nAnswer: 2", 1.0),
        (SPANS, "3 - 1 = 2\n#### 2", 1.0),
        (SPANS, "It is 3", 0.0),
        (SPANS, "", 0.0),
        (PATTERN, "I say <Blue>", 1.0),
        (PATTERN, "I say blue", 0.0),  # the pattern says where an answer stands
        ({"prompt": "p", "completion": "Answer: The Blue Sky", "answer": "The Blue Sky"}, "answer: the blue sky.", 1.0),
        ({"prompt": "p", "completion": "Paris", "answer": "Paris"}, "I think:\n**Paris**", 1.0),
        ({"prompt": "p", "completion": "Paris", "answer": "Paris"}, "Paris is nice", 0.0),
        # what stands where the gold answer stands
        ({"prompt": "p", "completion": "It is Paris.", "answer": "Paris"}, "It is Paris", 1.0),
        ({"prompt": "p", "completion": "It is Paris.", "answer": "Paris"}, "Well.\nIt is London.", 0.0),
        ({"prompt": "p", "completion": "It is Paris.", "answer": "Paris"}, "Answer: Paris", 1.0),
        ({"prompt": "p", "completion": "2 of 5 are red", "answer": "2"}, "3 of 5 are red", 0.0),
        # brackets and code
        ({"prompt": "p", "completion": "[]", "answer": "[]"}, "()", 0.0),
        ({"prompt": "p", "completion": "[]", "answer": "[]"}, "Answer: `[]`", 1.0),
        ({"prompt": "p", "completion": "!", "answer": "!"}, "...", 0.0),
        ({"prompt": "p", "completion": '""', "answer": '""'}, "", 0.0),
        ({"prompt": "p", "completion": "x != y", "answer": "x != y"}, "```\nx != y\n```", 1.0),
        ({"prompt": "p", "completion": "x != y", "answer": "x != y"}, "x = y", 0.0),
        ({"prompt": "p", "completion": "def f():\n    return 1", "answer": "def f():\n    return 1"}, "return 1", 0.0),
        ({"prompt": "p", "completion": "#### 5", "answer": "5"}, "#### 5 (since x = 3)\n\nQuestion: 1?\n#### 3", 1.0),
        ({"prompt": "p", "completion": "Yes", "answer": "Yes"}, "<think>No\nYes", 0.0),
    ],
)
def test_score(write, record, text, score):
    task = load(write, record, test_share=0)
    item = task.pool("train")[0]
    assert task.score(item, item.completion) == 1.0
    assert task.score(item, text) == score


def test_pattern_option(write):
    record = {"prompt": "p", "completion": "so [7]"}
    task = load(write, record, test_share=0, pattern=r"\[(?P<n>\d+)\]")
    assert covered(task.pool("train")[0]) == ["7"]
    assert task.extract("I say [8], no [9]") == "9"
    assert task.score(task.pool("train")[0], "[7]") == 1.0
    assert task.extract("nothing") is None


def test_scoring_a_prompt_is_refused(write):
    task = load(write, PROMPT)
    with pytest.raises(SPDError, match="prompt without an answer"):
        task.score(task.train(1)[0], "x")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completion": "x", "answer": "x"}, "the field 'prompt' is missing"),
        ({"prompt": " "}, "not empty"),
        ({"prompt": 3}, "must be a text"),
        ({"prompt": "p", "completion": "x"}, "needs one of spans, answer and pattern, and has none"),
        ({**SPANS, "answer": "2"}, "has spans and answer"),
        ({**ANSWER, "answer": "5"}, "the answer '5' does not occur"),
        ({**ANSWER, "answer": ""}, "must be a text that is not empty"),
        ({**PATTERN, "pattern": "(?P<answer>"}, "does not compile"),
        ({**PATTERN, "pattern": "blue"}, "needs a named group.* has 0"),
        ({**PATTERN, "pattern": "(?P<a>b)(?P<c>l)"}, "has 2 named groups"),
        ({**PATTERN, "pattern": "(?P<answer>green)"}, "finds nothing"),
        ({**PATTERN, "pattern": "(?P<answer>x*)"}, "finds nothing"),  # matches, but no character
        ({**SPANS, "spans": []}, "must be a list"),
        ({**SPANS, "spans": [[6, 99]]}, "does not lie in the completion of 8"),
        ({**SPANS, "spans": [[7, 6]]}, "does not lie"),
        ({**SPANS, "spans": [["6", "7"]]}, "does not lie"),
        ({**SPANS, "spans": [6, 7]}, "does not lie"),
        ({**SPANS, "completion": " It is 2.", "spans": [[0, 1]]}, "nothing but the white space"),
        ({**SPANS, "split": "dev"}, "split must be one of calibration, train, test, and is 'dev'"),
        ({**PROMPT, "split": "test"}, "for test needs a completion"),
        ({**SPANS, "anwser": "2"}, "unknown field 'anwser'"),
    ],
)
def test_bad_records_name_file_and_line(write, record, message):
    with pytest.raises(SPDError, match=f"mine.jsonl, line 2: .*{message}"):
        load(write, SPANS, record).train(1)


def test_a_runaway_pattern_is_stopped(write, monkeypatch):
    monkeypatch.setattr("spd_lens.tasks.patterns._SECONDS", 0.2)
    record = {"prompt": "p", "completion": "a" * 3000 + "x", "pattern": r"(?P<answer>(.*)(.*)(.*)(.*)[xy]\d)"}
    with pytest.raises(SPDError, match="mine.jsonl, line 1: .*takes too long"):
        load(write, record).train(1)


def test_patterns_have_a_time_in_all(write, monkeypatch):
    task = load(write, {**PATTERN, "split": "test"})
    item = task.pool("test")[0]
    task._seconds_left = 0.1
    slow = {**item.meta, "pattern": r"(?P<answer>a*a*a*a*\d)"}
    with pytest.raises(
        SPDError, match="mine-1: slow searches .* of mine have taken 60 seconds by now; make them simpler"
    ):
        for _ in range(1000):
            task.score(Example("p", "c", ((0, 1),), "mine-1", slow), "a" * 220)


@pytest.mark.parametrize("pattern", [r"(?P<answer>((a{999}){999}){999})", r"(?P<answer>[)]{2000}\\){99}{99}x)"])
def test_a_pattern_that_is_too_large_is_refused(write, pattern):
    with pytest.raises(SPDError, match="line 1: the counts in the regular expression .* multiply to too much"):
        load(write, {"prompt": "p", "completion": "a", "pattern": pattern}).train(1)


def test_a_long_pattern_is_refused_before_it_is_looked_at(write):
    start = time.process_time()
    with pytest.raises(SPDError, match="line 1: the regular expression .* has 200010 characters, and at most 2000"):
        load(write, {"prompt": "p", "completion": "a", "pattern": "(?P<a>x)" + "[" * 200_002}).train(1)
    assert time.process_time() - start < 5


@given(
    before=st.text(max_size=8).map(str.lstrip),
    answer=st.text(min_size=1, max_size=12).filter(str.strip),
    after=st.text(max_size=8),
)
def test_every_gold_text_scores_one(before, answer, after):
    completion = before + answer + after
    task = tasks.get("jsonl", path="unused.jsonl")
    item = Example("p", completion, ((len(before), len(before) + len(answer)),), "1")
    assert task.score(item, completion) == 1.0
    assert task.score(item, answer) == 1.0


def test_double_ids(write):
    with pytest.raises(SPDError, match="two records have the id 'x'"):
        load(write, {**SPANS, "id": "x"}, {**ANSWER, "id": "x"}).train(1)


def test_bad_options(write, tmp_path):
    with pytest.raises(SPDError, match="needs a path"):
        tasks.get("jsonl")
    with pytest.raises(SPDError, match="test_share must be"):
        load(write, SPANS, test_share=1)
    with pytest.raises(SPDError, match="does not compile"):
        load(write, SPANS, pattern="(")
    with pytest.raises(SPDError, match="neither a .jsonl file nor a directory with train.jsonl"):
        tasks.get("nowhere.jsonl").train(1)


# --- templates, and spans in prompts

BOTH = {"prompt": "What is 1 + 1?  ", "completion": " It is 2.", "answer": "2", "prompt_spans": [[8, 9], [12, 16]]}


def in_prompt(example):
    return [example.prompt[start:end] for start, end in example.prompt_spans]


def test_spans_of_prompts_stand_beside_the_three_or_alone(write):
    (example,) = load(write, BOTH, test_share=0).pool("train")
    assert (example.prompt, in_prompt(example), covered(example)) == ("What is 1 + 1?", ["1", "1?"], ["2"])
    alone = {key: value for key, value in BOTH.items() if key != "answer"}
    (example,) = load(write, alone, test_share=0).pool("train")
    assert (example.spans, in_prompt(example), example.completion) == ((), ["1", "1?"], "It is 2.")
    (example,) = load(write, alone, test_share=0, pattern=r"is (?P<n>\d)").pool("train")
    assert (covered(example), in_prompt(example)) == (["2"], ["1", "1?"])
    (example,) = load(write, {"prompt": "What is 1?", "prompt_spans": [[8, 9]]}).pool("train")
    assert in_prompt(example) == ["1"] and not example.completion


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{prompt}", "What is 1 + 1?  "),
        ("Question: {prompt}\nAnswer:", "Question: What is 1 + 1?  \nAnswer:"),
        ("{} {x} {{prompt}}", "{} {x} {What is 1 + 1?  }"),
    ],
)
def test_a_template_takes_texts_as_they_are_written(write, template, prompt):
    (example,) = (task := load(write, BOTH, test_share=0, prompt_template=template)).pool("train")
    assert (example.prompt, example.completion) == (prompt, " It is 2.")
    assert (in_prompt(example), covered(example)) == (["1", "1?  "], ["2"])
    assert task.options()["prompt_template"] == template
    assert "prompt_template" not in load(write, BOTH).options()
    assert task.score(example, "It is 2.") == task.score(example, " It is 2.") == 1.0
    assert task.score(example, " It is 3.") == 0.0


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Question:", "holds {prompt} once"),
        ("{prompt} or {prompt}", "holds {prompt} once"),
        (3, "holds {prompt} once"),
        ("Q: {prompt}\\nA:", "a backslash and an n"),
    ],
)
def test_what_is_no_template(write, template, words):
    with pytest.raises(SPDError, match="prompt_template") as refusal:
        load(write, BOTH, prompt_template=template)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[12, 17]], r"prompt span \[12, 17\] does not lie in the prompt of 16 characters"),
        ([], "the field 'prompt_spans' must be a list"),
        ("8-9", "the field 'prompt_spans' must be a list"),
        ([8, 9], "prompt span 8 does not lie"),
        ([[14, 16]], "nothing but the white space behind the prompt"),
    ],
)
def test_bad_spans_of_prompts_name_file_and_line(write, spans, message):
    with pytest.raises(SPDError, match=f"mine.jsonl, line 2: .*{message}"):
        load(write, SPANS, {**BOTH, "prompt_spans": spans}).train(1)


def test_what_has_spans_in_its_prompt_only_cannot_be_scored(write):
    alone = {"prompt": "What is 1?", "completion": "It is 1.", "prompt_spans": [[8, 9]], "split": "test"}
    task = load(write, {**ANSWER, "split": "train"}, alone)
    with pytest.raises(SPDError, match="mine-2 has spans in its prompt only.*give it spans, answer or pattern"):
        task.check_scorable()
    load(write, ANSWER, {**alone, "split": "train"}).check_scorable()


def test_verbatim_settings_take_own_data_as_it_is_written(write):
    path = str(write("mine.jsonl", [BOTH]) / "mine.jsonl")
    made = lambda **given: tasks.configured(path, None, {"test_share": 0, **given}, "verbatim").pool("train")[0].prompt  # noqa: E731
    assert made() == "What is 1 + 1?  "
    assert made(prompt_template="Q: {prompt}") == "Q: What is 1 + 1?  "
    for other in ("auto", "raw", "chat"):
        assert tasks.configured(path, None, {"test_share": 0}, other).pool("train")[0].prompt == "What is 1 + 1?"
    assert tasks.configured("synthetic-math", None, {}, "verbatim").options()


def test_a_file_whose_name_is_no_unicode(write):
    for name in ("half\udcff.jsonl", "half\ud800/train.jsonl"):
        with refused("no name in Unicode"):
            tasks.get("jsonl", path=name.removesuffix("/train.jsonl"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (SPANS | {"id": "half \ud800"}, ["half a character"]),
        (SPANS | {"prompt": "x" * 2000}, ["mine.jsonl, line 1", "2000 characters", "1000"]),
        (SPANS | {"x" * 9000: 1}, ["unknown field 'xxx"]),
        (SPANS | {"split": ["x" * 9000]}, ["split must be"]),
        (SPANS | {"spans": [[0, 10**30]]}, ["does not lie"]),
        ({"prompt": "p", "completion": "c", "pattern": "(?P<a>" + "z?" * 900 + "q)"}, ["finds nothing"]),
    ],
)
def test_a_record_of_any_size_ends_in_a_short_sentence(write, monkeypatch, record, words):
    monkeypatch.setattr(sources, "_LONGEST", 1000 if "prompt" in record and len(record["prompt"]) > 1000 else 2**24)
    with refused(*words):
        load(write, record).pool("train")


def test_a_file_that_would_not_fit_in_memory_is_not_read(write, monkeypatch):
    monkeypatch.setattr(sources, "_LARGEST", 10)
    with refused("mine.jsonl", "may have 10"):
        load(write, SPANS).pool("train")
