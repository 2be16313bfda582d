"""Which factor moves the number: padding in the loss, prompt format, scorer and projection, crossed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spd_lens.analysis.gain.completions import SCORERS, Opened
from spd_lens.analysis.gain.split import N_RESAMPLES, flipped
from spd_lens.errors import SPDError
from spd_lens.generation import recorded_settings
from spd_lens.runs import named
from spd_lens.stats import Estimate, clustered_mean
from spd_lens.study import FOCUS, RANDOM

FACTORS: dict[str, tuple[str, ...]] = {
    "padding": ("off", "on"),
    "prompts": ("verbatim", "raw", "chat"),
    "scorer": tuple(SCORERS),
    "projection": ("none", "random", "spd"),
}
"""Every factor with its levels; an effect is the later level minus the earlier one."""
OUTCOMES = ("gain", "score", "ends by itself", "tokens")
"""`gain` is the score minus the base model's, of the same study and under the same scorer."""
UNPROJECTED = ("ssd-reference", "psr", "ssd", "ssd-config")
"""Methods that may stand for no projection, the nearest first."""
CELLS = ["source", "target", *FACTORS, "study", "method", "outcome", "value", "low", "high", "n", "n_seeds"]
EFFECTS = ["source", "target", "outcome", "effect", "contrast", "value", "low", "high", "n", "contexts", "p", "p_holm"]

_DIGITS = 12
"""Decimals that are kept of an item's contrast, so that what is 0 but for rounding is 0."""

Levels = tuple[str, ...]
"""A level of each factor, in the order of `FACTORS`."""


class Effect(NamedTuple):
    """A main effect, or an interaction of two factors."""

    factors: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    """The earlier and the later level of each factor."""
    by_item: np.ndarray
    """The contrast on each item: `[item]`."""
    contexts: int
    """Settings of the other factors that it is averaged over."""

    @property
    def name(self) -> str:
        return " × ".join(self.factors)

    @property
    def contrast(self) -> str:
        return "; ".join(f"{high} − {low}" for low, high in self.pairs)


def projections(one: Opened, source: str) -> dict[str, str]:
    """The methods of a study that are levels of the projection.

    `none` is a method that projects nothing and samples as `spd` does, by what was recorded beside their corpora.
    """
    there = one.config.trained
    found = {method: level for method, level in ((FOCUS, "spd"), (RANDOM, "random")) if method in there}

    def sampling(method: str) -> list[Any] | None:
        kept = recorded_settings(one.study.cell(source, method, one.config.seeds[0]).corpus_path)
        return None if kept is None else [kept.get(name) for name in ("temperature", "top_p", "top_k")]

    wanted = sampling(next(iter(found))) if found else None
    for method in UNPROJECTED:
        if method in there and (wanted is None or sampling(method) == wanted):
            return {method: "none", **found}
    return found


def prompt_format(one: Opened) -> str:
    """The form of a study's prompts, as it was decided when the study ran."""
    kept = one.study.base().result(next(iter(one.targets))).settings
    return str(kept.get("prompt_format", one.config.settings["prompt_format"]))


def grid(studies: Sequence[Opened]) -> pd.DataFrame:
    """Every study, source and method that is a point of the factorial, with its levels of all factors but the scorer.

    Returns:
        Columns `study, source, method, padding, prompts, projection`.

    Raises:
        SPDError: two studies that are the same point.
    """
    rows = []
    for one in studies:
        for source, name in named(one.config.sources).items():
            padded = one.config.cell(name, one.config.seeds[0]).loss_on_padding
            place = {"padding": FACTORS["padding"][int(padded)], "prompts": prompt_format(one)}
            for method, projection in projections(one, source).items():
                rows.append({"study": one.name, "source": source, "method": method, **place, "projection": projection})
    points = pd.DataFrame(rows, columns=["study", "source", "method", "padding", "prompts", "projection"])
    twice = points[points.duplicated(["source", "padding", "prompts", "projection"], keep=False)]
    if not twice.empty:
        first, second = twice[twice.source == twice.source.iloc[0]].study.unique()[:2]
        row = twice.iloc[0]
        raise SPDError(
            f"{first} and {second} are one point of the factorial (source {row.source}, prompt format {row.prompts}, "
            f"padding in the loss {row.padding}, {row.method}); leave one of them out"
        )
    return points


def cells(frame: pd.DataFrame, points: pd.DataFrame) -> dict[tuple[str, str], dict[Levels, pd.DataFrame]]:
    """The outcomes of every point, seeds averaged, on the items that all points of a source and target share.

    Args:
        frame: From `completions`.
        points: From `grid`.

    Returns:
        By `(source, target)` and by levels, a table `[item, outcome]`; `attrs` has study, method and number of seeds.
    """
    found: dict[tuple[str, str], dict[Levels, pd.DataFrame]] = {}
    base = frame[frame.source == ""].set_index(["study", "target", "scorer", "item"]).score.sort_index()
    for row in points.itertuples():
        own = frame[(frame.study == row.study) & (frame.source == row.source) & (frame.method == row.method)]
        for (target, scorer), part in own.groupby(["target", "scorer"], sort=False):
            table = part.groupby("item")[["score", "ends by itself", "tokens"]].mean()
            table.insert(0, "gain", table.score - base.loc[row.study, target, scorer].reindex(table.index))
            table.attrs = {"study": row.study, "method": row.method, "n_seeds": part.seed.nunique()}
            levels: Levels = (row.padding, row.prompts, scorer, row.projection)
            found.setdefault((row.source, target), {})[levels] = table
    for tables in found.values():
        shared = sorted(set.intersection(*(set(table.index) for table in tables.values())))
        for levels, table in tables.items():
            tables[levels] = table.loc[shared]
    return found


def cell_table(found: Mapping[tuple[str, str], Mapping[Levels, pd.DataFrame]]) -> pd.DataFrame:
    """The mean of every outcome at every point, with its interval over items: columns `CELLS`."""
    rows = []
    for (source, target), tables in found.items():
        for levels, table in tables.items():
            place = {"source": source, "target": target, **dict(zip(FACTORS, levels, strict=True)), **table.attrs}
            for outcome in OUTCOMES:
                values = table[outcome].to_numpy()
                estimate = (
                    _estimate(values) if outcome == "gain" else clustered_mean(values[None], n_resamples=N_RESAMPLES)
                )
                rows.append({**place, "outcome": outcome, **estimate.to_row()})
    return pd.DataFrame(rows, columns=CELLS)


def constant(tables: Mapping[Levels, Any]) -> dict[str, str]:
    """The factors that do not vary, with their level."""
    seen = {factor: {levels[place] for levels in tables} for place, factor in enumerate(FACTORS)}
    return {factor: next(iter(values)) for factor, values in seen.items() if len(values) == 1}


def effects(by_item: Mapping[Levels, np.ndarray], *, without: Sequence[str] = ()) -> Iterator[Effect]:
    """Main effects and interactions of two factors, on every item.

    Factors are coded ±½: a main effect is the difference of the later and the earlier level, an interaction the
    difference of two differences. Each is averaged over the settings of the other factors in which all its levels were
    run, every setting with the same weight: these are the coefficients of the saturated linear model where everything
    was crossed (Box, Hunter & Hunter 2005, chapter 5).

    Args:
        by_item: An outcome of every point, `[item]`.
        without: Factors that the outcome does not depend on; the first level that there is stands for all.
    """
    names = list(FACTORS)
    for factor in without:
        place = names.index(factor)
        first = min((levels[place] for levels in by_item), key=FACTORS[factor].index, default="")
        by_item = {levels: values for levels, values in by_item.items() if levels[place] == first}
    present = [
        [v for v in values if any(v == x[place] for x in by_item)] for place, values in enumerate(FACTORS.values())
    ]
    varying = [place for place, values in enumerate(present) if len(values) > 1]
    for places in (*itertools.combinations(varying, 1), *itertools.combinations(varying, 2)):
        others = [values if place not in places else [""] for place, values in enumerate(present)]
        for pairs in itertools.product(*(itertools.combinations(present[place], 2) for place in places)):
            found = [_contrast(by_item, context, places, pairs) for context in itertools.product(*others)]
            complete = [values for values in found if values is not None]
            if complete:
                factors = tuple(names[place] for place in places)
                mean = np.mean(complete, axis=0).round(_DIGITS)
                yield Effect(factors, pairs, mean, len(complete))


def _contrast(
    by_item: Mapping[Levels, np.ndarray], context: Levels, places: Sequence[int], pairs: Sequence[tuple[str, str]]
) -> np.ndarray | None:
    """The signed sum over all levels of some factors, the others as in `context`; None where a point was not run."""
    total = np.zeros(())
    for chosen in itertools.product((0, 1), repeat=len(places)):
        levels = list(context)
        for place, pair, high in zip(places, pairs, chosen, strict=True):
            levels[place] = pair[high]
        values = by_item.get(tuple(levels))
        if values is None:
            return None
        total = total + (-1) ** (len(places) - sum(chosen)) * values
    return total


def effect_table(found: Mapping[tuple[str, str], Mapping[Levels, pd.DataFrame]]) -> pd.DataFrame:
    """All effects with intervals over items, the largest of each outcome first: columns `EFFECTS`.

    p-values are of sign flips over items, for the gain alone, corrected (Holm) for all effects on gains of the table.
    """
    rows: list[dict[str, Any]] = []
    for (source, target), tables in found.items():
        for outcome in OUTCOMES:
            without = ["scorer"] if outcome in ("ends by itself", "tokens") else []
            by_item = {levels: table[outcome].to_numpy() for levels, table in tables.items()}
            for effect in effects(by_item, without=without):
                place = {"source": source, "target": target, "outcome": outcome, "effect": effect.name}
                told = {"contrast": effect.contrast, "contexts": effect.contexts, "by_item": effect.by_item}
                rows.append({**place, **_estimate(effect.by_item).to_row(), **told})
    family = [row for row in rows if row["outcome"] == "gain"]
    for row, (p, p_holm) in zip(family, flipped([row["by_item"] for row in family]), strict=True):
        row["p"], row["p_holm"] = p, p_holm
    table = pd.DataFrame(rows, columns=EFFECTS)
    order = table.outcome.map(OUTCOMES.index)
    size = -table.value.abs()
    return table.assign(order=order, size=size).sort_values(["order", "size"], kind="stable")[EFFECTS]


def _estimate(by_item: np.ndarray) -> Estimate:
    """The mean with its interval; none where no item shows any effect."""
    if not by_item.any():
        return Estimate(0.0, -np.inf, np.inf, len(by_item), "no item differs")
    return clustered_mean(by_item[None], n_resamples=N_RESAMPLES)
