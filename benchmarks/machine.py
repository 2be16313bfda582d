"""What the numbers were measured on, and how fast it multiplies matrices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from typing import Any

import psutil
import torch

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


def matrix_seconds(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one `[m, k] x [k, n]` product of each shape as `nn.Linear` does it, nothing else; median of five."""
    total = 0.0
    for m, k, n in shapes:
        x, weight = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        total += statistics.median(times[1:])
    return total
