"""`Evidence`: the files of a study as tables, and what was planned and is missing in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spd_lens import methods
from spd_lens.errors import SPDError
from spd_lens.files import fitting, read_csv, read_json
from spd_lens.runs import Notes, read_kept, result_name
from spd_lens.stats import Finding
from spd_lens.study.config import BASE, may_project
from spd_lens.subspaces import FINDINGS, read_findings

COLUMNS = ["source", "target", "role", "method", "phase", "seed", "item", "measure", "value"]
"""The columns of `results.csv`, which has one row per item and measure."""
PRIMARY = ("aligned loss", "results loss", "KL from base")
"""The primary outcomes are paired and teacher-forced, so that small effects show; accuracy comes second."""
ORDER = (
    *PRIMARY, "accuracy", "accuracy by likelihood", "answer-only loss", "copied-answer loss", "loss on the rest",
    "completion loss", "token accuracy", "format", "finished", "tokens",
)  # fmt: skip
"""Measures in the order of tables: primary ones, then accuracy, then the rest."""


class Outcome(NamedTuple):
    """What one group of rows measures."""

    source: str
    target: str
    role: str
    phase: str
    method: str
    measure: str

    @property
    def home(self) -> Outcome:
        """Where its values are kept: the base has one result for all sources and phases."""
        return self._replace(source="", phase="") if self.method == BASE else self


@dataclass(frozen=True)
class Evidence:
    """A study's folder, read once."""

    name: str
    results: pd.DataFrame
    """`results.csv` without rows that have no value."""
    corpora: pd.DataFrame
    """`corpora.csv`; empty where there is none."""
    plan: Mapping[str, Any]
    """`study.yaml`; empty where there is none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """`study.json`; empty where there is none."""
    infinite: list[str] = field(default_factory=list)
    """What was left out because it was infinite, one sentence per method and measure."""
    findings: Sequence[Finding] = ()
    """`findings.json`; empty where there is none."""

    @classmethod
    def read(cls, folder: str | Path) -> Evidence:
        """Read the files of a study, finished or not.

        Raises:
            SPDError: no results yet, or files that are not a study's.
        """
        folder = Path(folder)
        if not (folder / "results.csv").is_file():
            raise SPDError(f"{folder} has no results.csv, so no study has finished a cell there; run `spd-lens study`")
        results = read_csv(folder / "results.csv", dtype=str, keep_default_na=False)  # "NA" may be a name
        lacking = [column for column in COLUMNS if column not in results]
        if lacking:
            raise SPDError(f"{folder / 'results.csv'} has no column {lacking[0]!r}; give the folder of a study")
        path = folder / "corpora.csv"
        corpora = read_csv(path, dtype={"seed": str}) if path.is_file() else pd.DataFrame()
        path = folder / "study.json"
        facts = read_json(path) if path.is_file() else {}
        fitting(Notes, facts, path)
        path = folder / "study.yaml"
        plan = read_kept(path) if path.is_file() else {}
        findings = read_findings(folder) if (folder / FINDINGS).is_file() else ()
        return replace(cls.of(results, plan, corpora, facts, folder.resolve().name), findings=findings)

    @classmethod
    def of(
        cls,
        results: pd.DataFrame,
        plan: Mapping[str, Any] | None = None,
        corpora: pd.DataFrame | None = None,
        facts: Mapping[str, Any] | None = None,
        name: str = "study",
    ) -> Evidence:
        """Take tables that are at hand instead of files."""
        results = results.loc[:, COLUMNS].copy()
        results["value"] = pd.to_numeric(results["value"], errors="coerce")
        for column in (*Outcome._fields, "item"):
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
        """The base first, then the planned methods, then others that there are results of."""
        return _union([BASE], self.plan.get("methods") or [], self.results["method"].unique())

    @property
    def trained(self) -> list[str]:
        """The methods that train, which is all but the base model."""
        return [method for method in self.methods if method != BASE]

    @cached_property
    def sources(self) -> list[str]:
        """The tasks that methods are trained on."""
        planned = [result_name(str(name)) for name in self.plan.get("sources") or []]
        return _union(planned, self.results["source"].unique())

    @cached_property
    def targets(self) -> list[str]:
        """The tasks that the study evaluates on."""
        planned = [result_name(str(name)) for name in self.plan.get("targets") or []]
        return _union(planned, self.results.loc[self.results["role"] == "target", "target"].unique())

    @cached_property
    def side_effects(self) -> list[str]:
        """Texts that a method is not meant to change."""
        return _union(self.results.loc[self.results["role"] == "side effect", "target"].unique())

    @cached_property
    def seeds(self) -> list[str]:
        """The seeds of sampling and training."""
        return _union(self.plan.get("seeds") or [], self.results["seed"].unique())

    @cached_property
    def _tables(self) -> dict[Outcome, pd.DataFrame]:
        """For every outcome, its values as `[seed, item]`."""
        return {
            Outcome(*map(str, key)): part.pivot(index="seed", columns="item", values="value")
            for key, part in self.results.groupby(list(Outcome._fields), sort=False)
        }

    def scores(self, outcome: Outcome) -> pd.DataFrame | None:
        """Values as `[seed, item]` of the items that every seed has; None where there are no values."""
        table = self._tables.get(outcome.home)
        return None if table is None else table.dropna(axis="columns")

    def items(self, outcome: Outcome) -> set[str]:
        """Items that at least one seed has."""
        return set(self._tables.get(outcome.home, ()))

    def outcomes(self) -> Iterator[Outcome]:
        """Everything that was measured, in the order of tables: measures vary fastest, then methods."""
        measures = in_order(self.results["measure"])
        measured = {(outcome.source, outcome.phase, outcome.role, outcome.target) for outcome in self._tables}
        places = [("target", target) for target in self.targets] + [("side effect", t) for t in self.side_effects]
        for source, phase, (role, target) in itertools.product(self.sources, ("trained", "projected"), places):
            if (phase, role) != ("trained", "target") and (source, phase, role, target) not in measured:
                continue  # nothing but the base: another source's side effect, or a phase without results
            for method, measure in itertools.product(self.methods, measures):
                outcome = Outcome(source, target, role, phase, method, measure)
                if outcome.home in self._tables:
                    yield outcome

    def missing(self) -> list[str]:
        """One sentence for each gap between plan and results: a report says what it lacks."""
        rows = self.results[self.results["role"] == "target"]
        keys = ["source", "method", "seed", "phase", "target"]
        have = {tuple(map(str, key)): set(part) for key, part in rows.groupby(keys)["measure"]}
        wanted: dict[str, set[str]] = {target: set() for target in self.targets}
        for (*_, phase, target), measures in have.items():
            wanted[target] |= measures if phase != "projected" else set()

        def lacking(source: str, method: str, seed: str, phase: str) -> dict[str, set[str]]:
            """The measures that have no results, by target."""
            return {t: wanted[t] - have.get((source, method, seed, phase, t), set()) for t in wanted}

        of_base = {target: lost - {"KL from base"} for target, lost in lacking("", BASE, "", "").items()}
        lines = [*_gaps(BASE, {"": of_base}, wanted)]
        for source, method in itertools.product(self.sources, self.trained):
            lost = {seed: lacking(source, method, seed, "trained") for seed in self.seeds}
            lines += _gaps(f"{method} from {source}", lost, wanted)
        return [*lines, *self._missing_phases(), *self.infinite]

    def _missing_phases(self) -> list[str]:
        """Sentences on phases and side effects that other methods of the study have."""
        lines = []
        found = {(outcome.source, outcome.method, outcome.phase, outcome.role) for outcome in self._tables}
        for source, method in itertools.product(self.sources, self.trained):
            if (source, method, "trained", "target") in found:
                if self.side_effects and (source, method, "trained", "side effect") not in found:
                    lines.append(f"{method} from {source} has no side effects measured")
                projects = method in methods.names() and may_project(method)
                if projects and (source, method, "projected", "target") not in found:
                    lines.append(f"{method} from {source} has no results under its projection, before training")
        return lines


def _gaps(who: str, lost: Mapping[str, Mapping[str, set[str]]], wanted: Mapping[str, set[str]]) -> Iterator[str]:
    """Sentences on the measures in `lost[seed][target]`; seeds that lack the same share a sentence."""
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


def in_order(measures: Iterable[str]) -> list[str]:
    """Measures in the order of tables: those of `ORDER`, then others by name."""
    known = set(measures)
    return [measure for measure in ORDER if measure in known] + sorted(known - set(ORDER))


def _seed(value: object) -> str:
    """The text of a seed: `42`, `42.0` and `"42"` are one seed, and no seed is the empty string."""
    if value is None or value == "" or value != value:  # NaN
        return ""
    return str(int(float(str(value)))) if str(value).replace(".", "", 1).isdigit() else str(value)


def _union(*groups: Any) -> list[str]:
    return [name for name in dict.fromkeys(str(name) for group in groups for name in group) if name]
