"""Models with layers on the disk: the same numbers as on one device, nothing written, and what needs one device."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.generation.generate import generate
from spd_lens.models.device_map import is_spread, stored_weights
from spd_lens.models.fingerprint import weights_digest
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.models.probe import probe
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.pipeline import run
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from spd_lens.subspaces.projection import fold_to, folded
from spd_lens.training.finetune import finetune
from tests.conftest import BACKENDS, build_llama, build_tokenizer
from tests.helpers import EXAMPLES, make_adapter, refused, relative_error

PLACES = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "disk", "model.layers.3": "cpu", "model.norm": "disk", "lm_head": "disk",
}  # fmt: skip
"""Of the layers `last_mid`, 1 is on the disk and 3 is not."""


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pairs(request, pair_of, tiny_llama_dir, tiny_qwen2_dir):
    """The same model on one device and with layers on the disk: without biases, and with."""
    directory = {"llama": tiny_llama_dir, "qwen2": tiny_qwen2_dir}[request.param]
    return pair_of(request.param), load(str(directory), dtype="float32", device_map=PLACES)


@pytest.fixture(scope="module")
def subspaces(pairs):
    moments = extract(pairs[0], EXAMPLES, engine="twin", kinds=("k", "v", "q", "z"), progress=False)
    return [moments.subspace(0.5), moments.subspace(0.5, sites=moments.at(pairs[0].sites()).sites, center=True)]


def on_disk(pair):
    return {name for name, weight in pair.hf.named_parameters() if weight.is_meta}


def stored(pair):
    return {name: weight.clone() for name, weight in stored_weights(pair.hf)}


def logits(pair, policy=None):
    with (policy or Policy()).applied(pair):
        return pair.check_logits(pair.hf)


def test_it_is_the_same_model_for_all_that_tells_models_apart(pairs):
    plain, spread = pairs
    assert is_spread(spread.hf) and not is_spread(plain.hf)
    assert "model.layers.1.self_attn.k_proj.weight" in on_disk(spread) and not on_disk(plain)
    assert spread.fingerprint == plain.fingerprint and weights_digest(spread.hf) == weights_digest(plain.hf)
    assert spread.device.type == "cpu" and spread.dtype == torch.float32
    assert max(probe(spread.hf, spread.tokenizer, spread.sites("all")).values()) < 1e-6
    assert torch.equal(logits(spread), logits(plain))


@pytest.mark.parametrize("options", [{}, {"keep": "classes,cross", "sinks": "attended", "layers": "all"}])
def test_gradients_are_those_of_one_device(pairs, options):
    # engine "lens" by default: without a lens model, backend "auto" takes the twin
    plain, spread = (
        extract(pair, EXAMPLES, progress=False, **options, **how)
        for pair, how in zip(pairs, ({"engine": "twin"}, {}), strict=True)
    )
    assert plain.settings == spread.settings and plain.mean_loss > 0
    for name, expected in plain._tensors().items():
        assert torch.equal(spread._tensors()[name], expected), name


def test_projected_passes_and_completions_are_those_of_one_device(pairs, subspaces, tiny_prompts):
    before, untouched = stored(pairs[1]), logits(pairs[1])
    for subspace in subspaces:
        policy = Policy("projected", subspace)
        expected, found = (logits(pair, policy) for pair in pairs)
        assert torch.equal(found, expected)
        assert relative_error(expected, untouched) > 0.01  # the projection does something
        forced = [teacher_forced(pair, EXAMPLES, [Policy(), policy], progress=False) for pair in pairs]
        assert forced[0] == forced[1]
        how = {"policy": policy, "max_new_tokens": 12, "temperature": 0.0, "progress": False}
        written = [[r.completion_ids for r in generate(pair, tiny_prompts, **how)] for pair in pairs]
        assert written[0] == written[1]
    after = stored(pairs[1])
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(pairs[1]), untouched)


def test_a_fold_counts_where_the_weights_are_read_and_is_gone_after_an_error(pairs, subspaces):
    _, spread = pairs
    own, name = stored(spread), "model.layers.1.self_attn.v_proj.weight"
    with pytest.raises(KeyError), folded(spread.hf, subspaces[0]):
        assert not torch.equal(stored(spread)[name], own[name])
        raise KeyError
    assert torch.equal(stored(spread)[name], own[name]) and name in on_disk(spread)


def test_the_checkpoint_of_a_fold_is_that_of_one_device_and_the_model_s_own_is_not_written(
    pairs, subspaces, tmp_path, tiny_llama_dir, tiny_qwen2_dir
):
    files = [path for place in (tiny_llama_dir, tiny_qwen2_dir) for path in Path(place).glob("*.safetensors")]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    expected, found = (
        load_file(fold_to(pair.hf, subspaces[0], tmp_path / name) / "model.safetensors")
        for pair, name in zip(pairs, ("plain", "spread"), strict=True)
    )
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == digests


def test_what_needs_one_device_says_so_before_any_work(pairs, tiny_prompts, tmp_path, tiny_settings):
    plain, spread = pairs
    why = ("spread over", "device_map")
    for use in (lambda: spread.lens, lambda: spread.sync(to="lens")):
        with refused("a lens model needs a second copy", "engine='twin'"):
            use()
    adapter = make_adapter(plain.hf, tmp_path / "adapter")
    with refused("an adapter needs all weights on one device", "cpu, disk", *why):
        teacher_forced(spread, EXAMPLES, [Policy(adapter=adapter)], progress=False)
    corpus = generate(plain, tiny_prompts[:1], max_new_tokens=4, progress=False)
    with refused("training", *why):
        finetune(spread, corpus, out=tmp_path / "tuned", progress=False)
    with refused("a run, which trains,", *why):
        run(SPDConfig.make(tiny_settings), tmp_path / "run", pair=spread, progress=False)
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "run").exists()


def test_a_named_backend_is_refused(tiny_llama_dir):
    pair = load(str(tiny_llama_dir), dtype="float32", device_map=PLACES, backend=BACKENDS[-1])
    with refused("a lens model needs a second copy", "engine='twin'"):
        extract(pair, EXAMPLES, progress=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": "auto", "device": "cpu"}, ["'cpu'", "'auto'", "leave one out"]),
        ({"offload_folder": "there"}, ["offload_folder='there'", "without device_map"]),
        ({"device_map": {**PLACES, "model.embed_tokens": "disk"}}, ["the embedding", "offloaded"]),
        ({"device_map": {"model.embed_tokens": "cpu", "model.layers": "disk"}}, ["cannot be loaded", "lm_head"]),
        ({"device_map": "everywhere"}, ["cannot be loaded", "everywhere"]),
    ],
)
def test_maps_that_cannot_be_followed(tiny_llama_dir, options, words):
    with refused(*words):
        load(str(tiny_llama_dir), dtype="float32", **options)


def test_an_adapter_and_weights_nowhere_are_refused(pairs, tmp_path):
    adapter = make_adapter(pairs[0].hf, tmp_path / "adapter")
    with refused(str(adapter), "is an adapter", "device_map"):
        load(str(adapter), device_map="auto")
    tokenizer = build_tokenizer(chat=False)
    with torch.device("meta"):
        nowhere = build_llama(tokenizer)
    with refused("are on meta", "spd_lens.load"):
        ModelPair(nowhere, tokenizer)


def test_a_map_of_one_device_changes_nothing(pairs, tiny_llama_dir):
    pair = load(str(tiny_llama_dir), dtype="float32", device_map="auto")
    assert not is_spread(pair.hf) and pair.lens is not None


def test_tied_embeddings_and_a_dtype_that_is_not_the_file_s(tmp_path):
    tokenizer = build_tokenizer(chat=False)
    build_llama(tokenizer, tied=True).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    places = {**PLACES, "lm_head": "cpu"}
    ways = {"device": "cpu"}, {"device_map": places}
    one, spread = (load(str(tmp_path / "model"), dtype="bfloat16", **how) for how in ways)
    assert weights_digest(one.hf) == weights_digest(spread.hf)
    assert torch.equal(logits(one), logits(spread))


def test_settings_name_a_device_for_each_part():
    config = SPDConfig.make({"device_map": "model.embed_tokens=0, model.layers=disk", "offload_folder": Path("there")})
    assert config.device_map == {"model.embed_tokens": 0, "model.layers": "disk"} and config.offload_folder == "there"
    assert SPDConfig.make({"device_map": "auto"}).device_map == "auto"
    assert SPDConfig.make({}).device_map is None
