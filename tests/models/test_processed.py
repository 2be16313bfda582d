"""A lens model that was edited, or whose weights were processed, is not measured in the twin's place."""

from __future__ import annotations

import copy

import pytest
import torch

from spd_lens.generation.generate import generate
from spd_lens.models.pair import ModelPair
from spd_lens.models.parity import Parity
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.projection import folded, projected
from spd_lens.subspaces.subspace import Subspace
from tests.conftest import BACKENDS, build_llama, build_qwen2, build_tokenizer
from tests.helpers import EXAMPLES, make_adapter, refused


def process(pair: ModelPair) -> None:
    """As users do it, and as HookedTransformer.from_pretrained does."""
    pair.lens.enable_compatibility_mode() if pair.backend == "bridge" else pair.lens.process_weights_()


def build(family: str, backend: str) -> ModelPair:
    make = {"llama": build_llama, "qwen2": build_qwen2}[family]
    return ModelPair(make(build_tokenizer(chat=False)), build_tokenizer(chat=False), backend=backend, name=family)


def subspace_of(pair: ModelPair, kinds: tuple[str, ...] = ("k", "v")) -> Subspace:
    return extract(pair, EXAMPLES[:3], layers=[1, 2], kinds=kinds, engine="twin", progress=False).subspace(0.5)


def test_folded_value_biases_are_no_part_of_v_any_more(backend):
    pair = build("qwen2", backend)
    subspace = subspace_of(pair)
    process(pair)
    with refused("1.v", "processed", "drop_lens()"), projected(pair.lens, subspace):
        pass
    for call in (
        lambda: extract(pair, EXAMPLES[:2], layers=[1], progress=False),
        lambda: generate(pair, ["7 * 3"], engine="lens", max_new_tokens=2, progress=False),
        pair.check,
    ):
        with refused("predicts what its twin does", "processed", "drop_lens()"):
            call()
    with refused("processed", "drop_lens()"):
        pair.sync(to="lens")
    keys = subspace.select([site for site in subspace.sites if site.kind == "k"])
    with projected(pair.lens, keys):  # keys are what they were
        hooked = pair.check_logits(pair.lens)
    with folded(pair.hf, keys):
        assert Parity.between(pair.check_logits(pair.hf), hooked).kl < 1e-8
    pair.drop_lens()
    assert pair.check().within(torch.float32)
    with projected(pair.lens, subspace):
        hooked = pair.check_logits(pair.lens)
    with folded(pair.hf, subspace):
        assert Parity.between(pair.check_logits(pair.hf), hooked).within(torch.float32)


def test_where_there_are_no_value_biases_a_processed_lens_model_projects_alike(backend):
    pair = build("llama", backend)
    subspace = subspace_of(pair)
    before = extract(pair, EXAMPLES[:2], layers=[1], progress=False)
    process(pair)
    with projected(pair.lens, subspace):
        hooked = pair.check_logits(pair.lens)
    with folded(pair.hf, subspace):
        assert Parity.between(pair.check_logits(pair.hf), hooked).kl < 1e-8
    after = extract(pair, EXAMPLES[:2], layers=[1], progress=False)
    for site in before.sites:
        torch.testing.assert_close(after.gradient[site], before.gradient[site], rtol=1e-3, atol=1e-9)
    with refused("predicts what its twin does", "logits are others", "drop_lens()"):  # which a check compares
        pair.check()


@pytest.mark.skipif("hooked" not in BACKENDS, reason="this lane has no HookedTransformer")
def test_a_lens_model_from_elsewhere_with_folded_biases_is_refused():
    pair = build("qwen2", "hooked")
    subspace = subspace_of(pair)
    lens = copy.deepcopy(pair.lens)
    with projected(lens, subspace):
        lens(torch.arange(9)[None])
    lens.process_weights_()
    with refused("key biases, but no value biases", "drop_lens()"), projected(lens, subspace):
        pass


@torch.no_grad()
def test_an_edited_lens_model_is_looked_at_but_not_measured(backend):
    pair = build("llama", backend)
    subspace = subspace_of(pair)
    weight = next(p for name, p in pair.lens.named_parameters() if "mlp" in name and p.ndim == 2)
    own = weight.clone()
    weight.mul_(1.5)
    with projected(pair.lens, subspace):
        pair.check_logits(pair.lens)
    for call in (
        lambda: extract(pair, EXAMPLES[:2], layers=[1], progress=False),
        lambda: generate(pair, ["7 * 3"], engine="lens", max_new_tokens=2, progress=False),
    ):
        with refused("disagree", "pair.sync(to='lens')"):
            call()
    weight.copy_(own)
    extract(pair, EXAMPLES[:2], layers=[1], progress=False)


@torch.no_grad()
def test_a_lens_model_of_earlier_weights_is_not_measured(backend):
    pair = build("llama", backend)
    extract(pair, EXAMPLES[:2], layers=[1], progress=False)
    for parameter in pair.hf.parameters():
        parameter.mul_(1.1)
    with refused("disagree", "pair.sync(to='lens')"):
        extract(pair, EXAMPLES[:2], layers=[1], progress=False)
    pair.sync(to="lens")
    extract(pair, EXAMPLES[:2], layers=[1], progress=False)


def test_an_adapter_that_was_brought_to_the_lens_model_is_measured_there(backend, tmp_path):
    pair = build("llama", backend)
    plain = extract(pair, EXAMPLES[:2], layers=[1], progress=False)
    pair.sync(to="lens", adapter=make_adapter(pair.hf, tmp_path / "adapter"))
    with folded(pair.hf, subspace_of(pair)):
        pass  # the twin was written to, and has its bits again
    tuned = extract(pair, EXAMPLES[:2], layers=[1], progress=False)
    assert not torch.allclose(tuned.gradient[tuned.sites[0]], plain.gradient[plain.sites[0]], rtol=1e-2)
