"""The generator of word problems: correct by recomputation, disjoint, the same in every process."""

import hashlib
import operator
import re
import subprocess
import sys

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.mark.parametrize(("difficulty", "steps"), [("easy", 1), ("medium", 2), ("hard", 3)])
def test_every_step_is_right(difficulty, steps):
    for example in tasks.get("synthetic-math", difficulty=difficulty).train(300, seed=7):
        question = example.prompt.split("\n\n")[0]
        assert "{" not in question and "{" not in example.completion
        known = {int(number) for number in re.findall(r"\d+", question)}
        *lines, last = example.completion.split("\n")
        assert len(lines) == steps
        for line in lines:
            left, sign, right, result = STEP.search(line).groups()
            assert int(left) in known and int(right) in known  # nothing comes from nowhere
            assert OPERATORS[sign](int(left), int(right)) == int(result) >= 1
            known.add(int(result))
        assert last == f"#### {result}" and example.meta["answer"] == result
        ((start, end),) = example.spans
        assert example.completion[start:end] == result


def test_every_number_of_the_question_is_used():
    for example in tasks.get("synthetic-math", difficulty="hard").train(200, seed=1):
        question, working = example.prompt.split("\n\n")[0], example.completion
        assert set(re.findall(r"\d+", question)) <= set(re.findall(r"\d+", working))


def test_splits_never_meet_at_any_seed():
    task = tasks.get("synthetic-math")
    drawn = {
        split: {task.problem(e) for seed in range(4) for e in task.draw(split, 200, seed)}
        for split in ("calibration", "train", "test")
    }
    assert not drawn["test"] & drawn["train"]
    assert not drawn["test"] & drawn["calibration"]
    assert not drawn["calibration"] & drawn["train"]


def test_draws_are_stable_and_varied():
    task = tasks.get("synthetic-math")
    examples = task.train(400, seed=42)
    assert examples[:50] == task.train(50, seed=42)
    assert len({e.id for e in examples}) == len({e.prompt for e in examples}) == 400
    shapes = {re.sub(r"\d+|\b[A-Z][a-z]+\b", "_", e.prompt) for e in examples}
    assert len(shapes) > 150


@pytest.mark.parametrize("name", ["synthetic-math", "synthetic-code", "synthetic-qa"])
def test_same_in_another_process(name):
    if name not in tasks.names():
        pytest.skip(f"{name} is not there")
    code = (
        f"import spd_lens.tasks as t; print([(e.id, e.prompt, e.completion) for e in t.get({name!r}).test(5, seed=3)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{[(e.id, e.prompt, e.completion) for e in tasks.get(name).test(5, seed=3)]}\n"}


def test_bad_options():
    with pytest.raises(SPDError, match="no difficulty 'brutal'; choose one of easy, medium, hard"):
        tasks.get("synthetic-math", difficulty="brutal")
    with pytest.raises(SPDError, match="say how many"):
        tasks.get("synthetic-math").train(None)


@pytest.mark.parametrize(
    ("name", "generator", "drawn"),
    [
        ("synthetic-math", "db92a066c677", "8df521722f52"),
        ("synthetic-qa", "12ea09c9661e", "1b7c5d848241"),
        ("synthetic-code", "ac205dbd9d8d", "da16cd97b80a"),
    ],
)
def test_examples_change_only_with_the_name_of_their_generator(name, generator, drawn):
    """Runs that an earlier version began go on: what they noted of their data is what is generated now."""
    found = hashlib.sha256()
    for difficulty in ("easy", "medium", "hard"):
        task = tasks.get(name, difficulty=difficulty)
        ((label, noted),) = task.sources().items()
        assert f"difficulty={difficulty}" in label and noted.startswith(generator)
        for split in ("calibration", "train", "test"):
            for example in task.draw(split, 20, 42):
                found.update(repr((example.id, example.prompt, example.completion, example.spans)).encode())
    assert found.hexdigest()[:12] == drawn


def test_the_fingerprint_tells_difficulties_apart():
    easy, hard = (tasks.get("synthetic-math", difficulty=d).sources() for d in ("easy", "hard"))
    assert easy.keys() != hard.keys()


def test_an_exhausted_generator_says_so(monkeypatch):
    task = tasks.get("synthetic-math")
    always = task.make(__import__("random").Random(0))
    monkeypatch.setattr(type(task), "make", lambda self, rng: always)
    with pytest.raises(SPDError, match="5 different .* were asked for, and its generator has about [01]"):
        task.train(5)
