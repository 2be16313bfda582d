"""Small Python functions over lists of numbers and over texts, with asserts: made here, no data needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from spd_lens.examples import Example
from spd_lens.tasks.code import CodeTask
from spd_lens.tasks.synthetic import SyntheticTask


@dataclass(frozen=True)
class Piece:
    """One operation in words, as code, and as a function that computes the expected values here."""

    words: str
    name: str
    code: str
    run: Callable[[Any], Any]


@dataclass(kw_only=True)
class SyntheticCode(CodeTask, SyntheticTask):
    """easy: one operation on a number, a text or a list; medium: filter a list and change what is left; hard: the same
    and then one number out of it."""

    name: ClassVar[str] = "synthetic-code"
    generator: ClassVar[str] = "ac205dbd9d8dd520a78ea68b52c1fbccfed7bd629d49b4f8b6c225b6db2e025b"

    max_new_tokens: int = 200

    def make(self, rng: random.Random) -> Example:
        if self.difficulty == "easy":
            return rng.choice(_EASY)(self, rng)
        return self._pipeline(rng)

    def _pipeline(self, rng: random.Random) -> Example:
        keep, change = _keep(rng), _change(rng)
        words = f"Write a function that takes a list of integers, keeps those that are {keep.words}, {change.words}"
        name, lines = f"{keep.name}_{change.name}", [f"    result = [{change.code} for x in numbers if {keep.code}]"]
        finish = rng.choice(_FINISHES) if self.difficulty == "hard" else None
        if finish is None:
            words, name, last = f"{words}, and returns the resulting list.", f"{name}_list", "result"
        else:
            words, name, last = f"{words}, and returns {finish.words}.", f"{name}_{finish.name}", finish.code
        code = "\n".join([f"def {name}(numbers):", *lines, f"    return {last}"])

        def run(numbers: list[int]) -> Any:
            result = [change.run(x) for x in numbers if keep.run(x)]
            return finish.run(result) if finish else result

        return self.build(words, name, code, run, _telling(rng, run))

    def build(self, words: str, name: str, code: str, run: Callable[[Any], Any], inputs: list[Any]) -> Example:
        """An example whose expected values come from `run`, the function that the code describes."""
        tests = [f"assert {name}({value!r}) == {run(value)!r}" for value in inputs]
        return self.example("", words, code, tests)


def _telling(rng: random.Random, run: Callable[[list[int]], Any]) -> list[list[int]]:
    """Three lists of numbers on which the function's results are not all equal, and at most one is empty."""
    inputs: list[list[int]] = []
    for _ in range(30):
        inputs = [[rng.randint(-20, 40) for _ in range(rng.randint(3, 6))] for _ in range(3)]
        results = [run(numbers) for numbers in inputs]
        if results.count([]) < 2 and any(result != results[0] for result in results):
            break
    return inputs


def _keep(rng: random.Random) -> Piece:
    number = rng.randint(-5, 25)
    divisor = rng.randint(3, 9)
    return rng.choice(
        [
            Piece(f"greater than {number}", f"over_{_id(number)}", f"x > {number}", lambda x: x > number),
            Piece(f"less than {number}", f"under_{_id(number)}", f"x < {number}", lambda x: x < number),
            Piece(f"divisible by {divisor}", f"multiples_{divisor}", f"x % {divisor} == 0", lambda x: x % divisor == 0),
            Piece(f"not divisible by {divisor}", f"not_{divisor}", f"x % {divisor} != 0", lambda x: x % divisor != 0),
            Piece("even", "even", "x % 2 == 0", lambda x: x % 2 == 0),
            Piece("odd", "odd", "x % 2 == 1", lambda x: x % 2 == 1),
            Piece(
                f"at most {divisor + 5} away from zero",
                f"within_{divisor + 5}",
                f"abs(x) <= {divisor + 5}",
                lambda x: abs(x) <= divisor + 5,
            ),
        ]
    )


def _change(rng: random.Random) -> Piece:
    number = rng.randint(2, 30)
    return rng.choice(
        [
            Piece(f"adds {number} to each of them", f"plus_{number}", f"x + {number}", lambda x: x + number),
            Piece(f"subtracts {number} from each", f"minus_{number}", f"x - {number}", lambda x: x - number),
            Piece(f"multiplies each of them by {number}", f"times_{number}", f"x * {number}", lambda x: x * number),
            Piece(f"subtracts each of them from {number}", f"from_{number}", f"{number} - x", lambda x: number - x),
            Piece(f"takes the remainder of each by {number}", f"mod_{number}", f"x % {number}", lambda x: x % number),
            Piece(f"squares each and adds {number}", f"square_{number}", f"x * x + {number}", lambda x: x * x + number),
        ]
    )


_FINISHES = (
    Piece("their sum", "sum", "sum(result)", sum),
    Piece("the largest of them, or 0 if there is none", "max", "max(result, default=0)", lambda r: max(r, default=0)),
    Piece("the smallest of them, or 0 if there is none", "min", "min(result, default=0)", lambda r: min(r, default=0)),
    Piece("how many different values there are", "distinct", "len(set(result))", lambda r: len(set(r))),
    Piece("the last of them, or 0 if there is none", "last", "result[-1] if result else 0", lambda r: [0, *r][-1]),
)


def _id(number: int) -> str:
    return f"minus_{-number}" if number < 0 else str(number)


_WORDS = (
    "apple river stone cloud train garden pencil window candle market silver forest bridge button copper dragon engine "
    "falcon guitar harbor island jacket kettle ladder mirror needle orange pepper rabbit saddle tunnel velvet walnut"
).split()


def _text(rng: random.Random) -> str:
    return " ".join(rng.sample(_WORDS, rng.randint(1, 3)))


def _linear(task: SyntheticCode, rng: random.Random) -> Example:
    factor, offset = rng.randint(2, 99), rng.randint(1, 99)
    name = f"times_{factor}_plus_{offset}"
    words = f"Write a function that multiplies a number by {factor} and adds {offset}."
    code = f"def {name}(x):\n    return x * {factor} + {offset}"
    return task.build(words, name, code, lambda x: x * factor + offset, rng.sample(range(-9, 30), 3))


def _clamp(task: SyntheticCode, rng: random.Random) -> Example:
    low = rng.randint(-20, 20)
    high = low + rng.randint(5, 50)
    name = f"clamp_{_id(low)}_to_{_id(high)}"
    words = f"Write a function that returns a number, but at least {low} and at most {high}."
    code = f"def {name}(x):\n    return max({low}, min({high}, x))"
    inputs = [low - rng.randint(1, 30), rng.randint(low, high), high + rng.randint(1, 30)]
    return task.build(words, name, code, lambda x: max(low, min(high, x)), inputs)


def _replace(task: SyntheticCode, rng: random.Random) -> Example:
    old, new = rng.sample("abcdeilnoprstuw", 2)
    name = f"replace_{old}_by_{new}"
    words = f"Write a function that replaces every {old!r} in a text by {new!r}."
    code = f"def {name}(text):\n    return text.replace({old!r}, {new!r})"
    return task.build(words, name, code, lambda text: text.replace(old, new), [_text(rng) for _ in range(3)])


def _affix(task: SyntheticCode, rng: random.Random) -> Example:
    word, times = rng.choice(_WORDS), rng.randint(2, 4)
    before = rng.random() < 0.5
    name = f"{'prefix' if before else 'suffix'}_{word}_{times}"
    words = (
        f"Write a function that repeats a text {times} times and puts {word!r} {'before' if before else 'after'} it."
    )
    body = f"{word!r} + text * {times}" if before else f"text * {times} + {word!r}"
    code = f"def {name}(text):\n    return {body}"
    inputs = rng.sample(_WORDS, 3)
    return task.build(words, name, code, lambda t: word + t * times if before else t * times + word, inputs)


def _filter(task: SyntheticCode, rng: random.Random) -> Example:
    keep = _keep(rng)
    name = f"keep_{keep.name}"
    words = f"Write a function that returns those numbers of a list that are {keep.words}."
    code = f"def {name}(numbers):\n    return [x for x in numbers if {keep.code}]"

    def run(numbers: list[int]) -> list[int]:
        return [x for x in numbers if keep.run(x)]

    return task.build(words, name, code, run, _telling(rng, run))


def _map(task: SyntheticCode, rng: random.Random) -> Example:
    change = _change(rng)
    name = f"{change.name}_each"
    words = f"Write a function that takes a list of integers, {change.words}, and returns the new list."
    code = f"def {name}(numbers):\n    return [{change.code} for x in numbers]"

    def run(numbers: list[int]) -> list[int]:
        return [change.run(x) for x in numbers]

    return task.build(words, name, code, run, _telling(rng, run))


_EASY = (_affix, _clamp, _filter, _linear, _map, _replace)
