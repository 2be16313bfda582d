"""`Task`: turns a data source into `Example`s, and scores completions.

A task has two sides that never meet: the training side, from which calibration and training examples are drawn
(the paper's calibration examples lie inside its training prompts, table 7), and the test side. The division is fixed;
a seed only decides which examples of a side are drawn, and in which order.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal, Self

from spd_lens.errors import SPDError, plain, shortened, whole
from spd_lens.examples import Example
from spd_lens.tasks.sources import Source

Split = Literal["calibration", "train", "test"]
Scoring = Literal["final", "reference"]

_WHERE_SET = ("prompt_template", "order", "scoring")
"""Options that a record holds only where they are set, as records that were written before these options lack them."""


@dataclass
class Pools:
    """What a task can draw from."""

    train: list[Example]
    test: list[Example]
    calibration: list[Example] | None = None
    """`None`: calibration is drawn from `train`."""


@dataclass(kw_only=True)
class Task(ABC):
    """One benchmark. Subclasses are dataclasses: their fields are the task's options."""

    name: ClassVar[str]
    group: ClassVar[str | None] = None
    """A key of `Example.meta`; draws are balanced over its values. `None`: plain draws."""

    path: Path | str | None = None
    """Local directory with the original files, or a directory that holds it under the task's name. `None`: the hub."""
    max_new_tokens: int = 256
    """Room for an answer when the task is evaluated; enough for nearly all of its gold completions."""
    duplicates_removed: int = field(default=0, init=False)
    """Examples left out of the training side, since they repeat another one or a test problem."""
    _pools: Pools | None = field(default=None, init=False, repr=False)
    _fits: Callable[[Split, Example], bool] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.init:
                setattr(self, option.name, plain(getattr(self, option.name)))
        self.max_new_tokens = whole(f"max_new_tokens of {self.name}", self.max_new_tokens)

    @abstractmethod
    def load(self) -> Pools:
        """Read the source and make all examples. Called once, when first needed."""

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """The answer that `text`, a completion, gives; `None` if it gives none."""

    @abstractmethod
    def score(self, item: Example, text: str) -> float:
        """How right the completion `text` is for `item`, in [0, 1]."""

    def judges(self, item: Example) -> bool:
        """Whether anything tells right from wrong for the item; if not, its score is 0. Known once `score` has scored a
        completion of the item."""
        return True  # most tasks compare answers

    def scored_by(self, scoring: Scoring) -> Self:
        """A copy of the task that reads and scores completions by other rules, for tasks with two sets of them. It
        shares what has been read of the data, so that the same completions can be scored in two ways.

        Raises:
            SPDError: The task has no such rules.
        """
        if scoring != "final":
            raise SPDError(f"{self.name} has no scoring {scoring!r}; it has one set of rules, 'final'")
        return self

    def spanned(self, span: str | None) -> Self:
        """A copy of the task in which something else decides correctness, as its option `span` says; the task itself
        for None. The examples of both have the same ids and come from the same data.

        Raises:
            SPDError: The task has no such span.
        """
        if span is None:
            return self
        if "span" not in {option.name for option in fields(self)}:
            raise SPDError(f"{self.name} has no option span, so that {span!r} cannot be chosen; leave it away")
        other: Any = copy.copy(self)
        other.span, other._pools, other.duplicates_removed = span, None, 0
        other.__post_init__()  # checks the option
        return other

    def answer_only(self, item: Example) -> Example | None:
        """The item asked for without any working: another prompt, a completion that is nothing but the answer, and the
        answer as its span. None where the task has no such form."""
        return None

    @property
    def finds_results(self) -> bool:
        """Whether `with_results` finds marks that the task's examples do not have by themselves."""
        return False

    def with_results(self, item: Example) -> Example:
        """The item with the mark `results` where that takes more than reading it, such as running programs; the item
        itself where the task has nothing to find."""
        return item

    @property
    def asks_form(self) -> bool:
        """Whether the prompts say what form the answer must have."""
        return True

    def in_asked_form(self, text: str) -> bool:
        """Whether the completion `text` gives an answer in the form that its prompt asks for, if in any.

        Stricter than `extract`, which takes the last number, or the only letter, of any text. The form is looked for
        where the answer is read from (`scoring.answer_part`): not in thoughts, and not behind a second question.
        """
        return self.extract(text) is not None

    def check_scorable(self) -> None:
        """Raise `SPDError` if `score` would, before anyone spends time on completions."""
        return None  # most tasks can always score

    def choices(self, item: Example) -> tuple[str, ...]:
        """The texts that may stand in the item's one span, where they are few enough to compare by likelihood."""
        return ()

    @abstractmethod
    def sources(self) -> dict[str, str]:
        """sha256 of everything the examples were made from, by file name or hub name and revision."""

    def calibration(self, n: int | None, seed: int = 42) -> list[Example]:
        """`n` examples (`None`: all) for extracting the subspace, with spans. They may lie inside the training set."""
        return self.kept("calibration", self.draw("calibration", n, seed))

    def train(self, n: int | None, seed: int = 42) -> list[Example]:
        """`n` examples (`None`: all) whose prompts the model answers itself; it never sees their completions."""
        return self.kept("train", self.draw("train", n, seed))

    def test(self, n: int | None, seed: int = 42) -> list[Example]:
        """`n` examples (`None`: all) for evaluation. None of their problems is in the other two draws, at any seed."""
        return self.kept("test", self.draw("test", n, seed))

    def that_fits(self, fits: Callable[[Split, Example], bool]) -> Self:
        """A copy of the task whose `calibration`, `train` and `test` leave out examples that `fits` refuses, so that
        they may give fewer than `n`. `draw` still gives all."""
        other = copy.copy(self)
        other._fits = fits
        return other

    def kept(self, split: Split, examples: list[Example]) -> list[Example]:
        """The examples that fit (see `that_fits`); `SPDError` if none does."""
        fits = self._fits
        if fits is None:
            return examples
        found = [example for example in examples if fits(split, example)]
        if examples and not found:
            raise SPDError(
                f"none of {len(examples)} {split} examples of {self.name} fits the model's context; use a model with a "
                "longer one, a lower max_new_tokens, or shorter texts"
            )
        return found

    def draw(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` examples of `split` in the order that `seed` gives: a larger draw begins with a smaller one."""
        pool = self.pool(split)
        n, seed = check_count(self.name, split, n, len(pool)), whole("seed", seed, least=None)
        ordered = shuffled(pool, f"{self.name}|{split}|{seed}")
        if self.group is not None:
            ordered = round_robin(ordered, self.group)
        return ordered[:n]

    def pool(self, split: Split) -> list[Example]:
        """Everything that `split` can be drawn from, in the source's order."""
        if self._pools is None:
            self._pools = self.apart(self.load())
        if split != "calibration":
            return getattr(self._pools, split)
        own = self._pools.calibration
        return [example for example in (self._pools.train if own is None else own) if self.calibrates(example)]

    def calibrates(self, example: Example) -> bool:
        """Whether the example may be drawn for calibration; not one in which nothing decides correctness."""
        return True  # most tasks give every example spans

    def apart(self, pools: Pools) -> Pools:
        """What was loaded, without the training examples that repeat another one or a test problem."""
        # the test side stays as published; what it repeats leaves the training side
        held_out = {self.problem(example) for example in pools.test}
        for side in ("train", "calibration"):
            if given := getattr(pools, side):
                left = without_repeats(given, held_out, self.problem)
                self.duplicates_removed += len(given) - len(left)
                setattr(pools, side, left)
        return pools

    def problem(self, example: Example) -> str:
        """What makes two examples the same problem: the normalised prompt, unless a task knows better."""
        return normalised(example.prompt)

    def options(self) -> dict[str, Any]:
        """The options as they are in force, for a run's record, without the path to the data and what runs code."""
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        unset = {
            item.name for item in fields(self) if item.name in _WHERE_SET and options.get(item.name) == item.default
        }
        return {name: value for name, value in options.items() if name not in {"path", "executor", *unset}}

    def card(self) -> dict[str, Any]:
        """A data set card: counts, duplicates removed, lengths of the spans in characters, sha256 of the sources."""
        pools = {split: self.pool(split) for split in ("calibration", "train", "test")}
        spans = [(*example.prompt_spans, *example.spans) for example in pools["test"]]
        lengths = [sum(end - start for start, end in marked) for marked in spans if marked]
        return {
            "task": self.name,
            "options": self.options(),
            "counts": {split: len(pool) for split, pool in pools.items()},
            "duplicates_removed": self.duplicates_removed,
            "span_characters": {"min": min(lengths), "median": median(lengths), "max": max(lengths)} if lengths else {},
            "sources": self.sources(),
        }

    def check_option(self, option: str, allowed: Sequence[Any]) -> None:
        """Refuse a value of `option` that is not among `allowed`."""
        value = getattr(self, option)
        if value not in allowed:
            raise SPDError(f"{self.name} has no {option} {value!r}; choose one of {', '.join(map(str, allowed))}")

    def check_names(self, what: str, given: Sequence[str] | str | None, known: Sequence[str]) -> tuple[str, ...]:
        """`given` (one name, several, or `None` for all), each once, in the order of `known`."""
        wanted = known if given is None else [given] if isinstance(given, str) else given
        if not isinstance(wanted, list | tuple):
            raise SPDError(f"{self.name} needs a list of names as its {what}s, not {given!r}")
        for name in wanted:
            if name not in known:
                raise SPDError(f"{self.name} has no {what} {name!r}; there are {', '.join(known)}")
        if not wanted:
            raise SPDError(f"{self.name} needs at least one {what}; there are {', '.join(known)}")
        return tuple(name for name in known if name in wanted)


@dataclass(kw_only=True)
class TwoScorings(Task):
    """A task that can also read and score completions as the paper's reference code does (`scoring.reference`)."""

    scoring: Scoring = "final"
    """`final`: the answer that a careful reader finds; `reference`: the reference code's plain rules."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("scoring", ("final", "reference"))

    def check_gold(self, readable: Callable[[str], bool], what: str) -> None:
        """Refuse a test item whose gold answer the reference code's rules do not read as it is written."""
        for item in self.pool("test"):
            if not readable(answer := str(item.meta["answer"])):
                raise SPDError(
                    f"the answer {shortened(answer)!r} of {item.id} is not {what}, so that scoring='reference' cannot "
                    "tell right from wrong; mend or leave out the record, or use scoring='final'"
                )

    def scored_by(self, scoring: Scoring) -> Self:
        other = copy.copy(self)
        other.scoring = scoring
        other.check_option("scoring", ("final", "reference"))
        return other


@dataclass(kw_only=True)
class PublishedTask(Task):
    """A task whose records are published: on the hub, or in a local directory with the original files."""

    local_form: ClassVar[str]
    """The files that a local directory must hold, in words."""

    hub: str = ""
    """Name of the data set on the hub; another copy with the same columns works too."""
    revision: str | None = None
    """Branch, tag or commit of the hub's copy. `None`: its newest state."""
    source: Source = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        path = None if self.path is None else Path(self.path)
        self.source = Source(self.name, path, self.hub, self.revision, self.local_form)

    def sources(self) -> dict[str, str]:
        self.pool("train")  # digests exist once the source has been read
        return dict(self.source.digests)


def check_count(task: str, split: str, n: int | None, available: int | None) -> int:
    """How many examples to draw (`n` None: all); `SPDError` where that is none, or more than there are."""
    n = whole("n", available if n is None else n, least=None)
    if n < 1:
        raise SPDError(f"{n} {split} examples of {task} make no sense; ask for at least 1")
    if available is not None and n > available:
        raise SPDError(f"{n} {split} examples of {task} were asked for, and there are {available}; ask for fewer")
    return n


def digest(text: str) -> str:
    """sha256 in hexadecimal. Unlike `hash()` it is the same in every process."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def shuffled(items: Iterable[Example], salt: str) -> list[Example]:
    """`items` in an order that depends on nothing but `salt` and each item's id: not on the order they came in, nor on
    what else is there. So the hub and the local files give the same draws."""
    return sorted(items, key=lambda item: digest(f"{salt}|{item.id}"))


def split_off(items: Sequence[Example], salt: str, n_test: int) -> tuple[list[Example], list[Example]]:
    """A fixed division into a training side and `n_test` test examples, for sources that come without one."""
    chosen = {item.id for item in shuffled(items, f"split|{salt}")[:n_test]}
    return [item for item in items if item.id not in chosen], [item for item in items if item.id in chosen]


def round_robin(items: Sequence[Example], group: str) -> list[Example]:
    """`items` with the groups, the values of `meta[group]`, taking turns, so that each beginning of the list is as
    balanced as possible."""
    turns: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    return sorted(items, key=lambda item: (next(turns[item.meta[group]]), item.meta[group]))


def without_repeats(items: Iterable[Example], held_out: set[str], problem: Callable[[Example], str]) -> list[Example]:
    """`items` without those whose problem is held out or came earlier."""
    first: dict[str, Example] = {}
    for item in items:
        first.setdefault(problem(item), item)
    return [item for text, item in first.items() if text not in held_out]


def normalised(text: str) -> str:
    """`text` with everything taken away that does not make it another problem: case, white space, Unicode variants,
    punctuation at the end of a word. Operators and brackets stay, since in some sources they are the problem."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"[.,;:!?'\"]+(?=\s|$)", "", text)
    return " ".join(text.split())
