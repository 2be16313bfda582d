"""Other architectures than the two that the rest of the tests use: extract, project, sync, or say why not."""

import pytest
import torch
import transformers

from spd_lens.capture import extract
from spd_lens.models import ModelPair
from spd_lens.projection import folded, projected
from tests.conftest import BACKENDS, build_tokenizer, randomise
from tests.helpers import EXAMPLES, refused, relative_error

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])

SEPARATE = {
    "qwen3": ("Qwen3", {"head_dim": 8}, BACKENDS),  # norms its keys after the hook point
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}, BACKENDS),
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}, ("bridge",)),
    "olmo2": ("Olmo2", {}, ("bridge",)),
}


def build(family, options, backend):
    tokenizer = build_tokenizer(chat=False)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **({} if family == "GPT2" else sizes),
        **options,
    )
    architecture = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return ModelPair(randomise(getattr(transformers, architecture)(config), std=0.15), tokenizer, backend=backend)


@pytest.mark.parametrize(
    ("name", "backend_name"), [(name, backend) for name, (_, _, backends) in SEPARATE.items() for backend in backends]
)
def test_separate_projections_do_everything(name, backend_name):
    family, options, _ = SEPARATE[name]
    pair = build(family, options, backend_name)
    by_engine = [extract(pair, EXAMPLES[:3], engine=engine, progress=False) for engine in ("lens", "twin")]
    for site in by_engine[0].sites:
        lens, twin = (moments.gradient[site].sum(0) for moments in by_engine)
        assert relative_error(lens, twin) < 1e-4
    subspace = by_engine[0].subspace()
    with torch.no_grad():
        plain = pair.hf(TOKENS).logits
        with projected(pair.lens, subspace), folded(pair.hf, subspace):
            hooked, in_weights = pair.lens(TOKENS, return_type="logits"), pair.hf(TOKENS).logits
    assert (hooked - in_weights).abs().max() < 1e-4 * plain.std()
    assert (in_weights - plain).abs().max() > 0.01 * plain.std()
    assert pair.sync(to="twin").within(torch.float32)


@pytest.mark.parametrize(("family", "options"), [("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4}), ("Phi3", {})])
def test_fused_projections_can_be_looked_at_and_not_folded(family, options):
    pair = build(family, options, "bridge")
    moments = extract(pair, EXAMPLES[:3], progress=False)
    subspace = moments.subspace()
    with torch.no_grad():
        plain = pair.lens(TOKENS, return_type="logits")
        with projected(pair.lens, subspace):
            assert (pair.lens(TOKENS, return_type="logits") - plain).abs().max() > 0.01 * plain.std()
    with refused(type(pair.hf).__name__, "k_proj", "engine='lens'"):
        extract(pair, EXAMPLES[:3], engine="twin", progress=False)
    with refused(type(pair.hf).__name__, "k_proj", "projected"), folded(pair.hf, subspace):
        pass
    with refused(type(pair.hf).__name__, "synced"):
        pair.sync(to="twin")


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer needs transformer-lens 3.9")
@pytest.mark.parametrize(
    ("family", "options"),
    [("Olmo2", {}), ("Phi3", {}), ("Llama", {"head_dim": 16})],
    ids=["unknown", "other weights", "other shapes"],
)
def test_what_hooked_transformer_cannot_convert_names_the_other_backend(family, options):
    pair = build(family, options, "hooked")
    with refused(f"{family}ForCausalLM", "backend='bridge'"):
        pair.lens  # noqa: B018 (building is what is tested)
    assert ModelPair(pair.hf, pair.tokenizer, backend="bridge").check().within(torch.float32)


def test_what_the_bridge_cannot_wrap_still_has_a_twin():
    pair = build("Arcee", {"head_dim": 8}, "bridge")
    pair.hf.__class__ = type("UnheardOfForCausalLM", (type(pair.hf),), {})
    with refused("UnheardOfForCausalLM", "engine='twin'"):
        pair.lens  # noqa: B018 (building is what is tested)
    assert extract(pair, EXAMPLES[:1], engine="twin", progress=False).sites
