"""The probe finds out where a model's heads are, from its own cache; an unknown architecture is asked when loaded."""

import pytest
import torch
import transformers

from spd_lens.models.architectures import ARCHITECTURES
from spd_lens.models.pair import ModelPair
from spd_lens.models.probe import probe
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.model_check import require_core
from spd_lens.runs.pipeline import run
from spd_lens.sites import Site
from tests.conftest import build_tokenizer, randomise
from tests.helpers import ALL_KINDS, refused
from tests.models.zoo import ZOO, build_twin

TOKENIZER = build_tokenizer(chat=False)
SITES = [Site(layer, kind) for layer in range(4) for kind in "kv"]
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
}


def unknown(prefix, **options):
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **options)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    assert model.config.model_type not in ARCHITECTURES
    return randomise(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_has_its_heads_where_the_table_says(name, dtype):
    found = probe(build_twin(name, dtype), TOKENIZER, SITES)
    assert list(found) == SITES
    assert max(found.values()) < 1e-3


@pytest.mark.parametrize("name", ZOO)
def test_the_core_is_green_at_every_kind_of_site(name):
    pair = ModelPair(build_twin(name), TOKENIZER, backend="bridge")
    before = pair.check_logits(pair.hf)
    require_core(pair, [0, 3], ALL_KINDS)
    assert torch.equal(pair.check_logits(pair.hf), before)
    assert not pair.has_lens


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("Arcee", {"num_key_value_heads": 2, "head_dim": 8}),
        ("StableLm", {"num_key_value_heads": 2}),
        ("Granite", {"num_key_value_heads": 2}),
    ],
)
def test_unknown_architectures_built_like_llama_are_taken(prefix, options):
    pair = ModelPair(unknown(prefix, **options), TOKENIZER, backend="bridge")
    assert max(probe(pair.hf, TOKENIZER, SITES).values()) < 1e-3


class Interleaved(torch.nn.Linear):
    """A projection whose heads the attention finds in another order than the layer writes them in."""

    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, 8)).flip(-2).flatten(-2)


class Scaled(torch.nn.Linear):
    """A layer that does more than its weight says."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("layer", [Interleaved, Scaled])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_an_unknown_architecture_that_does_something_else_is_refused_when_loaded(kind, layer):
    twin = unknown("Arcee", num_key_value_heads=2, head_dim=8)
    for block in twin.model.layers:
        getattr(block.self_attn, f"{kind}_proj").__class__ = layer
    with refused(f"the {kind} of layer", "ArceeForCausalLM", "not where spd_lens looks", "another model"):
        ModelPair(twin, TOKENIZER, backend="bridge")


def test_an_unknown_architecture_whose_config_names_other_heads_is_refused():
    twin = unknown("Arcee", num_key_value_heads=2, head_dim=8)
    twin.config.num_key_value_heads = 4
    with refused("ArceeForCausalLM", "not 4 heads of 8", "another model"):
        ModelPair(twin, TOKENIZER, backend="bridge")


def test_a_model_that_cannot_be_run_is_refused():
    with refused("StableLmForCausalLM", "cannot be run", "size of tensor"):
        ModelPair(unknown("StableLm"), TOKENIZER, backend="bridge")  # its configuration says 32 KV heads of 4


def test_a_model_without_attention_is_refused():
    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
    with refused("MambaForCausalLM", "no attention heads"):
        ModelPair(transformers.MambaForCausalLM(config), TOKENIZER, backend="bridge")


def test_a_run_asks_before_it_begins(fresh_pair, tiny_settings, tmp_path):
    for block in fresh_pair.hf.model.layers:
        block.self_attn.k_proj.__class__ = Scaled
    with refused("the k of layer", "LlamaForCausalLM", "not where spd_lens looks"):
        run(SPDConfig.make(tiny_settings), tmp_path / "run", pair=fresh_pair, progress=False)
    assert not (tmp_path / "run").exists()
