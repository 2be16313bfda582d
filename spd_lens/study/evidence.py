"""`Evidence`: the files of a study as tables, and what of its plan is missing in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spd_lens import methods
from spd_lens.config import check_whole, read_yaml
from spd_lens.errors import SPDError
from spd_lens.methods import Method
from spd_lens.storage import read_json

COLUMNS = ("source", "target", "role", "method", "phase", "seed", "item", "measure", "value")
"""Of `results.csv`: one row per item and measure."""
PRIMARY = ("aligned loss", "KL from base")
"""What decides: paired and teacher-forced, so that small effects show; accuracy comes second."""
ORDER = (
    *PRIMARY, "accuracy", "accuracy by likelihood", "completion loss", "token accuracy", "format", "finished", "tokens",
)  # fmt: skip
"""Measures in the order of tables: primary ones, then accuracy, then the rest."""
BASE = "base"


class Outcome(NamedTuple):
    """What one group of rows measures."""

    source: str
    target: str
    role: str
    phase: str
    method: str
    measure: str


@dataclass(frozen=True)
class Evidence:
    """A study's folder, read once."""

    name: str
    results: pd.DataFrame
    """`results.csv`, rows without a value left out."""
    corpora: pd.DataFrame
    """`corpora.csv`; empty where there is none."""
    plan: Mapping[str, Any]
    """`study.yaml`; empty where there is none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """`study.json`; empty where there is none."""
    infinite: list[str] = field(default_factory=list)
    """What was left out because it was infinite, one sentence per method and measure."""

    @classmethod
    def read(cls, folder: str | Path) -> Evidence:
        """Read the files of a study, finished or not.

        Raises:
            SPDError: no results yet, or files that are not a study's.
        """
        folder = Path(folder)
        if not (folder / "results.csv").is_file():
            raise SPDError(f"{folder} has no results.csv, so no study has finished a cell there; run `spd-lens study`")
        results = _read_csv(folder / "results.csv", dtype=str, keep_default_na=False)  # "NA" may be a name
        lacking = [column for column in COLUMNS if column not in results]
        if lacking:
            raise SPDError(f"{folder / 'results.csv'} has no column {lacking[0]!r}; give the folder of a study")
        path = folder / "corpora.csv"
        corpora = _read_csv(path, dtype={"seed": str}) if path.is_file() else pd.DataFrame()
        path = folder / "study.json"
        facts = read_json(path) if path.is_file() else {}
        return cls.of(results, _read_plan(folder / "study.yaml"), corpora, facts, folder.resolve().name)

    @classmethod
    def of(
        cls,
        results: pd.DataFrame,
        plan: Mapping[str, Any] | None = None,
        corpora: pd.DataFrame | None = None,
        facts: Mapping[str, Any] | None = None,
        name: str = "study",
    ) -> Evidence:
        """From tables at hand."""
        results = results.loc[:, list(COLUMNS)].copy()
        results["value"] = pd.to_numeric(results["value"], errors="coerce")
        for column in ("source", "target", "role", "method", "phase", "item", "measure"):
            results[column] = results[column].fillna("").astype(str)
        results["seed"] = results["seed"].map(_seed)
        endless = results[np.isinf(results["value"])].groupby(["method", "measure", "target"], sort=False).size()
        infinite = [f"{m} has {n} infinite values of {what} on {t}, left out" for (m, what, t), n in endless.items()]
        results = results[np.isfinite(results["value"])]
        is_base = results["method"] == BASE
        results.loc[is_base, ["source", "phase", "seed"]] = ""
        repeated = results.duplicated([c for c in COLUMNS if c != "value"])
        if repeated.any():
            row = results[repeated].iloc[0]
            raise SPDError(
                f"the results have item {row['item']} of {row['target']} twice for {row['method']} "
                f"({row['measure']}); rewrite results.csv from the study's files"
            )
        corpora = pd.DataFrame() if corpora is None else corpora
        return cls(name, results, corpora, plan or {}, facts or {}, infinite)

    @cached_property
    def methods(self) -> list[str]:
        """Base first, then as planned, then what there are results of."""
        return _union([BASE], self.plan.get("methods") or [], self.results["method"].unique())

    @cached_property
    def sources(self) -> list[str]:
        return _union(map(_task, self.plan.get("sources") or []), self.results["source"].unique())

    @cached_property
    def targets(self) -> list[str]:
        """The tasks that the study evaluates on."""
        planned = map(_task, self.plan.get("targets") or [])
        return _union(planned, self.results.loc[self.results["role"] == "target", "target"].unique())

    @cached_property
    def side_effects(self) -> list[str]:
        """Texts that a method is not meant to change."""
        return _union(self.results.loc[self.results["role"] == "side effect", "target"].unique())

    @cached_property
    def seeds(self) -> list[str]:
        return _union(map(str, self.plan.get("seeds") or []), self.results["seed"].unique())

    @cached_property
    def _tables(self) -> dict[Outcome, pd.DataFrame]:
        """For every outcome, its values as `[seed, item]`."""
        keys = ["source", "target", "role", "phase", "method", "measure"]
        return {
            Outcome(*map(str, key)): part.pivot(index="seed", columns="item", values="value")
            for key, part in self.results.groupby(keys, sort=False)
        }

    def scores(self, outcome: Outcome) -> pd.DataFrame | None:
        """Values as `[seed, item]`, of the items that every seed has; None where there are none.

        The base has one result for all sources and phases.
        """
        if outcome.method == BASE:
            outcome = outcome._replace(source="", phase="")
        table = self._tables.get(outcome)
        return None if table is None else table.dropna(axis="columns")

    def items(self, outcome: Outcome) -> set[str]:
        """Items that at least one seed has."""
        if outcome.method == BASE:
            outcome = outcome._replace(source="", phase="")
        return set(self._tables[outcome].columns) if outcome in self._tables else set()

    def outcomes(self) -> Iterator[Outcome]:
        """Everything that could have been measured, in the order of tables; methods innermost but measures."""
        found = set(self._tables)
        measured = {(outcome.source, outcome.phase, outcome.role, outcome.target) for outcome in found}
        places = [("target", target) for target in self.targets] + [("side effect", t) for t in self.side_effects]
        for source, phase, (role, target) in itertools.product(self.sources, ("trained", "projected"), places):
            if (phase, role) != ("trained", "target") and (source, phase, role, target) not in measured:
                continue  # the base alone: another source's side effect, or nothing was measured in this phase
            for method, measure in itertools.product(self.methods, self.measures):
                outcome = Outcome(source, target, role, phase, method, measure)
                at_home = outcome._replace(source="", phase="") if method == BASE else outcome
                if at_home in found:
                    yield outcome

    @cached_property
    def measures(self) -> list[str]:
        known = set(self.results["measure"])
        return [m for m in ORDER if m in known] + sorted(known - set(ORDER))

    def missing(self) -> list[str]:
        """What was planned and has no results, one sentence each; a report says so instead of leaving it out."""
        rows = self.results[self.results["role"] == "target"]
        have: dict[tuple[str, ...], set[str]] = {}
        for key, measure in zip(
            rows[["source", "method", "seed", "phase", "target"]].itertuples(index=False, name=None),
            rows["measure"], strict=True,
        ):  # fmt: skip
            have.setdefault(tuple(map(str, key)), set()).add(measure)
        wanted: dict[str, set[str]] = {target: set() for target in self.targets}
        for (*_, phase, target), measures in have.items():
            if phase != "projected":
                wanted[target] |= measures
        of_base = {t: wanted[t] - {"KL from base"} - have.get(("", BASE, "", "", t), set()) for t in wanted}
        lines = [*_gaps(BASE, {"": of_base}, wanted)]
        trained = [method for method in self.methods if method != BASE]
        for source, method in itertools.product(self.sources, trained):
            lost = {
                seed: {t: wanted[t] - have.get((source, method, seed, "trained", t), set()) for t in wanted}
                for seed in self.seeds
            }
            lines += _gaps(f"{method} from {source}", lost, wanted)
        return [*lines, *self._missing_phases(), *self.infinite]

    def _missing_phases(self) -> list[str]:
        """Phases and side effects that other methods of the study have."""
        lines = []
        found = {(outcome.source, outcome.method, outcome.phase, outcome.role) for outcome in self._tables}
        for source, method in itertools.product(self.sources, [m for m in self.methods if m != BASE]):
            if (source, method, "trained", "target") in found:
                if self.side_effects and (source, method, "trained", "side effect") not in found:
                    lines.append(f"{method} from {source} has no side effects measured")
                if projects(method) and (source, method, "projected", "target") not in found:
                    lines.append(f"{method} from {source} has no results under its projection, before training")
        return lines


def _gaps(who: str, lost: Mapping[str, Mapping[str, set[str]]], wanted: Mapping[str, set[str]]) -> Iterator[str]:
    """Sentences on `lost[seed][target]`, seeds that lack the same in one."""
    said: dict[str, list[str]] = {}
    for seed, targets in lost.items():
        none = [t for t, measures in targets.items() if measures >= wanted[t] - {"KL from base"}]
        if len(none) == len(targets):
            said.setdefault("no results", []).append(seed)
            continue
        if none:
            said.setdefault(f"no results on {', '.join(none)}", []).append(seed)
        for target, measures in targets.items():
            if measures and target not in none:
                said.setdefault(f"no {', '.join(sorted(measures))} on {target}", []).append(seed)
    for what, seeds in said.items():
        which = f", seed {', '.join(seeds)}," if len(seeds) < len(lost) else ""
        yield f"{who}{which} has {what}"


def projects(method: str) -> bool:
    """Whether a method generates under a projection; False for one that this installation does not know."""
    return method in methods.names() and type(methods.get(method)).projection is not Method.projection


def _seed(value: object) -> str:
    """`42`, `42.0` and `"42"` are one seed; none is the empty string."""
    if value is None or value == "" or value != value:  # NaN
        return ""
    return str(int(float(str(value)))) if str(value).replace(".", "", 1).isdigit() else str(value)


def _task(name: str) -> str:
    """The name that results of a task are kept under: a file of one's own by its stem."""
    return Path(name).stem if str(name).endswith(".jsonl") else str(name)


def _union(*groups: Any) -> list[str]:
    return [name for name in dict.fromkeys(str(name) for group in groups for name in group) if name]


def _read_csv(path: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, **options)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SPDError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error


def _read_plan(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    check_whole(path)
    return read_yaml(path)
