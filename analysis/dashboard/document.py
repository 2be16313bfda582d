"""What the page shows, as one JSON document: curves over the rank, overlaps between runs, and each run's records."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from plotly.colors import get_colorscale
from torch import Tensor

from spd_lens.analysis.common import (
    COLORS,
    DASHES,
    DIVERGING,
    LOSS_FIELDS,
    NULL_COLOR,
    SEQUENTIAL,
    SYMBOLS,
    Subject,
    cosine_by_rank,
    spectrum_note,
)
from spd_lens.analysis.dashboard import records
from spd_lens.analysis.dashboard.rank_curves import (
    SiteDirections,
    Source,
    jackknife_band,
    shares,
    split_half,
)
from spd_lens.evaluation import OUTCOMES, SAYS
from spd_lens.output import visible
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments, energies_of

log = logging.getLogger(__name__)

_ALL_RANKS_UP_TO = 256


def assemble(subjects: Sequence[Subject], *, link: records.Link | None = None, texts: int = 200) -> dict[str, Any]:
    """The document of some run directories.

    Args:
        subjects: The runs. If an analysis has left moments of all layers, those are shown.
        link: Where the pages of saved analyses are found; without it there are no links to them.
        texts: The largest number of completions per set.
    """
    document = from_sources([Source(one.name, known_moments(one), one.subspace) for one in subjects])
    for shown, subject in zip(document["runs"], subjects, strict=True):
        shown |= records.of_run(subject, link=link, texts=texts)
    return document


def known_moments(subject: Subject) -> GradientMoments:
    """A run's moments: of all layers if an analysis has extracted those, else of its own layers."""
    return subject.moments_everywhere() if subject.known_layers else subject.moments


def from_sources(sources: Sequence[Source]) -> dict[str, Any]:
    """The document of objects in memory: spectra and energies of each, and overlaps between all of them."""
    runs = []
    found: dict[tuple[int, Site, bool], SiteDirections] = {}
    for index, source in enumerate(sources):
        log.info("spectra of %s", source.name)
        blocks: dict[str, dict[str, Any]] = {}
        for site, per_head, directions in source.directions():
            found[index, site, per_head] = directions
            blocks.setdefault(str(site), {}).update(_curves(source, site, per_head, directions))
        used = None  # how the run itself projects: which sites, in which form, at which rank
        if (own := source.subspace) is not None:
            ranks = {str(site): list(of_blocks) for site, of_blocks in own.ranks.items()}
            note = visible(spectrum_note(own, of_gradients=source.moments is not None))
            used = {"per_head": own.per_head, "rank": own.rank, "ranks": ranks, "note": note}
        evidence = "" if own is None else f"evidence: {own.grade}"
        runs.append({"name": visible(source.name), "blocks": blocks, "used": used, "evidence": evidence})
    widths = {d.width for d in found.values()}
    return {
        "version": importlib.metadata.version("spd-lens"),
        "style": {
            "colors": COLORS, "dashes": DASHES, "symbols": SYMBOLS, "null": NULL_COLOR,
            "sequential": get_colorscale(SEQUENTIAL), "diverging": get_colorscale(DIVERGING),
        },  # fmt: skip
        "outcomes": {field: {"name": OUTCOMES[field], "says": SAYS[field]} for field in (*LOSS_FIELDS, "kl")},
        "grids": {str(width): rank_grid(width) for width in sorted(widths)},
        "runs": runs,
        "overlap": _overlaps(found, len(sources)) if len(sources) > 1 else {},
    }  # fmt: skip


def rank_grid(width: int) -> list[int]:
    """The ranks that are kept: all of them, or about 250 for wide blocks, close together where ranks are low."""
    if width <= _ALL_RANKS_UP_TO:
        return list(range(1, width + 1))
    steps = torch.logspace(0, 1, 190, dtype=torch.float64).sub(1).div(9) * (width - 64) + 64
    return sorted({*range(1, 65), width // 4, width // 2, *(round(float(step)) for step in steps)})


def _curves(source: Source, site: Site, per_head: bool, directions: SiteDirections) -> dict[str, dict[str, Any]]:
    """One entry per head, or one called `all`: everything over the grid of ranks."""
    curves: dict[str, Tensor | None] = {"energy": directions.cumulative, "kept": directions.held(directions.activation)}
    if directions.energies is not None:
        curves["spectrum"] = directions.energies / directions.energies.sum(-1, keepdim=True).clamp_min(1e-300)
    if directions.activation is not None:
        own = energies_of(directions.activation)
        curves["activation"] = shares(own)
        curves["activation_spectrum"] = own / own.sum(-1, keepdim=True).clamp_min(1e-300)
    if source.moments is not None:
        curves["halves"] = split_half(source.moments, site, per_head)
        if source.subspace is None or site in source.subspace.sites:  # 70 more decompositions, so only where it matters
            curves["low"], curves["high"] = jackknife_band(source.moments, site, per_head) or (None, None)
    total = None if directions.gradient is None else directions.gradient.diagonal(dim1=-2, dim2=-1).sum(-1)
    entries = {}
    for block in range(directions.n_blocks):
        entry: dict[str, Any] = {"width": directions.width}
        if total is not None:
            entry["total"] = _short(float(total[block]))
        entry |= {name: on_grid(curve[block], directions.width) for name, curve in curves.items() if curve is not None}
        entries[str(block) if per_head else "all"] = entry
    return entries


def _overlaps(found: Mapping[tuple[int, Site, bool], SiteDirections], n: int) -> dict[str, Any]:
    """For each site and head two `n × n` tables of curves: `energy[i][j]` is what run `i`'s directions hold of run
    `j`'s gradients, `cosine[i][j]` the mean squared cosine. None where they have no such site of the same shape."""
    overlaps: dict[str, Any] = {}
    for site, per_head in dict.fromkeys((site, per_head) for _, site, per_head in found):
        for i, j in product(range(n), repeat=2):
            one, two = found.get((i, site, per_head)), found.get((j, site, per_head))
            if i == j or one is None or two is None or one.vectors.shape[:2] != two.vectors.shape[:2]:
                continue
            held, cosine = one.held(two.gradient), cosine_by_rank(one.vectors, two.vectors)
            for block in range(one.n_blocks):
                head = overlaps.setdefault(str(site), {}).setdefault(str(block) if per_head else "all", {})
                for name, curve in (("energy", held), ("cosine", cosine)):
                    table = head.setdefault(name, [[None] * n for _ in range(n)])
                    table[i][j] = None if curve is None else on_grid(curve[block], one.width)
    return overlaps


def on_grid(curve: Tensor, width: int) -> list[float]:
    """A curve over all ranks, at those of the width's grid that it reaches."""
    return [_short(float(curve[rank - 1])) for rank in rank_grid(width) if rank <= len(curve)]


def _short(value: float) -> float:
    """A number with five digits: more than a screen shows, in a third of the bytes."""
    return float(f"{value:.5g}")
