"""MMLU and BBH: mapping, spans, splits, filters, gold scores, hub form."""

from collections import Counter

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError
from spd_lens.tasks.bbh import DEFAULT_SUBTASKS

ROW = 'Which bone?,femur," tibia ",ulna,skull,B\n'


def write_mmlu(write, dev=None):
    write("dev/anatomy_dev.csv", dev or ROW.replace("Which", "What"))
    write("val/anatomy_val.csv", ROW.replace("Which", "Whose"))
    return write("test/anatomy_test.csv", ROW)


def test_mmlu_example(write):
    task = tasks.get("mmlu", path=write_mmlu(write), subjects="anatomy")
    example = task.test(1)[0]
    assert example.id == "mmlu-test-anatomy-0"
    assert example.prompt == (
        "The following is a multiple choice question about anatomy.\n\n"
        "Which bone?\nA. femur\nB. tibia\nC. ulna\nD. skull\n\n"
        "Reply with one line that says 'Answer: ' followed by the letter of the right choice."
    )
    assert example.completion == "Answer: B" and example.spans == ((8, 9),)
    assert task.score(example, "B") == task.score(example, "Answer: Tibia") == 1.0
    assert task.score(example, "Answer: A") == task.score(example, "") == 0.0
    assert tasks.get("mmlu", path=write_mmlu(write), subjects="anatomy", span="line").test(1)[0].spans == ((0, 9),)


def test_a_test_question_leaves_the_training_side(write):
    shuffled = "Which  BONE,skull,ulna,tibia,femur,C\n"  # the test question with its choices in another order
    task = tasks.get("mmlu", path=write_mmlu(write, dev=shuffled), subjects=["anatomy"])
    assert [e.id for e in task.pool("train")] == ["mmlu-val-anatomy-0"]
    assert task.duplicates_removed == 1


def test_mmlu_hub_copy_gives_the_same_records(write, hub):
    record = {"subject": "anatomy", "choices": ["femur", " tibia ", "ulna", "skull"], "answer": 1}
    other = {**record, "subject": "virology", "question": "Which virus?"}
    splits = {
        "dev": [{**record, "question": "What bone?"}],
        "validation": [other, {**record, "question": "Whose bone?"}],
        "test": [{**record, "question": "Which bone?"}, other],
        "auxiliary_train": [{**record, "subject": "", "question": f"Aux {n}?"} for n in range(5)],
    }
    hub(splits)
    local = tasks.get("mmlu", path=write_mmlu(write), subjects=["anatomy"])
    remote = tasks.get("mmlu", subjects=["anatomy"])
    assert remote.pool("train") == local.pool("train") and remote.pool("test") == local.pool("test")
    more = tasks.get("mmlu", subjects=["anatomy"], train_source="auxiliary")
    assert (len(more.pool("train")), len(more.pool("calibration"))) == (5, 2)
    assert more.pool("train")[0].prompt.startswith("Aux 0?\nA. femur")


def test_mmlu_options():
    with pytest.raises(SPDError, match="no subject 'anatomi'; there are abstract_algebra"):
        tasks.get("mmlu", subjects=["anatomi"])
    with pytest.raises(SPDError, match="at least one subject"):
        tasks.get("mmlu", subjects=[])
    with pytest.raises(SPDError, match="list of names"):
        tasks.get("mmlu", subjects=5)
    with pytest.raises(SPDError, match="read from the hub only"):
        tasks.get("mmlu", path=".", train_source="auxiliary")


def test_published_mmlu(data):
    task = tasks.get("mmlu", path=data)
    train, test = task.pool("train"), task.pool("test")
    assert (len(train), len(test)) == (1768, 14042)  # dev and val have 1,816; 48 repeat a question
    assert not {task.problem(e) for e in train} & {task.problem(e) for e in test}
    assert all(task.score(e, e.completion) == 1.0 and e.spans == ((8, 9),) for e in train + test)
    assert len(task.sources()) == 3 * 57
    one = tasks.get("mmlu", path=data, subjects=["virology"])
    assert {e.meta["subject"] for e in one.test(50)} == {"virology"}


def write_bbh(write, subtasks=DEFAULT_SUBTASKS, n=10):
    for subtask in subtasks:
        examples = [{"input": f"{subtask} {i} is\n", "target": "(B)"} for i in range(n)]
        path = write(f"{subtask}.json", {"canary": "x", "examples": examples})
    return path


def test_bbh_draws_are_balanced(write):
    task = tasks.get("bbh", path=write_bbh(write))
    assert set(Counter(e.meta["subtask"] for e in task.test(12, seed=3)).values()) == {2}
    assert sorted(Counter(e.meta["subtask"] for e in task.test(8, seed=3)).values()) == [1, 1, 1, 1, 2, 2]
    assert (len(task.pool("train")), len(task.pool("test"))) == (24, 36)
    assert not {e.prompt for e in task.pool("train")} & {e.prompt for e in task.pool("test")}
    example = task.test(1)[0]
    assert [example.completion[a:b] for a, b in example.spans] == ["(B)"]
    assert tasks.get("bbh", path=write_bbh(write), span="line").test(1)[0].spans == ((0, len("Answer: (B)")),)


def test_bbh_hub_copy_gives_the_same_records(write, hub):
    records = [{"input": f"navigate {i} is\n", "target": "(B)"} for i in range(10)]
    asked = hub({"navigate/test": records, "test": records})
    local, remote = tasks.get("bbh", path=write_bbh(write), subtasks="navigate"), tasks.get("bbh", subtasks="navigate")
    assert remote.pool("train") == local.pool("train") and remote.pool("test") == local.pool("test")
    assert asked == [("lukaemon/bbh", "navigate", "test", None)]


def test_bbh_options():
    with pytest.raises(SPDError, match="no subtask 'fun'; there are boolean_expressions"):
        tasks.get("bbh", subtasks=["fun"])


def test_published_bbh(data):
    task = tasks.get("bbh", path=data)
    drawn = task.test(300)
    assert Counter(e.meta["subtask"] for e in drawn) == dict.fromkeys(DEFAULT_SUBTASKS, 50)
    every = tasks.get("bbh", path=data, subtasks=None)
    train, test = every.pool("train"), every.pool("test")
    assert len(train) + len(test) + every.duplicates_removed == 6511
    assert min(Counter(e.meta["subtask"] for e in test).values()) >= 50  # the paper's 50 from any subtask
    assert not {every.problem(e) for e in train} & {every.problem(e) for e in test}
    assert all(every.score(e, e.completion) == 1.0 for e in train + test)
