"""Of a model that also reads images, the language model: the same weights, and a vision tower that nothing touches."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import spd_lens as spd
from spd_lens.models.load import load
from spd_lens.models.multimodal import text_part
from spd_lens.models.pair import ModelPair
from spd_lens.models.parity import Parity
from spd_lens.training.lora_targets import ATTENTION
from tests.conftest import build_tokenizer, randomise
from tests.helpers import EXAMPLES, assert_same_bits, refused

TOKENIZER = build_tokenizer(chat=False)
TEXT = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
PLAIN = {key: value for key, value in TEXT.items() if key != "head_dim"}
SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_SIGHT = {
    "depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 14
}  # fmt: skip
QWEN_TOKENS = {"image_token_id": 399, "video_token_id": 398, "vision_start_token_id": 397}


def mrope(*section):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}}


T = transformers
WRAPPERS = {
    "Gemma3": lambda: T.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8}, vision_config=SIGHT,
        mm_tokens_per_image=4, image_token_index=399, boi_token_index=398, eoi_token_index=397,
    ),
    "Llava": lambda: T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT), vision_config=T.CLIPVisionConfig(**SIGHT), image_token_index=399
    ),
    "Mistral3": lambda: T.Mistral3Config(
        text_config=T.MistralConfig(**TEXT, sliding_window=16), vision_config=T.PixtralVisionConfig(**SIGHT),
        image_token_index=399,
    ),
    "SmolVLM": lambda: T.SmolVLMConfig(
        text_config=T.LlamaConfig(**TEXT), vision_config=SIGHT, image_token_id=399, pad_token_id=2
    ),
    "Idefics3": lambda: T.Idefics3Config(
        text_config=T.LlamaConfig(**TEXT), vision_config=SIGHT, image_token_id=399, pad_token_id=2
    ),
    "Qwen2VL": lambda: T.Qwen2VLConfig(
        text_config={**PLAIN, **mrope(1, 1, 2)}, vision_config={**QWEN_SIGHT, "embed_dim": 32}, **QWEN_TOKENS
    ),
    "Qwen3VL": lambda: T.Qwen3VLConfig(
        text_config={**TEXT, **mrope(2, 1, 1)}, vision_config={**QWEN_SIGHT, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    ),
}  # fmt: skip


def build(name, tied=False):
    config = WRAPPERS[name]()
    config.tie_word_embeddings = tied
    return randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config), std=0.15)


def logits(model, length=100):
    """Of a text longer than the windows, of ids at which no image is."""
    ids = torch.randint(5, 390, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_part_says_what_the_whole_says(name, tied):
    whole = build(name, tied)
    part = text_part(whole)
    assert type(part).__name__.endswith("ForCausalLM")
    assert not [key for key, _ in part.named_modules() if "vision" in key or "visual" in key]
    assert Parity.between(logits(whole), logits(part)).within(torch.float32)
    assert part.get_input_embeddings().weight.data_ptr() == whole.get_input_embeddings().weight.data_ptr()
    assert text_part(part) is part


@pytest.mark.parametrize("name", WRAPPERS)
def test_its_text_part_works_to_the_end(name, tmp_path, state_of):
    """From a directory and in memory alike; LoRA stays in the language model, whatever names are given."""
    whole = build(name)
    whole.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    before = state_of(whole)
    pair, loaded = ModelPair(whole, TOKENIZER), load(str(tmp_path / "model"), dtype="float32", device="cpu")
    assert Parity.between(logits(pair.hf), logits(loaded.hf)).within(torch.float32)
    subspace = spd.extract(loaded, EXAMPLES[:2], progress=False).subspace()
    corpus = spd.generate(loaded, ["Tom", "7 *"], subspace=subspace, max_new_tokens=4, progress=False)
    vision = {key.rpartition(".")[2] for key, m in whole.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = [*ATTENTION, *sorted(vision & {"up_proj", "down_proj"})]
    adapter = spd.finetune(loaded, corpus, out=tmp_path / "adapter", targets=targets, epochs=1, progress=False)
    tensors = list(load_file(adapter / "adapter_model.safetensors"))
    assert tensors and not [key for key in tensors if "vision" in key or "visual" in key]
    assert spd.evaluate(loaded, "synthetic-math", n=2, adapter=adapter, max_new_tokens=4, progress=False).items
    assert load(str(adapter), dtype="float32", device="cpu").fingerprint == pair.fingerprint
    assert_same_bits(whole, before)


def test_what_has_no_text_part_of_its_own_is_refused_by_name(tmp_path):
    git = transformers.GitConfig(
        **{key: TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                      "num_attention_heads")}, vision_config=SIGHT,
    )  # fmt: skip
    with refused("GitForCausalLM is multimodal", "vision_config", "language model alone"):
        ModelPair(randomise(transformers.GitForCausalLM(git)), TOKENIZER)
    config = transformers.Glm4vConfig(
        text_config={**TEXT, **mrope(1, 1, 2)}, vision_config={**QWEN_SIGHT, "image_size": 28}, **QWEN_TOKENS
    )
    with refused("Glm4vForConditionalGeneration is multimodal", "language model alone"):
        ModelPair(randomise(transformers.Glm4vForConditionalGeneration(config)), TOKENIZER)


def test_a_text_part_that_says_something_else_is_refused():
    whole = build("Llava")
    whole.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits * 2) or output)
    with refused("LlavaForConditionalGeneration is multimodal", "does not say the same", "language model alone"):
        ModelPair(whole, TOKENIZER)
