"""oneDNN's products against float64, and what else the mode must leave alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from spd_lens.models.onednn import available, fast_products, packed, recomputed_alike

HERE = (torch.device("cpu"), torch.float32)

pytestmark = pytest.mark.skipif(not available(), reason="PyTorch has no oneDNN product for this processor")


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was called."""
    from spd_lens.models import onednn as products

    made = []
    plain = products.onednn_product
    monkeypatch.setattr(products, "onednn_product", lambda *args, **kwargs: made.append(1) or plain(*args, **kwargs))
    return made


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)


def relative(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 5), (2, 3, 5)])
def test_forth_and_back_are_those_of_float64(calls, bias, shape):
    linear = layer(bias)
    rows = torch.randn(*shape, 24, requires_grad=True)
    wide, exact = copy.deepcopy(linear).double(), rows.detach().double().requires_grad_()
    with fast_products(*HERE):
        found = linear(rows)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    wanted = wide(exact)
    wanted.backward(upstream.double())
    assert len(calls) == 2
    assert relative(found, wanted.detach()) < 1e-6 and relative(rows.grad, exact.grad) < 1e-6


def test_rows_that_lie_scattered_in_memory(calls):
    linear, rows = layer(), torch.randn(5, 24, 6).transpose(1, 2)
    with fast_products(*HERE):
        found = linear(rows[:, -2:])
    assert calls and relative(found, copy.deepcopy(linear).double()(rows[:, -2:].double())) < 1e-6


def test_addmm_as_gpt2_and_the_lens_call_it(calls):
    bias, rows, weight = torch.randn(9), torch.randn(5, 3, requires_grad=True), torch.randn(3, 9)
    with fast_products(*HERE):
        found = torch.addmm(bias, rows, weight)
    found.sum().backward()
    assert len(calls) == 2
    assert relative(found, bias.double() + rows.detach().double() @ weight.double()) < 1e-6
    assert torch.allclose(rows.grad, weight.sum(1).expand(5, 3), rtol=1e-5)


def test_weights_in_training_other_types_and_scaled_products_take_the_usual_way(calls):
    trained = layer().requires_grad_(True)
    rows = torch.randn(4, 24)
    with fast_products(*HERE):
        trained(rows).sum().backward()
        layer(dtype=torch.float64)(rows.double())
        layer(dtype=torch.bfloat16)(rows.bfloat16())
        assert layer()(torch.empty(0, 24)).shape == (0, 40)
        scaled = torch.addmm(torch.ones(40), rows, torch.ones(24, 40), beta=2, alpha=3)
        matrix = torch.addmm(torch.ones(4, 40), rows, torch.ones(24, 40))
    assert not calls
    assert torch.allclose(trained.weight.grad, rows.sum(0).expand(40, 24), rtol=1e-5)
    total = rows.sum(1, keepdim=True).expand(4, 40)
    assert torch.allclose(scaled, 2 + 3 * total, atol=1e-4) and torch.allclose(matrix, 1 + total, atol=1e-4)


def test_recomputed_passes_have_the_same_gradient(calls):
    linear, rows = layer(), torch.randn(4, 24, requires_grad=True)
    with fast_products(*HERE):
        made = checkpoint(lambda x: linear(x).relu(), rows, use_reentrant=False, context_fn=recomputed_alike(*HERE))
        made.sum().backward()
    exact = rows.detach().double().requires_grad_()
    copy.deepcopy(linear).double()(exact).relu().sum().backward()
    assert len(calls) == 3 and relative(rows.grad, exact.grad) < 1e-6


def test_turned_off_with_oneDNN(calls):
    torch._C._set_mkldnn_enabled(False)
    try:
        with fast_products(*HERE):
            layer()(torch.randn(3, 24))
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("n", [1, 3, 300])
def test_packed_layers_compute_the_same_and_are_as_they_were_afterwards(dtype, tolerance, n):
    model = nn.Sequential(layer(dtype=dtype), nn.ReLU())
    rows = torch.randn(n, 2, 24, dtype=dtype)
    exact = F.relu(copy.deepcopy(model[0]).double()(rows.double()))
    before = model[0].weight.clone()
    with torch.no_grad(), packed(model):
        assert ("forward" in vars(model[0])) == available(dtype)
        found = model(rows)
    assert relative(found, exact) < tolerance
    assert "forward" not in vars(model[0]) and torch.equal(model[0].weight, before)


WITHOUT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Environment in which PyTorch and oneDNN use nothing newer than AVX2."""

GREEDY = """
import sys, torch
import spd_lens as spd
from spd_lens.models.devices import resolve_dtype
from spd_lens.models.onednn import available

assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
assert not available(torch.bfloat16) and not available(torch.float16)
for dtype in ("bfloat16", "float16"):
    pair = spd.load(sys.argv[1], dtype=dtype, device="cpu")
    prompts = ["7 * 3", "Tom has 12 apples."]
    for record in spd.generate(pair, prompts, temperature=0.0, max_new_tokens=8, progress=False):
        n, ids = len(record.prompt_ids), [*record.prompt_ids, *record.completion_ids]
        with torch.no_grad():
            logits = pair.hf(torch.tensor([ids]), use_cache=False).logits[0, n - 1 : -1].float()
        missed = logits.amax(-1) - logits[range(len(ids) - n), ids[n:]]
        assert missed.max() < 0.1 * logits.std(), (dtype, missed)  # the best token but for rounding
    task = spd.tasks.get("synthetic-math", max_new_tokens=4)
    moments = spd.extract(pair, task.calibration(2), engine="twin", progress=False)
    spd.evaluate(pair, task, 2, subspace=moments.subspace(), progress=False)
print("done")
"""


def test_half_precision_on_a_processor_without_instructions_for_it(tiny_llama_dir):
    environment = os.environ | WITHOUT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", GREEDY, str(tiny_llama_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.stdout == "done\n", done.stderr


def test_packed_weights_are_those_of_now():
    """What is folded in before counts."""
    linear, rows = layer(), torch.randn(3, 24)
    linear.weight.mul_(2)
    wanted = copy.deepcopy(linear).double()(rows.double())
    with packed(linear):
        assert relative(linear(rows), wanted) < 1e-6


@pytest.mark.parametrize("way", ["linear", "addmm", "packed"])
def test_copy_on_write_weights_stay_shared(way):
    linear = layer()
    linear.weight.data = torch._lazy_clone(linear.weight.data)
    rows = torch.randn(3, 24, requires_grad=True)
    if way == "packed":
        with torch.no_grad(), packed(linear):
            linear(rows)
    else:
        with fast_products(*HERE):
            made = linear(rows) if way == "linear" else torch.addmm(torch.zeros(24), linear(rows), linear.weight)
        made.sum().backward()
    assert torch._C._is_cow_tensor(linear.weight)
