"""How fast this machine multiplies matrices, found out in a second or two: by it, sizes of a first try are chosen."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from spd_lens.models.onednn import fast_products, packed

_WIDTH, _INNER, _LAYERS = 576, 1536, 24
"""Of the products: those of SmolLM2-135M's MLP, as many as no processor's own cache holds in float32."""
_MANY, _FEW = 1024, 32
"""Rows of a pass over whole texts, and of a step of generation."""
_SECONDS = 0.5
"""How long each of the two is tried, and at least three times."""


class MatrixRates(NamedTuple):
    """How fast matrices are multiplied with weights."""

    flops: float
    """Operations per second (a multiplication and an addition are two) where many tokens share the weights."""
    bandwidth: float
    """Bytes of weights per second where 32 tokens do, as while completions are generated."""


@torch.inference_mode()
def matrix_rates(device: torch.device, dtype: torch.dtype) -> MatrixRates:
    """Time products in the ways of the library's own passes; each rate is the median of several tries.

    What else the machine is doing slows them down as it would slow down what comes after.
    """
    shapes = [(_WIDTH, _INNER), (_INNER, _WIDTH)] * (_LAYERS // 2)
    layers = [nn.utils.skip_init(nn.Linear, *shape, bias=False, device=device, dtype=dtype) for shape in shapes]
    for layer in layers:
        layer.weight.fill_(1 / _INNER)

    def seconds(n_rows: int, some: list[nn.Linear]) -> float:
        inputs = {width: torch.ones(n_rows, width, device=device, dtype=dtype) for width in (_WIDTH, _INNER)}
        return _median_seconds(lambda: [layer(inputs[layer.in_features]) for layer in some], device)

    size = _WIDTH * _INNER  # of each weight
    with fast_products(device, dtype):
        flops = 2 * _MANY * 2 * size / seconds(_MANY, layers[:2])
    with packed(nn.ModuleList(layers)):
        bandwidth = _LAYERS * size * dtype.itemsize / seconds(_FEW, layers)
    return MatrixRates(flops, bandwidth)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # what is only done once is not counted
    tries: list[float] = []
    while len(tries) < 3 or sum(tries) < _SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        tries.append(time.perf_counter() - start)
    return statistics.median(tries)
