"""What both sweeps measure: every cell of a grid, teacher-forced, beside random subspaces of its shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from spd_lens.analysis.common import (
    Contrast,
    Estimated,
    Values,
    beside_random,
    by_item,
    contrasts,
    deciding,
    matched_draws,
)
from spd_lens.analysis.sweeps.grid import Grid, GridCell
from spd_lens.analysis.sweeps.store import FORCED, MEASURES, OTHER_TEXT, Measured, Store
from spd_lens.evaluation import ForcedPasses, teacher_forced, with_answer_only
from spd_lens.examples import Example
from spd_lens.models import ModelPair, neutrally, weights_digest
from spd_lens.runs import Folder
from spd_lens.stats import mean_interval
from spd_lens.subspaces import GradientMoments, Policy, Subspace
from spd_lens.tasks import Task

_UNMATCHED = dict.fromkeys(("matched", "matched_low", "matched_high"))
_TOGETHER = 24
"""Subspaces for each pass of the base model, which then is a small part of the work."""


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: the items under the base model, and under every cell."""

    base: Values
    cells: list[Measured]

    @property
    def measures(self) -> list[str]:
        """What the base model and every cell were measured by; a sweep made before a measure was known lacks it."""
        values = [self.base, *(one for cell in self.cells for one in (cell.own, *cell.random))]
        return [name for name in MEASURES if all(name in one for one in values)]

    def table(self) -> pd.DataFrame:
        """One row per cell and measure, all in nats per token, with 95 % intervals.

        `value` is the paired change from the base model, `low` and `high` its bootstrap interval over items; `random`
        is the same for the mean over random subspaces of the same ranks at the same sites, `random_low` and
        `random_high` the smallest and largest of them. `difference` is the cell minus random with an interval over
        items and draws, and `p_holm` is corrected over the cells. `matched` compares with random
        subspaces of the same KL, interpolated between ranks, for the loss that decides; it is empty if no random
        subspace did as much damage. `n_items` is smaller where some items have no token of a kind.
        """
        rows = []
        for measure in self.measures:
            own = [cell.change(self.base, measure) for cell in self.cells]
            random = [cell.random_change(self.base, measure) for cell in self.cells]
            against = contrasts(own, random)
            matched = self._matched(measure) if measure == deciding(self.measures) else {}
            for i, cell in enumerate(self.cells):
                interval = mean_interval(own[i])
                rows.append(
                    {
                        **_columns(cell), "measure": measure, "value": interval.value, "low": interval.low,
                        "high": interval.high, **beside_random(random[i], against[i]), "p_holm": against[i].p_holm,
                        **(matched[i].columns("matched") if i in matched else _UNMATCHED),
                        "n_items": len(own[i]), "n_random": len(random[i]),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def placebo(self, measure: str) -> pd.DataFrame:
        """The same test with each random subspace in the place of the cell, against the other draws of its cell.

        One row per cell and draw with `cell`, `draw`, `p` and `p_holm` (corrected over the cells, as in `table`).
        Random subspaces differ from each other by chance alone, so what passes here says how far to trust `table`.
        """
        rows = []
        random = [cell.random_change(self.base, measure) for cell in self.cells]
        for draw in range(min(len(draws) for draws in random)):
            others = [np.delete(draws, draw, axis=0) for draws in random]
            for cell, found in zip(self.cells, contrasts([d[draw] for d in random], others), strict=True):
                rows.append({"cell": cell.cell.name, "draw": draw, "p": found.p, "p_holm": found.p_holm})
        return pd.DataFrame(rows)

    def _matched(self, measure: str) -> dict[int, Contrast]:
        """The cells against random subspaces of the same KL, by the number of the cell, if there are such."""
        found: dict[int, np.ndarray] = {}
        for i, cell in enumerate(self.cells):
            ladder = [
                (other.random_change(self.base, "kl").mean(axis=1), other.random_change(self.base, measure))
                for other in self.cells
                if other.cell.family == cell.cell.family
            ]
            draws = matched_draws(float(cell.own["kl"].mean()), ladder)
            if draws is not None:
                found[i] = draws
        against = contrasts([self.cells[i].change(self.base, measure) for i in found], list(found.values()))
        return dict(zip(found, against, strict=True))


@neutrally
def sweep(
    pair: ModelPair,
    moments: GradientMoments,
    items: Sequence[Example],
    grid: Grid,
    *,
    folder: str | Path | None = None,
    strength: float = 1.0,
    center: bool = False,
    center_gradients: bool = False,
    estimated: Estimated | None = None,
    answer_only: Task | None = None,
    texts: Sequence[Example] = (),
    chunk: int | None = None,
    progress: bool = True,
) -> Sweep:
    """The outcomes of `OUTCOMES` side by side of every cell of a grid, teacher-forced on held-out items.

    One extraction serves all cells. The base model's pass is shared by all cells, and no layer below a cell's first
    one is run again. The cost is about `cells × (1 + n_random)` forward passes over the layers from the first projected
    one on.

    Args:
        pair: The model.
        moments: Moments at all layers of the grid.
        items: Gold completions with spans, held out from calibration.
        grid: The combinations to try.
        folder: Folder that keeps finished chunks of cells: a sweep that was killed continues, a larger grid adds cells.
        strength: Strength of the projections.
        center: Project around the mean activation.
        center_gradients: Take the subspaces from the gradients around their mean.
        estimated: Where subspaces come from, whose centring is then the one above; None: the moments (Eq. 9-11).
        answer_only: Task of the items, which are then also asked for the answer alone (a pass of its own).
        texts: Texts of another kind (`other_texts()`), on which KL from base is measured too (a pass of its own).
        chunk: Number of cells measured together: more need the base model's logits less often, and lose more when
            killed. None: as many as make 24 subspaces.
        progress: Show a progress bar.

    Raises:
        SPDError: The grid asks for what the moments or the model do not have, or `folder` holds a sweep with other
            settings.
    """
    cells = grid.cells(moments)
    store = Store(None if folder is None else Path(folder), len(items))
    with contextlib.nullcontext() if folder is None else Folder(folder).locked():
        also = {
            "center_gradients": center_gradients, "answer_only": answer_only is not None,
            "other_texts": [text.id for text in texts],
            "estimator": "" if estimated is None or estimated.is_paper else estimated.name,
        }  # fmt: skip
        store.check(_settings(pair, moments, items, grid, float(strength), center, also))
        todo = [cell for cell in cells if cell.name not in store]
        passes = ForcedPasses(pair, {cell.first_layer for cell in todo}, keep=True)
        chunk = chunk or max(1, _TOGETHER // (1 + grid.n_random))
        done = len(cells) - len(todo)
        with tqdm(total=len(cells), initial=done, desc="sweep", unit="cell", disable=not progress) as bar:
            for start in range(0, len(todo), chunk):
                cut = todo[start : start + chunk]
                how: dict[str, Any] = {"center": center, "center_gradients": center_gradients}
                chosen = [cell.estimated(estimated) if estimated else cell.subspace(moments, **how) for cell in cut]
                named = {cell.name: subspace for cell, subspace in zip(cut, chosen, strict=True)}
                found = measure(
                    pair, items, beside_controls(named, grid.n_random, grid.seed, strength), answer_only=answer_only,
                    texts=texts, passes=passes, batch_tokens=grid.batch_tokens,
                )  # fmt: skip
                _keep(store, zip(cut, chosen, strict=True), found, grid.n_random)
                bar.update(len(cut))
        return Sweep(store.base, [store.get(cell) for cell in cells])


def _keep(
    store: Store, chosen: Iterable[tuple[GridCell, Subspace]], found: Mapping[str, Values], n_random: int
) -> None:
    """Keep cells, and the base model where it is not kept yet."""
    if "base" not in store:
        store.base = found["base"]
    for cell, subspace in chosen:
        ranks = tuple(rank for site in subspace.sites for rank in subspace.ranks[site])
        store.put(Measured(cell, ranks, found[cell.name], [found[f"{cell.name}/{i}"] for i in range(n_random)]))


def _settings(
    pair: ModelPair,
    moments: GradientMoments,
    items: Sequence[Example],
    grid: Grid,
    strength: float,
    center: bool,
    also: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides a cell's numbers. Ranks, layers, kinds and heads do not: a folder can take more cells.

    What is in `also` is recorded only where it does something, since earlier sweeps lack it.
    """
    checksum = sum(float(moments.gradient[site].sum()) for site in moments.sites)
    return {
        "model": pair.name,
        "dtype": str(pair.dtype).removeprefix("torch."),
        **pair.format.settings,
        "items": [item.id for item in items],
        **grid.model_dump(include={"task", "n_random", "seed", "batch_tokens"}),
        "strength": strength,
        "center": center,
        "moments": [int(moments.n_examples.sum()), int(moments.n_tokens.sum()), f"{checksum:.9g}"],
        "weights": weights_digest(pair.hf),
        **{name: value for name, value in also.items() if value},
    }


def beside_controls(chosen: Mapping[str, Subspace], n_random: int, seed: int, strength: float) -> list[Policy]:
    """The base model; each subspace under its name, and `NAME/0`, `NAME/1`, ...: random ones of the same ranks."""
    policies = [Policy("base")]
    for name, subspace in chosen.items():
        policies.append(Policy(name, subspace, strength))
        policies += [Policy(f"{name}/{i}", subspace.random_like(seed + i), strength) for i in range(n_random)]
    return policies


@neutrally
def measure(
    pair: ModelPair,
    items: Sequence[Example],
    policies: Sequence[Policy],
    *,
    passes: ForcedPasses | None = None,
    batch_tokens: int = 1024,
    answer_only: Task | None = None,
    texts: Sequence[Example] = (),
) -> dict[str, Values]:
    """`teacher_forced` as arrays, one number per item; `passes` as there."""
    how: dict[str, Any] = {"passes": passes, "batch_tokens": batch_tokens, "progress": False}
    found = teacher_forced(pair, items, policies, **how)
    if answer_only is not None:
        found = with_answer_only(pair, answer_only, items, policies, found, passes=passes, progress=False)
    values = {policy: by_item(rows, FORCED) for policy, rows in found.items()}
    if texts:
        for policy, rows in teacher_forced(pair, texts, policies, **how).items():
            values[policy][OTHER_TEXT] = by_item(rows, ["kl"])["kl"]
    return values


def _columns(measured: Measured) -> dict[str, Any]:
    cell = measured.cell
    return {
        "cell": cell.name,
        "site": " ".join(map(str, cell.sites)),
        "layers": cell.layers,
        "layer": str(cell.first_layer) if len({s.layer for s in cell.sites}) == 1 else "several",
        "kind": cell.kinds,
        "head": cell.head,
        "projector": cell.projector,
        "rank": cell.rank,
        "width": cell.width,
        "least_rank": min(measured.ranks),
    }
