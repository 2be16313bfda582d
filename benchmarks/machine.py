"""What the numbers were measured on, and how fast it multiplies matrices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import torch

from spd_lens.models import available, onednn_packed, onednn_product

_PACKAGES = ("torch", "transformers", "transformer-lens", "peft", "trl", "accelerate", "numpy")


def facts() -> dict[str, Any]:
    """Machine, versions, threads."""
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capabilities": [name for name, has in torch.cpu.get_capabilities().items() if has is True],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


Products = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Left and right factors."""


def fastest(products: Products) -> Callable[[], None]:
    """Nothing but matrix products, one after the other, so that weights come from memory; to be timed.

    On a CPU the faster of PyTorch's own way and oneDNN's with packed weights.
    """
    ways = [partial(_multiply, torch.mm, products)]
    if products[0][0].device.type == "cpu" and available(products[0][0].dtype):
        packed = [(left, onednn_packed(right.t().contiguous())) for left, right in products]
        ways.append(partial(_multiply, partial(onednn_product, bias=None), packed))
    return min(ways, key=_seconds)


def matrix_seconds(products: Products) -> float:
    """Seconds of `fastest`: median of three."""
    return _seconds(fastest(products))


def _multiply(multiply: Callable[..., Any], products: Products) -> None:
    for left, right in products:
        multiply(left, right)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(call: Callable[[], None]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
