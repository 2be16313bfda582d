"""GSM8K and SVAMP: mapping, spans, splits, gold scores, hub form."""

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError
from spd_lens.tasks.svamp import worked_line

PROBLEM = {"question": "What is 6 times 7?", "answer": "6 * 7 = <<6*7=42>>42\nBig: <<1=1>>1,042\n#### 1,042"}


def answers(examples):
    return [[example.completion[start:end] for start, end in example.spans] for example in examples]


def small_gsm8k(write, train=(), test=()):
    write("train.jsonl", [PROBLEM, *train])
    return write("test.jsonl", [{"question": "Another one?", "answer": "#### 3"}, *test])


def test_gsm8k_example(write):
    example = tasks.get("gsm8k", path=small_gsm8k(write)).train(1, seed=0)[0]
    assert example.id == "gsm8k-train-0"
    assert example.prompt.startswith("What is 6 times 7?\n\nSolve the problem step by step.")
    assert example.completion == "6 * 7 = 42\nBig: 1,042\n#### 1,042"  # no calculator marks
    assert answers([example]) == [["1,042"]]  # the number alone, with its separator


@pytest.mark.parametrize(("span", "text"), [("line", "#### 3"), ("completion", "#### 3"), ("number", "3")])
def test_span_option(write, span, text):
    assert answers(tasks.get("gsm8k", path=small_gsm8k(write), span=span).test(1, 0)) == [[text]]


def test_a_problem_of_the_test_side_leaves_the_training_side(write):
    again = {"question": "  another   ONE ?", "answer": "#### 4"}  # the test problem, but for case and spaces
    task = tasks.get("gsm8k", path=small_gsm8k(write, train=[again, PROBLEM]))
    assert [example.id for example in task.train(None)] == ["gsm8k-train-0"]
    assert [example.id for example in task.calibration(None)] == ["gsm8k-train-0"]
    assert [example.id for example in task.test(None)] == ["gsm8k-test-0"]
    assert task.duplicates_removed == 2


def test_draws(data):
    task = tasks.get("gsm8k", path=data)
    one, other = task.test(20, seed=1), task.test(20, seed=2)
    assert one == tasks.get("gsm8k", path=data / "gsm8k").test(20, seed=1)
    assert one[:5] == task.test(5, seed=1)  # a larger draw begins with the smaller one
    assert {example.id for example in one} != {example.id for example in other}
    assert len({example.id for example in task.train(7473, seed=42)}) == 7473


@pytest.mark.parametrize(("name", "n_train", "n_test"), [("gsm8k", 7473, 1319), ("svamp", 700, 300)])
def test_published_files(data, name, n_train, n_test):
    task = tasks.get(name, path=data)
    train, test = task.train(None), task.test(None)
    assert (len(train), len(test)) == (n_train, n_test)
    assert not {task.problem(example) for example in train} & {task.problem(example) for example in test}
    for example in train + test:
        assert task.score(example, example.completion) == 1.0
        assert [task.extract(example.completion)] == [example.meta["answer"]] == answers([example])[0]
        assert example.prompt == example.prompt.rstrip() and example.completion == example.completion.strip()
        assert "<<" not in example.completion
        assert 1 <= len(example.meta["answer"]) <= 11
    assert task.score(test[0], "#### 123456789") == 0.0
    assert all(len(sha256) == 64 for sha256 in task.sources().values())


def test_svamp_hub_copy_gives_the_same_records(write, hub):
    """The hub's copy is divided otherwise and writes numbers as text; it must not matter."""
    records = [
        {
            "ID": f"chal-{i}",
            "Body": f"Ada had {i} pens at the start",
            "Question": "How many has she now?",
            "Equation": f"( {i}.0 + 2.0 )",
            "Answer": i + 2.0,
            "Type": "Addition",
        }
        for i in range(1, 21)
    ]
    as_text = [{**r, "Answer": str(r["Answer"]), "question_concat": "unused"} for r in reversed(records)]
    hub({"train": as_text[:14], "test": as_text[14:]})
    local = tasks.get("svamp", path=write("SVAMP.json", records))
    assert (len(local.pool("train")), len(local.pool("test"))) == (14, 6)
    for split in ("calibration", "train", "test"):
        assert local.draw(split, 5, 3) == tasks.get("svamp").draw(split, 5, 3)
    example = next(e for e in local.pool("train") + local.pool("test") if e.id == "svamp-chal-7")
    assert example.prompt.startswith("Ada had 7 pens at the start. How many has she now?\n\n")
    assert example.completion == "7 + 2 = 9\n#### 9"


def test_gsm8k_hub_copy_gives_the_same_records(write, hub):
    local = tasks.get("gsm8k", path=small_gsm8k(write))
    asked = hub({"train": [PROBLEM], "test": [{"question": "Another one?", "answer": "#### 3"}]})
    remote = tasks.get("gsm8k", revision="abc")
    assert remote.train(1) == local.train(1) and remote.test(1) == local.test(1)
    assert asked[0] == ("openai/gsm8k", "main", "train", "abc")
    assert list(remote.sources()) == ["openai/gsm8k/main/train@abc", "openai/gsm8k/main/test@abc"]


@pytest.mark.parametrize(
    ("equation", "answer", "line"),
    [
        ("( 8.0 - 3.0 )", 5, "8 - 3 = 5"),
        ("( ( 8.0 - 3.0 ) * 2.0 )", 10, "(8 - 3) * 2 = 10"),
        ("( ( 1.0 + 2.0 ) * ( 3.0 + 4.0 ) )", 21, "(1 + 2) * (3 + 4) = 21"),
        ("( 1.0 / 4.0 )", 0.25, "1 / 4 = 0.25"),
        ("8.0", 8, ""),  # no operation: nothing to show
        ("( 8.0 - 3.0 )", 4, ""),  # the source contradicts itself
        ("( 8.0 / 0.0 )", 4, ""),
        ("( 8.0 - ", 8, ""),
        ("__import__('os')", 8, ""),
        ("(" * 40, 8, ""),
        ("", 0, ""),
    ],
)
def test_worked_line(equation, answer, line):
    assert worked_line(equation, answer) == line


def test_more_than_there_is(write):
    task = tasks.get("gsm8k", path=small_gsm8k(write))
    with pytest.raises(SPDError, match="5 test examples of gsm8k were asked for, and there are 1"):
        task.test(5)
    with pytest.raises(SPDError, match="0 train examples"):
        task.train(0)
