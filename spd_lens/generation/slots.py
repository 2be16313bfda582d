"""Completions in slots: a fixed cache, rows of their own lengths, and a new prompt wherever a completion has ended."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from spd_lens.generation.cuda_graphs import CudaGraphs
from spd_lens.generation.jobs import Completions, Decoding, Job, Row
from spd_lens.models import (
    attention_implementation,
    fastest_attention,
    is_spread,
    one_query_at_a_time,
    ordinary_buffers,
    right_pad,
    run_twin,
    unembed_only,
)

MIN_PREFIX = 64
"""Shared tokens from which on it pays to compute a common prefix once."""
_COLUMNS = {"cpu": 64, "cuda": 256}
"""Attention reads the cache in steps of this many columns: rounding then hardly depends on the other rows' lengths, and
on CUDA few lengths need few graphs."""
_FREE = 1 / 8
"""Share of the slots that must be free before new prompts are read: a few together are read faster."""
_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 16_384}
"""Padded tokens of prompts that are read in one pass: enough that arithmetic limits, not reading the weights."""
_SIMILAR = {"cpu": 0.9, "cuda": 0.5}
"""Prompts shorter than this share of the longest are read in another pass; on CUDA padding is cheaper than a pass."""


@dataclass
class _Place:
    """Where the layers of a `SlotCache` write and how far they read; set before every step."""

    positions: Int[Tensor, " row"]
    length: int


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[slot, kv_head, column, d_head]`: token `t` of a row stands in column `t`."""

    is_sliding = False

    def __init__(self, place: _Place, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.place, self.keys, self.values = place, keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the cache is allocated from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row, in place, and return all rows' columns."""
        n, length = len(key_states), self.place.length
        rows, positions = torch.arange(n, device=self.keys.device), self.place.positions.to(self.keys.device)
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[:n, :, :length], self.values[:n, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.length, 0

    def get_seq_length(self) -> int:
        return self.place.length - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class Slots:
    """Batched completion without padding, with refilling: as one completion ends, the next prompt takes its slot.

    Every row keeps its own positions: token `t` in column `t` of a cache that is allocated once. New prompts are read
    together where a few slots are free, padded on the right: causal attention keeps padding from them without a mask,
    so that company hardly changes their rounding. A prefix that all share is read once.
    """

    def __init__(self, model: Any, decoding: Decoding, n_slots: int) -> None:
        """Make slots for `n_slots` completions at a time of a transformers model, which is left as it is."""
        self.model, self.decoding, self.n_slots = model, decoding, n_slots
        self._device: torch.device = model.device
        self._on = "cuda" if self._device.type == "cuda" else "cpu"
        self._spread = is_spread(model)

    @torch.no_grad()
    def run(self, jobs: Sequence[Job]) -> Iterator[Completions]:
        """Yield completions as they end, longest prompts first."""
        waiting = deque(sorted(jobs, key=lambda job: -len(job.prompt_ids)))
        self.n_slots = min(self.n_slots, len(waiting))
        prefix = _common_prefix([job.prompt_ids for job in waiting])
        self._prefix = self._read([prefix], None)[0] if len(prefix) >= MIN_PREFIX and len(waiting) > 1 else None
        self._cache: SlotCache | None = None
        self._capacity = self._rounded(len(waiting[0].prompt_ids) + self.decoding.max_new_tokens)
        self._tokens, self._positions = torch.zeros(2, self.n_slots, dtype=torch.long, device=self._device)
        self._forward = CudaGraphs(self._logits) if self._on == "cuda" and not self._spread else self._logits
        try:
            yield from self._until_all_ended(waiting)
        finally:
            ordinary_buffers(self.model.modules())  # steps ran in inference mode

    def _until_all_ended(self, waiting: deque[Job]) -> Iterator[Completions]:
        rows: list[Row] = []
        while waiting or rows:
            ended: Completions = []
            free = self.n_slots - len(rows)
            if waiting and (free >= self.n_slots * _FREE or not rows):
                rows += self._admit([waiting.popleft() for _ in range(min(free, len(waiting)))], len(rows))
            else:
                self._step(rows)
            for slot in reversed(range(len(rows))):
                if self.decoding.over(rows[slot]):
                    ended.append((rows[slot].job, rows[slot].new_ids))
                    self._vacate(rows, slot)
            if ended:
                yield ended

    def _admit(self, jobs: Sequence[Job], first: int) -> list[Row]:
        """Read prompts into the slots from `first` on, and draw their first tokens."""
        rows: list[Row] = []
        for group in _groups(jobs, _TOKENS_AT_ONCE[self._on], _SIMILAR[self._on]):
            prompts = [list(ids) for ids in dict.fromkeys(tuple(job.prompt_ids) for job in group)]  # samples share one
            read, logits = self._read(prompts, self._prefix)
            if self._cache is None:
                self._cache = SlotCache.like(read, self.n_slots, self._capacity)
            places = [prompts.index(job.prompt_ids) for job in group]
            slots = slice(first + len(rows), first + len(rows) + len(group))
            self._cache.fill(slots, read, places)
            admitted = [self.decoding.row(job) for job in group]
            self.decoding.extend(admitted, logits[places])
            rows += admitted
        return rows

    def _read(
        self, prompts: list[list[int]], prefix: DynamicCache | None
    ) -> tuple[DynamicCache, Float[Tensor, "row d_vocab"]]:
        """Run prompts, or what follows the prefix in them; returns keys and values, and the logits after them."""
        cache = DynamicCache()  # without the config, by which sliding layers would drop what the window has passed
        start = 0
        if prefix is not None:
            for layer, shared in enumerate(prefix.layers):
                cache.update(*(x.expand(len(prompts), -1, -1, -1) for x in (shared.keys, shared.values)), layer)
            start = cache.get_seq_length()
        device = self._device
        tokens, mask = right_pad([ids[start:] for ids in prompts], 0, device)
        last = mask.sum(dim=1) - 1
        positions = torch.arange(start, start + tokens.shape[1], device=device).expand(len(prompts), -1)
        with (
            fastest_attention(self.model, start + tokens.shape[1]),
            unembed_only(self.model.get_output_embeddings(), torch.arange(len(prompts), device=device), last),
        ):
            logits = run_twin(
                self.model, tokens, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits  # fmt: skip
        return cache, logits[0].float()

    def _step(self, rows: list[Row]) -> None:
        """Draw one new token for every row."""
        self._tokens[: len(rows)] = torch.tensor([row.new_ids[-1] for row in rows])
        self._positions[: len(rows)] = torch.tensor([row.position for row in rows])
        length = min(self._rounded(max(row.position for row in rows) + 1), self._capacity)
        self.decoding.extend(rows, self._forward(self._n_computed(len(rows)), length)[: len(rows)])

    def _n_computed(self, n: int) -> int:
        """Rows to compute: on CUDA a power of two, since a graph has one size; empty slots are never read."""
        return n if self._on == "cpu" else min(self.n_slots, 1 << (n - 1).bit_length())

    def _logits(self, n: int, length: int) -> Float[Tensor, "row d_vocab"]:
        """The first `n` slots' tokens through the model, with `length` columns of the cache in reach."""
        assert self._cache is not None  # there is a row, so a prompt was read
        positions = self._positions[:n]
        self._cache.place.positions, self._cache.place.length = positions, length
        with one_query_at_a_time(self.model) as added, self._unrecorded():
            output = run_twin(
                self.model,
                self._tokens[:n, None],
                attention_mask=step_mask(self.model, positions, length, added),
                position_ids=positions[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[:, -1].float()

    def _unrecorded(self) -> contextlib.AbstractContextManager[Any]:
        """Inference mode on a CPU, where autograd's bookkeeping takes a twentieth of a small model's step.

        Not where accelerate loads weights in each pass, which would stay inference tensors.
        """
        return torch.inference_mode() if self._on == "cpu" and not self._spread else contextlib.nullcontext()

    def _rounded(self, length: int) -> int:
        step = _COLUMNS[self._on]
        return -(-length // step) * step

    def _vacate(self, rows: list[Row], slot: int) -> None:
        """Take a row out; the last row moves into its slot, so that the rows in use stay together."""
        assert self._cache is not None
        last = len(rows) - 1
        if slot != last:
            self._cache.move(last, slot)
            rows[slot] = rows[last]
        rows.pop()


class SlotCache(Cache):
    """A transformers cache whose rows have positions of their own."""

    def __init__(self, layers: list[_SlotLayer], place: _Place) -> None:
        super().__init__(layers=layers)
        self.place = place

    @classmethod
    def like(cls, read: DynamicCache, n_slots: int, capacity: int) -> SlotCache:
        """Empty slots for what a model made of its first prompt."""
        place = _Place(torch.zeros(0, dtype=torch.long), 0)

        def empty(part: Tensor) -> Tensor:
            # zeros: a masked column has weight 0, but 0 times what was in memory before may be NaN
            return part.new_zeros(n_slots, part.shape[1], capacity, part.shape[3])

        return cls([_SlotLayer(place, empty(layer.keys), empty(layer.values)) for layer in read.layers], place)

    def fill(self, slots: slice, read: DynamicCache, places: list[int]) -> None:
        """Put prompts' keys and values into slots. Those of padding are overwritten before a query may read them."""
        for mine, theirs in zip(self.layers, read.layers, strict=True):
            mine.keys[slots, :, : theirs.keys.shape[2]] = theirs.keys[places]
            mine.values[slots, :, : theirs.values.shape[2]] = theirs.values[places]

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]


def step_mask(model: Any, positions: Int[Tensor, " row"], length: int, added: bool) -> Any:
    """Which columns each row's one query may read, `[row, 1, 1, column]`; by kind of layer where kinds differ.

    True where `column <= position`, and in a layer with a sliding window `column > position - window`. A mask that is
    `added` to scores, as eager attention's is, has 0 there and the lowest number elsewhere.
    """
    added = added or attention_implementation(model.config) == "eager"

    def wanted(mask: Bool[Tensor, "row 1 1 column"]) -> Tensor:
        if not added:
            return mask
        zeros = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(model.dtype).min)

    config = model.config.get_text_config()
    columns = torch.arange(length, device=positions.device)
    full = (columns <= positions[:, None])[:, None, None]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if not window or length <= window or kinds == {"full_attention"}:
        return wanted(full)
    sliding = wanted(full & (columns > positions[:, None] - window)[:, None, None])
    if kinds == {"sliding_attention"}:
        return sliding
    return {"full_attention": wanted(full), "sliding_attention": sliding}


def _groups(jobs: Sequence[Job], at_once: int, similar: float) -> Iterator[list[Job]]:
    """Prompts of similar length that are read in one pass, with enough tokens that arithmetic limits its speed."""
    group: list[Job] = []
    for job in jobs:  # longest first
        if group and (
            len(group[0].prompt_ids) * (len(group) + 1) > at_once
            or len(job.prompt_ids) < similar * len(group[0].prompt_ids)
        ):
            yield group
            group = []
        group.append(job)
    yield group


def _common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, except that every prompt keeps one token of its own."""
    low, high = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    n = next((i for i in range(limit) if low[i] != high[i]), limit)
    return low[: max(n, 0)]
