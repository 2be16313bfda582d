"""What a contest says of every subspace that took part, as findings: its grade follows (docs/evidence.md)."""

from __future__ import annotations

from typing import Any

import numpy as np

from spd_lens.analysis.estimators.engine import Held
from spd_lens.analysis.estimators.settings import OWN, PAPER, Entrant
from spd_lens.analysis.estimators.tables import primary
from spd_lens.files import file_sha256
from spd_lens.output import visible
from spd_lens.runs import made_by
from spd_lens.stats import BASE, HELD_OUT, RANDOM, Estimate, Finding, corrected, crossed_difference


def contest_findings(held: Held) -> list[Finding]:
    """Findings of every draw of the entrants that are compared, against the base model and random subspaces.

    Of the primary outcome alone, since a grade is the best over outcomes, and a contest decides by one. Against random
    subspaces the null is that of the table, that the draw's subspace is one more of them, but of this one subspace: the
    other draws do not count. The digest is of the directions that were kept, which are fewer than the file has where
    the KL was reached at a lower rank.
    """
    outcome = primary(held)
    base = held.values(None, outcome)
    there = np.isfinite(base[0])
    found: list[Finding] = []
    for entrant in held.contest.entrants():
        values, random = held.values(entrant, outcome), Entrant(RANDOM, OWN, entrant.rank)
        others = held.values(random, outcome)
        for draw, own in enumerate(() if values is None else values[:, there]):
            about = _about(held, entrant, draw) | {"outcome": outcome}
            about["sources"] = _sources(held, "base", entrant.cell(draw))
            found.append(Finding.paired(base[0, there], own, against=BASE, kl_against=0.0, **about))
            if others is None:
                continue
            same = np.broadcast_to(own, (2, own.size))  # one subspace: all its draws are the same
            one = crossed_difference(same, others[:, there], paired=False)
            difference = Estimate(one.value, one.low, one.high, own.size, "95 % over items and random subspaces")
            reached = [random.cell(n) for n, cell in enumerate(held.cells(random)) if cell and cell["reached"]]
            about["sources"] = _sources(held, entrant.cell(draw), *reached)
            found.append(Finding(difference=difference, p=one.p, against=RANDOM, kl_against=about["kl"], **about))
    return corrected(found)


def _about(held: Held, entrant: Entrant, draw: int) -> dict[str, Any]:
    """The fields that both findings of a draw share."""
    policy = held.policy(entrant, draw)
    assert policy.subspace is not None
    name = "spd" if entrant.estimator == PAPER else f"spd-{entrant.estimator}"
    span = None if entrant.span == OWN else entrant.span
    config = held.config.model_copy(update={"span": span, "rank": entrant.rank, "energy": None})
    return {
        "kind": "subspace", "digest": policy.subspace.digest(), "data": HELD_OUT, "seed": draw, "kl": held.contest.kl,
        "method": made_by(name, config), "task": visible(held.config.task),
        "model": visible(held.config.model), "fingerprint": held.pair.fingerprint.digest(),
    }  # fmt: skip


def _sources(held: Held, *cells: str) -> dict[str, str]:
    paths = [held.store.path(cell) for cell in cells]
    return {path.relative_to(held.place.folder).as_posix(): file_sha256(path) for path in paths}
