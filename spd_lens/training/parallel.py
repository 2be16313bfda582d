"""The processes that train together: which of them this one is, and what the first of them does for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed

from spd_lens.errors import SPDError
from spd_lens.models import several_processes, single_process
from spd_lens.training.loss import IGNORED

_T = TypeVar("_T")
Engine = Literal["ddp", "fsdp", "deepspeed"]


@dataclass(frozen=True)
class Processes:
    """One process, or several that a launcher started, each with the whole corpus and a model of its own."""

    index: int = 0
    count: int = 1
    engine: Engine | None = None
    """What keeps their weights the same; None: this process trains alone."""

    @property
    def sharded(self) -> bool:
        """Whether a process holds weights whole only while a layer runs."""
        return self.engine in ("fsdp", "deepspeed")

    @property
    def recorded(self) -> dict[str, Any]:
        """For `training.json`; nothing for one process that trains alone."""
        return {} if self.engine is None else {"processes": {"count": self.count, "engine": self.engine}}

    def first(self, function: Callable[[], _T]) -> _T:
        """What the first process finds, in all of them, once it has; an `SPDError` of its is one of all."""
        if self.engine is None:
            return function()
        found: list[Any] = [None, None]
        if self.index == 0:
            try:
                found[0] = function()
            except SPDError as error:
                found[1] = str(error)
        distributed.broadcast_object_list(found)
        if found[1] is not None:
            raise SPDError(found[1])
        return found[0]

    def check(self, batch_size: int, identity: Mapping[str, Any]) -> None:
        """Raise `SPDError` if the processes cannot share batches, or were not given the same."""
        if batch_size % self.count:
            raise SPDError(
                f"batch_size is {batch_size}, which {self.count} processes cannot share equally; make it a multiple of "
                f"{self.count}, or start another number of processes"
            )
        if self.engine is None:
            return
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, dict(identity))
        for name in identity:
            if other := [there[name] for there in found if there[name] != found[0][name]]:
                raise SPDError(
                    f"the processes of one training differ in {name} ({found[0][name]!r} and {other[0]!r}); give all "
                    "of them the same model, corpus and settings"
                )

    def shares(self, parts: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """This process's rows of each pass: of a step's rows every `count`-th, so that all have as many, or one fewer.

        All go through every pass together. Where one has no row of its own, it takes another's, without a label.
        """
        mine, before = [], 0
        for part in parts:
            n_rows = len(part["input_ids"])
            start = (self.index - before) % self.count
            before += n_rows
            if start < n_rows:
                mine.append({name: value[start :: self.count] for name, value in part.items()})
            else:
                one = {name: value[:1] for name, value in part.items()}
                mine.append({**one, "labels": torch.full_like(one["labels"], IGNORED)})
        return mine


@contextlib.contextmanager
def joined(device: torch.device, parallel: bool) -> Iterator[Processes]:
    """While open, the process trains alone whatever a launcher says, or with `parallel` as one of a launcher's."""
    if not parallel:
        with single_process():
            yield Processes()
        return
    engine: Engine = "ddp"
    for name, value in (("ACCELERATE_USE_FSDP", "fsdp"), ("ACCELERATE_USE_DEEPSPEED", "deepspeed")):
        if os.environ.get(name, "false").lower() == "true":
            engine = value  # type: ignore[assignment]
    with several_processes(device) as state:
        yield Processes(state.process_index, state.num_processes, engine)
