"""Processes that share one piece of work: which of them this is, what the others found, and sums over all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spd_lens.errors import SPDError, one_line, shortened

T = TypeVar("T")

_FROM_A_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torchrun and `accelerate launch` tell a process who the others are."""


@dataclass(frozen=True)
class Processes:
    """This process among those that it works together with. All of them must call the same methods in the same order.

    Raises:
        SPDError: from every method, where another process has ended or does not answer.
    """

    rank: int = 0
    n: int = 1
    _group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def gathered(self, mine: T) -> list[T]:
        """What each of the processes has, in order of rank."""
        if self.n == 1:
            return [mine]
        found: list[Any] = [None] * self.n
        with _answered():
            dist.all_gather_object(found, mine, group=self._group)
        return found

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Let tensors on the CPU become their sums over all processes, in float64, the same bits in all of them.

        All travel at once. Counts stay exact up to 2⁵³.
        """
        if self.n == 1:
            return
        total = torch.cat([tensor.flatten().double() for tensor in tensors])
        with _answered():
            dist.all_reduce(total, group=self._group)
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here. Where it fails in one of the processes, every process raises that error."""
        try:
            result = work()
        except Exception as error:
            with contextlib.suppress(SPDError):  # what went wrong here says more than that nobody answers
                self.gathered(one_line(error, 600))
            raise
        for rank, sentence in enumerate(self.gathered("")):
            if sentence:
                raise SPDError(f"process {rank} of {self.n} (counted from 0) stopped, so all do: {sentence}")
        return result

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise `SPDError`, in every process alike, where a fact is another in one of them."""
        first, *others = self.gathered(dict(facts))
        for rank, theirs in enumerate(others, start=1):
            for what, mine in first.items():
                if theirs.get(what) != mine:
                    found = shortened(theirs.get(what, "none"), 200)
                    raise SPDError(
                        f"the processes do not work on the same: {what} is {found} in process {rank} and "
                        f"{shortened(mine, 200)} in process 0; give all of them the same versions, files and settings"
                    )


@contextlib.contextmanager
def processes(shared: bool = True) -> Iterator[Processes]:
    """The processes of torch.distributed's default group where there is one of several; else this process alone.

    Numbers are exchanged on the CPU. Where the default group carries CUDA tensors alone, a group beside it does that.
    `shared=False`: this process alone in any case.
    """
    if not (shared and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Processes()
        return
    beside = None if "cpu:gloo" in dist.get_backend_config() else dist.new_group(backend="gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), beside)
    finally:
        if beside is not None:
            dist.destroy_process_group(beside)


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """While open, the processes that a launcher (torchrun, `accelerate launch`) started are torch.distributed's default
    group, each on a GPU of its own as far as there are enough. Without a launcher: this process alone.

    Raises:
        SPDError: the others cannot be reached.
    """
    several = all(name in os.environ for name in _FROM_A_LAUNCHER) and os.environ["WORLD_SIZE"] != "1"
    if not several or not dist.is_available() or dist.is_initialized():
        with processes() as found:
            yield found
        return
    if torch.cuda.is_available():  # "cuda" then means this one
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _answered():
        dist.init_process_group("gloo")
    try:
        with processes() as found:
            yield found
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """An error of torch.distributed as one sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise SPDError(
            "another of the processes that work together has ended or does not answer, so nothing was finished; look "
            f"at what it said, and start all of them again ({one_line(error)})"
        ) from error
