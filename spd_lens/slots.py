"""Completions in slots: a fixed cache, rows of their own lengths, and a new prompt wherever a completion has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from spd_lens.decoding import Completions, Decoding, Job
from spd_lens.models.hooks import unembed_only
from spd_lens.sampling import choose, row_uniforms

MIN_PREFIX = 64
"""Shared tokens from which on it pays to compute a common prefix once."""
_COLUMNS = 64
"""Attention reads the cache in steps of this many columns: rounding then hardly depends on the other rows' lengths."""


@dataclass
class _Row:
    job: Job
    ids: list[int] = field(default_factory=list)
    """New tokens so far."""

    @property
    def position(self) -> int:
        """Where the next token to be read stands: the last new one."""
        return len(self.job.prompt_ids) + len(self.ids) - 1


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
        """Nothing: it is allocated from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row, in place, and return all rows' columns."""
        n, length = len(key_states), self.place.length
        rows = torch.arange(n, device=self.keys.device)
        self.keys[rows, :, self.place.positions] = key_states[:, :, 0]
        self.values[rows, :, self.place.positions] = value_states[:, :, 0]
        return self.keys[:n, :, :length], self.values[:n, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.length, 0

    def get_seq_length(self) -> int:
        return self.place.length - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class Slots:
    """Batched completion without padding, with refilling: as one completion ends, the next prompt takes its slot.

    Every row keeps its own positions: token `t` in column `t` of a cache that is allocated once. Prompts are read one
    at a time, at their own lengths, so that neither padding nor company changes their rounding; a prefix that all share
    is read once. On the CPU this is as fast as reading them together.
    """

    def __init__(self, model: Any, decoding: Decoding, n_slots: int) -> None:
        """`n_slots` completions at a time of a transformers causal language model, which is left as it is."""
        self.model, self.decoding, self.n_slots = model, decoding, n_slots
        self._last: tuple[list[int], DynamicCache, Tensor] | None = None

    @torch.no_grad()
    def run(self, jobs: Sequence[Job]) -> Iterator[Completions]:
        """Yield completions as they end, longest prompts first."""
        waiting = deque(sorted(jobs, key=lambda job: -len(job.prompt_ids)))
        self.n_slots = min(self.n_slots, len(waiting))
        prefix = _common_prefix([job.prompt_ids for job in waiting])
        self._prefix = self._read(prefix, None)[0] if len(prefix) >= MIN_PREFIX and len(waiting) > 1 else None
        self._cache: SlotCache | None = None
        self._capacity = _rounded(len(waiting[0].prompt_ids) + self.decoding.max_new_tokens)
        self._noise = torch.zeros(self.n_slots, self.decoding.max_new_tokens, dtype=torch.float64)
        rows: list[_Row] = []
        while waiting or rows:
            ended: Completions = []
            while waiting and len(rows) < self.n_slots:
                row = self._admit(waiting.popleft(), len(rows))
                if self._over(row):
                    ended.append((row.job, row.ids))
                else:
                    rows.append(row)
            if rows:
                self._step(rows)
                for slot in reversed(range(len(rows))):
                    if self._over(rows[slot]):
                        ended.append((rows[slot].job, rows[slot].ids))
                        self._vacate(rows, slot)
            if ended:
                yield ended

    def _over(self, row: _Row) -> bool:
        return row.ids[-1] in self.decoding.stop_ids or len(row.ids) == self.decoding.max_new_tokens

    def _admit(self, job: Job, slot: int) -> _Row:
        """Read a prompt into a slot and draw its first token."""
        if self._last is None or self._last[0] != job.prompt_ids:  # samples of one prompt read it once
            self._last = None  # before the next one is read: memory
            self._last = (job.prompt_ids, *self._read(job.prompt_ids, self._prefix))
        _, read, logits = self._last
        if self._cache is None:
            self._cache = SlotCache.like(read, self.n_slots, self._capacity)
        self._cache.fill(slot, read)
        noise = row_uniforms(self.decoding.seed, *job.key, self.decoding.max_new_tokens)
        self._noise[slot] = torch.from_numpy(noise)
        return _Row(job, [int(choose(logits, self.decoding.sampling, self._noise[slot, :1], [0]))])

    def _read(self, ids: list[int], prefix: DynamicCache | None) -> tuple[DynamicCache, Float[Tensor, "1 d_vocab"]]:
        """Run a prompt, or what follows the prefix in it; its keys and values, and the logits after it."""
        cache = DynamicCache()  # without the config, by which sliding layers would drop what the window has passed
        start = 0
        if prefix is not None:
            for layer, shared in enumerate(prefix.layers):
                cache.update(shared.keys, shared.values, layer)
            start = cache.get_seq_length()
        device = self.model.device
        tokens = torch.tensor([ids[start:]], device=device)
        positions = torch.arange(start, len(ids), device=device)[None]
        last = torch.tensor([len(ids) - start - 1], device=device)
        with unembed_only(self.model.get_output_embeddings(), torch.zeros_like(last), last):
            logits = self.model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits
        return cache, logits[0].float()

    def _step(self, rows: list[_Row]) -> None:
        """One new token for every row."""
        assert self._cache is not None  # there is a row, so a prompt was read
        device = self.model.device
        positions = torch.tensor([row.position for row in rows])
        length = min(_rounded(int(positions.max()) + 1), self._capacity)
        self._cache.place.positions, self._cache.place.length = positions.to(device), length
        tokens = torch.tensor([[row.ids[-1]] for row in rows], device=device)
        logits = (
            self.model(
                input_ids=tokens,
                attention_mask=step_mask(self.model, positions.to(device), length),
                position_ids=positions.to(device)[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
            .logits[:, -1]
            .float()
        )
        steps = [len(row.ids) for row in rows]
        noise = self._noise[torch.arange(len(rows)), steps]
        for row, token in zip(rows, choose(logits, self.decoding.sampling, noise, steps).tolist(), strict=True):
            row.ids.append(token)

    def _vacate(self, rows: list[_Row], slot: int) -> None:
        """Take a row out; the last row moves into its slot, so that the rows in use stay together."""
        assert self._cache is not None
        last = len(rows) - 1
        if slot != last:
            self._cache.move(last, slot)
            self._noise[slot] = self._noise[last]
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

    def fill(self, slot: int, read: DynamicCache) -> None:
        """Put one prompt's keys and values into a slot."""
        for mine, theirs in zip(self.layers, read.layers, strict=True):
            mine.keys[slot, :, : theirs.keys.shape[2]] = theirs.keys[0]
            mine.values[slot, :, : theirs.values.shape[2]] = theirs.values[0]

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]


def step_mask(model: Any, positions: Int[Tensor, " row"], length: int) -> Any:
    """Which columns each row's one query may read, `[row, 1, 1, column]`; by kind of layer where kinds differ.

    True where `column <= position`, and in a layer with a sliding window `column > position - window`. Eager attention
    adds its mask: there 0 where True.
    """
    config = model.config.get_text_config()
    columns = torch.arange(length, device=positions.device)
    full = (columns <= positions[:, None])[:, None, None]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if not window or length <= window or kinds == {"full_attention"}:
        return _as_the_attention_takes_it(model, full)
    sliding = _as_the_attention_takes_it(model, full & (columns > positions[:, None] - window)[:, None, None])
    if kinds == {"sliding_attention"}:
        return sliding
    return {"full_attention": _as_the_attention_takes_it(model, full), "sliding_attention": sliding}


def _as_the_attention_takes_it(model: Any, mask: Bool[Tensor, "row 1 1 column"]) -> Tensor:
    if model.config._attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


def _common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Tokens that all prompts begin with; every prompt keeps one token of its own."""
    low, high = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    n = next((i for i in range(limit) if low[i] != high[i]), limit)
    return low[: max(n, 0)]


def _rounded(length: int) -> int:
    return -(-length // _COLUMNS) * _COLUMNS
