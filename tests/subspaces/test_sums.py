"""Sums of each head alone: the same subspaces per head, a share of the memory, and no joint ones."""

import sys

import pytest
import torch

from spd_lens import estimators
from spd_lens.runs import SPDConfig
from spd_lens.settings import Extraction
from spd_lens.sites import Site
from spd_lens.subspaces.extract import check_texts, extract
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.subspace import Subspace
from spd_lens.subspaces.sums import moments_size
from tests.helpers import EXAMPLES, reference_rows, refused, relative_error

KEEP = ("classes", "cross")
SITES = {"layers": "all", "kinds": ("k", "v", "q", "resid")}


def taken(pair, **options):
    return extract(pair, EXAMPLES[:4], engine="twin", progress=False, shards=2, keep=KEEP, **SITES, **options)


@pytest.fixture(scope="module")
def whole(tiny_qwen2_pair):
    return taken(tiny_qwen2_pair)


@pytest.fixture(scope="module")
def apart(tiny_qwen2_pair):
    return taken(tiny_qwen2_pair, across_heads=False)


def test_each_heads_sums_are_those_of_the_rows(tiny_qwen2_pair, apart):
    pair, site = tiny_qwen2_pair, Site(1, "v")
    gradients, activations, _ = reference_rows(pair.hf, [pair.encode(e) for e in EXAMPLES[:4]], [site])
    for name, rows in (("gradient", gradients[site]), ("activation", activations[site])):
        found = getattr(apart, name)[site].sum(0)
        assert found.shape == (2, 8, 8)
        for head, own in enumerate(rows.double().split(8, dim=1)):
            assert relative_error(found[head], own.T @ own) < 1e-5


def views(moments, site):
    """All that moments say of a site's heads."""
    parts = (moments, moments.region("prompt"), moments.shards([1]))
    blocks = [part.blocks(site) for part in parts]
    blocks += [moments.blocks(site, of="activation"), moments.blocks(site, center_gradients=True)]
    return [*blocks, moments.grams(site), moments.attribution(site)]


def test_all_that_is_per_head_is_the_same(whole, apart):
    assert (whole.across_heads, apart.across_heads) == (True, False)
    for site in whole.sites:
        assert apart.width(site) == whole.width(site)
        for found, expected in zip(views(apart, site), views(whole, site), strict=True):
            assert relative_error(found, expected) < 1e-12
            assert torch.equal(found, found.mT)
    one, other = (moments.subspace(0.5, center=True) for moments in (whole, apart))
    for site in whole.sites:
        assert one.ranks[site] == other.ranks[site]
        # projectors: a direction of a repeated singular value is any of a plane
        assert relative_error(other.projector(site), one.projector(site)) < 1e-9
        assert relative_error(other.singular_values[site], one.singular_values[site]) < 1e-9


def test_a_joint_subspace_is_refused_by_the_flag_that_brings_it(apart):
    site = Site(3, "k")
    for ask in (lambda: apart.subspace(4, per_head=False), lambda: apart.attribution(site, per_head=False),
                lambda: apart.grams(site, per_head=False)):  # fmt: skip
        with refused("no products across the 2 heads", "across_heads=True", "--across-heads"):
            ask()
    stream = Site(3, "resid")  # one block, joint as it is
    assert apart.subspace(4, per_head=False, sites=[stream]).ranks[stream] == (4,)
    with refused("across_heads = False", "--joint", "--per-head"):
        SPDConfig.make({"per_head": False, "across_heads": False})
    assert not SPDConfig.make({"across_heads": False}).extraction.across_heads


def test_they_are_saved_and_added_as_they_are(whole, apart, tmp_path):
    back = GradientMoments.load(apart.save(tmp_path / "apart.safetensors"))
    assert not back.across_heads and back.kept == ("classes", "cross")
    for site in apart.sites:
        assert torch.equal(back.gradient[site], apart.gradient[site])
        assert torch.equal((back + apart).blocks(site), 2 * apart.blocks(site))
    with refused("across_heads True and False"):
        whole + apart


def test_an_extraction_without_them_does_not_serve_where_they_are_asked_for(tiny_qwen2_pair, whole, apart):
    asked = Extraction(keep=list(KEEP))
    with refused("the file", "across_heads=False"):
        check_texts(apart, tiny_qwen2_pair, asked, "the file")
    check_texts(apart, tiny_qwen2_pair, asked.model_copy(update={"across_heads": False}), "the file")
    check_texts(whole, tiny_qwen2_pair, asked.model_copy(update={"across_heads": False}), "the file")  # it keeps more


@pytest.mark.parametrize("name", ["contrast", "attribution", "whitened", "scored"])
def test_estimators_take_them(tiny_qwen2_pair, name):
    for across in (True, False):
        settings = Extraction(engine="twin", layers=[1], across_heads=across)
        source = estimators.Calibration(tiny_qwen2_pair, EXAMPLES, settings=settings)
        found = estimators.get(name).subspace(source, estimators.Shape(rank=3))
        if across:
            expected = found
    for site in found.sites:
        assert relative_error(found.projector(site), expected.projector(site)) < 1e-9


@pytest.mark.parametrize("across_heads", [True, False])
@pytest.mark.parametrize("keep", [(), ("cross",), KEEP])
def test_the_size_is_what_the_tensors_take(tiny_qwen2_pair, keep, across_heads):
    fingerprint = tiny_qwen2_pair.fingerprint
    sites = tiny_qwen2_pair.sites("all", ("k", "q"))
    moments = GradientMoments.empty(fingerprint, sites, 3, {}, keep, across_heads=across_heads)
    counts = 3 * 4 * 8 * (5 if "classes" in keep else 1)  # of tokens, scored tokens and examples, and the loss
    size = moments_size([fingerprint.heads_at(site) for site in sites], 3, keep, across_heads=across_heads)
    assert size == sum(tensor.nbytes for tensor in moments._tensors().values()) - counts


def test_moments_that_do_not_fit_are_refused_before_anything_is_computed(tiny_qwen2_pair, monkeypatch):
    heads = [tiny_qwen2_pair.fingerprint.heads_at(site) for site in tiny_qwen2_pair.sites("all", ("k", "v"))]
    size, least, apart = moments_size(heads, 8), moments_size(heads, 1), moments_size(heads, 8, across_heads=False)
    module = sys.modules[extract.__module__]
    monkeypatch.setattr(module, "free_memory", lambda _: size - 1)
    monkeypatch.setattr(tiny_qwen2_pair, "encode", None)  # nothing is read
    gb = [f"{n / 1e9:.3g} GB" for n in (size, apart, least)]
    with refused("8 sites in 8 shards", "--no-across-heads", "shards=1", "layers=", *gb):
        extract(tiny_qwen2_pair, EXAMPLES, layers="all", progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(module, "free_memory", lambda _: least)
    assert extract(tiny_qwen2_pair, EXAMPLES, layers="all", engine="twin", shards=1, progress=False).n_shards == 1


def test_layers_taken_a_few_at_a_time_make_one_subspace(tiny_qwen2_pair):
    parts = [extract(tiny_qwen2_pair, EXAMPLES, layers=own, engine="twin", progress=False) for own in ([0, 1], [2, 3])]
    together = extract(tiny_qwen2_pair, EXAMPLES, layers="all", engine="twin", progress=False).subspace(3)
    found = [part.subspace(3) for part in parts]
    both = Subspace.from_blocks(
        {site: part.blocks(site) for part in found for site in part.sites}, fingerprint=tiny_qwen2_pair.fingerprint
    )
    assert both.sites == together.sites
    for site in both.sites:
        assert relative_error(both.projector(site), together.projector(site)) < 1e-4  # the gradients are float32
