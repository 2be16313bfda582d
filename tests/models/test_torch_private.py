"""A canary: which of PyTorch's and transformers' private interfaces are still what the library takes them for.

Seen to work with torch 2.13.0 and transformers 5.23.0. Where one of these tests fails with another release, an
interface is gone or has changed: the module says what the library loses without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import spd_lens as spd
from spd_lens.models import torch_private, transformers_private
from spd_lens.models.onednn import available, packed

SEEN = "2.13.0"
"""The release of torch with which all of these were last seen to work."""


def gone(what: str) -> str:
    return f"{what} of torch {SEEN} is gone or another in {torch.__version__}: see models/torch_private"


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(torch_private, "enabled", False)


def test_copies_share_memory_until_written():
    weight = torch.zeros(4)
    copied = torch_private.lazy_copy(weight)
    assert torch_private.is_lazy(weight) and torch_private.is_lazy(copied), gone("_lazy_clone")
    assert not torch_private.is_lazy(torch.zeros(4)), gone("_C._is_cow_tensor")
    weight += 1
    assert torch.equal(copied, torch.zeros(4)), gone("copy-on-write storage")


@pytest.mark.skipif(not available(), reason="oneDNN is not used on this processor")
def test_oneDNN_multiplies_dense_and_packed_weights():
    rows, weight, bias = torch.randn(3, 24), torch.randn(40, 24), torch.randn(40)
    wanted = F.linear(rows.double(), weight.double(), bias.double())
    for given in (weight, torch_private.onednn_packed(weight)):
        found = torch_private.onednn_product(rows, given, bias)
        assert torch.allclose(found.double(), wanted, atol=1e-4), gone("ops.mkldnn._linear_pointwise")


def test_oneDNN_says_what_it_takes():
    if torch.backends.mkldnn.is_available():
        assert torch_private.has_onednn_product(), gone("ops.mkldnn._linear_pointwise")
        assert hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"), gone("ops.mkldnn._is_mkldnn_bf16_supported")
        assert hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), gone("ops.mkldnn._reorder_linear_weight")


def test_open_modes_are_seen():
    class Functions(TorchFunctionMode):
        pass

    class Dispatch(TorchDispatchMode):
        pass

    with torch.device("cpu"):
        assert torch_private.open_modes() == []
        with Functions() as functions, Dispatch() as dispatch:
            assert torch_private.open_modes() == [functions, dispatch], gone("the stacks of modes")


def test_kernels_of_attention_have_an_order():
    own = torch._C._get_sdp_priority_order()
    with torch_private.attention_order(own[::-1]):
        assert torch._C._get_sdp_priority_order() == own[::-1], gone("_C._set_sdp_priority_order")
    assert torch._C._get_sdp_priority_order() == own


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "backward_pre", "backward"])
def test_hooks_are_in_their_tables(kind):
    module, hook = nn.Linear(2, 2), lambda *passed: None
    own = {"backward": "full_backward", "backward_pre": "full_backward_pre"}.get(kind, kind)
    handle = getattr(module, f"register_{own}_hook")(hook)
    everywhere = getattr(nn.modules.module, f"register_module_{own}_hook")(hook)
    try:
        assert torch_private.hook_tables(module, kind)[handle.id] is hook, gone(f"Module._{kind}_hooks")
        assert torch_private.hook_tables(None, kind)[everywhere.id] is hook, gone(f"_global_{kind}_hooks")
    finally:
        everywhere.remove()


def test_writing_is_counted():
    weight = torch.zeros(3)
    before = torch_private.times_written(weight)
    weight += 1
    assert torch_private.times_written(weight) != before, gone("Tensor._version")
    with torch.inference_mode():
        assert torch_private.times_written(torch.zeros(3)) is None


def test_what_compile_leaves_is_known():
    module = nn.Sequential(nn.Linear(2, 2))
    wrapped = torch.compile(module, backend="eager")
    assert torch_private.is_wrapped_by_compile(wrapped) and torch_private.before_compile(wrapped) is module
    assert torch_private.is_compiled(wrapped) and not torch_private.is_compiled(module), gone("_orig_mod")
    module.compile(backend="eager")
    assert torch_private.is_compiled(module), gone("_compiled_call_impl")
    layer = nn.Linear(2, 2)
    layer.forward = torch.compile(layer.forward, backend="eager")
    assert torch_private.is_compiled(layer), gone("_torchdynamo_orig_callable")
    assert torch_private.without_wrappers(layer.forward) is nn.Linear.forward


def test_switched_off_the_plain_path_runs(plain):
    weight = torch.zeros(4)
    assert torch_private.lazy_copy(weight).data_ptr() != weight.data_ptr()
    assert not available() and not torch_private.onednn_takes_bfloat16()
    layer, rows = nn.Linear(24, 40).requires_grad_(False), torch.randn(3, 24)
    with packed(layer):
        assert torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))
    with TorchFunctionMode():
        assert torch_private.open_modes() == []
    assert torch_private.hook_tables(layer, "forward") == {} and torch_private.times_written(weight) is None
    order = torch._C._get_sdp_priority_order()
    with torch_private.attention_order(order[::-1]):
        assert torch._C._get_sdp_priority_order() == order


JOB = """
import sys
import spd_lens as spd
import spd_lens as spd
from spd_lens.models import torch_private, transformers_private
from spd_lens.models.onednn import available

plain = sys.argv[2] == "plain"
assert torch_private.enabled is not plain and not (plain and available())
pair = spd.load(sys.argv[1], dtype="float32", device="cpu")
task = spd.tasks.get("synthetic-math", max_new_tokens=4)
subspace = spd.extract(pair, task.calibration(2), progress=False).subspace()
corpus = spd.generate(pair, ["7 * 3", "Tom has 12 apples."], subspace=subspace, temperature=0.0, max_new_tokens=6,
                      progress=False)
print([record.completion_ids for record in corpus])
adapter = spd.finetune(pair, corpus, out=sys.argv[3], epochs=1, progress=False)
assert pair.sync(to="lens", adapter=adapter).kl < 1e-4
"""


def test_a_whole_job_on_the_plain_path_says_the_same(tiny_llama_dir, tmp_path):
    said = {}
    for way, switch in (("plain", "1"), ("private", "0")):
        environment = os.environ | {"SPD_LENS_PLAIN_TORCH": switch, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", JOB, str(tiny_llama_dir), way, str(tmp_path / way)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr
        said[way] = done.stdout
    assert said["plain"] == said["private"]


def test_transformers_still_has_what_is_needed(tiny_llama_dir):
    pair = spd.load(str(tiny_llama_dir), dtype="float32", device="cpu")
    config = pair.hf.config
    assert transformers_private.template_environment().from_string("{{ 1 + 1 }}").render() == "2"
    assert transformers_private.default_generation_settings()["temperature"] == 1.0
    assert transformers_private.causal_class(config) is type(pair.hf)
    assert transformers_private.is_known_to(AutoModelForCausalLM, config)
    assert not transformers_private.is_known_to(AutoModelForImageTextToText, config)
    made = transformers_private.logits_processors(pair.hf, {"suppress_tokens": [3]}, [0, 1], [2])
    logits = made(torch.tensor([[0, 1]]), torch.zeros(1, pair.hf.vocab_size))
    assert logits[0, 3] == -torch.inf and logits.isfinite().sum() == pair.hf.vocab_size - 1
    assert transformers_private.attention_implementation(config) == "sdpa"
    assert transformers_private.may_change_attention(pair.hf)
    transformers_private.call_attention(config, "eager")
    assert {layer.self_attn.config._attn_implementation for layer in pair.hf.model.layers} == {"eager"}
