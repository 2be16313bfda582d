"""Time and memory of several ways to do one thing, in turn and in one process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch

_SAMPLING_SECONDS = 0.002


@dataclass(frozen=True)
class Sample:
    """One timed call."""

    seconds: float
    peak: int
    """Bytes above what was held before the call: resident memory of the process, or CUDA's own count."""
    result: Any


def timed(call: Callable[[], Any], settled: bool = True) -> Sample:
    """Run a call once; its result is kept, so that results can be compared.

    `settled`: give freed memory back before, without which the peak is wrong; getting it again costs the call time.
    """
    if settled:
        settle()
    with _PeakMemory() as memory:
        start = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Sample(seconds, memory.peak, result)


def in_turn(
    ways: Mapping[str, Callable[[int], Any]],
    rounds: int,
    warm_up: Callable[[], Any] | None = None,
    settled: bool = False,
) -> dict[str, list[Sample]]:
    """A B C A B C ...: each way does round `n` right after the other ways did, so that a drifting machine spares none.

    Args:
        ways: Each is told the number of the round, which may choose its inputs.
        rounds: Timed calls of each way.
        warm_up: Run once before and not timed.
        settled: Whether to give freed memory back before each call, as in `timed`.
    """
    if warm_up is not None:
        warm_up()
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for n in range(rounds):
        for name, way in ways.items():
            samples[name].append(timed(partial(way, n), settled))
    return samples


def ratios(ours: list[Sample], peer: list[Sample]) -> list[float]:
    """How many times faster ours is, round by round."""
    return [p.seconds / o.seconds for o, p in zip(ours, peer, strict=True)]


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a module's function in a process of its own: what a heap has been through shows in its peaks."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def settle() -> None:
    """Give freed memory back, so that the next peak is the next call's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def held() -> int:
    """Bytes held now, freed memory given back: the process's resident memory, or what CUDA's allocator gave."""
    settle()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


class _PeakMemory:
    """Largest resident memory while open, sampled by a thread; on CUDA the allocator's peak."""

    def __enter__(self) -> _PeakMemory:
        self.peak = 0
        self._process = psutil.Process()
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            self.peak = max(self.peak, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated() - self._before
            return
        self._stop.set()
        self._thread.join()
