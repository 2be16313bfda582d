"""What spd_lens works on is decided when a pair is made: every other model is refused there, in one sentence."""

import importlib
import json
import shutil

import pytest
import torch
import transformers

import spd_lens as spd
from spd_lens.errors import SPDError
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.models.architectures import context_length
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.models.parity import Parity
from spd_lens.study.shapes import read_shape
from spd_lens.subspaces.extract import Tap, extract
from spd_lens.subspaces.projection import folded, projected_twin
from spd_lens.training.finetune import finetune
from tests.conftest import build_llama, build_tokenizer, randomise
from tests.helpers import EXAMPLES, greedy, refused, relative_error

TOKENIZER = build_tokenizer(chat=False)
TOKENS = {"vocab_size": len(TOKENIZER), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
BART = {
    **TOKENS, "d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_position_embeddings": 256,
}  # fmt: skip
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}


def make(family, model=None, **settings):
    config = getattr(transformers, f"{family}Config")(**settings)
    return randomise(getattr(transformers, model or f"{family}ForCausalLM")(config), std=0.15)


HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
WORKS = {
    "a mixture whose layers return what the router said": lambda: make(
        "Llama4Text", "Llama4ForCausalLM", **GROUPED, num_local_experts=4, num_experts_per_tok=1,
        intermediate_size_mlp=64, attention_chunk_size=64,
    ),
    "a recurrence beside the attention": lambda: make("FalconH1", **GROUPED, **HYBRID, mamba_d_ssm=64),
    "attention in some layers": lambda: make(
        "Lfm2", **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    "a context called seq_length": lambda: make(
        "Bloom", **TOKENS, hidden_size=32, n_layer=4, n_head=4, seq_length=256
    ),
    "a context called max_seq_len": lambda: make("Mpt", **TOKENS, d_model=32, n_layers=4, n_heads=4, max_seq_len=256),
    "like Llama, and unknown": lambda: make("Granite", **GROUPED),
}  # fmt: skip
REFUSED = {
    "no context": (lambda: make("Bloom", **TOKENS, hidden_size=32, n_layer=4, n_head=4), "max_position_embeddings"),
    "no attention in the default layers": (
        lambda: make("RecurrentGemma", **GROUPED, lru_width=32, attention_window_size=16), "RecurrentGemma",
    ),
    "a recurrence alone": (lambda: make("Mamba", **MAMBA), "no attention heads"),
    "an encoder": (lambda: make("T5", "T5ForConditionalGeneration", vocab_size=400, d_model=32, num_layers=2,
                                num_heads=4, d_kv=8, d_ff=64), "encoder"),
    "an encoder and decoder": (lambda: make("Bart", "BartForConditionalGeneration", **BART), "encoder"),
    "the decoder of one": (lambda: make("Bart", **BART), "not built like Llama"),
    "a model that reads both ways": (lambda: make("Bert", "BertLMHeadModel", **SIZES), "not built like Llama"),
    "a masked language model": (lambda: make("Bert", "BertForMaskedLM", **SIZES), "BertForMaskedLM"),
    "no head": (lambda: make("Llama", "LlamaModel", **GROUPED), "AutoModelForCausalLM"),
    "a classifier": (lambda: make("Llama", "LlamaForSequenceClassification", **GROUPED), "AutoModelForCausalLM"),
    "another layout": (lambda: make("CodeGen", **TOKENS, n_embd=32, n_layer=4, n_head=4, n_positions=256,
                                    rotary_dim=4), "not built like Llama"),
    "latent attention": (lambda: make(
        "DeepseekV2", **{**SIZES, "num_key_value_heads": 4}, n_routed_experts=4, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8), "latent vector"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_what_loads_works_to_the_end(name):
    """Moments with default arguments, hooks and folding, and completions, each against the plain thing."""
    pair = ModelPair(WORKS[name](), TOKENIZER)
    moments = extract(pair, EXAMPLES[:3], progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.import_module("spd_lens.subspaces.extract"), "positionwise_in_last_block", lambda model: []
        )
        plain = extract(pair, EXAMPLES[:3], engine="twin", progress=False)
    for found in (moments, extract(pair, EXAMPLES[:3], engine="twin", progress=False)):
        assert all(relative_error(found.gradient[s].sum(0), plain.gradient[s].sum(0)) < 1e-3 for s in plain.sites)
    subspace = moments.subspace()
    with projected_twin(pair.hf, subspace):
        hooked = pair.check_logits(pair.hf)
    with folded(pair.hf, subspace):
        assert Parity.between(hooked, pair.check_logits(pair.hf)).within(torch.float32)
        corpus = spd.generate(pair, ["Tom has 12 apples.", "7 * 3"], temperature=0, max_new_tokens=6, progress=False)
        for record in corpus:
            expected = greedy(lambda ids: pair.hf(ids).logits, list(record.prompt_ids), record.n_completion_tokens)
            assert list(record.completion_ids) == expected
    assert evaluate(pair, "synthetic-math", n=2, max_new_tokens=4, progress=False).items


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_when_loaded(name):
    build, word = REFUSED[name]
    model = build()
    with refused(type(model).__name__.removesuffix("ForCausalLM"), word):
        ModelPair(model, TOKENIZER)


def test_a_model_that_looks_ahead_is_refused_whatever_its_layers_are_called():
    model = make("Granite", **GROUPED)
    for block in model.model.layers:
        block.self_attn.is_causal = False
    model.model.config._attn_implementation = "sdpa"
    model.model.forward = seeing_all(model.model)
    with refused("GraniteForCausalLM", "depends on the text behind it"):
        ModelPair(model, TOKENIZER)


def seeing_all(inner):
    forward = inner.forward

    def both_ways(input_ids=None, attention_mask=None, **options):
        n = input_ids.shape[1]
        if options.get("use_cache") is not True:
            attention_mask = torch.zeros(len(input_ids), 1, n, n)
        return forward(input_ids=input_ids, attention_mask=attention_mask, **options)

    return both_ways


def test_parts_that_mix_positions_are_run_whole():
    pair = ModelPair(WORKS["a recurrence beside the attention"](), TOKENIZER)
    assert Tap(pair, pair.sites(), on_lens=False)._last == []
    for name in ("like Llama, and unknown", "a mixture whose layers return what the router said"):
        pair = ModelPair(WORKS[name](), TOKENIZER)
        assert Tap(pair, pair.sites(), on_lens=False)._last


LEFT_ON = [
    {"return_dict": False},
    {"output_hidden_states": True},
    {"use_cache": False},
    {"return_dict": False, "use_cache": False, "output_hidden_states": True},
]


def everything(family, out, **settings):
    """What each part of the library makes of a model with these settings."""
    sizes = {**TOKENS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256} if family == "GPT2" else GROUPED
    model = make(family, "GPT2LMHeadModel" if family == "GPT2" else None, **sizes)
    if settings.get("output_attentions"):
        model.set_attn_implementation("eager")  # transformers allows it with no other
    for name, value in settings.items():
        setattr(model.config, name, value)
    pair = ModelPair(model, TOKENIZER)
    moments = extract(pair, EXAMPLES[:2], progress=False)
    corpus = spd.generate(pair, ["Tom", "7 *"], subspace=moments.subspace(), max_new_tokens=4, progress=False)
    adapter = finetune(pair, corpus, out=out, epochs=1, progress=False)
    result = evaluate(pair, "synthetic-math", n=2, adapter=adapter, max_new_tokens=4, progress=False)
    return moments, corpus, result


@pytest.fixture(scope="module", params=["Llama", "GPT2", "Granite"])
def plain(request, tmp_path_factory):
    """A family's name, and everything of it with the settings as they are."""
    return request.param, everything(request.param, tmp_path_factory.mktemp("plain") / "adapter")


@pytest.mark.parametrize("settings", [*LEFT_ON, {"output_attentions": True}], ids=str)
def test_settings_left_on_a_model_change_nothing(plain, settings, tmp_path):
    family, expected = plain
    found = everything(family, tmp_path / "adapter", **settings)
    for site in expected[0].sites:
        assert relative_error(found[0].gradient[site], expected[0].gradient[site]) < 1e-5
    assert [r.completion_ids for r in found[1]] == [r.completion_ids for r in expected[1]]
    assert [i.completion for i in found[2].items] == [i.completion for i in expected[2].items]


def test_the_context_is_read_under_the_names_that_it_has():
    assert context_length(transformers.GPT2Config(n_positions=77)) == 77
    assert context_length(transformers.MptConfig(max_seq_len=99)) == 99
    assert context_length(transformers.BloomConfig(seq_length=55)) == 55
    assert context_length(transformers.BloomConfig()) is None


@pytest.fixture
def directory_with(tiny_llama_dir, tmp_path):
    def directory_with(content):
        shutil.copytree(tiny_llama_dir, tmp_path / "copy")
        path = tmp_path / "copy" / "config.json"
        if isinstance(content, dict):
            content = json.dumps({**json.loads(path.read_text()), **content})
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "copy"

    return directory_with


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, ("config.json", "recursion")),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, ("config.json", "recursion")),
        (b'{"a": "\xff"}', ("config.json", "utf-8")),
        ("null", ("config.json", "no settings")),
        ("", ("config.json", "empty")),
        ({"quantization_config": "gptq"}, ("quantised with gptq",)),
        ({"quantization_config": [1]}, ("quantised with",)),
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers = 1000000", "39 weights")),
        ({"num_hidden_layers": -1}, ("num_hidden_layers = -1",)),
        ({"vision_config": {"depth": 10**7}}, ("depth = 10000000",)),
        ({"model_type": "t5"}, ("T5", "encoder")),
        ({"max_position_embeddings": 0}, ("max_position_embeddings",)),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_a_model_is_made(directory_with, content, words):
    with refused(*words):
        load(str(directory_with(content)), dtype="float32", device="cpu")


def test_a_plan_refuses_such_a_configuration_too(directory_with):
    with pytest.raises(SPDError, match="num_hidden_layers = 1000000"):
        read_shape(str(directory_with({"num_hidden_layers": 10**6})))


def test_the_pair_works_on_the_model_that_it_was_given():
    model = build_llama(TOKENIZER)
    assert ModelPair(model, TOKENIZER).hf is model
