"""Subspaces and moments of strangers, whole files with digests of their own: what cannot be is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import spd_lens as spd
from spd_lens.errors import DamagedFile, SPDError
from spd_lens.files import load_tensors, save_tensors
from spd_lens.models import Fingerprint
from tests.helpers import refused
from tests.reliability.flips import make

SUBSPACE, MOMENTS = "a subspace", "gradient moments"
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("foreign")
    make(place / "run")
    return place / "run"


def forged(written: Path, tmp_path: Path, kind: str, change: Change) -> Path:
    """A file with something changed in it, and the digest that belongs to that."""
    name = {SUBSPACE: "subspace.safetensors", MOMENTS: "moments.safetensors"}[kind]
    tensors, header = load_tensors(written / name, kind)
    change(tensors, header)
    return save_tensors(tmp_path / name, kind, {k: v.contiguous() for k, v in tensors.items()}, header)


def put(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda tensors, header: tensors.__setitem__(name, change(tensors[name]))


def say(*path: str, value: Any) -> Change:
    def change(_: Any, header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


def beyond(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name.replace("1.k", "9.k"): value.clone() for name, value in tensors.items() if "1.k" in name})


K = "basis.1.k"
BASES: dict[str, Change] = {
    "ten times as long": put(K, lambda v: v * 10),
    "zero": put(K, torch.zeros_like),
    "twice the same column": put(K, lambda v: v[..., [0, 0]]),
    "tilted": put(K, lambda v: v + 1e-3),
    "not finite": put(K, lambda v: v * math.nan),
    "more columns than the width": put(K, lambda v: torch.cat([v] * 4, dim=-1)),
    "no column": put(K, lambda v: v[..., :0]),
    "something behind the rank": say("ranks", "1.k", value=[1, 2]),
    "whole numbers": put(K, lambda v: v.long()),
    "truth values": put(K, lambda v: v.bool()),
    "complex": put(K, lambda v: v.to(torch.complex64)),
    "flat": put(K, lambda v: v.flatten()),
    "a block less": put(K, lambda v: v[:1]),
    "negative rank": say("ranks", "1.k", value=[-5, 2]),
    "huge rank": say("ranks", "1.k", value=[10**9, 2]),
    "a rank in words": say("ranks", "1.k", value=["x", 2]),
    "true as rank": say("ranks", "1.k", value=[True, 2]),
    "ranks of no site": say("ranks", value={}),
    "a site that is none": say("ranks", "1.x", value=[2]),
    "offset of another shape": lambda t, h: t.__setitem__("offset.1.k", torch.zeros(3, 3)),
    "offset not finite": lambda t, h: t.__setitem__("offset.1.k", torch.full((2, 4), math.inf)),
    "values of another shape": lambda t, h: t.__setitem__("singular_values.1.k", torch.zeros(7)),
    "values of a site without basis": lambda t, h: t.__setitem__("singular_values.0.k", torch.zeros(2, 4)),
    "a rank that is a list": say("rank", value=[1]),
    "origin in words": say("origin", value="somewhere"),
    "findings that are none": say("findings", value=[{"kind": "subspace"}]),
    "no fingerprint field": lambda t, h: h.pop("fingerprint"),
}
NAN = [math.nan] * 64
FINGERPRINTS: dict[str, Any] = {
    "not numbers": NAN, "scaled": [-1e9 / 8] * 64, "zero": [0.0] * 64, "short": [1.0], "texts": ["x"] * 64,
    "infinite": [math.inf] * 64, "true": [True] * 64, "one number": 1.0, "nothing": None,
}  # fmt: skip
SUMS: dict[str, Change] = {
    "not finite": put("gradient.1.k", lambda v: v * math.nan),
    "infinite": put("loss_sum", lambda v: v + math.inf),
    "another shape": put("gradient.1.k", lambda v: v[:, :4]),
    "another number of shards": put("activation.1.v", lambda v: v[:1]),
    "float32": put("gradient.1.k", lambda v: v.float()),
    "negative counts": put("n_tokens", lambda v: -v),
    "counts with fractions": put("n_examples", lambda v: v.double()),
    "negative squares": put("gradient.1.v", lambda v: -v),
    "no head": say("n_heads", "1.k", value=0),
    "less than no head": say("n_heads", "1.k", value=-1),
    "heads in words": say("n_heads", "1.k", value="2"),
    "other heads": say("n_heads", "1.k", value=4),
    "no site": say("n_heads", value={}),
    "a site that is none": say("n_heads", "x", value=1),
    "a layer beyond the model": lambda t, h: (beyond(t), h["n_heads"].update({"9.k": 2})),
    "a dtype that is none": say("settings", "dtype", value="os"),
    "settings in a list": say("settings", value=[]),
    "a tensor less": lambda t, h: t.pop("n_scored"),
}  # fmt: skip


@pytest.mark.parametrize("change", BASES.values(), ids=BASES)
def test_subspaces_that_cannot_be(written, tmp_path, change):
    path = forged(written, tmp_path, SUBSPACE, change)
    with refused(path, kind=DamagedFile):
        spd.Subspace.load(path)


@pytest.mark.parametrize("change", SUMS.values(), ids=SUMS)
def test_moments_that_cannot_be(written, tmp_path, change):
    path = forged(written, tmp_path, MOMENTS, change)
    with refused(path, kind=DamagedFile):
        spd.GradientMoments.load(path)


@pytest.mark.parametrize("sample", FINGERPRINTS.values(), ids=FINGERPRINTS)
def test_a_fingerprint_that_would_fit_any_model(written, tmp_path, sample):
    for kind, load in ((SUBSPACE, spd.Subspace.load), (MOMENTS, spd.GradientMoments.load)):
        path = forged(written, tmp_path, kind, say("fingerprint", "sample", value=sample))
        with refused(path, kind=DamagedFile):
            load(path)


def test_fingerprints_are_compared_by_their_direction():
    one = Fingerprint(2, 16, 4, 2, 4, (0.6, 0.8))
    for scale in (1.0, 1e9, 1e-9):
        one.check(Fingerprint(2, 16, 4, 2, 4, (0.6 * scale, 0.8 * scale)), "it")
    for sample in ((-0.6e9, -0.8e9), (math.nan, 0.8), (0.0, 0.0), (0.8, -0.6), (1.0,)):
        with refused("another model"):
            one.check(Fingerprint(2, 16, 4, 2, 4, sample), "it")


def test_blocks_are_heads_or_one(tiny_pair):
    """Eight components in two heads of four are not four blocks of two."""
    site = spd.Site(1, "k")
    n_heads, d_head = tiny_pair.fingerprint.heads_at(site)
    blocks = torch.eye(d_head // 2, dtype=torch.float64)[:, :1].expand(2 * n_heads, -1, -1)
    other = spd.Subspace(bases={site: blocks}, ranks={site: (1,) * (2 * n_heads)})
    with refused("blocks", f"{site}"):
        other.check(tiny_pair.hf)


def test_bases_of_ones_own_are_looked_at_before_they_act(tiny_pair):
    site = spd.Site(1, "k")
    n_heads, d_head = tiny_pair.fingerprint.heads_at(site)
    bases = torch.eye(d_head, dtype=torch.float64)[:, :2].expand(n_heads, -1, -1)
    spd.Subspace(bases={site: bases}, ranks={site: (2,) * n_heads}).check(tiny_pair.hf)
    with (
        refused("orthonormal"),
        spd.folded(tiny_pair.hf, spd.Subspace(bases={site: 2 * bases}, ranks={site: (2,) * n_heads})),
    ):
        pass
    with refused("ranks"):
        spd.Subspace(bases={site: bases}, ranks={site: (3,) * n_heads})


def test_what_is_whole_loads(written, tmp_path):
    path = forged(written, tmp_path, SUBSPACE, lambda tensors, header: None)
    with safe_open(str(path), "pt") as file:
        assert (
            set(file.metadata()) == {"spd_lens", "sha256"}
            and json.loads(file.metadata()["spd_lens"])["kind"] == SUBSPACE
        )
    assert spd.Subspace.load(path).digest() == spd.Subspace.load(written / "subspace.safetensors").digest()
    with pytest.raises(SPDError, match="gradient moments"):
        spd.GradientMoments.load(path)
