"""synthetic-code runs, synthetic-qa has one right choice, and neither lets its splits meet."""

import subprocess
import sys

import pytest

import spd_lens.tasks as tasks
from spd_lens.tasks.code import extract_code
from spd_lens.tasks.synthetic_qa import KINDS, OPPOSITES

LEVELS = ("easy", "medium", "hard")


@pytest.mark.parametrize("difficulty", LEVELS)
def test_reference_solutions_pass_their_asserts(difficulty):
    examples = tasks.get("synthetic-code", difficulty=difficulty).train(150, seed=5)
    program = "\n".join(example.completion for example in examples)
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for example in examples:
        values = [example.completion[start:end] for start, end in example.spans]
        assert [test.split(" == ")[1] for test in example.meta["tests"]] == values
        assert len(set(values)) > 1  # a constant is not the right answer
        assert extract_code(example.completion) == example.completion


def test_a_changed_solution_fails():
    task = tasks.get(
        "synthetic-code", difficulty="medium", executor=lambda code, tests, setup: "result[1:]" not in code
    )
    item = task.test(1)[0]
    assert task.score(item, item.completion) == 1.0
    assert task.score(item, item.completion.replace("return result", "return result[1:]")) == 0.0


@pytest.mark.parametrize("difficulty", LEVELS)
def test_questions_have_one_right_choice(difficulty):
    letters = []
    for example in (task := tasks.get("synthetic-qa", difficulty=difficulty)).train(300, seed=2):
        choices, answer = example.meta["choices"], example.meta["answer"]
        assert len(set(choices)) == 4 and answer in "ABCD"
        assert _is_right(example.meta["question"], choices["ABCD".index(answer)], choices)
        assert example.completion == f"Answer: {answer}" and example.spans == ((8, 9),)
        assert task.score(example, example.completion) == 1.0
        assert task.score(example, f"Answer: {'ABCD'['ABCD'.index(answer) - 1]}") == 0.0
        letters.append(answer)
    assert min(letters.count(letter) for letter in "ABCD") > 45  # no letter is a good guess


def _is_right(question: str, right: str, choices: list[str]) -> bool:
    """Answers every kind of question anew, from its text."""
    lowered = [choice.lower() for choice in choices]
    if "largest" in question or "smallest" in question:
        return int(right) == (max if "largest" in question else min)(map(int, choices))
    if "alphabetical" in question:
        return right == (min if "first" in question else max)(lowered)
    if "opposite" in question:
        word = question.split("'")[1]
        partners = {other for pair in OPPOSITES if word in pair for other in pair if other != word}
        return partners & set(choices) == {right}
    if question.startswith("What is"):
        one, other = question.removesuffix("?").split()[2::2]
        return int(right) == int(one) + int(other)
    if "comes next" in question:
        terms = [int(term) for term in question.removesuffix("?").split(": ")[1].split(", ")]
        steps = [later - earlier for earlier, later in zip(terms, terms[1:], strict=False)]
        return int(right) == terms[-1] + steps[-1] + (steps[-1] - steps[-2])
    (kind,) = [kind for kind in KINDS if question.endswith((f" {kind}?", f"names {kind}?"))]
    members = {choice for choice in choices if choice in KINDS[kind]}
    return members == (set(choices) - {right} if "not" in question else {right})


def test_no_word_is_of_two_kinds():
    words = [word for kind in KINDS.values() for word in kind]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("name", ["synthetic-code", "synthetic-qa"])
@pytest.mark.parametrize("difficulty", LEVELS)
def test_splits_never_meet(name, difficulty):
    task = tasks.get(name, difficulty=difficulty)
    drawn = {
        split: {task.problem(e) for seed in (0, 1) for e in task.draw(split, 100, seed)}
        for split in ("calibration", "train", "test")
    }
    assert not drawn["test"] & (drawn["train"] | drawn["calibration"])
    assert not drawn["calibration"] & drawn["train"]
