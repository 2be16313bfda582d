"""Projecting one head at a time, all others untouched, and what that does to held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.estimate import Estimate
from spd_lens.evaluation import Policy
from spd_lens.evaluation.forced import ForcedBatch, ForcedItem, forced_logits, teacher_forced
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.models.batches import batches_by_length
from spd_lens.models.neutral import neutrally
from spd_lens.sites import Site
from spd_lens.statistics import mean_interval, paired_difference
from spd_lens.subspace import Subspace

from .inputs import place
from .prefix import Prefix, PrefixPolicy

MEASURES = {"aligned_loss": "aligned loss, nats", "kl": "KL from base, nats per token"}


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
    (`analysis.prefix`), a pass begins at the projected layer.

    Args:
        pair: The model.
        items: Held-out items with completion and spans.
        subspace: A subspace per head; each of its sites and heads is projected in turn.
        n_random: Number of random subspaces of the same rank in the same head; their effects are averaged per item.
        seed: Seed of the first of them.
        batch_tokens: Padded tokens per batch.
        progress: Show a progress bar.

    Returns:
        One row per head, measure (`aligned_loss`: change from base; `kl`: KL(base || projected)) and `policy`:
        `subspace`, `random`, and `difference`, the subspace's minus the random ones' per item. `value, low, high` are
        means over items with 95 % intervals (`spd_lens.statistics`), in nats; `rank` is that of the head.
    """
    controls = [subspace.random_like(seed + i) for i in range(n_random)]
    if not controls:
        raise SPDError("the effect of a head needs its null; give n_random = 1 or more")
    prefix = _prefix(pair, items, sorted({site.layer for site in subspace.sites}), batch_tokens)
    cells = [(site, head) for site in subspace.sites for head in range(subspace.bases[site].shape[0])]
    policies: list[Policy] = [Policy("base")]
    for site, head in cells:
        for name, whole in (("own", subspace), *((str(i), control) for i, control in enumerate(controls))):
            policies.append(PrefixPolicy(f"{site}/{head}/{name}", only_head(whole, site, head), prefix=prefix))
    found = _measured(pair, items, policies, prefix, batch_tokens, progress)
    rows = []
    for site, head in cells:
        for measure in MEASURES:
            base = _per_item(found["base"], measure)
            own = _per_item(found[f"{site}/{head}/own"], measure) - base
            random = torch.stack([_per_item(found[f"{site}/{head}/{i}"], measure) for i in range(n_random)])
            null = random.mean(dim=0) - base
            estimates = {
                "subspace": mean_interval(own.tolist(), seed=seed),
                "random": mean_interval(null.tolist(), seed=seed),
                "difference": paired_difference(null.tolist(), own.tolist(), seed=seed),
            }
            common = {**place(site, head, per_head=True), "rank": subspace.ranks[site][head], "measure": measure}
            rows += [{**common, "policy": policy, **_bounds(e)} for policy, e in estimates.items()]
    return pd.DataFrame(rows)


def _measured(
    pair: ModelPair, items: Sequence[Example], policies: Sequence[Policy], prefix: Prefix | None, batch_tokens: int,
    progress: bool,
) -> dict[str, list[ForcedItem]]:  # fmt: skip
    if prefix is None:
        return teacher_forced(pair, items, policies, batch_tokens=batch_tokens, progress=progress)
    with prefix.watching():
        return teacher_forced(pair, items, policies, batch_tokens=batch_tokens, progress=progress)


def _prefix(pair: ModelPair, items: Sequence[Example], layers: Sequence[int], batch_tokens: int) -> Prefix | None:
    """Where passes may begin in the middle, if they give the same bits there on a real batch."""
    above = [layer for layer in layers if layer > 0]
    if not above:
        return None
    try:
        prefix = Prefix(pair.hf, above)
    except SPDError:  # blocks under other names
        return None
    encoded = [pair.encode(item) for item in items]
    shortest = batches_by_length([len(e.ids) for e in encoded], batch_tokens)[-1]
    batch = ForcedBatch.of([encoded[i] for i in shortest], pair)
    probe = Prefix(pair.hf, [above[-1]])
    with torch.no_grad():
        exact = probe.agrees(lambda: forced_logits(pair, pair.hf, batch))
    return prefix if exact else None


def _per_item(items: Sequence[ForcedItem], measure: str) -> Float[Tensor, " item"]:
    return torch.tensor([getattr(item, measure) for item in items], dtype=torch.float64)


def _bounds(estimate: Estimate) -> dict[str, float | int]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
