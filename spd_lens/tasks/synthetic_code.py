"""Small Python functions over lists of numbers and over texts, with asserts: made here, no data needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from spd_lens.examples import Example
from spd_lens.tasks.code import CodeTask
from spd_lens.tasks.synthetic import SyntheticTask


class Piece(NamedTuple):
    """One operation in words, as a part of a function's name, and as code, with places for numbers."""

    words: str
    name: str
    code: str

    def filled(self, **numbers: object) -> Piece:
        """The piece with its numbers."""
        return Piece(*(part.format(**numbers) for part in self))


class Draft(NamedTuple):
    """A function before its asserts: what it does in words, its name, parameter and body, and what it is tried on."""

    words: str
    name: str
    parameter: str
    body: str
    inputs: list[Any] | None = None
    """`None`: lists of numbers on which its results differ."""


@dataclass(kw_only=True)
class SyntheticCode(CodeTask, SyntheticTask):
    """easy: one operation on a number, a text or a list; medium: filter a list and change what is left; hard: the same
    and then one number out of it."""

    name: ClassVar[str] = "synthetic-code"
    generator: ClassVar[str] = "ac205dbd9d8dd520a78ea68b52c1fbccfed7bd629d49b4f8b6c225b6db2e025b"

    max_new_tokens: int = 200

    def make(self, rng: random.Random) -> Example:
        draft = (
            rng.choice(_EASY)(rng) if self.difficulty == "easy" else _pipeline(rng, finish=self.difficulty == "hard")
        )
        code = f"def {draft.name}({draft.parameter}):\n    {draft.body}"
        made: dict[str, Any] = {}
        exec(code, made)  # the code is our own, and says itself what is expected of it
        run = made[draft.name]
        inputs = _telling(rng, run) if draft.inputs is None else draft.inputs
        tests = [f"assert {draft.name}({value!r}) == {run(value)!r}" for value in inputs]
        return self.example("", f"Write a function that {draft.words}.", code, tests)

    @property
    def finds_results(self) -> bool:
        return True  # its own programs need no leave

    def _passes(self, program: str, tests: Sequence[str], setup: str) -> bool:
        scope: dict[str, Any] = {}
        try:
            exec("\n".join((program, setup, *tests)), scope)  # our own code as in `make`, with one place changed
        except Exception:  # whatever a changed program raises, it does not pass
            return False
        return True


def _telling(rng: random.Random, run: Callable[[list[int]], Any]) -> list[list[int]]:
    """Three lists of numbers on which the function's results are not all equal, and at most one is empty."""
    inputs: list[list[int]] = []
    for _ in range(30):
        inputs = [[rng.randint(-20, 40) for _ in range(rng.randint(3, 6))] for _ in range(3)]
        results = [run(numbers) for numbers in inputs]
        if results.count([]) < 2 and any(result != results[0] for result in results):
            break
    return inputs


_KEEPS = (
    Piece("greater than {number}", "over_{id}", "x > {number}"),
    Piece("less than {number}", "under_{id}", "x < {number}"),
    Piece("divisible by {divisor}", "multiples_{divisor}", "x % {divisor} == 0"),
    Piece("not divisible by {divisor}", "not_{divisor}", "x % {divisor} != 0"),
    Piece("even", "even", "x % 2 == 0"),
    Piece("odd", "odd", "x % 2 == 1"),
    Piece("at most {distance} away from zero", "within_{distance}", "abs(x) <= {distance}"),
)
_CHANGES = (
    Piece("adds {number} to each of them", "plus_{number}", "x + {number}"),
    Piece("subtracts {number} from each", "minus_{number}", "x - {number}"),
    Piece("multiplies each of them by {number}", "times_{number}", "x * {number}"),
    Piece("subtracts each of them from {number}", "from_{number}", "{number} - x"),
    Piece("takes the remainder of each by {number}", "mod_{number}", "x % {number}"),
    Piece("squares each and adds {number}", "square_{number}", "x * x + {number}"),
)
_FINISHES = (
    Piece("their sum", "sum", "sum(result)"),
    Piece("the largest of them, or 0 if there is none", "max", "max(result, default=0)"),
    Piece("the smallest of them, or 0 if there is none", "min", "min(result, default=0)"),
    Piece("how many different values there are", "distinct", "len(set(result))"),
    Piece("the last of them, or 0 if there is none", "last", "result[-1] if result else 0"),
)
_LIST = Piece("the resulting list", "list", "result")
_WORDS = (
    "apple river stone cloud train garden pencil window candle market silver forest bridge button copper dragon engine "
    "falcon guitar harbor island jacket kettle ladder mirror needle orange pepper rabbit saddle tunnel velvet walnut"
).split()


def _keep(rng: random.Random) -> Piece:
    number, divisor = rng.randint(-5, 25), rng.randint(3, 9)
    return rng.choice(_KEEPS).filled(number=number, id=_id(number), divisor=divisor, distance=divisor + 5)


def _change(rng: random.Random) -> Piece:
    number = rng.randint(2, 30)
    return rng.choice(_CHANGES).filled(number=number)


def _id(number: int) -> str:
    return f"minus_{-number}" if number < 0 else str(number)


def _pipeline(rng: random.Random, finish: bool) -> Draft:
    keep, change = _keep(rng), _change(rng)
    last = rng.choice(_FINISHES) if finish else _LIST
    return Draft(
        f"takes a list of integers, keeps those that are {keep.words}, {change.words}, and returns {last.words}",
        f"{keep.name}_{change.name}_{last.name}",
        "numbers",
        f"result = [{change.code} for x in numbers if {keep.code}]\n    return {last.code}",
    )


def _linear(rng: random.Random) -> Draft:
    factor, offset = rng.randint(2, 99), rng.randint(1, 99)
    words, name = f"multiplies a number by {factor} and adds {offset}", f"times_{factor}_plus_{offset}"
    return Draft(words, name, "x", f"return x * {factor} + {offset}", rng.sample(range(-9, 30), 3))


def _clamp(rng: random.Random) -> Draft:
    low = rng.randint(-20, 20)
    high = low + rng.randint(5, 50)
    words, name = f"returns a number, but at least {low} and at most {high}", f"clamp_{_id(low)}_to_{_id(high)}"
    inputs = [low - rng.randint(1, 30), rng.randint(low, high), high + rng.randint(1, 30)]
    return Draft(words, name, "x", f"return max({low}, min({high}, x))", inputs)


def _replace(rng: random.Random) -> Draft:
    old, new = rng.sample("abcdeilnoprstuw", 2)
    words = f"replaces every {old!r} in a text by {new!r}"
    inputs = [" ".join(rng.sample(_WORDS, rng.randint(1, 3))) for _ in range(3)]
    return Draft(words, f"replace_{old}_by_{new}", "text", f"return text.replace({old!r}, {new!r})", inputs)


def _affix(rng: random.Random) -> Draft:
    word, times = rng.choice(_WORDS), rng.randint(2, 4)
    before = rng.random() < 0.5
    words = f"repeats a text {times} times and puts {word!r} {'before' if before else 'after'} it"
    body = f"return {word!r} + text * {times}" if before else f"return text * {times} + {word!r}"
    return Draft(words, f"{'prefix' if before else 'suffix'}_{word}_{times}", "text", body, rng.sample(_WORDS, 3))


def _filter(rng: random.Random) -> Draft:
    keep = _keep(rng)
    words = f"returns those numbers of a list that are {keep.words}"
    return Draft(words, f"keep_{keep.name}", "numbers", f"return [x for x in numbers if {keep.code}]")


def _map(rng: random.Random) -> Draft:
    change = _change(rng)
    words = f"takes a list of integers, {change.words}, and returns the new list"
    return Draft(words, f"{change.name}_each", "numbers", f"return [{change.code} for x in numbers]")


_EASY = (_affix, _clamp, _filter, _linear, _map, _replace)
