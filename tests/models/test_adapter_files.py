"""What an adapter's directory may hold: foreign tensors, endless patterns, no base: all end in a sentence."""

import json
import time

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from spd_lens.models.adapter_files import check_adapter, layers_of_models
from spd_lens.models.adapters import adapted, merged_copy
from spd_lens.models.load import load
from spd_lens.models.tokenizer import load_tokenizer
from tests.helpers import assert_same_bits, make_adapter, refused, save_adapter


@pytest.fixture
def hf(pair_of, state_of):
    twin = pair_of("qwen2").hf
    state = state_of(twin)
    yield twin
    assert_same_bits(twin, state)


@pytest.fixture
def adapter(hf, tmp_path):
    return make_adapter(hf, tmp_path / "adapter")


def configure(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def store(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def put_on(hf, adapter):
    with adapted(hf, adapter):
        pass


def refused_everywhere(hf, adapter, *words):
    for entrance in (put_on, merged_copy):
        with refused(adapter, *words):
            entrance(hf, adapter)


BASE = "base_model.model."


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.base_layer.bias",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_C.weight",
        "model.layers.0.self_attn.rotary.inv_freq",
        "score.weight",
    ],
)
def test_a_tensor_that_peft_does_not_save_is_named(hf, adapter, name):
    """PEFT itself would write some of these into the model, and leave the others out."""
    there = dict(hf.named_parameters()).get(name.replace(".base_layer", ""))
    store(adapter, lambda state: state | {BASE + name: torch.randn(3 if there is None else there.shape)})
    refused_everywhere(hf, adapter, BASE + name, "no counterpart in the model")


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"use_dora": True}])
def test_a_tensor_that_is_missing_is_named(hf, tmp_path, settings):
    for number, place in enumerate((0, -1, 7)):
        adapter = tmp_path / str(number)
        save_adapter(hf, adapter, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings))
        gone = sorted(load_file(adapter / "adapter_model.safetensors"))[place]
        store(adapter, lambda state, gone=gone: {name: value for name, value in state.items() if name != gone})
        refused_everywhere(hf, adapter, gone)


def test_embeddings_beside_the_adapter_are_taken_and_others_of_that_shape_are_not(hf, adapter):
    rows = hf.get_input_embeddings().weight
    store(
        adapter, lambda state: state | {BASE + "model.embed_tokens.weight": rows + 1, BASE + "lm_head.weight": rows + 2}
    )
    with adapted(hf, adapter):
        assert torch.equal(hf.get_input_embeddings().weight, rows + 1)
        assert torch.equal(hf.get_output_embeddings().weight, rows + 2)
    store(adapter, lambda state: state | {BASE + "lm_head.weight": torch.zeros(len(rows) + 1, rows.shape[1])})
    refused_everywhere(hf, adapter, "size mismatch", "lm_head")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(hf, adapter, wrong):
    key = BASE + "model.layers.1.self_attn.v_proj.lora_B.weight"
    store(adapter, lambda state: state | {key: state[key].index_fill(0, torch.tensor(1), wrong)})
    refused_everywhere(hf, adapter, "not finite", key)


ENDLESS = r"(([a-z_.0-9]+)+)+!"
OF = "its tensors are of k_proj, o_proj, q_proj, v_proj"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ENDLESS}, ("target_modules", ENDLESS, "a pattern", OF)),
        ({"target_modules": r".*\.(?:q|k|v|o)_proj$"}, ("target_modules", "a pattern", OF)),
        ({"target_modules": "(" * 50_000}, ("target_modules", "(((")),
        ({"target_modules": [ENDLESS]}, ("target_modules", ENDLESS)),
        ({"target_modules": ["q_proj", ENDLESS]}, ("target_modules", ENDLESS)),
        ({"exclude_modules": ENDLESS}, ("exclude_modules", ENDLESS)),
        ({"exclude_modules": [ENDLESS]}, ("exclude_modules", ENDLESS)),
        ({"rank_pattern": {ENDLESS: 4}}, ("rank_pattern", ENDLESS)),
        ({"alpha_pattern": {"q_proj": 2, ENDLESS: 4}}, ("alpha_pattern", ENDLESS)),
        ({"target_parameters": [ENDLESS]}, ("target_parameters", ENDLESS)),
        ({"trainable_token_indices": {ENDLESS: [1]}}, ("trainable_token_indices", ENDLESS)),
        ({"layers_to_transform": [0], "layers_pattern": ENDLESS}, ("layers_pattern", ENDLESS)),
        ({"layers_to_transform": [0], "layers_pattern": [ENDLESS]}, ("layers_pattern", ENDLESS)),
        ({"modules_to_save": [ENDLESS]}, ("modules_to_save", ENDLESS)),
        ({"init_lora_weights": "pissa_niter_1000000000"}, ("init_lora_weights", "too many steps")),
        ({"new_in_peft_99": 7}, ("new_in_peft_99 = 7", "does not know")),
        ({"x" * 100_000: ["y" * 100_000]}, ("xxx", "does not know")),
        ({"megatron_config": {"x": 1}}, ("megatron_config", "imports")),
        ({"layer_replication": [[0, 4]] * 100_000}, ("layer_replication",)),
        ({"r": 10**9}, ("is 1000000000",)),
        ({"rank_pattern": {"q_proj": 10**9}}, ("is 1000000000",)),
        ({"r": "2"}, ()),
        ({"r": 0}, ()),
        ({"target_modules": 5}, ("target_modules", "5")),
        ({"target_modules": {"q_proj": 1}}, ("target_modules", "q_proj")),
        ({"target_modules": [["q_proj"]]}, ()),
        ({"task_type": ["CAUSAL_LM"]}, ()),
        ({"rank_pattern": "q_proj"}, ("rank_pattern", "'q_proj'")),
        ({"alpha_pattern": [16]}, ("alpha_pattern", "[16]")),
        ({"lora_alpha": float("nan")}, ("lora_alpha", "nan")),
        ({"alpha_pattern": {"v_proj": float("inf")}}, ("v_proj", "inf")),
        ({"bias": "every"}, ()),
        ({"init_lora_weights": "corda"}, ("eigens",)),
    ],
)
def test_a_hostile_or_senseless_setting_ends_in_a_sentence_soon(hf, adapter, settings, words):
    configure(adapter, **settings)
    start = time.process_time()
    with refused(adapter, *words):
        put_on(hf, adapter)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("off", [None, False, [], {}, 0, ""])
def test_a_setting_of_a_later_peft_that_is_off_changes_nothing(hf, adapter, off):
    configure(adapter, new_in_peft_99=off)
    put_on(hf, adapter)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("OFT", {"num_cayley_neumann_terms": 10**6}),
        ("BOFT", {"boft_n_butterfly_factor": 10**6}),
        ("FOURIERFT", {"n_frequency": 10**9}),
        ("VBLORA", {"num_vectors": 10**9}),
        ("RANDLORA", {"r": 10**8}),
        ("PEANUT", {"depth": 10**6}),
    ],
)
def test_sizes_that_the_file_does_not_bear_are_refused_for_every_kind(hf, adapter, kind, settings):
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": kind, "target_modules": ["q_proj"], "base_model_name_or_path": "x", **settings})
    )
    with refused(adapter, *settings, *settings.values()):
        put_on(hf, adapter)


def test_more_tensors_than_a_model_could_have_are_refused_before_they_are_read(hf, adapter):
    store(adapter, lambda state: state | {f"x{n}": torch.zeros(0) for n in range(20_000)})
    with refused(adapter, "tensors"):
        put_on(hf, adapter)


@pytest.mark.parametrize(
    "names",
    [["q_proj", *(f"x.{i}" for i in range(50_000))], [f"model.layers.{i}.self_attn.q_proj" for i in range(9999)]],
)
def test_many_names_are_no_hindrance(hf, tmp_path, names):
    save_adapter(hf, tmp_path, LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"k_proj": 3}))
    configure(
        tmp_path, target_modules=names, exclude_modules=names[1:][::-1][:4000], rank_pattern=dict.fromkeys(names[1:], 2)
    )
    start = time.process_time()
    if names[0] == "q_proj":
        put_on(hf, tmp_path)
    else:  # all but the first layer excluded itself
        with refused(tmp_path):
            configure(tmp_path, exclude_modules=names)
            put_on(hf, tmp_path)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "text",
    [
        b"[1, 2]", b"7", b"null", b'"text"', b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}",
        b'{"peft_type": "LORA", "x": "' + b"a" * 5_000_000 + b'"}',
    ],
)  # fmt: skip
def test_a_configuration_that_is_none_ends_in_a_sentence(hf, adapter, text):
    (adapter / "adapter_config.json").write_bytes(text)
    entrances = [lambda: put_on(hf, adapter), lambda: merged_copy(hf, adapter), lambda: check_adapter(adapter)]
    entrances += [lambda: load(str(adapter)), lambda: load_tokenizer(str(adapter))]
    for entrance in entrances:
        with refused(adapter, "no readable adapter_config.json"):
            entrance()


@pytest.mark.parametrize("base", [7, {"a": 1}, "x" * 100_000, ["gpt2"], True, "a\0b", "~" + "/x" * 100, None, ""])
def test_a_base_that_is_no_model_ends_in_a_sentence(adapter, base):
    configure(adapter, base_model_name_or_path=base)
    for entrance in (load, load_tokenizer):
        with refused("base" if not isinstance(base, str) or len(base) != 201 else "does not exist"):
            entrance(str(adapter))


def test_an_adapter_that_is_its_own_base_is_refused(adapter, tmp_path):
    configure(adapter, base_model_name_or_path=str(adapter))
    other = tmp_path / "other"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    for entrance in (load, load_tokenizer):
        with refused(adapter, "its own base"):
            entrance(str(adapter))
    configure(adapter, base_model_name_or_path=str(other))
    configure(other, base_model_name_or_path=str(tmp_path / "." / "adapter"))
    for entrance in (load, load_tokenizer):
        with refused("its own base"):
            entrance(str(adapter))


def test_adapters_on_adapters_are_merged_from_the_inside_out(tiny_llama_dir, tmp_path):
    pair = load(str(tiny_llama_dir), dtype="float32", device="cpu")
    inner = make_adapter(pair.hf, tmp_path / "inner")
    configure(inner, base_model_name_or_path=str(tiny_llama_dir))
    outer = make_adapter(pair.hf, tmp_path / "outer", seed=1)
    configure(outer, base_model_name_or_path=str(inner))
    assert layers_of_models(outer) == (tiny_llama_dir, [inner, outer])
    expected = merged_copy(merged_copy(pair.hf, inner), outer).state_dict()
    assert_same_bits(load(str(outer), dtype="float32", device="cpu").hf, expected)


@pytest.mark.parametrize("adapter", [5, ["a"], {"a": 1}, b"adapter"])
def test_what_is_no_directory_is_no_adapter(hf, adapter):
    with refused("its directory", repr(adapter)):
        put_on(hf, adapter)
