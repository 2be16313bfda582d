"""Two subspaces face to face: principal angles and mean squared cosine, against random subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.analysis.common import mean_squared_cosine, p_value, place, principal_angles, random_bases
from spd_lens.errors import SPDError
from spd_lens.sites import Site
from spd_lens.subspaces import Subspace

COSINE = "mean squared cosine"
ANGLES = {"smallest angle": 0.0, "median angle": 0.5, "largest angle": 1.0}
"""Angles in degrees, each as a quantile of the principal angles."""


def compare_subspaces(
    a: Subspace, b: Subspace, *, any_model: bool = False, draws: int = 999, seed: int = 0
) -> pd.DataFrame:
    """Principal angles and mean squared cosine of two subspaces, against random subspaces of `a`'s rank.

    Args:
        a: Per head or joint, as `b`, at the same sites and of the same widths. Ranks may differ.
        b: The other subspace.
        any_model: Allow subspaces of two models of one shape. Their coordinates mean the same only if one model was
            made from the other; for unrelated models chance is all there is to find.
        draws: Number of random subspaces for the null.
        seed: Seed of the random subspaces.

    Returns:
        Columns `site, layer, kind, head, measure, rank_a, rank_b, width, value, chance, p_random`. The mean squared
        cosine is `‖P_a P_b‖²_F / min(rank_a, rank_b)` with the expectation `max(rank_a, rank_b) / width`; angles are
        in degrees, with the random subspaces' mean as chance. `p_random` is one-sided: as close by chance.
    """
    check_comparable(a, b, any_model=any_model)
    rows: list[dict[str, Any]] = []
    for site, block, x, y in _blocks(a, b):
        width = x.shape[0]
        random = random_bases(draws, width, x.shape[1], seed)
        where = {**place(site, block, a.per_head), "rank_a": x.shape[1], "rank_b": y.shape[1], "width": width}
        value = float(mean_squared_cosine(x, y))
        null = mean_squared_cosine(random, y)
        chance = max(x.shape[1], y.shape[1]) / width
        rows.append({**where, "measure": COSINE, "value": value, "chance": chance, "p_random": p_value(value, null)})
        found = principal_angles(x, y).rad2deg()
        drawn = _angles_of_each(random, y)
        for name, q in ANGLES.items():
            value = float(torch.quantile(found, q))
            null = torch.quantile(drawn, q, dim=1)
            rows.append(
                {**where, "measure": name, "value": value, "chance": float(null.mean()),
                 "p_random": p_value(value, null, smaller=True)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def angle_table(a: Subspace, b: Subspace, *, any_model: bool = False, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Every principal angle in degrees, ascending. Arguments as in `compare_subspaces`.

    Returns:
        Columns `site, layer, kind, head, number, value, chance, random_low, random_high`: the angle's number from 1,
        and the mean and the 95 % range of random subspaces of `a`'s rank.
    """
    check_comparable(a, b, any_model=any_model)
    rows: list[dict[str, Any]] = []
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for site, block, x, y in _blocks(a, b):
        random = random_bases(draws, x.shape[0], x.shape[1], seed)
        drawn = _angles_of_each(random, y)
        low, high = torch.quantile(drawn, ends, dim=0)
        found = principal_angles(x, y).rad2deg()
        for i, angle in enumerate(found):
            rows.append(
                {**place(site, block, a.per_head), "number": i + 1, "value": float(angle),
                 "chance": float(drawn[:, i].mean()), "random_low": float(low[i]), "random_high": float(high[i])}
            )  # fmt: skip
    return pd.DataFrame(rows)


def check_comparable(a: Subspace, b: Subspace, *, any_model: bool) -> None:
    """Raise `SPDError` unless the two have the same sites and blocks, and are of one model or `any_model` is given."""
    check_sites("the first subspace", a.sites, "the second", b.sites)
    for site in a.sites:
        mine, theirs = a.bases[site].shape[:2], b.bases[site].shape[:2]
        if mine[0] != theirs[0] and mine[0] * mine[1] == theirs[0] * theirs[1]:
            raise SPDError(
                f"at site {site} one subspace is per head ({max(mine[0], theirs[0])} blocks) and the other joint; "
                "their angles mean nothing: make both with the same per_head"
            )
        if mine != theirs:
            raise SPDError(
                f"at site {site} the subspaces have {mine[0]} blocks of width {mine[1]} and {theirs[0]} of "
                f"{theirs[1]}; only subspaces of one shape compare"
            )
    if not any_model and a.fingerprint is not None and b.fingerprint is not None:
        check_model(a, b)


def check_sites(first: str, mine: Sequence[Site], second: str, theirs: Sequence[Site]) -> None:
    """Raise `SPDError` unless two things have the same sites."""
    if list(mine) != list(theirs):
        raise SPDError(
            f"{first} has the sites {', '.join(map(str, mine))} and {second} {', '.join(map(str, theirs))}; compare "
            "them at the sites that they share, with select()"
        )


def check_model(a: Any, b: Any) -> None:
    """Raise `SPDError` unless two things with fingerprints are of one model."""
    try:
        a.fingerprint.check(b.fingerprint, "the first of the two")
    except SPDError as error:
        raise SPDError(f"{error}; if two models of one shape are to be compared, pass any_model=True") from error


def _angles_of_each(bases: Float[Tensor, "n width ra"], b: Float[Tensor, "width rb"]) -> Float[Tensor, "n angle"]:
    """Principal angles of many subspaces to one, in degrees and ascending, since their cosines descend."""
    return torch.linalg.svdvals(bases.mT @ b).clamp(max=1.0).acos().rad2deg()


def _blocks(a: Subspace, b: Subspace) -> list[tuple[Site, int, Float[Tensor, "width ra"], Float[Tensor, "width rb"]]]:
    """Blocks where both have a direction, without the padding."""
    found = []
    for site in a.sites:
        for block, (x, y) in enumerate(zip(a.blocks(site), b.blocks(site), strict=True)):
            if x.shape[1] and y.shape[1]:
                found.append((site, block, x, y))
    return found
