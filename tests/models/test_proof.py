"""Lens and twin are compared at the lengths that are used: windows and rope regimes show on long texts alone."""

import logging
import re

import pytest
import torch
import transformers

from spd_lens.analysis.heads.attention import attention_patterns
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.generation.generate import generate
from spd_lens.models import lens
from spd_lens.models.pair import ModelPair
from spd_lens.models.parity import CHECK_TEXTS
from spd_lens.models.proof import beyond, long_text, parity_at, regimes
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.model_check import MOMENTS_TOLERANCE, check_model
from spd_lens.runs.pipeline import run
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from spd_lens.training.length_groups import passes
from tests.conftest import BACKENDS, build_tokenizer, randomise
from tests.helpers import EXAMPLES, LONG_EXAMPLE, greedy, make_adapter, refused, relative_error
from tests.models.zoo import build_twin

TOKENIZER = build_tokenizer(chat=False)
SIZES = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 96, "max_window_layers": 0}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 64}
LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "attention_factor": 1.0}
# family, settings, and whether HookedTransformer does what they say
MODELS = {
    "window in Qwen2": ("Qwen2", WINDOW, False),
    "window in some layers of Qwen3": ("Qwen3", {**WINDOW, "head_dim": 8, "max_window_layers": 1}, False),
    "longrope": ("Llama", {"rope_parameters": {**ROPE, **LONG, "rope_type": "longrope"}}, False),
    "yarn": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}, False),
    "local attention of GPT-Neo": ("GPTNeo", NEO, True),
    "window in Mistral": ("Mistral", {"sliding_window": 96, "head_dim": 8}, True),
}


def twin_of(name, dtype=torch.float32):
    family, settings, _ = MODELS[name]
    sizes = {key: value for key, value in SIZES.items() if family != "GPTNeo" or not re.search("num_|inter", key)}
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**sizes, **settings})
    )
    return randomise(model, std=0.15).to(dtype)


def worst(pair, engine):
    """How far default moments are from the twin's."""
    twin = extract(pair, [LONG_EXAMPLE, *EXAMPLES[:2]], layers="all", engine="twin", progress=False)
    found = extract(pair, [LONG_EXAMPLE, *EXAMPLES[:2]], layers="all", progress=False, **engine)
    return max(relative_error(found.gradient[site].sum(0), twin.gradient[site].sum(0)) for site in twin.sites)


def test_rotary_angles_of_a_row_do_not_depend_on_its_batch():
    """LongRoPE: transformers chooses the angles of a whole batch by its longest row."""
    pair = ModelPair(twin_of("longrope"), TOKENIZER)
    texts = [LONG_EXAMPLE, *EXAMPLES]
    lengths = [len(pair.encode(text).ids) for text in texts]
    assert min(lengths) <= 64 < max(lengths)  # so that the two regimes would meet

    together, alone = (extract(pair, texts, engine="twin", batch_tokens=tokens, progress=False) for tokens in (4096, 1))
    for site in alone.sites:
        assert relative_error(together.gradient[site], alone.gradient[site]) < 1e-5
    together, alone = (
        teacher_forced(pair, texts, [Policy("base")], batch_tokens=tokens, progress=False)["base"]
        for tokens in (4096, 1)
    )
    assert [item.aligned_loss for item in together] == pytest.approx([item.aligned_loss for item in alone], abs=1e-5)

    prompts = [text.prompt for text in texts]
    corpus = generate(pair, prompts, max_new_tokens=16, temperature=0.0, progress=False)
    for prompt, record in zip(prompts, corpus, strict=True):
        ids = torch.tensor([pair.format.prompt_ids(prompt)])
        reference = pair.hf.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
        assert list(record.completion_ids) == reference[: len(record.completion_ids)]

    rows = {"attention_mask": (torch.arange(90) < torch.tensor([[90], [60], [70], [50]])).long()}
    rows["input_ids"] = rows["attention_mask"]
    rows["labels"] = rows["attention_mask"] - 1 - 99 * (1 - rows["attention_mask"])  # 0 on text, -100 behind it
    assert all(len({n > 64 for n in part["attention_mask"].sum(1).tolist()}) == 1 for part in passes(rows, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_auto_takes_says_what_the_twin_says_on_long_texts(name, dtype):
    pair = ModelPair(twin_of(name, dtype), TOKENIZER)
    assert worst(pair, {}) < MOMENTS_TOLERANCE[dtype] / 2
    hooked = "hooked" in BACKENDS and MODELS[name][2]
    assert pair.backend == ("hooked" if hooked else "bridge")
    assert pair.proven_length >= len(pair.encode(LONG_EXAMPLE).ids) > 96


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer needs transformer-lens 3.9")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backend_asked_for_by_name_is_an_error_that_names_the_length(dtype):
    pair = ModelPair(twin_of("window in Qwen2", dtype), TOKENIZER, backend="hooked")
    with refused("Qwen2ForCausalLM", "120 tokens", "sliding_window 96", "backend='bridge'", "engine='twin'"):
        pair.lens  # noqa: B018 (building is what is tested)
    assert not pair.has_lens


@pytest.fixture
def unnamed(monkeypatch):
    """A window that no setting names: only a text of that length shows it."""
    monkeypatch.setattr(lens, "regimes", lambda config: {})
    return lambda backend="auto": ModelPair(twin_of("window in Qwen2"), TOKENIZER, backend=backend)


USES = {
    "extract": lambda pair: extract(pair, [LONG_EXAMPLE], progress=False),
    "generate": lambda pair: generate(pair, ["Tom"], engine="lens", max_new_tokens=150, temperature=0, progress=False),
    "attention": lambda pair: attention_patterns(pair, long_text(TOKENIZER, 150, 0), [0]),
    "check": check_model,
}


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer needs transformer-lens 3.9")
@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_lens_model_asks_at_its_own_length(unnamed, use, caplog):
    pair = unnamed()
    extract(pair, EXAMPLES[:2], progress=False)
    assert pair.backend == "hooked"
    USES[use](pair)
    assert pair.backend == "bridge"
    [said] = [record.message for record in caplog.records if record.name == "spd_lens.models.lens"]
    assert "disagree on texts of" in said and "the lens model is a TransformerBridge" in said
    if use == "check":
        assert {c.name: c.passed for c in check_model(unnamed("hooked"))}["lens = twin"] is False
    else:
        with refused("disagree on texts of", "tokens", "backend='bridge'"):
            USES[use](unnamed("hooked"))


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer needs transformer-lens 3.9")
def test_a_run_says_which_backend_it_took(tiny_settings, tmp_path):
    pair = ModelPair(twin_of("window in Qwen2"), TOKENIZER)
    record = run(SPDConfig.make(tiny_settings), tmp_path / "run", pair=pair, progress=False)
    assert record.notes["resolved"]["backend"] == "bridge"
    assert "(bridge, " in (tmp_path / "run" / "summary.md").read_text()


def test_the_lens_model_generates_what_the_twin_does_beyond_the_window():
    pair = ModelPair(twin_of("window in Qwen2"), TOKENIZER)
    [record] = generate(
        pair, [LONG_EXAMPLE.prompt[:200]], engine="lens", max_new_tokens=20, temperature=0, progress=False
    )  # fmt: skip
    assert list(record.completion_ids) == greedy(
        lambda tokens: pair.hf(tokens).logits, list(record.prompt_ids), record.n_completion_tokens
    )
    assert len(record.prompt_ids) + record.n_completion_tokens > 96


def test_a_lens_model_with_an_adapter_in_it_is_asked_about_its_conversion(fresh_pair, tmp_path):
    fresh_pair.sync(to="lens", adapter=make_adapter(fresh_pair.hf, tmp_path / "adapter"))
    tuned = fresh_pair.lens
    extract(fresh_pair, [LONG_EXAMPLE], progress=False)
    assert fresh_pair.lens is tuned, "the adapter must not be lost"
    assert fresh_pair.proven_length > 100


def test_regimes_are_found_wherever_the_configuration_names_them():
    named = {name: regimes(twin_of(name).config) for name in MODELS}
    assert named["window in Qwen2"] == {96: "sliding_window"}
    assert named["local attention of GPT-Neo"] == {64: "window_size"}
    assert named["longrope"] == {64: "original_max_position_embeddings"}
    gemma = transformers.Gemma3TextConfig(sliding_window=512)
    assert 512 in regimes(gemma)
    assert 128 in regimes(transformers.Llama4TextConfig(attention_chunk_size=128, floor_scale=8192))
    assert regimes(transformers.Qwen2Config(**{**SIZES, "sliding_window": 96})) == {}, "it is not used"
    own = transformers.LlamaConfig(**SIZES)
    own.layer_settings = {"windows": [0, 40, 70]}
    assert regimes(own) == {40: "windows", 70: "windows"}
    assert [beyond(n, 256) for n in (8, 96, 250)] == [24, 120, 256]


def test_where_memory_ends_it_is_said_and_the_text_is_compared_when_it_is_used(monkeypatch, caplog):
    monkeypatch.setattr(lens, "rows_that_fit", lambda twin, length: 0)
    pair = ModelPair(twin_of("window in Mistral"), TOKENIZER)
    assert pair.lens is not None
    assert pair.proven_length == 0
    assert "no memory" in caplog.text and "sliding_window = 96" in caplog.text
    pair.lens_at(150)
    assert pair.proven_length == 150


def test_a_text_is_compared_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        lens, "parity_at", lambda twin, model, tokenizer, length: asked.append(length)
        or parity_at(twin, model, tokenizer, length),
    )  # fmt: skip
    pair = ModelPair(twin_of("window in Mistral"), TOKENIZER)
    for length in (50, 150, 150, 120, 151):
        pair.lens_at(length)
    assert asked == [120, 150, 151]


def test_long_texts_are_real_tokens_and_always_the_same():
    text = long_text(TOKENIZER, 200, 0)
    ordinary = {id for words in CHECK_TEXTS for id in TOKENIZER(words)["input_ids"]}
    assert len(text) == 200 and set(text) <= ordinary
    assert text[0] == TOKENIZER.bos_token_id not in text[1:]
    assert text == long_text(TOKENIZER, 200, 0) != long_text(TOKENIZER, 200, 1)
    assert long_text(TOKENIZER, 1, 0) == [TOKENIZER.bos_token_id]


def test_where_no_lens_model_agrees_auto_works_on_the_twin(caplog, tmp_path, tiny_settings):
    twin = build_twin("falcon, groups")
    pair = ModelPair(twin, TOKENIZER)
    with caplog.at_level(logging.WARNING):
        assert worst(pair, {}) == 0
    assert pair.backend == "none" and "captured on the twin" in caplog.text
    assert not [check for check in check_model(pair) if check.passed is False]
    record = run(SPDConfig.make(tiny_settings), tmp_path / "run", pair=pair, progress=False)
    assert record.notes["resolved"]["backend"] == "none"
    assert (tmp_path / "run" / "summary.md").exists()
    for use in ("generate", "attention"):
        with refused("FalconForCausalLM", "engine='twin'"):
            USES[use](pair)
    with refused("FalconForCausalLM", "engine='twin'"):
        extract(ModelPair(twin, TOKENIZER, backend="bridge"), EXAMPLES[:1], progress=False)
