"""Extraction (Eq. 6-11): the twin engine against the plain way and the way of a notebook, and against arithmetic."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import spd_lens as spd
from benchmarks import machine, subjects
from benchmarks.bounds import TOKENS_AT_ONCE, attention_factor, extraction_products
from benchmarks.measure import Sample, in_fresh_process, in_turn, settle, timed
from benchmarks.table import Row
from spd_lens.models import Encoded, batches_by_length, lens_logits, site_layer

ROUNDS = {"smollm2": 4, "qwen2.5-0.5b-shape": 2}
N_EXAMPLES = 50
GOALS = {
    ("float32", "plain"): 3.0,
    ("float32", "notebook"): 5.0,
    ("bfloat16", "plain"): 7.0,
    ("bfloat16", "notebook"): 12.0,
}
DTYPES = ("float32", "bfloat16")


@dataclass
class Timings:
    """What every way took in every round."""

    samples: dict[str, list[Sample]]
    tokens: dict[str, list[int]]
    """Tokens that it worked on."""

    def rates(self, way: str) -> list[float]:
        """Tokens per second, round by round."""
        return [n / s.seconds for n, s in zip(self.tokens[way], self.samples[way], strict=True)]

    def row(self, model: str, way: str, peer: str, what: str, **options: Any) -> Row:
        """How many times faster than another way, round by round."""
        ours, theirs = self.rates(way), self.rates(peer)
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        return Row.of(
            "extraction", model, way, what, each,
            ours=f"{statistics.median(ours):.0f} tok/s", peer=f"{statistics.median(theirs):.0f} tok/s", **options,
        )  # fmt: skip

    def inverse(self, model: str, way: str, peer: str, what: str, **options: Any) -> Row:
        """How many times as long as another way."""
        row = self.row(model, way, peer, what, at_least=False, **options)
        return replace(row, value=1 / row.value, low=1 / row.high, high=1 / row.low)


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """Rows of every model: ours in both dtypes against the peers in float32."""
    for name in models:
        n = 10 if quick else N_EXAMPLES
        yield from _model(name, subjects.task().calibration(n, seed=42), 1 if quick else ROUNDS[name])
        settle()
        yield in_fresh_process(_memory, name, n)


def _model(name: str, examples: list[spd.Example], rounds: int) -> Iterator[Row]:
    pair = subjects.subject(name, "float32").pair
    narrow = spd.ModelPair(copy.deepcopy(pair.hf).to(torch.bfloat16), pair.tokenizer, name=pair.name)
    lens = type(pair.lens).__name__  # built before it is timed
    timings = _timings({"float32": pair, "bfloat16": narrow}, examples, rounds, few=name != "smollm2")
    for dtype in DTYPES:
        for way, what in (("plain", "the plain way on the twin"), ("notebook", f"the notebook's way on {lens}")):
            yield timings.row(name, dtype, way, f"{what}, float32", target=GOALS[dtype, way])
    for dtype in DTYPES:
        what = "time over that of its matrix products alone"
        yield timings.inverse(name, dtype, f"products, {dtype}", what, target=1.3)
    yield _exact(name, pair, examples[:2])
    yield from _angles(name, *(_sum(timings.samples[dtype][:2]) for dtype in DTYPES))


def _timings(pairs: dict[str, spd.ModelPair], examples: list[spd.Example], rounds: int, few: bool) -> Timings:
    """Ours on halves of the examples in turn, the slow ways on fifths, and products; all in each round.

    `few`: the notebook's way, which takes minutes, on a fifth of its parts.
    """
    pair = pairs["float32"]
    halves = [examples[i % 2 :: 2] for i in range(rounds)]
    parts = [examples[i::5] for i in range(rounds)]
    short = [part[: max(1, len(part) // 5)] for part in parts] if few else parts
    sites, encoded = pair.sites(), [pair.encode(example) for example in examples]
    lengths = [len(e.ids) for e in encoded]
    ways: dict[str, Callable[[int], Any]] = {
        "plain": lambda i: plain_way(pair, sites, parts[i]),
        "notebook": lambda i: notebook_way(pair, sites, short[i]),
    }
    tokens = {way: [_n_tokens(pair, part) for part in given] for way, given in (("plain", parts), ("notebook", short))}
    for dtype, own in pairs.items():
        multiply = machine.fastest(extraction_products(own))
        ways[dtype] = partial(lambda own, i: _ours(own, halves[i]), own)
        ways[f"products, {dtype}"] = partial(lambda multiply, _: multiply(), multiply)
        tokens[dtype] = [_n_tokens(own, half) for half in halves]
        tokens[f"products, {dtype}"] = [round(TOKENS_AT_ONCE / attention_factor(own, lengths))] * rounds
    samples = in_turn(ways, rounds, warm_up=lambda: [_ours(own, examples[:2]) for own in pairs.values()])
    return Timings(samples, tokens)


def _ours(pair: spd.ModelPair, part: Sequence[spd.Example]) -> spd.GradientMoments:
    return spd.extract(pair, part, engine="twin", shards=1, progress=False)


def _n_tokens(pair: spd.ModelPair, part: Sequence[spd.Example]) -> int:
    return sum(len(pair.encode(example).ids) for example in part)


def plain_way(
    pair: spd.ModelPair, sites: Sequence[spd.Site], examples: Sequence[spd.Example]
) -> dict[spd.Site, torch.Tensor]:
    """Eq. 6-9 written down: the rows of `plain_rows`, and their SVD."""
    return _decomposed(plain_rows(pair, sites, [pair.encode(example) for example in examples]))


def plain_rows(
    pair: spd.ModelPair, sites: Sequence[spd.Site], texts: Sequence[Encoded]
) -> dict[spd.Site, list[torch.Tensor]]:
    """The rows of `G`, `[token, width]` of each text: one at a time, all logits, gradients of all weights."""
    stacked: dict[spd.Site, list[torch.Tensor]] = {site: [] for site in sites}
    kept: dict[spd.Site, torch.Tensor] = {}

    def keep(site: spd.Site, module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept[site] = output

    handles = [site_layer(pair.hf, site).module.register_forward_hook(partial(keep, site)) for site in sites]
    pair.hf.requires_grad_(True)
    for encoded in texts:
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
    return stacked


def notebook_way(
    pair: spd.ModelPair, sites: Sequence[spd.Site], examples: Sequence[spd.Example]
) -> dict[spd.Site, torch.Tensor]:
    """The same computation on the lens model with backward hooks, as a notebook has it."""
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


def _angles(name: str, wide: spd.GradientMoments, narrow: spd.GradientMoments) -> Iterator[Row]:
    """What bfloat16 does to the subspace at half rank: principal angles to that of float32, per head."""
    a, b = wide.subspace(rank=0.5), narrow.subspace(rank=0.5)
    cosines = torch.cat([torch.linalg.svdvals(a.bases[s].mT @ b.bases[s]).flatten() for s in a.sites])
    squared = cosines.square()
    what = "mean squared cosine to float32's subspace, half rank, per head"
    yield Row(
        "extraction", name, "bfloat16", what, squared.mean().item(), squared.min().item(), squared.max().item(), unit=""
    )
    angle = cosines.clamp(max=1).arccos().max().item()
    yield Row.of("extraction", name, "bfloat16", "largest principal angle to float32's subspace", [angle], unit="rad")


def _sum(samples: list[Sample]) -> spd.GradientMoments:
    first, *others = (sample.result for sample in samples)
    return sum(others, first)


def _memory(name: str, n: int) -> Row:
    """Peak of a whole extraction over that of its largest batch alone, by padded tokens; each with its own moments."""
    pair, examples = subjects.subject(name, "float32").pair, subjects.task().calibration(n, seed=42)
    lengths = [len(pair.encode(e).ids) for e in examples]
    largest = max(batches_by_length(lengths, TOKENS_AT_ONCE), key=lambda batch: len(batch) * lengths[batch[0]])
    _ours(pair, examples[:2])  # what is made once is not the first one's
    one = timed(lambda: _ours(pair, [examples[i] for i in largest])).peak
    whole = timed(lambda: _ours(pair, examples)).peak
    note = f"{n} examples; the batch has {len(largest) * lengths[largest[0]]} tokens"
    return Row.of(
        "extraction", name, "float32", "peak memory of all examples over that of one batch", [whole / one],
        target=1.3, at_least=False, ours=f"{whole / 2**20:.0f} MiB", peer=f"{one / 2**20:.0f} MiB", note=note,
    )  # fmt: skip
