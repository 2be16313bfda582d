"""Every completion of studies, scored in parts: what it says, where it says it, and what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from spd_lens.analysis.gain.cutting import first_answer, goes_on
from spd_lens.errors import SPDError
from spd_lens.evaluation import ItemResult
from spd_lens.examples import Example
from spd_lens.runs import allow_execution, differ
from spd_lens.study import BASE, Cell, Study, StudyConfig
from spd_lens.tasks import CodeTask, Scoring, Task

FINAL: Scoring = "final"
REFERENCE: Scoring = "reference"
SCORERS: dict[Scoring, str] = {
    FINAL: "stated final answer",
    REFERENCE: "last number, first letter, first line, first block",
}
"""What the two scorers take for the answer."""
COMPONENTS = ("rest", "format", "stopping")
RATES = ("ends by itself", "runs on", "cut at the limit", "answer found", "asked form")
COLUMNS = [
    "study", "source", "target", "method", "seed", "item", "scorer", "own", "score", *COMPONENTS, *RATES, "tokens",
]  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A finished study."""

    name: str
    study: Study
    config: StudyConfig
    targets: Mapping[str, Task] = field(repr=False)
    """The targets that are scored here, by the name of their results."""
    left_out: tuple[str, ...]
    """Targets whose programs were not to be run."""

    @property
    def model(self) -> str:
        return str(self.config.settings["model"])

    def cells(self) -> list[Cell]:
        """The base model and everything that was trained."""
        return [self.study.base(), *self.study.cells(self.config)]

    @classmethod
    def open(cls, folder: Path, name: str, data_dir: Path | None, allow_code_execution: bool) -> Opened:
        """Open a study and check that all that it plans is there.

        Raises:
            SPDError: no study, or one that is not finished or trains nothing.
        """
        study = Study.open(folder)
        config = study.config
        if not config.trained:
            raise SPDError(f"{folder} trains no method, so that nothing has changed in it; add methods to the study")
        made = {key: config.task(task, data_dir) for key, task in config.shared.targets.items()}
        if allow_code_execution:
            allow_execution(config.shared.model_copy(update={"allow_code_execution": True}), made.values())
        left_out = tuple(key for key, task in made.items() if isinstance(task, CodeTask) and task.executor is None)
        opened = cls(name, study, config, {k: t for k, t in made.items() if k not in left_out}, left_out)
        for cell in opened.cells():
            for target in opened.targets:
                if not cell.has_result(target, "trained"):
                    raise SPDError(
                        f"{folder} is not finished: {cell} has no scored completions of {target}; let the same "
                        "`spd-lens study` command continue it"
                    )
        return opened


def open_all(folders: Sequence[Path], data_dir: Path | None, allow_code_execution: bool) -> list[Opened]:
    """Studies of one model on the same items.

    Raises:
        SPDError: a folder that is no finished study, or studies of several models or items.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := [path for path in resolved if resolved.count(path) > 1]:
        raise SPDError(f"{twice[0]} is named twice; name each study once")
    short = [path.name for path in resolved]
    names = short if len(set(short)) == len(short) else [f"{path.parent.name}/{path.name}" for path in resolved]
    studies = [Opened.open(*each, data_dir, allow_code_execution) for each in zip(folders, names, strict=True)]
    first = studies[0]
    for other in studies[1:]:
        weights = [study.study.notes.get("weights") for study in (first, other)]
        if other.model != first.model or (all(weights) and weights[0] != weights[1]):
            raise SPDError(
                f"{first.name} is a study of {first.model} and {other.name} of "
                f"{other.model if other.model != first.model else 'other weights under that name'}; compare studies of "
                "one model"
            )
        for target in first.targets.keys() & other.targets.keys():
            ids = [{item.id for item in one.study.base().result(target).items} for one in (first, other)]
            if ids[0] != ids[1]:
                raise SPDError(
                    f"{first.name} and {other.name} were evaluated on different items of {target} ({len(ids[0])} and "
                    f"{len(ids[1])}, {len(ids[0] & ids[1])} in common); compare studies with the same n_eval and "
                    "data_seed, and the same order of items"
                )
    if not any(study.targets for study in studies):
        raise SPDError(
            f"every target of these studies scores programs that a model wrote ({', '.join(first.left_out)}); say "
            "--allow-code-execution to run them in the sandbox"
        )
    return studies


def differing(studies: Sequence[Opened]) -> dict[str, list[str]]:
    """The settings of training and generation in which studies differ, each with its value in every study."""
    plans = [{**one.config.settings, "source_settings": one.config.source_settings} for one in studies]
    task_options = [{"task_options": one.config.task_options} for one in studies]
    rows = [{**plan, **options} for plan, options in zip(plans, task_options, strict=True)]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: [str(row.get(key)) for row in rows]
        for key in keys
        if any(differ(key, rows[0].get(key), row.get(key)) for row in rows[1:])
    }


@dataclass
class Scored:
    """A task's completions under both of its scorers; a text is scored once, however often it comes up."""

    task: Task
    own: str = field(init=False)
    """The scorer that the study has: `final` or `reference`."""
    scorers: dict[str, Task] = field(init=False)
    known: dict[tuple[str, str, str], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.own = getattr(self.task, "scoring", FINAL)
        self.scorers = {self.own: self.task}
        for name in SCORERS:
            if name != self.own:
                try:
                    other = self.task.scored_by(name)
                    other.check_scorable()
                except SPDError:  # a task that has one way to score, or gold answers that the other cannot read
                    continue
                self.scorers[name] = other

    def score(self, scorer: str, item: Example, text: str) -> float:
        """What a scorer says of a text, in [0, 1]."""
        key = scorer, item.id, text
        if key not in self.known:
            self.known[key] = self.scorers[scorer].score(item, text)
        return self.known[key]

    def parts(self, item: Example, result: ItemResult) -> Iterator[dict[str, Any]]:
        """For each scorer, the score and what it is made of; with what the completion looks like."""
        text = result.completion
        cut = first_answer(self.task, text)
        final = self.scorers.get(FINAL, self.task)
        cut_off = result.finish_reason == "length"
        shown = {
            "ends by itself": float(not cut_off),
            "runs on": float(goes_on(self.task, text)),
            "cut at the limit": float(cut_off),
            "answer found": float(final.extract(cut) is not None),
            "asked form": float(final.in_asked_form(cut)),
            "tokens": float(result.n_tokens),
        }
        rest = self.score(FINAL if FINAL in self.scorers else self.own, item, cut)
        for scorer in sorted(self.scorers):
            own = scorer == self.own
            # a program's score is the one that the study found, without running it again
            kept = own and isinstance(self.task, CodeTask)
            whole = result.score if kept else self.score(scorer, item, text)
            of_cut = whole if cut == text else self.score(scorer, item, cut)
            parts = {"score": whole, "rest": rest, "format": of_cut - rest, "stopping": whole - of_cut}
            yield {"scorer": scorer, "own": own, **parts, **shown}


def completions(studies: Sequence[Opened]) -> pd.DataFrame:
    """Every completion of every study, scored in parts: `[row]` with the columns of `COLUMNS`, a row for each scorer.

    With `F` the rules that look for a stated final answer, `S` a scorer, and `cut` the completion up to the first
    question that follows its answer: `rest = F(cut)`, `format = S(cut) - F(cut)`, `stopping = S(whole) - S(cut)`, which
    add up to `score = S(whole)`. Rows of the base model have no source and no seed.

    Raises:
        SPDError: the data are not those that a study was evaluated on.
    """
    rows: list[dict[str, Any]] = []
    for one in studies:
        for target, task in one.targets.items():
            scored, items = Scored(task), _items(one, target, task)
            for cell in one.cells():
                place = {"study": one.name, "source": cell.source, "target": target, "method": cell.method}
                place["seed"] = "" if cell.method == BASE else str(cell.seed)
                for result in cell.result(target).items:
                    item = _same(one, target, items.get(result.id), result)
                    rows += [{**place, "item": item.id, **parts} for parts in scored.parts(item, result)]
    return pd.DataFrame(rows, columns=COLUMNS)


def rescored(studies: Sequence[Opened], frame: pd.DataFrame) -> int:
    """How many completions today's rules score otherwise than the study did when it was run."""
    kept = {
        (one.name, cell.source, target, cell.method, "" if cell.method == BASE else str(cell.seed), item.id): item.score
        for one in studies
        for target in one.targets
        for cell in one.cells()
        for item in cell.result(target).items
    }
    own = frame[frame.own]
    keys = own[["study", "source", "target", "method", "seed", "item"]].itertuples(index=False, name=None)
    return sum(kept[key] != score for key, score in zip(keys, own.score, strict=True))


def _items(one: Opened, target: str, task: Task) -> dict[str, Example]:
    name = one.config.shared.targets[target]
    return {item.id: item for item in task.test(one.config.n_scored(name), one.config.shared.data_seed)}


def _same(one: Opened, target: str, item: Example | None, result: ItemResult) -> Example:
    """The item of a result; refused where the data say something else than what was answered."""
    if item is None or item.completion != result.gold:
        raise SPDError(
            f"the data of {target} are not those that {one.name} was evaluated on (item {result.id} "
            f"{'is not there' if item is None else 'reads otherwise'}); give those with --data-dir"
        )
    return item
