"""Checkpoints as people have them: sharded, resized, tied, quantised, adapter on adapter, spread over devices."""

import importlib.util
import json
import shutil

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spd_lens.examples import Example
from spd_lens.generation.generate import generate
from spd_lens.models.adapters import adapted
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.models.parity import Parity
from spd_lens.runs.model_check import require_core
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.projection import folded, projected
from tests.conftest import build_tokenizer
from tests.helpers import EXAMPLES, make_adapter, refused
from tests.models.zoo import build_twin

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed"
)


def saved(model, directory, **options):
    model.save_pretrained(directory, **options)
    build_tokenizer(chat=False).save_pretrained(directory)
    return directory


def read(directory, backend="auto", dtype="float32"):
    return load(str(directory), backend=backend, dtype=dtype, device="cpu")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def works(pair):
    """The whole chain: heads, gradients, hooks and folds, on the twin and on the lens model."""
    require_core(pair, "last_mid", ("k", "v"))
    subspace = extract(pair, EXAMPLES[:2], progress=False).subspace()
    with projected(pair.lens, subspace), folded(pair.hf, subspace):
        hooked, in_weights = pair.check_logits(pair.lens), pair.check_logits(pair.hf)
    return Parity.between(in_weights, hooked).within(pair.dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_weights_in_several_files(name, tmp_path):
    twin = build_twin(name)
    directory = saved(twin, tmp_path / "sharded", max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").exists()
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2
    pair = read(directory, "bridge")
    assert torch.equal(pair.check_logits(pair.hf), pair.check_logits(twin))
    assert works(pair)
    files[1].unlink()
    with refused("sharded", "cannot be loaded"):
        read(directory)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_with_more_rows_than_the_tokenizer(tied, backend, tmp_path):
    """Padded to a multiple of 64, as most are; the extra rows are never sampled into text that cannot be read."""
    twin = build_twin("llama")
    if tied:
        twin.config.tie_word_embeddings = True
        twin.tie_weights()
    twin.resize_token_embeddings(448, mean_resizing=False)
    pair = read(saved(twin, tmp_path / "resized"), backend)
    assert pair.hf.get_input_embeddings().weight.shape[0] == 448 > len(pair.tokenizer)
    shared = pair.hf.get_input_embeddings().weight.data_ptr() == pair.hf.get_output_embeddings().weight.data_ptr()
    assert shared is tied
    assert works(pair)
    assert pair.sync(to="twin").within(torch.float32)
    adapter = make_adapter(pair.hf, tmp_path / "adapter")
    assert pair.sync(to="lens", adapter=adapter).within(torch.float32)
    [record] = generate(pair, ["Tom has 12"], max_new_tokens=4, temperature=0.0, progress=False)
    assert isinstance(record.completion, str)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(tmp_path):
    directory = saved(build_twin("llama"), tmp_path / "model")
    tokenizer = build_tokenizer(chat=False)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(directory)
    pair = read(directory)
    assert pair.encode(EXAMPLES[0]).ids
    with refused("<|new|>", "rows", "tokenizer"):
        pair.prompt_ids(Example("What is <|new|>?"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_an_adapter(dtype, tmp_path, backend):
    """Each directory names the one below it as its base; all are merged in float32, once rounded."""
    base = saved(build_twin("qwen2"), tmp_path / "base")
    first, second = tmp_path / "first", tmp_path / "second"
    make_adapter(build_twin("qwen2"), first, seed=1, std=0.2)
    make_adapter(build_twin("qwen2"), second, seed=2, std=0.2)
    for directory, below in ((first, base), (second, first)):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(below)}))
    pair = read(second, backend, dtype)
    assert pair.hf.dtype == getattr(torch, dtype)
    # the same, one after the other on a model of one's own
    middle = read(first)
    with adapted(middle.hf, second) as both:
        expected = middle.check_logits(both)
    with adapted(read(base).hf, second) as only_second:
        assert Parity.between(expected, pair.check_logits(only_second)).kl > 0.01
    assert Parity.between(expected, pair.check_logits(pair.hf)).within(pair.dtype)
    assert works(pair)


def test_rotary_frequencies_stay_float32_under_an_adapter(tmp_path):
    base = saved(build_twin("llama"), tmp_path / "base")
    make_adapter(build_twin("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    merged, plain = read(tmp_path / "adapter", dtype="bfloat16").hf, read(base, dtype="bfloat16").hf
    assert dict(merged.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    for (name, one), other in zip(merged.named_buffers(), plain.buffers(), strict=True):
        assert one.dtype == other.dtype == torch.float32, name
        assert torch.equal(one, other)


def test_a_model_that_carries_an_adapter_is_refused():
    wrapped = get_peft_model(build_twin("llama"), LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        with refused("carries a PEFT adapter", "merge_and_unload", "adapter="):
            ModelPair(model, build_tokenizer(chat=False))
    assert works(ModelPair(wrapped.merge_and_unload(), build_tokenizer(chat=False)))


def test_a_device_map_of_one_device(tmp_path):
    twin = AutoModelForCausalLM.from_pretrained(saved(build_twin("llama"), tmp_path / "model"), device_map={"": "cpu"})
    assert works(ModelPair(twin, build_tokenizer(chat=False)))


def test_a_model_spread_over_devices_works_but_for_its_lens_model(tmp_path):
    pair = ModelPair(build_twin("llama"), build_tokenizer(chat=False))
    own = pair.check_logits(pair.hf)
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    twin = dispatch_model(
        build_twin("llama"), {**places, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path)
    )
    pair = ModelPair(twin, build_tokenizer(chat=False))
    assert torch.equal(pair.check_logits(pair.hf), own)
    with refused("several devices", "engine='twin'"):
        pair.lens_at(8)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "hqq"])
def test_other_quantisations_are_refused_by_name_before_a_weight_is_read(method, tmp_path):
    directory = saved(build_twin("llama"), tmp_path / "quantised")
    edit_config(directory, quantization_config={"quant_method": method, "bits": 4})
    (directory / "model.safetensors").write_bytes(b"not read")
    with refused("quantised", method, "not been tried", "unquantised model"):
        read(directory)


def test_bitsandbytes_has_to_be_installed(tmp_path, monkeypatch):
    directory = saved(build_twin("llama"), tmp_path / "quantised")
    edit_config(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("quantised", "spd-lens[quantised]"):
        read(directory)


def test_a_quantised_model_in_memory_is_refused():
    twin = build_twin("llama")
    twin.is_quantized = True
    with refused("LlamaForCausalLM", "quantised", "spd_lens.load"):
        ModelPair(twin, build_tokenizer(chat=False))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_bitsandbytes_weights_are_dequantised(name, bits, tmp_path):
    how = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    plain = saved(build_twin(name), tmp_path / "plain")
    quantised = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"}
    )
    pair = read(saved(quantised, tmp_path / "quantised"), "bridge")
    assert {p.dtype for p in pair.hf.parameters()} == {torch.float32}
    tokens = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])
    # with gradients: without, bitsandbytes takes a path on the CPU that layers of 32 features are too small for
    to_quantised = Parity.between(quantised(tokens).logits.detach(), pair.hf(tokens).logits)
    to_plain = Parity.between(build_twin(name)(tokens).logits.detach(), pair.hf(tokens).logits)
    # 4 bits: the same products. 8 bits: bitsandbytes rounds activations too, which de-quantised weights do not
    assert to_quantised.kl < (1e-8 if bits == 4 else 1e-2)
    assert to_plain.kl > 1e-8
    assert works(pair)
    pair.hf.save_pretrained(tmp_path / "again")
    shutil.copytree(tmp_path / "again", tmp_path / "copy")
    build_tokenizer(chat=False).save_pretrained(tmp_path / "copy")
    again = read(tmp_path / "copy")
    assert torch.equal(again.check_logits(again.hf), pair.check_logits(pair.hf))
