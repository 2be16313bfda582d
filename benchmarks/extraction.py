"""Extraction (Eq. 6-11): the twin engine against the plain way and the way of a notebook, and against arithmetic."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import spd_lens as spd
from benchmarks import machine, subjects
from benchmarks.measure import Sample, in_turn, settle, timed, total_seconds
from benchmarks.table import Row
from spd_lens.capture import batches_by_length
from spd_lens.models.backends import lens_logits
from spd_lens.models.weights import site_layer

ROUNDS = 5
TOKENS_AT_ONCE = 1024
GOALS = {
    ("float32", "plain"): 3.0,
    ("float32", "notebook"): 5.0,
    ("bfloat16", "plain"): 7.0,
    ("bfloat16", "notebook"): 12.0,
}


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """Rows of every model: float32 beside its peers, then bfloat16 against the peers' float32."""
    for name in models:
        yield from _model(name, quick)
        settle()


def _model(name: str, quick: bool) -> Iterator[Row]:
    # the notebook's way takes minutes on the larger model: there it does a part of the examples
    n, share = (10, 5) if quick else (50, {"smollm2": 1, "qwen2.5-0.5b-shape": 5}[name])
    rounds = 1 if quick else ROUNDS
    examples = subjects.task().calibration(n, seed=42)
    parts = [examples[i::rounds] for i in range(rounds)]
    pair = subjects.subject(name, "float32").pair
    narrow = spd.ModelPair(copy.deepcopy(pair.hf).to(torch.bfloat16), pair.tokenizer, name=pair.name)
    sites = pair.sites()
    samples = in_turn(
        {
            "float32": lambda i: _ours(pair, parts[i]),
            "bfloat16": lambda i: _ours(narrow, parts[i]),
            "plain": lambda i: plain_way(pair, sites, parts[i]),
        },
        rounds,
        warm_up=lambda: (_ours(pair, parts[0][:2]), _ours(narrow, parts[0][:2])),
    )
    tokens = [_n_tokens(pair, part) for part in parts]
    for dtype in ("float32", "bfloat16"):
        what = "the plain way on the twin, float32"
        yield _speed(name, dtype, what, samples[dtype], samples["plain"], tokens, tokens, GOALS[dtype, "plain"])
    yield _bound(name, pair, examples, samples["float32"])
    yield _bound(name, narrow, examples, samples["bfloat16"])
    yield _exact(name, pair, examples[:2])
    yield from _angles(name, samples)
    yield _memory(name, pair, examples)
    lens = pair.lens  # built before it is timed
    parts = [part[: max(1, len(part) // share)] for part in parts]
    notebook = [timed(partial(notebook_way, pair, sites, part)) for part in parts]
    lens_tokens = [_n_tokens(pair, part) for part in parts]
    for dtype in ("float32", "bfloat16"):
        what = f"the notebook's way on {type(lens).__name__}, float32"
        yield _speed(name, dtype, what, samples[dtype], notebook, tokens, lens_tokens, GOALS[dtype, "notebook"])


def _ours(pair: spd.ModelPair, part: Sequence[spd.Example]) -> spd.GradientMoments:
    return spd.extract(pair, part, engine="twin", shards=1, progress=False)


def _n_tokens(pair: spd.ModelPair, part: Sequence[spd.Example]) -> int:
    return sum(len(pair.encode(example).ids) for example in part)


def plain_way(
    pair: spd.ModelPair, sites: Sequence[spd.Site], examples: Sequence[spd.Example]
) -> dict[spd.Site, torch.Tensor]:
    """Eq. 6-9 written down: an example at a time, all logits, gradients of all weights, SVD of all rows."""
    stacked: dict[spd.Site, list[torch.Tensor]] = {site: [] for site in sites}
    kept: dict[spd.Site, torch.Tensor] = {}

    def keep(site: spd.Site, module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept[site] = output

    handles = [site_layer(pair.hf, site).module.register_forward_hook(partial(keep, site)) for site in sites]
    pair.hf.requires_grad_(True)
    for example in examples:
        encoded = pair.encode(example)
        ids = torch.tensor([encoded.ids], device=pair.device)
        logits = pair.hf(input_ids=ids).logits[0]
        scored = torch.tensor(encoded.scored, device=pair.device)
        F.cross_entropy(logits[scored - 1], ids[0, scored]).backward()
        for site in sites:
            stacked[site].append(kept[site].grad[0])  # type: ignore[index]  # there is one after backward
        pair.hf.zero_grad(set_to_none=True)
    pair.hf.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return _decomposed(stacked)


def notebook_way(
    pair: spd.ModelPair, sites: Sequence[spd.Site], examples: Sequence[spd.Example]
) -> dict[spd.Site, torch.Tensor]:
    """The same on the lens model with backward hooks, as a notebook has it."""
    stacked: dict[spd.Site, list[torch.Tensor]] = {site: [] for site in sites}
    lens = pair.lens

    def keep(site: spd.Site, gradient: torch.Tensor, hook: Any) -> None:
        stacked[site].append(gradient[0].flatten(1).clone())

    lens.requires_grad_(True)
    for site in sites:
        lens.add_hook(site.hook_name, partial(keep, site), dir="bwd")
    for example in examples:
        encoded = pair.encode(example)
        ids = torch.tensor([encoded.ids], device=pair.device)
        scored = torch.tensor(encoded.scored, device=pair.device)
        logits = lens_logits(lens, ids, torch.ones_like(ids))[0]
        F.cross_entropy(logits[scored - 1], ids[0, scored]).backward()
        lens.zero_grad(set_to_none=True)
    lens.reset_hooks()
    lens.requires_grad_(False)
    return _decomposed(stacked)


def _decomposed(stacked: dict[spd.Site, list[torch.Tensor]]) -> dict[spd.Site, torch.Tensor]:
    """`Vᵀ` scaled by the singular values: enough to compare with moments."""
    found = {}
    for site, parts in stacked.items():
        _, values, right = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        found[site] = values[:, None] * right
    return found


def _speed(
    name: str,
    dtype: str,
    what: str,
    ours: list[Sample],
    peer: list[Sample],
    tokens: list[int],
    peer_tokens: list[int],
    target: float,
) -> Row:
    rates = [[n / s.seconds for n, s in zip(t, run, strict=True)] for t, run in ((tokens, ours), (peer_tokens, peer))]
    each = [a / b for a, b in zip(*rates, strict=True)]
    return Row(
        "extraction",
        name,
        dtype,
        what,
        statistics.median(each),
        min(each),
        max(each),
        target,
        ours=f"{statistics.median(rates[0]):.0f} tok/s",
        peer=f"{statistics.median(rates[1]):.0f} tok/s",
    )


def _bound(name: str, pair: spd.ModelPair, examples: Sequence[spd.Example], samples: list[Sample]) -> Row:
    """Time beside that of the matrix products that cannot be avoided, at the rate measured now.

    Forward through all linear layers, and the gradient of activations through the layers above the first target.
    """
    lengths = [len(pair.encode(example).ids) for example in examples]
    first = min(site.layer for site in pair.sites())
    products: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, block in enumerate(pair.hf.model.layers):
        for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
            products.append((_noise(linear.in_features, pair), linear.weight.T))
            if layer > first:
                products.append((_noise(linear.out_features, pair), linear.weight))
    bound = machine.matrix_seconds(products) * sum(lengths) / TOKENS_AT_ONCE
    ours = total_seconds(samples)
    dtype = str(pair.dtype).removeprefix("torch.")
    ratio = ours / bound
    return Row(
        "extraction", name, dtype, "time over that of its matrix products alone", ratio, ratio, ratio, 1.3,
        at_least=False, ours=f"{ours:.1f} s", peer=f"{bound:.1f} s",
    )  # fmt: skip


def _noise(width: int, pair: spd.ModelPair) -> torch.Tensor:
    return torch.randn(TOKENS_AT_ONCE, width, dtype=pair.dtype, device=pair.device)


def _exact(name: str, pair: spd.ModelPair, examples: Sequence[spd.Example]) -> Row:
    """Largest relative difference of the moments from the plain way in float64, over sites, and the plain way's own."""
    reference = spd.ModelPair(copy.deepcopy(pair.hf).double(), pair.tokenizer, name=pair.name)
    wide, plain = (_grams(plain_way(p, pair.sites(), examples)) for p in (reference, pair))
    moments = _ours(pair, examples)
    off = _off({site: moments.gradient[site].sum(0) for site in wide}, wide)
    what = f"moments of {len(examples)} examples: relative difference from the plain way in float64"
    return Row(
        "extraction", name, "float32", what, max(off), min(off), max(off), 1e-4, at_least=False, unit="",
        ours=f"{max(off):.1e}", peer=f"{max(_off(plain, wide)):.1e}", note="the peer: the plain way in float32",
    )  # fmt: skip


def _grams(rows: dict[spd.Site, torch.Tensor]) -> dict[spd.Site, torch.Tensor]:
    return {site: right.double().T @ right.double() for site, right in rows.items()}


def _off(found: dict[spd.Site, torch.Tensor], wanted: dict[spd.Site, torch.Tensor]) -> list[float]:
    return [((found[s].cpu() - wanted[s].cpu()).norm() / wanted[s].cpu().norm()).item() for s in wanted]


def _angles(name: str, samples: dict[str, list[Sample]]) -> Iterator[Row]:
    """What bfloat16 does to the subspace at half rank: principal angles to that of float32, per head."""
    wide, narrow = (_sum(samples[dtype]) for dtype in ("float32", "bfloat16"))
    a, b = wide.subspace(rank=0.5), narrow.subspace(rank=0.5)
    cosines = torch.cat([torch.linalg.svdvals(a.bases[s].mT @ b.bases[s]).flatten() for s in a.sites])
    squared = cosines.square()
    yield Row(
        "extraction",
        name,
        "bfloat16",
        "mean squared cosine to float32's subspace, half rank, per head",
        squared.mean().item(),
        squared.min().item(),
        squared.max().item(),
        unit="",
    )
    angle = cosines.clamp(max=1).arccos().max().item()
    yield Row(
        "extraction", name, "bfloat16", "largest principal angle to float32's subspace", angle, angle, angle, unit="rad"
    )


def _sum(samples: list[Sample]) -> spd.GradientMoments:
    total = samples[0].result
    for sample in samples[1:]:
        a = sample.result
        total = total + a
    return total


def _memory(name: str, pair: spd.ModelPair, examples: Sequence[spd.Example]) -> Row:
    """Peak of a whole extraction over that of its largest batch alone, by padded tokens; each with its own moments."""
    lengths = [len(pair.encode(e).ids) for e in examples]
    largest = max(batches_by_length(lengths, TOKENS_AT_ONCE), key=lambda batch: len(batch) * lengths[batch[0]])
    one = timed(lambda: _ours(pair, [examples[i] for i in largest]))
    whole = timed(lambda: _ours(pair, examples))
    ratio = whole.peak / one.peak
    n_tokens = len(largest) * lengths[largest[0]]
    return Row(
        "extraction",
        name,
        "float32",
        "peak memory of all examples over that of one batch",
        ratio,
        ratio,
        ratio,
        1.3,
        at_least=False,
        ours=f"{whole.peak / 2**20:.0f} MiB",
        peer=f"{one.peak / 2**20:.0f} MiB",
        note=f"{len(examples)} examples; the batch has {n_tokens} tokens",
    )
