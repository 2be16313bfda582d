"""Projecting one head at a time, all others untouched, and what that does to held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from spd_lens.analysis.common import by_item, known, place
from spd_lens.errors import SPDError
from spd_lens.evaluation import teacher_forced
from spd_lens.examples import Example
from spd_lens.models import ModelPair, neutrally
from spd_lens.sites import Site
from spd_lens.stats import mean_interval, paired_difference
from spd_lens.subspaces import Policy, Subspace

MEASURES = {
    "aligned_loss": "aligned loss, nats",
    "results_loss": "results loss, nats",
    "kl": "KL from base, nats per token",
}


def only_head(subspace: Subspace, site: Site, head: int) -> Subspace:
    """The projection of one head alone: its own basis there, the identity on every other head of the site.

    Raises `SPDError` for a joint subspace, which has no heads to take one of, or a head that does not exist.
    """
    bases = subspace.select([site]).blocks(site)
    if not subspace.per_head:
        raise SPDError("a joint subspace has no head of its own; make it per head: moments.subspace(per_head=True)")
    if not 0 <= head < len(bases):
        raise SPDError(f"site {site} has no head {head}: it has heads 0 to {len(bases) - 1}")
    whole = torch.eye(len(bases[head]), dtype=bases[head].dtype)  # P = I, exactly
    alone = {site: [basis if block == head else whole for block, basis in enumerate(bases)]}
    offset = {}
    if site in subspace.offset:
        offset[site] = subspace.offset[site] * (torch.arange(len(bases)) == head)[:, None]
    return Subspace.from_blocks(alone, subspace, singular_values={}, offset=offset)


@neutrally
def head_effects(
    pair: ModelPair,
    items: Sequence[Example],
    subspace: Subspace,
    *,
    n_random: int = 1,
    seed: int = 0,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> pd.DataFrame:
    """Project one head at a time, all others untouched, and measure held-out text.

    Costs `1 + n_random` forward passes over the items per head and site; where the architecture allows it
    (`evaluation.skip_layers`), a pass begins at the projected layer.

    Args:
        pair: The model.
        items: Held-out items with completion and spans.
        subspace: A subspace per head; each of its sites and heads is projected in turn.
        n_random: Number of random subspaces of the same rank in the same head; what they do is averaged per item.
        seed: Seed of the first random subspace; each further one has the next.
        batch_tokens: Padded tokens per batch.
        progress: Whether to show a progress bar.

    Returns:
        One row per head, measure (`aligned_loss` and, where the items have computed results, `results_loss`: change
        from base; `kl`: KL(base || projected)) and `policy`: `subspace`, `random`, and `difference`, the subspace's
        minus the random ones' per item. `value, low, high` are means over items with 95 % intervals
        (`spd_lens.stats.intervals`), in nats; `rank` is that of the head.
    """
    controls = [subspace.random_like(seed + i) for i in range(n_random)]
    if not controls:
        raise SPDError("what a head does needs its null; give n_random = 1 or more")
    cells = [(site, head) for site in subspace.sites for head in range(subspace.bases[site].shape[0])]
    policies = [Policy("base")]
    for site, head in cells:
        for name, whole in (("own", subspace), *((str(i), control) for i, control in enumerate(controls))):
            policies.append(Policy(f"{site}/{head}/{name}", only_head(whole, site, head)))
    found = teacher_forced(pair, items, policies, batch_tokens=batch_tokens, progress=progress)
    rows = []
    for site, head in cells:
        for measure, unprojected in by_item(found["base"], MEASURES).items():
            names = ("own", *map(str, range(n_random)))
            values = [by_item(found[f"{site}/{head}/{name}"], [measure])[measure] for name in names]
            own, *random = known(np.stack(values) - unprojected, unprojected)
            null = np.mean(random, axis=0)
            estimates = {
                "subspace": mean_interval(own.tolist(), seed=seed),
                "random": mean_interval(null.tolist(), seed=seed),
                "difference": paired_difference(null.tolist(), own.tolist(), seed=seed),
            }
            common = {**place(site, head, per_head=True), "rank": subspace.ranks[site][head], "measure": measure}
            rows += [{**common, "policy": policy, **estimate.to_row()} for policy, estimate in estimates.items()]
    return pd.DataFrame(rows).astype({"low": float, "high": float})  # NaN where one item gives no interval
