"""Weights between lens and twin, both ways, proved on arrival and undone where they cannot arrive."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from spd_lens.errors import SPDError
from spd_lens.models.adapters import adapted
from spd_lens.models.backends import HookedBackend
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from tests.conftest import BACKENDS, build_llama, build_tokenizer
from tests.helpers import assert_same_bits, make_adapter, refused, save_adapter

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])
needs_hooked = pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer needs transformer-lens 3.9")


@pytest.fixture
def own_pair(tiny_llama_dir, tiny_qwen2_dir, family, backend):
    """A pair of the test's own, of each family and backend, in float32."""
    directory = {"llama": tiny_llama_dir, "qwen2": tiny_qwen2_dir}[family]
    return load(str(directory), backend=backend, dtype="float32", device="cpu")


def lens_logits(pair):
    with torch.no_grad():
        return pair.lens(TOKENS, return_type="logits")


def twin_logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def far(one, two):
    return ((one - two).abs().max() / two.std()).item()


def test_an_adapter_reaches_the_lens_and_leaves_it_again(own_pair, state_of, tmp_path):
    pair = own_pair
    adapter = make_adapter(pair.hf, tmp_path / "adapter")
    twin, lens = state_of(pair.hf), state_of(pair.lens)
    plain = lens_logits(pair)
    parity = pair.sync(to="lens", adapter=adapter)
    with adapted(pair.hf, adapter) as tuned:
        target = twin_logits(tuned)
    assert far(lens_logits(pair), target) < 1e-4
    assert far(plain, target) > 0.1, "the adapter does nothing here"
    assert parity.within(torch.float32)
    assert parity.kl < 1e-9
    assert_same_bits(pair.hf, twin)
    with refused("lens model and twin", "disagree", "sync"):  # fine-tuning looks first
        pair.check()
    assert pair.sync(to="lens").within(torch.float32)
    assert_same_bits(pair.lens, lens)
    assert torch.equal(lens_logits(pair), plain)


def test_adapters_replace_each_other(own_pair, tmp_path):
    pair = own_pair
    first, second = (make_adapter(pair.hf, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    pair.sync(to="lens", adapter=second)
    alone = lens_logits(pair)
    pair.sync(to="lens", adapter=first)
    assert far(lens_logits(pair), alone) > 0.1
    pair.sync(to="lens", adapter=second)
    assert torch.equal(lens_logits(pair), alone)


def test_an_adapter_without_effect_is_no_error(own_pair, tmp_path):
    before = lens_logits(own_pair)
    own_pair.sync(to="lens", adapter=make_adapter(own_pair.hf, tmp_path / "adapter", std=0.0))
    assert torch.equal(lens_logits(own_pair), before)


def test_a_small_adapter_arrives_in_float32(own_pair, tmp_path):
    pair = own_pair
    adapter = make_adapter(pair.hf, tmp_path / "adapter", std=0.01)
    with adapted(pair.hf, adapter) as tuned:
        target = twin_logits(tuned)
    pair.sync(to="lens", adapter=adapter)
    effect = far(twin_logits(pair.hf), target)
    assert 1e-4 < effect < 0.05
    assert far(lens_logits(pair), target) < 0.01 * effect


def test_an_adapter_that_bfloat16_rounds_away_is_refused(tiny_llama_dir, state_of, backend, tmp_path):
    """The merged twin and the lens would agree; only the unmerged adapter shows that nothing arrived."""
    pair = load(str(tiny_llama_dir), backend=backend, dtype="bfloat16", device="cpu")
    lens, twin = state_of(pair.lens), state_of(pair.hf)
    small = make_adapter(pair.hf, tmp_path / "small", std=0.01)
    with refused("small", "did not reach the lens model", "bfloat16", "dtype='float32'"):
        pair.sync(to="lens", adapter=small)
    assert_same_bits(pair.lens, lens)
    assert_same_bits(pair.hf, twin)
    pair.sync(to="lens", adapter=make_adapter(pair.hf, tmp_path / "large", std=0.3))
    assert pair.dtype == torch.bfloat16
    assert far(lens_logits(pair).float(), twin_logits(pair.hf).float()) > 1


def test_a_whole_checkpoint_can_be_looked_at_too(own_pair, state_of, tmp_path):
    pair = own_pair
    tuned = copy.deepcopy(pair.hf)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.05)
    tuned.save_pretrained(tmp_path / "tuned")
    twin = state_of(pair.hf)
    pair.sync(to="lens", adapter=tmp_path / "tuned")
    assert far(lens_logits(pair), twin_logits(tuned)) < 1e-4
    assert far(twin_logits(pair.hf), twin_logits(tuned)) > 0.1
    assert_same_bits(pair.hf, twin)


def edited(pair, place, change):
    """Change one of the lens model's weights in place; returns its logits and what they were."""
    before = lens_logits(pair)
    with torch.no_grad():
        change(place(pair.lens))
    after = lens_logits(pair)
    assert far(after, before) > 0.01, "the edit does nothing here"
    return after


HOOKED_EDITS = {
    "W_Q": (lambda lens: lens.blocks[1].attn.W_Q, lambda w: w[3].mul_(0)),
    "W_K": (lambda lens: lens.blocks[1].attn._W_K, lambda w: w[0].mul_(-1)),
    "W_V": (lambda lens: lens.blocks[3].attn._W_V, lambda w: w[1].add_(0.3)),
    "W_O": (lambda lens: lens.blocks[0].attn.W_O, lambda w: w[2].mul_(0)),
    "W_in": (lambda lens: lens.blocks[2].mlp.W_in, lambda w: w[:, 5].add_(1)),
    "W_gate": (lambda lens: lens.blocks[2].mlp.W_gate, lambda w: w[:, 7].add_(1)),
    "W_out": (lambda lens: lens.blocks[2].mlp.W_out, lambda w: w[5].add_(1)),
    "norm": (lambda lens: lens.blocks[2].ln1.w, lambda w: w[:9].mul_(2)),
    "W_E": (lambda lens: lens.embed.W_E, lambda w: w[42].add_(1)),
    "W_U": (lambda lens: lens.unembed.W_U, lambda w: w[:, 42].add_(1)),
}


@needs_hooked
@pytest.mark.parametrize("edit", HOOKED_EDITS)
def test_an_edited_hooked_transformer_reaches_the_twin(tiny_pair, state_of, edit):
    pair = ModelPair(copy.deepcopy(tiny_pair.hf), tiny_pair.tokenizer, backend="hooked")
    twin = state_of(pair.hf)
    after = edited(pair, *HOOKED_EDITS[edit])
    lens = state_of(pair.lens)
    assert pair.sync(to="twin").within(torch.float32)
    assert far(twin_logits(pair.hf), after) < 1e-4
    assert_same_bits(pair.lens, lens)
    changed = [name for name, value in pair.hf.state_dict().items() if not torch.equal(value, twin[name])]
    assert len(changed) == 1, "one weight was edited, one weight changes"
    pair.sync(to="lens")
    assert_same_bits(pair.lens, lens)


@needs_hooked
def test_an_edited_bias_reaches_a_twin_that_has_biases(tiny_qwen2_pair):
    pair = ModelPair(copy.deepcopy(tiny_qwen2_pair.hf), tiny_qwen2_pair.tokenizer, backend="hooked")
    before = pair.hf.model.layers[1].self_attn.v_proj.bias.clone()
    after = edited(pair, lambda lens: lens.blocks[1].attn._b_V, lambda b: b[1].add_(1))
    pair.sync(to="twin")
    assert far(twin_logits(pair.hf), after) < 1e-4
    moved = pair.hf.model.layers[1].self_attn.v_proj.bias - before
    assert torch.equal(moved[:8], torch.zeros(8))
    assert torch.allclose(moved[8:], torch.ones(8))


BRIDGE_EDITS = {
    "k": lambda model: model.model.layers[1].self_attn.k_proj.weight,
    "o": lambda model: model.model.layers[0].self_attn.o_proj.weight,
    "mlp": lambda model: model.model.layers[2].mlp.down_proj.weight,
    "embedding": lambda model: model.model.embed_tokens.weight,
    "unembedding": lambda model: model.lm_head.weight,
}
BRIDGE_PLACES = {
    "k": lambda lens: lens.blocks[1].attn.k.weight,
    "o": lambda lens: lens.blocks[0].attn.o.weight,
    "mlp": lambda lens: lens.blocks[2].mlp.out.weight,
    "embedding": lambda lens: lens.embed.weight,
    "unembedding": lambda lens: lens.unembed.weight,
}


@pytest.mark.parametrize("edit", BRIDGE_EDITS)
def test_an_edited_bridge_reaches_the_twin(tiny_pair, state_of, edit):
    pair = ModelPair(copy.deepcopy(tiny_pair.hf), tiny_pair.tokenizer, backend="bridge")
    twin = state_of(pair.hf)
    after = edited(pair, BRIDGE_PLACES[edit], lambda w: w[:60].add_(0.5))
    expected = BRIDGE_EDITS[edit](pair.hf).clone()
    expected[:60] += 0.5
    pair.sync(to="twin")
    assert far(twin_logits(pair.hf), after) < 1e-4
    assert torch.equal(BRIDGE_EDITS[edit](pair.hf), expected)
    changed = [name for name, value in pair.hf.state_dict().items() if not torch.equal(value, twin[name])]
    assert len(changed) == 1


def test_an_unedited_lens_changes_no_bit_of_the_twin(own_pair, state_of):
    twin = state_of(own_pair.hf)
    own_pair.sync(to="twin")
    assert_same_bits(own_pair.hf, twin)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_come_back_bit_for_bit(pair_of, state_of, family, backend, dtype):
    pair = pair_of(family, backend, dtype)
    twin = state_of(pair.hf)
    pair.sync(to="twin")
    assert_same_bits(pair.hf, twin)


@needs_hooked
@pytest.mark.parametrize("bias", ["_b_K", "b_O"])
def test_a_bias_that_the_twin_has_no_place_for_is_refused(tiny_pair, state_of, bias):
    pair = ModelPair(copy.deepcopy(tiny_pair.hf), tiny_pair.tokenizer, backend="hooked")
    twin = state_of(pair.hf)
    # softmax does not see a constant added to all keys, but rotary embedding makes it one that varies
    edited(pair, lambda lens: getattr(lens.blocks[1].attn, bias), lambda b: b.add_(1))
    lens = state_of(pair.lens)
    with refused("blocks.1.attn", bias.strip("_"), "LlamaForCausalLM"):
        pair.sync(to="twin")
    assert_same_bits(pair.hf, twin)
    assert_same_bits(pair.lens, lens)


@needs_hooked
@pytest.mark.parametrize("place", ["embed.W_E", "unembed.W_U"])
def test_one_of_two_tied_embeddings_cannot_change_alone(state_of, place):
    tokenizer = build_tokenizer(chat=False)
    hf = build_llama(tokenizer)
    hf.config.tie_word_embeddings = True
    hf.tie_weights()
    pair = ModelPair(hf, tokenizer, backend="hooked")
    twin = state_of(hf)
    edited(pair, lambda lens: lens.get_parameter(place), lambda w: w.add_(0.5 * torch.randn_like(w)))
    with refused("embed", "ties"):
        pair.sync(to="twin")
    assert_same_bits(hf, twin)
    pair.sync(to="lens")
    with torch.no_grad():  # both at once is one parameter's change
        pair.lens.embed.W_E[42].add_(1)
        pair.lens.unembed.W_U[:, 42].add_(1)
    pair.sync(to="twin")
    assert far(twin_logits(hf), lens_logits(pair)) < 1e-4
    assert hf.lm_head.weight is hf.model.embed_tokens.weight


@needs_hooked
def test_the_way_back_is_checked(tiny_pair, state_of, monkeypatch):
    """A reading that mixes two heads up must not reach the twin."""
    pair = ModelPair(copy.deepcopy(tiny_pair.hf), tiny_pair.tokenizer, backend="hooked")
    twin = state_of(pair.hf)
    read = HookedBackend.read

    def mixed_up(self, lens, hf):
        weights = read(self, lens, hf)
        key = "model.layers.1.self_attn.o_proj.weight"
        return weights | {key: weights[key].view(32, 4, 8).flip(1).reshape(32, 32)}

    pair.lens  # noqa: B018 (built before the mistake)
    monkeypatch.setattr(HookedBackend, "read", mixed_up)
    with refused("disagree"):
        pair.sync(to="twin")
    assert_same_bits(pair.hf, twin)


def test_directions_and_adapters_that_make_no_sense(tiny_pair, state_of, tmp_path):
    twin = state_of(tiny_pair.hf)
    with refused("'hf'", "'lens'", "'twin'"):
        tiny_pair.sync(to="hf")
    with refused("no adapter"):
        tiny_pair.sync(to="twin", adapter=tmp_path)
    with refused("not an adapter", "adapter_config.json"):
        tiny_pair.sync(to="lens", adapter=tmp_path)
    assert_same_bits(tiny_pair.hf, twin)


TIED = {
    "unembedding": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "DoRA on both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "unembedding kept whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding kept whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "kept whole, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [20, 31]},
    "stored embeddings": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("form", TIED)
def test_adapters_of_tied_embeddings_are_merged_right_or_refused(form, backend, state_of, tmp_path):
    """PEFT itself merges both into the one matrix that they share, so that each gets the other's adapter, too."""
    tokenizer = build_tokenizer(chat=False)
    twin = build_llama(tokenizer, tied=True)
    twin.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pair = load(str(tmp_path / "model"), backend=backend, dtype="float32", device="cpu")
    adapter, moved = tmp_path / "adapter", 0.3 if form == "stored embeddings" else 0.0
    config = LoraConfig(r=2, base_model_name_or_path=str(tmp_path / "model"), **TIED[form])
    expected = twin_logits(save_adapter(pair.hf, adapter, config, embeddings=moved))
    state = state_of(pair.hf)
    assert far(twin_logits(pair.hf), expected) > 0.1, "the adapter does nothing here"

    merged = load(str(adapter), backend=backend, dtype="float32", device="cpu")
    assert far(twin_logits(merged.hf), expected) < 1e-4
    assert far(lens_logits(merged), expected) < 1e-4
    apart = not torch.equal(merged.hf.lm_head.weight, merged.hf.model.embed_tokens.weight)
    assert merged.hf.config.tie_word_embeddings is not apart
    merged.hf.save_pretrained(tmp_path / "merged")
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    again = load(str(tmp_path / "merged"), backend=backend, dtype="float32", device="cpu")
    assert torch.equal(twin_logits(again.hf), twin_logits(merged.hf))

    if backend == "bridge" and apart:  # its lens model ties its embeddings, too
        with refused("lm_head.weight", "ties its embeddings", "spd_lens.load"):
            pair.sync(to="lens", adapter=adapter)
    else:
        pair.sync(to="lens", adapter=adapter)
        assert far(lens_logits(pair), expected) < 1e-4
        pair.sync(to="lens")
    assert far(lens_logits(pair), twin_logits(pair.hf)) < 1e-4
    assert_same_bits(pair.hf, state)


def test_the_remedy_is_not_what_was_done_already(own_pair, monkeypatch, tmp_path):
    """A backend that does not deliver: in float32 another dtype is no way out."""
    adapter = make_adapter(own_pair.hf, tmp_path / "adapter")
    own_pair.lens  # noqa: B018 (builds it)
    monkeypatch.setattr(type(own_pair._lens.backend), "write", lambda *_: None)
    with pytest.raises(SPDError, match=r"did not reach the lens model.*spd_lens\.load") as caught:
        own_pair.sync(to="lens", adapter=adapter)
    assert "dtype=" not in str(caught.value)


@pytest.mark.parametrize("whole", [False, True])
def test_embeddings_apart_do_not_fit_a_model_that_ties_them(whole, tmp_path):
    """One of the two would be loaded over the other."""
    pair = ModelPair(build_llama(tokenizer := build_tokenizer(chat=False), tied=True), tokenizer)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if whole:
        own = build_llama(tokenizer)
        own.save_pretrained(tmp_path)
    else:
        save_adapter(pair.hf, tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
        path = tmp_path / "adapter_model.safetensors"
        rows = pair.hf.lm_head.weight
        save_file(load_file(path) | {f"base_model.model.{name}": rows + i for i, name in enumerate(names)}, path)
    with refused(tmp_path, "does not fit", "apart from another matrix", "ties"), adapted(pair.hf, tmp_path):
        pass
