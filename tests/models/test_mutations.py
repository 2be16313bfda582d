"""The table of architectures gone wrong, once for every entry and every way: the check must turn red, the core refuse.

Which architectures are fused, have biases or several heads is read off the models, so that a new entry is tested
without another line here.
"""

from functools import cache

import pytest
import torch

import spd_lens.subspaces.projection
from spd_lens.errors import SPDError
from spd_lens.models.architectures import ARCHITECTURES, Architecture, architecture
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.models.pair import ModelPair
from spd_lens.models.weights import site_layer
from spd_lens.runs.model_check import check_model, require_core
from spd_lens.sites import Site
from tests.conftest import build_tokenizer
from tests.models.zoo import ZOO, build_twin

RIGHT = Architecture.features


@cache
def twin_of(name):
    return build_twin(name)


def pair_of(name):
    return ModelPair(twin_of(name), build_tokenizer(chat=False), backend="bridge")


def every_feature(self, kind, n_heads, n_kv_heads, d_head):
    features = RIGHT(self, kind, n_heads, n_kv_heads, d_head)
    n = n_heads if kind in "qz" else n_kv_heads
    return torch.arange(n * d_head) if features is None else features


def heads_shifted(self, kind, n_heads, n_kv_heads, d_head):
    """Each head taken for the next one."""
    return every_feature(self, kind, n_heads, n_kv_heads, d_head).roll(d_head)


def heads_interleaved(self, kind, n_heads, n_kv_heads, d_head):
    """Feature by feature instead of head by head."""
    return every_feature(self, kind, n_heads, n_kv_heads, d_head).view(-1, d_head).T.flatten()


def features_reversed(self, kind, n_heads, n_kv_heads, d_head):
    """Within each head: all that can be wrong where there is one."""
    return every_feature(self, kind, n_heads, n_kv_heads, d_head).view(-1, d_head).flip(1).flatten()


def slice_of(other):
    """Another kind's features of a fused layer, as many as are asked for."""

    def features(self, kind, n_heads, n_kv_heads, d_head):
        return RIGHT(self, other[kind], n_heads, n_kv_heads, d_head)[: n_kv_heads * d_head]

    return features


def shifted_slice(self, kind, *sizes):
    """The right size at the wrong place, by one feature."""
    return RIGHT(self, kind, *sizes) - 1


KEYS_FOR_VALUES = slice_of({"k": "v", "v": "k", "q": "q", "z": "z"})
QUERIES_FOR_KEYS = slice_of({"k": "q", "v": "v", "q": "q", "z": "z"})


def n_kv_heads(name):
    return Fingerprint.of(twin_of(name)).n_kv_heads


FUSED = [name for name in ZOO if architecture(twin_of(name)).fusion]
BIASED = [name for name in ZOO if site_layer(twin_of(name), Site(1, "k")).base.bias is not None]
WRONG = [
    *((name, heads_shifted) for name in ZOO if n_kv_heads(name) > 1),
    *((name, heads_interleaved) for name in ZOO if n_kv_heads(name) > 1),
    *((name, features_reversed) for name in ZOO),
    *((name, mutation) for name in FUSED for mutation in (KEYS_FOR_VALUES, QUERIES_FOR_KEYS, shifted_slice)),
]


def red(pair):
    return {check.name for check in check_model(pair) if check.passed is False}


def label(value):
    return value if isinstance(value, str) else value.__qualname__


@pytest.mark.parametrize(("name", "features"), WRONG, ids=label)
def test_a_run_is_refused_where_heads_are_wrong(name, features, monkeypatch):
    pair = pair_of(name)
    require_core(pair, "last_mid", ("k", "v"))
    monkeypatch.setattr(Architecture, "features", features)
    with pytest.raises(SPDError, match="not where spd_lens looks for it"):
        require_core(pair, "last_mid", ("k", "v"))


@pytest.mark.parametrize("name", BIASED)
def test_a_run_is_refused_where_a_bias_is_forgotten(name, monkeypatch):
    pair = pair_of(name)
    forget_biases(monkeypatch)
    with pytest.raises(SPDError, match="hooks and folded weights disagree"):
        require_core(pair, "last_mid", ("k", "v"))


@pytest.mark.parametrize("name", [name for name, member in ZOO.items() if member.bridge])
def test_the_check_turns_red_line_by_line(name, monkeypatch):
    """Wrong heads show in the cache and between the lens model's hooks and the fold; a forgotten bias in the latter."""
    pair = pair_of(name)
    with monkeypatch.context() as patch:
        patch.setattr(Architecture, "features", heads_shifted if n_kv_heads(name) > 1 else features_reversed)
        assert {"heads = cache", "hook = fold"} <= red(pair)
    if name in FUSED:
        with monkeypatch.context() as patch:
            patch.setattr(Architecture, "features", KEYS_FOR_VALUES)
            assert {"heads = cache", "hook = fold", "gradients"} <= red(pair)
    if name in BIASED:
        forget_biases(monkeypatch)
        assert red(pair) == {"hook = fold"}


def forget_biases(patch):
    right = spd_lens.subspaces.projection._map_features

    def without_bias(weight, *arguments, **options):
        if weight.shape[1] > 1:
            right(weight, *arguments, **options)

    patch.setattr(spd_lens.subspaces.projection, "_map_features", without_bias)


def test_every_entry_of_the_table_is_mutated():
    mutated = {twin_of(name).config.get_text_config().model_type for name, _ in WRONG}
    assert mutated == {name for name, layout in ARCHITECTURES.items() if not layout.refused}
    assert {"gpt2", "phi3", "gpt_neox", "falcon, groups"} <= set(FUSED)
    assert {"qwen2", "gpt2", "opt"} <= set(BIASED)
