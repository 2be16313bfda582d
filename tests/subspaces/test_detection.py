"""What is found in the files of a checkpoint: the projection that was folded into them, and else none."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from spd_lens.models.stored_layers import StoredLayers
from spd_lens.models.weights import site_layer
from spd_lens.sites import Site
from spd_lens.subspaces.bases import random_basis
from spd_lens.subspaces.detection import detect, zero_below
from spd_lens.subspaces.projection import fold_to
from spd_lens.subspaces.subspace import Subspace
from tests.conftest import build_llama, build_qwen2, build_tokenizer
from tests.helpers import refused, save_adapter
from tests.models.zoo import ZOO, build_twin

SITES = [Site(1, "k"), Site(1, "v"), Site(3, "v")]
FORMS = {"per head": {}, "joint": {"joint": True}, "centred": {"centred": True}, "q and z": {"kinds": "qz"}}


def drawn(seed=0, rank=5, *, joint=False, centred=False, kinds=None):
    """A subspace at random: with heads of different rank, and with an offset where it is centred."""
    generator = torch.Generator().manual_seed(seed)
    sites = SITES if kinds is None else [Site(2, kind) for kind in kinds]
    blocks, offset = {}, {}
    for site in sites:
        n = 2 if site.kind in "kv" else 4
        shapes = [(8 * n, 2 * rank)] if joint else [(8, rank - i % 2) for i in range(n)]
        blocks[site] = [random_basis(*shape, generator) for shape in shapes]
        if centred:
            offset[site] = torch.randn(len(shapes), shapes[0][0], generator=generator, dtype=torch.float64)
    return Subspace.from_blocks(blocks, offset=offset)


@pytest.fixture(scope="module")
def twin_of():
    return {
        family: build(build_tokenizer(chat=False)) for family, build in (("llama", build_llama), ("qwen2", build_qwen2))
    }


@pytest.fixture
def fold(twin_of, tmp_path):
    def _fold(subspace, family="qwen2", dtype=torch.float32, strength=1.0):
        twin = copy.deepcopy(twin_of[family]).to(dtype)
        twin.save_pretrained(tmp_path / "base")
        place = fold_to(twin, subspace, tmp_path / "folded", strength)
        return place, tmp_path / "base"

    return _fold


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "with base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_projection_in_the_weights_is_found_with_its_directions(fold, form, dtype, with_base):
    subspace = drawn(**FORMS[form])
    folded, base = fold(subspace, dtype=dtype)
    known = {"own": subspace, "other": drawn(1, **FORMS[form])}
    found = detect(folded, base if with_base else None, kinds=FORMS[form].get("kinds", "kv"), subspaces=known)
    assert found.subspace is not None and found.subspace.sites == subspace.sites
    assert found.subspace.ranks == subspace.ranks and not found.changed and not found.empty
    assert list(found.strengths.values()) == pytest.approx([1.0] * len(subspace.sites), abs=1e-2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for site in subspace.sites:
        assert (found.subspace.projector(site) - subspace.projector(site)).abs().max() < tolerance
        constants = [one.affine(site)[1] for one in (found.subspace, subspace)]
        assert (constants[0] - constants[1]).abs().max() < 10 * tolerance
    own, other = found.matches
    assert own.is_same and own.overlap > 0.99 and not other.is_same and other.overlap < 0.9
    assert "this is the projection" in str(own) and "another one" in str(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_ordinary_model_has_none_by_a_wide_margin(twin_of, tmp_path, dtype):
    for family, twin in twin_of.items():
        copy.deepcopy(twin).to(dtype).save_pretrained(tmp_path / family)
        found = detect(tmp_path / family, kinds="kvqz")
        assert found.subspace is None and found.n_sites == 16
        assert found.margin > (1e4 if dtype == torch.float32 else 10)
        assert "no projection in 16 sites" in next(found.lines())


def test_weights_that_were_rounded_to_bfloat16_and_stored_wider(fold):
    folded, _ = fold(drawn(), "llama", torch.bfloat16)
    file = folded / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert detect(folded).subspace.ranks == drawn().ranks


def test_a_weaker_projection_shows_beside_the_base_alone(fold):
    folded, base = fold(drawn(centred=True), strength=0.4)
    assert detect(folded).subspace is None
    found = detect(folded, base)
    assert found.subspace.ranks == drawn().ranks
    assert list(found.strengths.values()) == pytest.approx([0.4] * 3, abs=1e-4)
    wanted = drawn(centred=True)
    for site in SITES:
        assert torch.allclose(found.subspace.affine(site)[1], wanted.affine(site)[1], atol=1e-4)
    assert "strength 0.4" in "\n".join(found.lines())


def test_what_training_changes_is_no_projection(twin_of, tmp_path):
    twin = build_llama(build_tokenizer(chat=False))
    twin.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    for site, rank in ((Site(0, "k"), 2), (Site(2, "v"), 16)):
        low = torch.randn(16, rank, generator=generator) @ torch.randn(rank, 32, generator=generator)
        site_layer(twin, site).base.weight.data += 0.01 * low
    site_layer(twin, Site(3, "v")).base.weight.data *= 0.9
    twin.save_pretrained(tmp_path / "trained")
    found = detect(tmp_path / "trained", tmp_path / "base")
    assert found.subspace is None and found.changed == (Site(0, "k"), Site(2, "v"), Site(3, "v"))
    assert "as training does" in "\n".join(found.lines())
    assert detect(tmp_path / "base", tmp_path / "base").changed == ()


def test_a_pruned_head_is_told_apart(twin_of, tmp_path):
    twin = build_llama(build_tokenizer(chat=False))
    site_layer(twin, Site(1, "k")).base.weight.data[:8] = 0
    twin.save_pretrained(tmp_path / "pruned")
    found = detect(tmp_path / "pruned")
    assert found.empty == (Site(1, "k"),) and found.margin > 1e3


def test_zero_is_above_all_that_rounding_leaves():
    """Against the errors themselves, in matrices of several shapes whose rows differ in size."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 16), (8, 32), (64, 576), (128, 128)):
        exact = torch.randn(shape, generator=generator, dtype=torch.float64)
        exact *= torch.exp(torch.randn(shape[0], 1, generator=generator, dtype=torch.float64))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            errors = torch.linalg.svdvals(exact.to(dtype).double() - exact)
            assert 1.2 < zero_below(exact.to(dtype)) / errors[0] < 6


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "phi3", "opt", "gemma3_text", "bloom"])
def test_layers_are_read_from_files_as_the_model_has_them(name, tmp_path):
    twin = build_twin(next(key for key in ZOO if key.startswith(name.removesuffix("_text"))))
    twin.save_pretrained(tmp_path)
    stored = StoredLayers(tmp_path)
    for kind in "kvqz":
        site = Site(1, kind)
        layer, found = site_layer(twin, site), stored.at(site)
        weight = layer.base.weight.T if layer.transposed else layer.base.weight
        weight = weight.T if layer.reads else weight
        weight = weight if layer.features is None else weight[layer.features]
        assert torch.equal(found.weight.flatten(0, 1), weight)
        if layer.base.bias is not None and not layer.reads:
            bias = layer.base.bias if layer.features is None else layer.base.bias[layer.features]
            assert torch.equal(found.bias.flatten(), bias)


def test_what_is_no_checkpoint_is_refused_in_a_sentence(twin_of, fold, tmp_path):
    folded, _ = fold(drawn())
    with refused("resid", "k, v, q, z"):
        detect(folded, kinds=("resid",))
    other = build_llama(build_tokenizer(chat=False))
    other.config.num_hidden_layers, other.model.layers = 2, other.model.layers[:2]
    other.save_pretrained(tmp_path / "short")
    with refused("2.k", "not the base"):
        detect(folded, tmp_path / "short")
    save_adapter(twin_of["llama"], tmp_path / "adapter", LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM"))
    with refused("adapter", "is an adapter"):
        detect(tmp_path / "adapter")
    (folded / "model.safetensors").write_bytes((folded / "model.safetensors").read_bytes()[:100])
    with refused("model.safetensors", "damaged"):
        detect(folded)
