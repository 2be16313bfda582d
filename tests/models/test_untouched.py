"""`untouched`: whatever is done to a twin meanwhile is done to copies, and what is not is noticed."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from spd_lens.models.adapters import adapted
from spd_lens.models.load import load
from spd_lens.models.torch_private import is_lazy, own_memory
from spd_lens.models.untouched import state_digest, untouched
from tests.helpers import assert_same_bits, make_adapter, refused

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture
def hf(fresh_pair, state_of):
    twin = fresh_pair.hf
    state, before, digest = state_of(twin), logits(twin), state_digest(twin)
    things = [(name, id(module), dict(vars(module))) for name, module in twin.named_modules()]
    settings = [copy.deepcopy(vars(config)) for config in (twin.config, twin.generation_config)]
    yield twin
    assert_same_bits(twin, state)
    assert [(name, id(module), vars(module)) for name, module in twin.named_modules()] == things
    assert [vars(config) for config in (twin.config, twin.generation_config)] == settings
    assert torch.equal(logits(twin), before)
    assert state_digest(twin) == digest


@torch.no_grad()
def in_place(twin):
    twin.model.layers[0].self_attn.q_proj.weight.mul_(2)


def through_data(twin):
    twin.model.layers[0].self_attn.q_proj.weight.data.mul_(2)


def by_another_tensor(twin):
    twin.model.layers[0].self_attn.q_proj.weight.data = torch.zeros(32, 32)


def by_another_parameter(twin):
    twin.lm_head.weight = nn.Parameter(torch.zeros(400, 32))


def from_a_state_dict(twin):
    twin.load_state_dict({name: value + 1 for name, value in twin.state_dict().items()})


def a_buffer(twin):
    twin.model.rotary_emb.inv_freq.mul_(3)


def a_bias(twin):
    twin.lm_head.bias = nn.Parameter(torch.ones(len(twin.lm_head.weight)))


def a_layer(twin):
    twin.model.layers = nn.ModuleList([*twin.model.layers, twin.model.layers[0]])
    twin.config.num_hidden_layers = 5


def a_layer_taken_away(twin):
    del twin.model.layers[2]


def settings(twin):
    twin.config.rope_parameters["rope_theta"] = 3.0
    twin.generation_config.temperature = 9.0
    twin.config._attn_implementation = "eager"


def flags(twin):
    twin.train().requires_grad_(True)


def hooks(twin):
    twin.model.norm.register_forward_hook(lambda *_: 0 * _[-1])


def attributes(twin):
    twin.something = 5
    twin.model.layers[0].self_attn.layer_idx = 3
    del twin.model.layers[1].self_attn.scaling


def a_training_step(twin):
    twin.requires_grad_(True)
    twin(TOKENS).logits.sum().backward()
    torch.optim.SGD(twin.parameters(), lr=1.0).step()


CHANGES = (
    in_place, through_data, by_another_tensor, by_another_parameter, from_a_state_dict, a_buffer, a_bias, a_layer,
    a_layer_taken_away, settings, flags, hooks, attributes, a_training_step,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_go_to_the_copies_and_with_them(hf, change):
    before = logits(hf)
    with untouched(hf):
        assert torch.equal(logits(hf), before)
        change(hf)
    assert torch.equal(logits(hf), before)
    with pytest.raises(KeyboardInterrupt), untouched(hf):
        change(hf)
        raise KeyboardInterrupt


def test_they_nest_and_hooks_from_before_stay_on(hf):
    outputs = []
    handle = hf.lm_head.register_forward_hook(lambda *args: outputs.append(args[-1]))
    with untouched(hf):
        in_place(hf)
        one = logits(hf)
        with untouched(hf):
            in_place(hf)
            assert not torch.equal(logits(hf), one)
        assert torch.equal(logits(hf), one)
        assert len(outputs) == 3
    handle.remove()


def test_tied_weights_are_tied_among_the_copies():
    twin = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)).eval().requires_grad_(False)
    weight = twin.lm_head.weight
    with untouched(twin):
        assert twin.lm_head.weight is twin.transformer.wte.weight is not weight
    assert twin.lm_head.weight is twin.transformer.wte.weight is weight


def test_what_writes_past_the_copies_is_noticed(fresh_pair):
    hf = fresh_pair.hf
    weight = hf.model.layers[0].self_attn.q_proj.weight
    with refused("LlamaForCausalLM", "were changed"), untouched(hf):
        weight.mul_(2)
    with refused("LlamaForCausalLM", "were changed"), untouched(hf):
        weight.data.mul_(2)


def test_the_digest_sees_each_kind_of_change(fresh_pair):
    for change in CHANGES:
        if change in (hooks, attributes):  # of which it sees nothing
            continue
        hf = load(fresh_pair.name, dtype="float32", device="cpu").hf
        before = state_digest(hf)
        assert state_digest(hf) == before
        change(hf)
        assert state_digest(hf) != before, change.__name__


def test_weights_are_ordinary_again_and_stay_shared_with_a_lens(fresh_pair, tmp_path):
    """Products on a CPU copy weights that are lazy each time; but unsharing them from the lens would take memory."""
    hf = fresh_pair.hf
    adapter = make_adapter(hf, tmp_path)
    own_memory(hf)
    places = [parameter.data_ptr() for parameter in hf.parameters()]
    with adapted(hf, adapter) as tuned:
        assert any(is_lazy(parameter) for parameter in tuned.parameters())
        logits(tuned)
    assert not any(is_lazy(parameter) for parameter in hf.parameters())
    assert [parameter.data_ptr() for parameter in hf.parameters()] == places, "memory was taken for a second copy"
    fresh_pair.lens  # noqa: B018 (builds it)
    with untouched(hf):
        pass
    assert all(is_lazy(parameter) for parameter in hf.parameters())
