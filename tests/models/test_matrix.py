"""Architecture × backend × dtype × (capture, hooks, fold, LoRA + sync): what docs/models.md says, made here.

Each test tells its cell and what it measured to the JUnit report, from which scripts/model_table.py writes the tables.
"""

import os
import re

import pytest
import torch

import spd_lens as spd
from spd_lens.models.adapters import adapted
from spd_lens.models.parity import Parity
from spd_lens.models.weights import site_layer
from spd_lens.runs.model_check import MOMENTS_TOLERANCE, check_model
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.projection import folded, projected, projected_twin
from spd_lens.training.lora_targets import ATTENTION, resolve_targets
from tests.conftest import BACKENDS, build_tokenizer
from tests.helpers import (
    ALL_KINDS,
    EXAMPLES,
    LONG_EXAMPLE,
    assert_same_bits,
    greedy,
    make_adapter,
    refused,
    relative_error,
)
from tests.models.zoo import ZOO, build_pair, build_twin

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAPTER_STD = {torch.float32: 0.1, torch.bfloat16: 0.3, torch.float16: 0.3}
"""Large enough for the adapter to survive rounding to the dtype."""

OTHER_LANE = "SPD_LENS_BOTH_LANES" in os.environ and len(BACKENDS) > 1
"""Whether another lane tries TransformerBridge in half precision, with a newer TransformerLens."""

CELLS = [
    pytest.param((name, backend, dtype), id=f"{name}-{backend}-{str(dtype).removeprefix('torch.')}")
    for name, member in ZOO.items()
    for backend in BACKENDS
    for dtype in DTYPES
    if getattr(member, backend) and (backend != "hooked" or dtype in member.hooked_dtypes)
    if not (OTHER_LANE and backend == "bridge" and dtype != torch.float32)
]
REFUSED = [
    (name, backend, dtype)
    for name, member in ZOO.items()
    for backend in BACKENDS
    for dtype in DTYPES
    if not getattr(member, backend) or (backend == "hooked" and dtype not in member.hooked_dtypes)
]


@pytest.fixture(scope="module", params=CELLS)
def cell(request):
    """The cell and its pair, which a test leaves as it was."""
    return request.param, build_pair(*request.param)


@pytest.fixture
def pair(cell):
    return cell[1]


@pytest.fixture
def note(cell, record_property):
    """`note("fold", kl=...)`: which column this test fills, and what it measured."""

    def note(column, **measured):
        (name, backend, dtype), _ = cell
        record_property("cell", f"{name}|{backend}|{str(dtype).removeprefix('torch.')}|{column}")
        for what, value in measured.items():
            record_property(what, value)

    return note


@pytest.fixture(scope="module")
def subspace(cell):
    """Of all kinds, from the twin's gradients."""
    _, pair = cell
    return extract(pair, EXAMPLES[:2], engine="twin", kinds=ALL_KINDS, progress=False).subspace()


def test_the_check_is_green(pair, note):
    note("check")
    assert not [check for check in check_model(pair) if check.passed is False]


def test_lens_and_twin_give_the_same_moments(cell, pair, note):
    name, _, _ = cell[0]
    lens, twin = (
        extract(pair, [*EXAMPLES[:2], LONG_EXAMPLE], engine=engine, kinds=ALL_KINDS, progress=False)
        for engine in ("lens", "twin")
    )
    assert lens.sites == twin.sites
    assert pair.proven_length >= len(pair.encode(LONG_EXAMPLE).ids) > 8 * ZOO[name].window
    errors = []
    for site in lens.sites:
        assert lens.n_heads[site] == twin.n_heads[site]
        for one, other in ((lens.gradient, twin.gradient), (lens.activation, twin.activation)):
            assert one[site].dtype == other[site].dtype == torch.float64
            errors.append(relative_error(one[site].sum(0), other[site].sum(0)))
    note("capture", moments=max(errors))
    assert max(errors) < MOMENTS_TOLERANCE[pair.dtype]


def test_hooks_on_the_lens_model_are_hooks_on_the_twin(pair, subspace, note):
    plain = pair.check_logits(pair.hf)
    with projected(pair.lens, subspace) as projection, projected_twin(pair.hf, subspace):
        lens, twin = pair.check_logits(pair.lens), pair.check_logits(pair.hf)
    parity, effect = Parity.between(twin, lens), Parity.between(plain, twin)
    note("hooks", kl=parity.kl, logits=parity.logits)
    assert parity.within(pair.dtype)
    assert parity.kl < effect.kl / 4
    assert set(projection.firings.values()) == {1}


@pytest.mark.parametrize("options", [{}, {"center": True}, {"per_head": False}], ids=["plain", "centred", "joint"])
def test_folded_weights_are_hooks(pair, options, note, state_of):
    subspace = extract(pair, EXAMPLES[:2], engine="twin", kinds=ALL_KINDS, progress=False).subspace(**options)
    plain, state = pair.check_logits(pair.hf), state_of(pair.hf)
    with projected(pair.lens, subspace), folded(pair.hf, subspace):
        hooked, in_weights = pair.check_logits(pair.lens), pair.check_logits(pair.hf)
    parity, effect = Parity.between(in_weights, hooked), Parity.between(plain, in_weights)
    note("fold", kl=parity.kl, logits=parity.logits)
    assert parity.within(pair.dtype)
    assert parity.kl < effect.kl / 4
    assert_same_bits(pair.hf, state)


def test_folding_rounds_once(pair, subspace, note):
    """What is written is the float64 product, rounded to the model's dtype: no product was taken in half precision."""
    note("fold")
    site = Site(3, "v")
    layer = site_layer(pair.hf, site)
    features = slice(None) if layer.features is None else layer.features

    def rows():
        weight = layer.base.weight
        return (weight.T if layer.transposed else weight)[features].detach().double()

    before = rows()
    basis = subspace.bases[site].double()
    wide = (basis @ basis.mT @ before.unflatten(0, (len(basis), -1))).flatten(0, 1)
    with folded(pair.hf, subspace):
        assert (rows() - wide).abs().max() <= torch.finfo(pair.dtype).eps * wide.abs().max()


def test_lora_on_the_twin_reaches_the_lens_model_and_folds(pair, subspace, note, tmp_path):
    """The paper's targets under the architecture's own names; adapter and projection together, in both models."""
    targets = resolve_targets(pair.hf, ATTENTION)
    adapter = make_adapter(pair.hf, tmp_path / "adapter", targets=targets, std=ADAPTER_STD[pair.dtype])
    plain = pair.check_logits(pair.hf)
    with adapted(pair.hf, adapter) as tuned:
        target = pair.check_logits(tuned)
        with folded(tuned, subspace):
            target_projected = pair.check_logits(tuned)
    effect = Parity.between(target, plain)
    parity = pair.sync(to="lens", adapter=adapter)
    with projected(pair.lens, subspace):
        in_lens = Parity.between(target_projected, pair.check_logits(pair.lens))
    note("LoRA + sync", kl=max(parity.kl, in_lens.kl), logits=max(parity.logits, in_lens.logits))
    assert pair.sync(to="lens").within(pair.dtype)
    assert effect.logits > 0.05
    assert parity.within(pair.dtype)
    assert in_lens.within(pair.dtype)


def test_an_edit_of_the_lens_model_reaches_the_twin_and_back(pair, note, state_of):
    note("LoRA + sync")
    state, before = state_of(pair.hf), pair.check_logits(pair.hf)
    try:
        with torch.no_grad():
            for key, parameter in pair.lens.named_parameters():
                if re.search(r"\.o\.|W_O|o_proj|out_proj|dense\b|c_proj", key):
                    parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))  # a norm may follow
        assert pair.sync(to="twin").within(pair.dtype)
        assert (pair.check_logits(pair.hf) - before).abs().max() > 1e-3 * before.std()
        with torch.no_grad():
            site_layer(pair.hf, Site(0, "v")).base.weight.mul_(0.25)
        assert pair.sync(to="lens").within(pair.dtype)
    finally:
        pair.hf.load_state_dict(state)
        pair.drop_lens()


@pytest.mark.parametrize(("name", "backend", "dtype"), REFUSED, ids=str)
def test_what_a_backend_does_not_take_it_refuses_by_name_and_the_twin_works_alone(
    name, backend, dtype, record_property
):
    record_property("refused", f"{name}|{backend}|{str(dtype).removeprefix('torch.')}")
    pair = build_pair(name, backend, dtype)
    with refused(type(pair.hf).__name__, "engine='twin'" if backend == "bridge" else "backend"):
        pair.lens  # noqa: B018 (building is what is tested)
    moments = extract(pair, EXAMPLES[:2], engine="twin", progress=False)
    with torch.no_grad(), folded(pair.hf, moments.subspace()):
        assert pair.check_logits(pair.hf).isfinite().all()


@pytest.mark.parametrize("name", ZOO)
def test_a_model_from_a_directory_works_with_default_arguments_beyond_its_window(name, tmp_path):
    """Load, extract, generate and evaluate: with the backend that takes it, and with the twin alone where none does."""
    twin, tokenizer = build_twin(name), build_tokenizer(chat=False)
    twin.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pair = spd.load(str(tmp_path), dtype="float32")
    moments = spd.extract(pair, [LONG_EXAMPLE, *EXAMPLES[:2]], progress=False)
    expected = "hooked" if "hooked" in BACKENDS and ZOO[name].hooked else "bridge" if ZOO[name].bridge else "none"
    assert pair.backend == expected
    alone = spd.extract(pair, [LONG_EXAMPLE, *EXAMPLES[:2]], engine="twin", progress=False)
    errors = [relative_error(moments.gradient[site].sum(0), alone.gradient[site].sum(0)) for site in alone.sites]
    assert max(errors) < MOMENTS_TOLERANCE[torch.float32]
    prompts = [LONG_EXAMPLE.prompt, "7 * 3"]
    corpus = spd.generate(pair, prompts, subspace=moments.subspace(), max_new_tokens=8, temperature=0, progress=False)
    with folded(pair.hf, moments.subspace()):
        for record in corpus:
            plain = greedy(lambda ids: pair.hf(ids).logits, list(record.prompt_ids), record.n_completion_tokens)
            assert list(record.completion_ids) == plain
    assert len(corpus[0].prompt_ids) > 8 * ZOO[name].window
    assert len(spd.evaluate(pair, "synthetic-math", n=2, max_new_tokens=8, progress=False).items) == 2


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_moments_of_half_precision_are_those_of_float32_up_to_rounding(dtype):
    """The sums are float64 whatever the model computes in, so that only its own rounding is in them."""
    half, whole = build_pair("llama", "bridge", dtype), build_pair("llama", "bridge")
    whole.hf.load_state_dict(half.hf.state_dict())  # the same rounded weights
    found, exact = (extract(pair, EXAMPLES, engine="twin", progress=False) for pair in (half, whole))
    for site in exact.sites:
        assert found.gradient[site].dtype == torch.float64
        error = relative_error(found.gradient[site].sum(0), exact.gradient[site].sum(0))
        assert error < {torch.bfloat16: 0.05, torch.float16: 0.005}[dtype], site
