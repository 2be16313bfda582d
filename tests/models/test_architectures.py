"""Every architecture of the table in every backend that takes it: extract, project, fold, sync, or say why not."""

import re

import pytest
import torch
import transformers

from spd_lens.capture import extract
from spd_lens.models import ModelPair
from spd_lens.models.adapters import adapted
from spd_lens.models.architectures import ARCHITECTURES, architecture
from spd_lens.models.weights import site_layer
from spd_lens.projection import folded, projected
from spd_lens.sites import Site
from spd_lens.training import ATTENTION, resolve_targets
from tests.conftest import BACKENDS, build_tokenizer, randomise
from tests.helpers import ALL_KINDS, EXAMPLES, assert_same_bits, make_adapter, refused, relative_error
from tests.models.zoo import ZOO, build_pair, build_twin

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])
TAKEN = [(name, backend) for name, member in ZOO.items() for backend in BACKENDS if getattr(member, backend)]
NOT_TAKEN = [(name, backend) for name, member in ZOO.items() for backend in BACKENDS if not getattr(member, backend)]


@pytest.mark.parametrize(("name", "backend_name"), TAKEN)
def test_lens_and_twin_give_the_same_gradients_and_the_same_projection(name, backend_name, state_of):
    pair = build_pair(name, backend_name)
    lens, twin = (
        extract(pair, EXAMPLES[:3], engine=engine, kinds=ALL_KINDS, progress=False) for engine in ("lens", "twin")
    )
    assert lens.sites == twin.sites
    for site in lens.sites:
        assert lens.n_heads[site] == twin.n_heads[site]
        assert relative_error(lens.gradient[site].sum(0), twin.gradient[site].sum(0)) < 1e-4, site
        assert relative_error(lens.activation[site].sum(0), twin.activation[site].sum(0)) < 1e-4, site
    state = state_of(pair.hf)
    for options in ({}, {"center": True}, {"per_head": False}):
        subspace = lens.subspace(**options)
        with torch.no_grad():
            plain = pair.hf(TOKENS).logits
            with projected(pair.lens, subspace), folded(pair.hf, subspace):
                hooked, in_weights = pair.lens(TOKENS, return_type="logits"), pair.hf(TOKENS).logits
        assert (hooked - in_weights).abs().max() < 1e-4 * plain.std(), options
        assert (in_weights - plain).abs().max() > 0.01 * plain.std(), options
        assert_same_bits(pair.hf, state)


@pytest.mark.parametrize(("name", "backend_name"), TAKEN)
def test_an_edit_of_the_lens_model_reaches_the_twin_and_back(name, backend_name):
    pair = build_pair(name, backend_name)
    before = pair.check_logits(pair.hf)
    with torch.no_grad():
        for key, parameter in pair.lens.named_parameters():
            if re.search(r"\.o\.|W_O|o_proj|out_proj|dense\b|c_proj", key):
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))  # a norm may follow
    assert pair.sync(to="twin").within(torch.float32)
    assert (pair.check_logits(pair.hf) - before).abs().max() > 1e-3 * before.std()
    with torch.no_grad():
        site_layer(pair.hf, Site(0, "v")).base.weight.mul_(0.25)
    assert pair.sync(to="lens").within(torch.float32)


@pytest.mark.parametrize(("name", "backend_name"), NOT_TAKEN)
def test_what_a_backend_does_not_take_it_refuses_and_the_twin_works_alone(name, backend_name):
    pair = build_pair(name, backend_name)
    with refused(type(pair.hf).__name__, "backend='bridge'" if backend_name == "hooked" else "engine='twin'"):
        pair.lens  # noqa: B018 (building is what is tested)
    moments = extract(pair, EXAMPLES[:2], engine="twin", progress=False)
    with torch.no_grad(), folded(pair.hf, moments.subspace()):
        assert pair.hf(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("name", ZOO)
def test_features_are_the_heads_that_the_model_itself_computes(name):
    """Against the attention module's own reading: change one head's values, and only its group's outputs move."""
    twin = build_twin(name)
    pair = ModelPair(twin, build_tokenizer(chat=False), backend="bridge")
    shape = pair.fingerprint
    layer = site_layer(twin, Site(1, "v"))
    features = torch.arange(shape.n_kv_heads * shape.d_head) if layer.features is None else layer.features
    assert len(features) == shape.n_kv_heads * shape.d_head == len(set(features.tolist()))
    seen = {}

    def look(which):
        reader = site_layer(twin, Site(1, "z")).module
        handle = reader.register_forward_pre_hook(lambda _m, args: seen.__setitem__(which, args[0].detach()))
        with torch.no_grad():
            twin(TOKENS)
        handle.remove()

    look("whole")
    head = shape.n_kv_heads - 1
    rows = features.view(shape.n_kv_heads, shape.d_head)[head]
    with torch.no_grad():
        weight = layer.base.weight.T if layer.transposed else layer.base.weight
        weight[rows] *= 2.0
    look("edited")
    change = (seen["edited"] - seen["whole"]).abs().amax(dim=(0, 1)).view(shape.n_heads, shape.d_head).amax(dim=1)
    group = shape.n_heads // shape.n_kv_heads
    moved = (change > 1e-3).view(shape.n_kv_heads, group).all(dim=1)
    still = (change == 0).view(shape.n_kv_heads, group).all(dim=1)
    assert moved.tolist() == [h == head for h in range(shape.n_kv_heads)]
    assert still.tolist() == [h != head for h in range(shape.n_kv_heads)]


def test_the_table_has_a_test_for_each_entry():
    tested = {build_twin(name).config.get_text_config().model_type for name in ZOO}
    assert tested == {name for name, layout in ARCHITECTURES.items() if not layout.refused}


def test_latent_attention_is_refused_with_the_reason():
    config = transformers.DeepseekV3Config(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip
    with refused("DeepseekV3ForCausalLM", "latent vector", "choose another model"):
        architecture(transformers.DeepseekV3ForCausalLM(config))


def test_an_unknown_architecture_built_like_llama_works():
    config = transformers.ArceeConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, head_dim=8, pad_token_id=2,
    )  # fmt: skip
    assert "arcee" not in ARCHITECTURES
    pair = ModelPair(randomise(transformers.ArceeForCausalLM(config)), build_tokenizer(chat=False), backend="bridge")
    assert extract(pair, EXAMPLES[:1], engine="twin", progress=False).sites
    pair.hf.__class__ = type("UnheardOfForCausalLM", (type(pair.hf),), {})
    with refused("UnheardOfForCausalLM", "engine='twin'"):
        pair.lens  # noqa: B018 (building is what is tested)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer needs transformer-lens 3.9")
def test_what_has_other_shapes_than_its_config_says_is_refused_by_hooked_transformer():
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, head_dim=16, pad_token_id=2,
    )  # fmt: skip
    pair = ModelPair(randomise(transformers.LlamaForCausalLM(config)), build_tokenizer(chat=False), backend="hooked")
    with refused("LlamaForCausalLM", "backend='bridge'"):
        pair.lens  # noqa: B018 (building is what is tested)


@pytest.mark.parametrize(("name", "backend_name"), TAKEN)
def test_lora_on_the_twin_reaches_the_lens_model_and_folds(name, backend_name, tmp_path):
    """The paper's targets under the architecture's own names; adapter and projection together, in both models."""
    pair = build_pair(name, backend_name)
    targets = resolve_targets(pair.hf, ATTENTION)
    adapter = make_adapter(pair.hf, tmp_path / "adapter", targets=targets)
    subspace = extract(pair, EXAMPLES[:2], engine="twin", progress=False).subspace()
    plain = pair.check_logits(pair.hf)
    with adapted(pair.hf, adapter) as tuned:
        target = pair.check_logits(tuned)
        with folded(tuned, subspace):
            target_projected = pair.check_logits(tuned)
    assert (target - plain).abs().max() > 0.05 * plain.std()
    assert pair.sync(to="lens", adapter=adapter).within(torch.float32)
    with projected(pair.lens, subspace):
        assert (pair.check_logits(pair.lens) - target_projected).abs().max() < 1e-3 * plain.std()
    assert pair.sync(to="lens").within(torch.float32)


def test_names_that_stand_for_themselves_are_left_alone():
    twin = build_twin("gpt2")
    assert resolve_targets(twin, ["q_proj", "k_proj", "mlp.c_fc"]) == ("attn.c_attn", "mlp.c_fc")
    with refused("w_proj", "c_fc"):
        resolve_targets(twin, ["q_proj", "w_proj"])
