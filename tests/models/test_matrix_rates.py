"""The rate of matrix products: near that of a plain product timed here."""

import time

import pytest
import torch

from spd_lens.models.matrix_rates import matrix_rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rates_are_those_of_plain_products(dtype):
    start = time.perf_counter()
    rates = matrix_rates(torch.device("cpu"), dtype)
    assert time.perf_counter() - start < 30
    rows, weight = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        rows @ weight
        times.append(time.perf_counter() - start)
    plain = 2 * 1024 * 576 * 1536 / min(times)
    assert plain / 20 < rates.flops < plain * 5  # whatever else the machine does meanwhile
    # 32 rows: a weight of so many bytes takes 64 operations, and its bytes cannot come slower than those are computed
    assert rates.flops / 64 * dtype.itemsize / 50 < rates.bandwidth < 5e12
