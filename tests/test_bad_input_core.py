"""What the core is given and must not take: one clear sentence, and everything is as it was."""

import importlib.metadata
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd_lens.examples import Example
from spd_lens.models.devices import resolve_device, resolve_dtype
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.projection import fold_to, folded, projected
from spd_lens.subspaces.subspace import Subspace
from tests.conftest import BACKENDS, N_CTX, build_llama, randomise
from tests.helpers import EXAMPLES, assert_same_bits, refused


@pytest.fixture(scope="module")
def moments(tiny_pair):
    return extract(tiny_pair, EXAMPLES, engine="twin", progress=False)


@pytest.fixture
def untouched(tiny_pair, state_of):
    """Afterwards both models are bit for bit what they were, and carry no hook more."""
    twin, lens = state_of(tiny_pair.hf), state_of(tiny_pair.lens)

    def hooks():
        models = (tiny_pair.hf, tiny_pair.lens)
        return [len(module._forward_hooks) for model in models for module in model.modules()]

    before = hooks()
    yield tiny_pair
    assert_same_bits(tiny_pair.hf, twin)
    assert_same_bits(tiny_pair.lens, lens)
    assert hooks() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "middle"}, ["'middle'", "last_mid"]),
        ({"layers": [4]}, ["layer 4", "0 to 3"]),
        ({"layers": -1}, ["layer -1", "0 to 3"]),
        ({"layers": []}, ["no layer"]),
        ({"kinds": ("k", "x")}, ["'x'", "k, v, q"]),
        ({"kinds": ()}, ["no kind"]),
        ({"loss": "cosine"}, ["'cosine'", "aligned", "full"]),
        ({"engine": "vllm"}, ["'vllm'", "lens", "twin"]),
        ({"shards": 0}, ["shards is 0"]),
        ({"examples": []}, ["no calibration examples"]),
        ({"examples": [EXAMPLES[0], Example("q", "x", id="bare")]}, ["'bare'", "no correctness span"]),
        ({"examples": [Example("q", id="open")], "loss": "full"}, ["'open'", "no completion"]),
        ({"examples": [Example("7 " * N_CTX, "42", [(0, 2)], "long")]}, ["'long'", str(N_CTX), "tokens"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_extractions_that_cannot_be(untouched, options, words):
    options = {"examples": EXAMPLES, "progress": False} | options
    with refused(*words):
        extract(untouched, options.pop("examples"), **options)


def test_one_bad_example_among_many_stops_before_any_work(tiny_pair, monkeypatch):
    forwards = []
    forward = type(tiny_pair.hf).forward
    monkeypatch.setattr(
        type(tiny_pair.hf), "forward", lambda self, *a, **k: forwards.append(1) or forward(self, *a, **k)
    )
    with refused("'bare'"):
        extract(tiny_pair, [*EXAMPLES, Example("q", "x", id="bare")], engine="twin", progress=False)
    assert not forwards


def test_an_example_as_long_as_the_context_is_taken_and_one_token_more_is_not(tiny_pair):
    prompt = "x" * (N_CTX - 3)  # BOS, the prompt, the raw format's line break and the completion
    example = Example(prompt, "7", [(0, 1)], "full")
    assert len(tiny_pair.encode(example).ids) == N_CTX
    assert len(tiny_pair.prompt_ids(example)) == N_CTX - 1
    longer = Example(f"{prompt}x", "7", [(0, 1)], "longer")
    with refused("'longer'", str(N_CTX + 1), str(N_CTX)):
        tiny_pair.encode(longer)
    with refused("'longer'", str(N_CTX)):
        tiny_pair.prompt_ids(longer)


def test_settings_of_load_are_checked_before_the_model_is_read(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with refused("'keras'", "hooked", "bridge"):
        load(nowhere, backend="keras")
    with refused("'float8'", "bfloat16"):
        load(nowhere, dtype="float8")
    with refused("'gpu'", "cuda"):
        load(nowhere, device="gpu")


def test_a_wrong_prompt_format_leaves_the_model_given_alone(tiny_pair):
    hf = build_llama(tiny_pair.tokenizer).train()
    hf.requires_grad_(True)
    for options, word in (({"backend": "keras"}, "'keras'"), ({"prompt_format": "html"}, "'html'")):
        with refused(word):
            ModelPair(hf, tiny_pair.tokenizer, **options)
    assert hf.training
    assert all(parameter.requires_grad for parameter in hf.parameters())


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_where_there_is_none(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with refused(repr(name), "0 CUDA devices", "device='cpu'"):
        resolve_device(name)
    assert resolve_device("auto").type == "cpu"


def test_a_cuda_device_beyond_the_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused("'cuda:2'", "2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cpu:x", ""])
def test_devices_that_are_not_there(name):
    if name and name.isalpha() and getattr(torch, name, None) and getattr(torch, name).is_available():
        pytest.skip(f"this machine has a device {name}")
    with refused(repr(name), "device"):
        resolve_device(name)


def test_dtypes():
    cpu = torch.device("cpu")
    assert resolve_dtype("float32", cpu) is torch.float32
    assert resolve_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    for name in ("int8", "torch.float32", ""):
        with refused(repr(name), "float32"):
            resolve_dtype(name, cpu)


def test_hooked_with_a_transformer_lens_that_no_longer_has_it(tiny_llama_dir, monkeypatch):
    installed = importlib.metadata.version("transformer-lens")
    if "hooked" in BACKENDS:
        version = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "4.3.0" if name == "transformer-lens" else version(name)
        )
        installed = "4.3.0"
    with refused("'hooked'", installed, "transformer-lens>=3.9,<4", "backend='bridge'"):
        load(str(tiny_llama_dir), backend="hooked")
    assert load(str(tiny_llama_dir), backend="auto", dtype="float32", device="cpu").backend == "bridge"


def foreign(tiny_pair, **changes):
    """A model that differs in one thing from the pair's."""
    config = type(tiny_pair.hf.config).from_dict(tiny_pair.hf.config.to_dict() | changes)
    return randomise(type(tiny_pair.hf)(config), seed=9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["n_layers = 4", "3"]),
        ({"hidden_size": 48}, ["d_model = 32", "48"]),
        ({"num_key_value_heads": 4}, ["n_kv_heads = 2", "4"]),
        ({"head_dim": 16}, ["d_head = 8", "16"]),
        ({}, ["same shape", "cosine"]),
    ],
    ids=str,
)
def test_a_subspace_of_another_model(tiny_pair, moments, state_of, tmp_path, changes, words):
    subspace = moments.subspace()
    # HookedTransformer (3.9) has no heads of another width than d_model / n_heads
    other = ModelPair(foreign(tiny_pair, **changes), tiny_pair.tokenizer, backend="bridge")
    state = state_of(other.hf)
    for strength in (1.0, 0.0):
        for context in (projected(other.lens, subspace, strength), folded(other.hf, subspace, strength)):
            with refused("the subspace", "another model", *words), context:
                pass
    with refused("another model", *words):
        fold_to(other.hf, subspace, tmp_path / "folded")
    assert_same_bits(other.hf, state)
    assert not any(point.fwd_hooks for point in other.lens.hook_dict.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("site", [Site(4, "k"), Site(1, "q")], ids=str)
def test_a_subspace_without_a_name_must_fit_all_the_same(untouched, site):
    basis = torch.eye(8, dtype=torch.float64)[None, :, :2].repeat(2, 1, 1)
    subspace = Subspace(bases={Site(1, "k"): basis, site: basis}, ranks={Site(1, "k"): (2, 2), site: (2, 2)})
    for context in (projected(untouched.lens, subspace), folded(untouched.hf, subspace)):
        with refused(str(site), "2 blocks of width 8"), context:
            pass


def test_a_subspace_fits_its_model_in_every_dtype_and_backend(pair_of, moments, backend):
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        pair = pair_of("llama", backend, dtype)
        moments.subspace().check(pair.hf)
        moments.subspace().check(pair.lens)
        assert moments.subspace().fingerprint.n_kv_heads == 2


SAVED = {"a subspace": Subspace.load, "gradient moments": GradientMoments.load}


@pytest.fixture(params=SAVED)
def saved(request, moments, tmp_path):
    artefact = moments.subspace() if request.param == "a subspace" else moments
    return artefact.save(tmp_path / "mine.safetensors"), SAVED[request.param], request.param


def test_files_that_are_not_what_they_should_be(saved, moments, tmp_path):
    path, read, kind = saved
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:50], b"", b"{}" * 100, b"\xff" + whole[1:]):
        path.write_bytes(damage)
        with refused("mine.safetensors", "not a readable safetensors file"):
            read(path)
    path.write_bytes(whole)
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with refused("foreign.safetensors", kind, "another program"):
        read(tmp_path / "foreign.safetensors")
    with refused("nowhere.safetensors", "no file"):
        read(tmp_path / "nowhere.safetensors")
    with refused("no file"):
        read(tmp_path)
    assert read(path).sites == moments.sites


def test_a_subspace_is_no_moments_and_the_other_way_round(moments, tmp_path):
    one, two = moments.save(tmp_path / "m.safetensors"), moments.subspace().save(tmp_path / "s.safetensors")
    with refused("m.safetensors", "a subspace", "gradient moments"):
        Subspace.load(one)
    with refused("s.safetensors", "a subspace", "gradient moments"):
        GradientMoments.load(two)


@pytest.mark.parametrize("header", ["{", "[]", '{"kind": 3}', "null"])
def test_files_with_a_damaged_header(saved, header):
    path, read, _ = saved
    save_file(load_file(path), path, metadata={"spd_lens": header})
    with refused("mine.safetensors", "damaged"):
        read(path)


def test_files_whose_header_does_not_fit_their_tensors(saved):
    path, read, kind = saved
    save_file({"x": torch.ones(1)}, path, metadata={"spd_lens": json.dumps({"kind": kind, "header": {}})})
    with refused("mine.safetensors", "damaged"):
        read(path)


def test_a_place_that_cannot_be_written_keeps_what_was_there(moments, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with refused("file", "cannot be written"):
        moments.save(tmp_path / "file" / "m.safetensors")
    path = moments.subspace(1).save(tmp_path / "s.safetensors")
    before = path.read_bytes()

    def disk_full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with refused("s.safetensors", "No space left"):
        moments.subspace(2).save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "s.safetensors"]
