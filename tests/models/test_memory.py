"""Lens and twin hold their weights once, and neither ever sees what is written to the other."""

import copy
import weakref

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import settle
from spd_lens import extract, projected
from spd_lens.models.adapters import adapted
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.models.torch_private import lazy_copy
from spd_lens.subspaces.projection import folded
from tests.conftest import build_tokenizer
from tests.helpers import EXAMPLES, assert_same_bits, make_adapter
from tests.models.zoo import ZOO, build_pair

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])


@pytest.fixture
def pair(tiny_llama_dir, tiny_qwen2_dir, family, backend):
    """From a file, of each family and backend, with its lens model built."""
    directory = {"llama": tiny_llama_dir, "qwen2": tiny_qwen2_dir}[family]
    loaded = load(str(directory), backend=backend, dtype="float32", device="cpu")
    loaded.lens  # noqa: B018 (built on first use)
    return loaded


def address(tensor):
    """Where it lies. `data_ptr()` would count as writing, and end the sharing."""
    return torch._C._data_address(tensor)


def own_weights(pair):
    """Names of the lens model's weights that take memory of their own; biases the twin lacks are made up, and small."""
    shared = {address(p) for p in pair.hf.parameters()}
    return [
        name
        for name, p in pair.lens.named_parameters()
        if address(p) not in shared and not (name.rsplit(".", 1)[-1].startswith(("b", "_b")) and p.abs().max() == 0)
    ]


def test_the_lens_has_no_weights_of_its_own(pair):
    assert own_weights(pair) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looking_takes_no_copies(tiny_llama_dir, backend, dtype):
    pair = load(str(tiny_llama_dir), backend=backend, dtype=dtype, device="cpu")
    moments = extract(pair, EXAMPLES, engine="lens", layers="all", progress=False)
    with projected(pair.lens, moments.subspace(2)):
        pair.lens.run_with_cache(TOKENS)
    extract(pair, EXAMPLES, engine="twin", layers="all", progress=False)
    pair.check()
    assert own_weights(pair) == []


def test_what_is_written_to_the_lens_stays_there(pair, state_of):
    twin = state_of(pair.hf)
    for parameter in pair.lens.parameters():
        with torch.no_grad():
            parameter.add_(0.5)
        assert_same_bits(pair.hf, twin)


def test_what_is_written_to_the_twin_stays_there(pair, state_of):
    lens = state_of(pair.lens)
    for parameter in pair.hf.parameters():
        with torch.no_grad():
            parameter.mul_(1.5)
    assert_same_bits(pair.lens, lens)


WRITES = {
    "in place": lambda p: p.detach().add_(1),
    "data": lambda p: p.data.zero_(),
    "a view's element": lambda p: p.data.T[3:4].fill_(7),
    "an index": lambda p: p.data.__setitem__(0, 3.0),
    "numpy": lambda p: np.copyto(p.detach().numpy(), 2.0),
    "an optimizer": lambda p: _step(p),
    "set_data": lambda p: setattr(p, "data", torch.zeros_like(p)),
}


def _step(parameter):
    parameter.requires_grad_(True)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
    parameter.requires_grad_(False)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("side", ["lens", "twin"])
def test_every_way_to_write(tiny_llama_dir, backend, state_of, side, write):
    pair = load(str(tiny_llama_dir), backend=backend, dtype="float32", device="cpu")
    mine, other = (pair.lens, pair.hf) if side == "lens" else (pair.hf, pair.lens)
    parameter = next(p for name, p in mine.named_parameters() if ".mlp." in name and p.ndim == 2)
    before, other_before = parameter.detach().clone(), state_of(other)
    WRITES[write](parameter)
    assert not torch.equal(parameter, before)
    assert_same_bits(other, other_before)


def test_a_lens_built_before_the_twin_is_folded_or_adapted_keeps_its_weights(pair, state_of, tmp_path):
    lens = state_of(pair.lens)
    moments = extract(pair, EXAMPLES, engine="twin", progress=False)
    tuned = copy.deepcopy(pair.hf)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.05)
    tuned.save_pretrained(tmp_path / "tuned")
    contexts = (
        folded(pair.hf, moments.subspace(2)),
        adapted(pair.hf, make_adapter(pair.hf, tmp_path / "adapter")),
        adapted(pair.hf, tmp_path / "tuned"),
    )
    for context in contexts:
        with context:
            assert_same_bits(pair.lens, lens)
        assert_same_bits(pair.lens, lens)


def test_sync_shares_again(pair, tmp_path):
    handles = dict(pair.lens.named_parameters())
    pair.sync(to="lens", adapter=make_adapter(pair.hf, tmp_path / "adapter"))
    assert own_weights(pair)
    pair.sync(to="lens")
    assert own_weights(pair) == []
    assert all(handles[name] is p for name, p in pair.lens.named_parameters()), "parameters stay the same objects"


def test_an_edit_brought_to_the_twin_is_all_that_is_no_longer_shared(tiny_llama_dir, backend):
    pair = load(str(tiny_llama_dir), backend=backend, dtype="float32", device="cpu")
    name, parameter = next((n, p) for n, p in pair.lens.named_parameters() if ".mlp." in n and p.ndim == 2)
    with torch.no_grad():
        parameter.add_(0.3)
    pair.sync(to="twin")
    assert own_weights(pair) == [name]
    pair.check()


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].bridge or ZOO[name].hooked])
def test_nothing_leaks_in_any_architecture(name, backend, state_of):
    if not getattr(ZOO[name], backend):
        pytest.skip(f"{backend} does not take {name}")
    pair = build_pair(name, backend)
    lens, twin = state_of(pair.lens), state_of(pair.hf)
    with torch.no_grad():
        for parameter in pair.hf.parameters():
            parameter.add_(0.5)
        assert_same_bits(pair.lens, lens)
        pair.hf.load_state_dict(twin)
        for parameter in pair.lens.parameters():
            parameter.add_(0.5)
    assert_same_bits(pair.hf, twin)


def test_a_lazy_copy_of_a_view_is_a_view_until_written():
    whole = torch.arange(12.0).reshape(3, 4)
    turned = lazy_copy(whole.T)
    assert address(turned) == address(whole) and turned.stride() == (1, 4)
    whole += 1
    assert address(turned) != address(whole)
    assert torch.equal(turned, whole.T - 1)


def test_memory_that_torch_does_not_manage_is_copied():
    outside = np.zeros(4, dtype=np.float32)
    copied = lazy_copy(torch.from_numpy(outside))
    outside += 1
    assert torch.equal(copied, torch.zeros(4))


def test_where_torch_does_not_notice_writes_nothing_is_shared():
    """As on MPS; `meta` is another such device, and here."""
    weight = torch.empty(4, device="meta")
    assert torch._C._is_cow_tensor(torch._lazy_clone(weight)), "it would be shared"
    assert not torch._C._is_cow_tensor(lazy_copy(torch.empty(4, device="meta")))
    assert torch._C._is_cow_tensor(lazy_copy(torch.empty(4)))


def test_drop_lens_gives_its_memory_back(backend):
    """A model of 64 MiB, whose lens model was edited everywhere."""
    tokenizer = build_tokenizer(chat=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    pair = ModelPair(LlamaForCausalLM(config), tokenizer, backend=backend)
    weights = sum(p.numel() * p.element_size() for p in pair.hf.parameters())
    with torch.no_grad():
        for parameter in pair.lens.parameters():
            parameter.add_(1)
    gone = weakref.ref(pair.lens)
    settle()
    before = psutil.Process().memory_info().rss
    pair.drop_lens()
    assert gone() is None
    settle()
    assert not pair.has_lens
    assert before - psutil.Process().memory_info().rss > 0.8 * weights
