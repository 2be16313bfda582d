import random

import pytest

import spd_lens as spd
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.subspaces.controls import shuffled_answers, with_answers
from spd_lens.tasks import value_of


def _example(answer: str, *more: str) -> Example:
    completion, spans = "so it is ", []
    for part in (answer, *more):
        spans.append((len(completion), len(completion) + len(part)))
        completion += part + " and "
    return Example("q", completion, tuple(spans), id=answer)


def _answers(example: Example) -> tuple[str, ...]:
    return tuple(example.completion[a:b] for a, b in example.spans)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_keeps_an_answer_and_none_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    answers = ["A"] * 5 + ["B"] * 4 + ["C"] * 1  # the most common is exactly half
    rng.shuffle(answers)
    examples = [_example(a) for a in answers]
    shuffled = shuffled_answers(examples, seed)
    assert all(_answers(old) != _answers(new) for old, new in zip(examples, shuffled, strict=True))
    assert sorted(map(_answers, shuffled)) == sorted(map(_answers, examples))
    assert [e.prompt for e in shuffled] == [e.prompt for e in examples]


def test_seeds_differ_and_repeat() -> None:
    examples = [_example(str(i)) for i in range(12)]
    assert shuffled_answers(examples, 1) == shuffled_answers(examples, 1)
    assert shuffled_answers(examples, 1) != shuffled_answers(examples, 2)


def test_spans_move_with_answers_of_other_lengths() -> None:
    example = _example("7", "eight")
    changed = with_answers(example, ["1234567"])
    assert changed.completion == "so it is 1234567 and 1234567 and "
    assert _answers(changed) == ("1234567", "1234567")


def test_marks_do_not_outlive_the_gold_completion() -> None:
    example = Example("q", "7 and 7", ((6, 7),), marks={"copies": ((6, 7),)})
    assert with_answers(example, ["123456789"]).marks == {}


@pytest.mark.parametrize("seed", range(10))
def test_no_span_of_several_keeps_its_value(seed: int) -> None:
    pairs = [("1", "2"), ("1", "3"), ("4", "2"), ("5", "1,000"), ("6", "1000.0"), ("1", "7", "2"), ("8",)]
    examples = [_example(*pair) for pair in pairs]
    shuffled = shuffled_answers(examples, seed)
    assert sorted(len(e.spans) for e in shuffled) == sorted(map(len, pairs))
    for old, new in zip(examples, shuffled, strict=True):
        assert all(value_of(a) != value_of(b) for a, b in zip(_answers(old), _answers(new), strict=True))
    assert shuffled == shuffled_answers(examples, seed)


def test_spans_that_are_not_in_order_keep_no_value_either() -> None:
    examples = [Example("p1", "a=1 b=2", ((6, 7), (2, 3))), Example("p2", "a=3 b=1", ((6, 7), (2, 3)))]
    assert [e.completion for e in shuffled_answers(examples, 0)] == ["a=3 b=1", "a=1 b=2"]


def test_of_results_of_a_real_task() -> None:
    examples = spd.tasks.get("synthetic-math", difficulty="hard", span="results").calibration(n=40, seed=1)
    for old, new in zip(examples, shuffled_answers(examples, 0), strict=True):
        assert all(a != b for a, b in zip(_answers(old), _answers(new), strict=True)) and new.spans


def test_of_a_real_task() -> None:
    examples = spd.tasks.get("synthetic-qa").calibration(n=40, seed=1)
    shuffled = shuffled_answers(examples, 0)
    assert all(_answers(old) != _answers(new) for old, new in zip(examples, shuffled, strict=True))


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([_example("1")], "two examples"),
        ([_example("1"), _example("1"), _example("2")], "2 of 3 examples have the same answer"),
        ([_example("1"), Example("q", "text")], "correctness spans"),
        ([_example("x", "1"), _example("x", "2")], "2 of them would keep a value at its place"),
    ],
)
def test_refused(examples: list[Example], words: str) -> None:
    with pytest.raises(SPDError, match=words):
        shuffled_answers(examples, 0)
