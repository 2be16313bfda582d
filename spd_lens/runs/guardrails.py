"""Guardrails: signs that a result should not be trusted, each found before the next expensive step rests on it.

All of them go through `errors.caution`: a warning, or with `strict` an error. docs/configuration.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from spd_lens.errors import caution
from spd_lens.evaluation import degeneration, fitting, other_texts, teacher_forced
from spd_lens.examples import Example
from spd_lens.generation import Corpus
from spd_lens.models import ModelPair
from spd_lens.subspaces import GradientMoments, Policy, Subspace, squared_cosines

AGREEMENT = 0.25
"""How far the subspaces of two halves must be from chance (0) to the same (1). With SmolLM2-135M and word problems it
is 0.3 to 0.6 from 4 examples a half on, at half rank and at an eighth."""
EXPLOSION = 1.0
"""How many nats per token a projection may cost on plain prose: with more, each token is e times less probable. Half
rank costs SmolLM2-135M about 0.1."""
_N_PROSE = 8


def check_items(used: Iterable[Example], drawn: Mapping[str, Sequence[Example]]) -> None:
    """Test items, by the name of their task, with a prompt of those that were used: training prompts and calibration
    examples. Case and spaces make no difference."""
    known = {_plain(example) for example in used}
    for name, items in drawn.items():
        if seen := [item for item in items if _plain(item) in known]:
            caution(
                f"{len(seen)} of {len(items)} test items of {name} have the prompt of a training prompt or a "
                f"calibration example, such as {seen[0].name}: their scores say nothing of "
                "held-out data; evaluate on other items"
            )


def _plain(example: Example) -> str:
    return " ".join(example.prompt.split()).casefold()


def check_halves(moments: GradientMoments, subspace: Subspace) -> None:
    """Calibration examples of which one half gives other directions than the other half.

    Compared at the subspace's ranks, over all blocks, between what chance gives (0) and the same directions (1).
    """
    if moments.n_shards < 2 or not all(int(half.n_examples.sum()) for half in moments.halves()):
        return
    found, chance, most = 0.0, 0.0, 0
    for site in set(subspace.sites) & set(moments.sites):
        per_head = len(subspace.ranks[site]) > 1
        spectra = [half.spectrum(site, per_head) for half in moments.halves()]
        for block, rank in enumerate(subspace.ranks[site]):
            bases = [one.leading(rank, moments.dtype)[block] for one in spectra]
            found += float(squared_cosines(*bases))
            chance += bases[0].shape[1] * bases[1].shape[1] / bases[0].shape[0]
            most += min(basis.shape[1] for basis in bases)
    if most > chance and (agreement := (found - chance) / (most - chance)) < AGREEMENT:
        caution(
            f"two halves of the {int(moments.n_examples.sum())} calibration examples give directions that agree by "
            f"{agreement:.2f}, where chance is 0 and the same directions are 1: the subspace is mostly noise; give "
            "more calibration examples, or another rank"
        )


def check_policy(pair: ModelPair, policy: Policy) -> None:
    """A projection that takes so much away that the model can no longer write."""
    texts = fitting(pair, other_texts(_N_PROSE)) if policy.subspace is not None and policy.strength else []
    if not texts:
        return
    measured = teacher_forced(pair, texts, [Policy("base", adapter=policy.adapter), policy], progress=False)
    before, after = (fmean(item.completion_loss for item in items) for items in measured.values())
    if not after - before <= EXPLOSION:  # NaN too
        caution(
            f"under the projection plain prose costs {after:.2f} nats per token, and {before:.2f} without it: what the "
            "model writes will be worth little; keep a higher rank, project fewer layers, or lower the strength"
        )


def check_corpus(corpus: Corpus) -> None:
    """Completions that are empty, go round in loops, were cut off or are all the same."""
    for fault in degeneration(corpus):
        caution(
            f"{fault}: training on this corpus teaches just that; look at it, and at rank, strength and max_new_tokens"
        )


def check_base(warnings: Iterable[str]) -> None:
    """A base model that scores far below what is published of it."""
    for sentence in warnings:
        caution(sentence)
