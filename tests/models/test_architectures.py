"""The table of architectures: its features are the heads of the models; what is not in it is refused or like Llama."""

import pytest
import torch
import transformers

from spd_lens.models.architectures import ARCHITECTURES, architecture
from spd_lens.models.pair import ModelPair
from spd_lens.models.weights import site_layer
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.training.lora_targets import resolve_targets
from tests.conftest import BACKENDS, build_tokenizer, randomise
from tests.helpers import EXAMPLES, refused
from tests.models.zoo import ZOO, build_twin

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])


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


def test_names_that_stand_for_themselves_are_left_alone():
    twin = build_twin("gpt2")
    assert resolve_targets(twin, ["q_proj", "k_proj", "mlp.c_fc"]) == ("attn.c_attn", "mlp.c_fc")
    with refused("w_proj", "c_fc"):
        resolve_targets(twin, ["q_proj", "w_proj"])
