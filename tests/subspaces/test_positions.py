"""Classes of positions: every token in one, sinks where attention rests, and moments taken apart by them."""

import copy
from pathlib import Path

import pytest
import torch

from spd_lens.examples import Example
from spd_lens.models.attention import attention_received
from spd_lens.settings import Extraction
from spd_lens.sites import Site
from spd_lens.subspaces.extract import check_texts, extract, token_gradients
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.positions import CLASSES, positions_by_class, sinks_of
from tests.conftest import BACKENDS
from tests.helpers import EXAMPLES, hook_at, norms_in_full_precision, reference_rows, refused, relative_error
from tests.models.zoo import ZOO, build_twin

PATHS = [("twin", "auto"), *(("lens", name) for name in BACKENDS)]
PER_SITE = ("gradient", "activation", "activation_sum", "gradient_sum", "cross")


def taken(pair, examples=EXAMPLES, engine="twin", **options):
    return extract(pair, examples, engine=engine, progress=False, **options)


@pytest.fixture(scope="module")
def kept(tiny_qwen2_pair):
    return taken(tiny_qwen2_pair, shards=3, keep=("classes", "cross"))


def plain_class(position, encoded, sink=0):
    if position == sink:
        return "sink"
    if position in encoded.scored:
        return "scored"
    return "completion" if position >= encoded.completion_start else "prompt"


def sums_of(g, x):
    """Row by row, in plain float64."""
    width = g.shape[1]
    outer = {name: torch.zeros(width, width, dtype=torch.float64) for name in ("gradient", "activation", "cross")}
    for one, other in zip(g, x.double(), strict=True):
        outer["gradient"] += torch.outer(one, one)
        outer["activation"] += torch.outer(other, other)
        outer["cross"] += torch.outer(one, other)
    return outer | {"gradient_sum": g.sum(0), "activation_sum": x.double().sum(0)}


def test_every_position_is_in_one_class(tiny_pair):
    for example in EXAMPLES:
        encoded = tiny_pair.encode(example)
        found = positions_by_class(encoded)
        assert list(found) == list(CLASSES)
        assert sorted(sum(found.values(), [])) == list(range(len(encoded.ids)))
        assert all(plain_class(position, encoded) == name for name in CLASSES for position in found[name])
    moved = positions_by_class(encoded, (encoded.scored[0],))
    assert moved["sink"] == encoded.scored[:1] and 0 in moved["prompt"]
    assert moved["scored"] == encoded.scored[1:]


@pytest.mark.parametrize(("engine", "backend"), PATHS)
def test_each_class_holds_the_sums_over_its_own_rows(pair_of, family, engine, backend):
    pair = pair_of(family, backend)
    moments = taken(pair, engine=engine, layers="all", shards=2, keep=("classes", "cross"))
    encoded = [pair.encode(example) for example in EXAMPLES]
    gradients, activations, _ = reference_rows(pair.hf, encoded, moments.sites)
    names = [plain_class(position, e) for e in encoded for position in range(len(e.ids))]
    for name in CLASSES:
        rows = [i for i, found in enumerate(names) if found == name]
        region = moments.region(name)
        assert int(region.n_tokens.sum()) == len(rows) > 0
        assert int(region.n_scored.sum()) == (sum(len(e.scored) for e in encoded) if name == "scored" else 0)
        for site in moments.sites:
            expected = sums_of(gradients[site][rows], activations[site][rows])
            for part in PER_SITE:
                found = getattr(region, part)[site].sum(0)
                assert (found - expected[part]).norm() <= 1e-4 * getattr(moments, part)[site].sum(0).norm() + 1e-12


def test_the_classes_add_up_to_the_whole(kept):
    total = kept.region(*CLASSES)
    for one, whole in ((total, kept), (total.shards([2]), kept.shards([2])), (total.pooled(), kept.pooled())):
        for site in kept.sites:
            for name in PER_SITE:
                assert relative_error(getattr(one, name)[site], getattr(whole, name)[site]) < 1e-13
        for name in ("n_tokens", "n_scored", "n_examples", "loss_sum"):
            assert torch.equal(getattr(one, name), getattr(whole, name))
    assert kept.region("scored", "prompt").settings["region"] == ["prompt", "scored"], "in one order, however named"


def test_what_is_kept_besides_changes_nothing_else(tiny_qwen2_pair, kept, tmp_path):
    plain = taken(tiny_qwen2_pair, shards=3)
    assert (plain.kept, kept.kept) == ((), ("classes", "cross"))
    assert plain.settings == kept.settings
    for site in plain.sites:
        assert torch.equal(plain.gradient[site], kept.gradient[site])
    assert plain.subspace().digest() == kept.subspace().digest()
    names = set(GradientMoments._tensors(plain))
    assert not [name for name in names if "cross" in name or "/" in name], "a default file holds what it always held"


def test_regions_survive_sums_shards_and_files(tiny_qwen2_pair, kept, tmp_path):
    first, second = (
        taken(tiny_qwen2_pair, part, shards=3, keep="classes, cross") for part in (EXAMPLES[:3], EXAMPLES[3:])
    )
    back = GradientMoments.load(kept.save(tmp_path / "m.safetensors"))
    assert back.kept == kept.kept
    ways = [(back, 0.0), (first + second, 1e-5)]
    for name in CLASSES:
        whole = kept.region(name)
        for made, tolerance in ways:
            region = made.region(name)
            assert region.settings == {**kept.settings, "region": [name]}
            assert torch.equal(region.n_tokens.sum(), whole.n_tokens.sum())
            assert torch.equal(region.n_examples, whole.n_examples)
            for site in kept.sites:
                for part in PER_SITE:
                    wanted = getattr(whole, part)[site].sum(0)
                    off = (getattr(region, part)[site].sum(0) - wanted).norm()
                    assert off <= tolerance * getattr(kept, part)[site].sum(0).norm()
        even, odd = kept.halves()
        site = kept.sites[0]
        halves = even.region(name).blocks(site) + odd.region(name).blocks(site)
        assert torch.allclose(halves, whole.blocks(site), rtol=1e-12, atol=0)
    again = GradientMoments.load(kept.region("prompt", "scored").save(tmp_path / "r.safetensors"))
    assert torch.equal(again.region("prompt").gradient[site], kept.region("prompt").gradient[site])


def test_a_region_is_moments_like_any_other(kept):
    site = Site(3, "v")
    region = kept.region("prompt", "completion", "scored")
    subspace = region.subspace(2)
    assert subspace.origin["region"] == ["prompt", "completion", "scored"]
    assert subspace.digest() != kept.subspace(2).digest()
    gram = sum(kept.region(name).gradient[site].sum(0) for name in ("prompt", "completion", "scored"))
    values = torch.linalg.eigvalsh(gram[:8, :8]).flip(0).clamp_min(0).sqrt()
    assert torch.allclose(region.singular_values(site)[0], values, atol=1e-9 * values[0])
    assert region.mean_loss == kept.mean_loss
    assert region.subspace(2, center_gradients=True).digest() != subspace.digest()


def test_a_region_without_a_gradient_says_which(tiny_pair):
    one = [Example("Which planet is the largest?", "C", [(0, 1)])]
    moments = taken(tiny_pair, one, keep="classes")
    with refused("region scored", "zero"):
        moments.region("scored").subspace(2)
    with refused("region completion", "zero"):
        moments.region("completion").subspace(2, center_gradients=True)


def test_what_was_not_kept_is_said(tiny_qwen2_pair, kept):
    plain = taken(tiny_qwen2_pair, shards=3)
    site = plain.sites[0]
    with refused("scored", "--keep classes"):
        plain.region("scored")
    with refused("--keep cross"):
        plain.attribution(site)
    with refused("'answer'", *CLASSES):
        kept.region("scored", "answer")
    with refused("no class"):
        kept.region()
    with refused("sink", "prompt, scored", "whole moments"):
        kept.region("prompt", "scored").region("sink")
    with refused("region"):
        kept.region("prompt") + kept.region("scored")
    mixed = kept + plain
    assert mixed.kept == () and torch.equal(mixed.blocks(site), 2 * plain.blocks(site))
    old = GradientMoments.load(Path(__file__).parents[1] / "fixtures/artefacts/moments.safetensors")
    with refused("--keep classes"):
        old.region("scored")
    with refused("--keep cross"):
        old.attribution(old.sites[0])


# what removing a direction does to the loss


@pytest.mark.parametrize("site", [Site(1, "k"), Site(3, "v"), Site(2, "resid")], ids=str)
@pytest.mark.parametrize("per_head", [True, False], ids=["per head", "joint"])
def test_attribution_is_the_slope_of_the_loss_as_a_direction_goes(pair_of, family, site, per_head):
    """Removing a strength `s` of `v` at every token changes the loss by `-s vᵀ A v` and something of order `s²`."""
    pair = pair_of(family, "auto", "float64")
    with norms_in_full_precision():
        moments = taken(pair, layers=[site.layer], kinds=[site.kind], keep="cross")
    found = moments.attribution(site, per_head)
    block, generator = found.shape[0] - 1, torch.Generator().manual_seed(0)
    v = torch.randn(found.shape[-1], generator=generator, dtype=torch.float64)
    v /= v.norm()
    predicted = (v @ found[block] @ v).item()
    columns = slice(block * len(v), (block + 1) * len(v))

    def total_loss(strength):
        def less(activation):
            changed = activation.clone()
            part = changed[..., columns]
            changed[..., columns] = part - strength * (part @ v)[..., None] * v
            return changed

        total = 0.0
        with norms_in_full_precision(), torch.no_grad():
            handle = hook_at(pair.hf, site, less)
            for example in EXAMPLES:
                e = pair.encode(example)
                log_p = pair.hf(torch.tensor([e.ids])).logits[0].log_softmax(-1)
                total -= torch.stack([log_p[t - 1, e.ids[t]] for t in e.scored]).mean().item()
            handle.remove()
        return total

    before = total_loss(0.0)
    assert moments.loss_sum.sum().item() == pytest.approx(before, rel=1e-9)
    assert abs(predicted) > 1e-4, "nothing is measured"
    errors = [total_loss(s) - before + s * predicted for s in (1e-2, 1e-3)]
    assert abs(errors[1]) < 1e-2 * 1e-3 * abs(predicted) + 1e-5 * abs(predicted) + 1e-9
    assert 50 < errors[0] / errors[1] < 200, "what is left is not of second order"


def test_attribution_is_symmetric_and_adds(kept):
    for site in kept.sites:
        found = kept.attribution(site, per_head=False)
        gram = kept.cross[site].sum(0)
        assert torch.equal(found[0], found[0].T)
        assert torch.allclose(found[0], (gram + gram.T) / 2)
        assert torch.equal(kept.attribution(site)[1], found[0, 8:, 8:])
        parts = sum(kept.region(name).attribution(site) for name in CLASSES)
        assert relative_error(parts, kept.attribution(site)) < 1e-12


# where attention rests


@pytest.mark.parametrize("name", sorted(ZOO))
def test_attention_received_is_counted_from_the_weights(name, caplog):
    model = build_twin(name).eval()
    ids = torch.randint(5, 400, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    own = model.config._attn_implementation
    if name.startswith("falcon"):
        with refused("FalconAttention", "sinks='first'"):
            attention_received(model, ids, [1])
        return
    found = attention_received(model, ids, [1, 3])
    assert model.config._attn_implementation == own
    assert not model.get_output_embeddings()._forward_pre_hooks
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    weights = plain(torch.tensor([ids]), output_attentions=True).attentions
    for k in range(len(ids)):
        seen = [weights[layer][0, h, q, k].item() for layer in (1, 3) for h in range(4) for q in range(k, len(ids))]
        assert found[k].item() == pytest.approx(sum(seen) / len(seen), abs=1e-7)


@pytest.mark.parametrize("engine", ["twin", "lens"])
def test_attended_sinks_are_where_attention_rests(pair_of, family, engine):
    pair = pair_of(family)
    encoded = [pair.encode(example) for example in EXAMPLES]
    rows = token_gradients(pair, EXAMPLES, engine=engine, layers=[1, 3], sinks="attended", progress=False)
    found = {one.index: one.sinks for one in rows}
    sinks = []
    for index, e in enumerate(encoded):
        half = attention_received(pair.hf, e.ids, [1, 3])[: (len(e.ids) + 1) // 2]
        assert found[index] == (int(half.argmax()),)
        sinks.append(found[index][0])
    moments = taken(pair, engine=engine, layers=[1, 3], sinks="attended", keep="classes")
    g = reference_rows(pair.hf, encoded, moments.sites)[0]
    starts = torch.tensor([0, *(len(e.ids) for e in encoded)]).cumsum(0)[:-1]
    for site in moments.sites:
        own = g[site][starts + torch.tensor(sinks)]
        off = moments.region("sink").gradient[site].sum(0) - own.T @ own
        assert off.norm() <= 1e-4 * moments.gradient[site].sum(0).norm()
    assert moments.settings["sinks"] == "attended" and "sinks" not in taken(pair, engine=engine).settings


def test_a_planted_sink_is_found_and_the_last_positions_do_not_count(tiny_pair, monkeypatch):
    encoded = tiny_pair.encode(EXAMPLES[2])
    received = torch.full((len(encoded.ids),), 0.1, dtype=torch.float64)
    received[3], received[-1] = 0.5, 0.9
    monkeypatch.setattr("spd_lens.subspaces.positions.attention_received", lambda *_: received)
    assert sinks_of(tiny_pair, encoded, [1], "attended") == (3,)
    assert sinks_of(tiny_pair, encoded, [1], "first") == (0,)


# what a folder holds


def test_an_extraction_of_another_kind_is_refused_and_one_that_keeps_more_is_not(tiny_pair):
    kept = taken(tiny_pair, EXAMPLES[:2], keep=("classes", "cross"), sinks="attended")
    sampled = taken(tiny_pair, EXAMPLES[:2], labels="sampled", seed=7)
    assert (sampled.settings["labels"], sampled.settings["seed"]) == ("sampled", 7)
    assert sampled.subspace(2).origin["labels"] == "sampled"

    def check(moments, **asked):
        check_texts(moments, tiny_pair, Extraction(engine="twin", **asked), "m.safetensors")

    check(kept)
    check(kept, keep="cross")
    check(kept, keep=["classes"], sinks="attended")
    check(kept, seed=3)
    check(sampled, labels="sampled", seed=7)
    with refused("m.safetensors", "sinks was attended", "its usual value", "another folder"):
        check(kept, keep="classes")
    with refused("does not keep cross", "another folder"):
        check(sampled, labels="sampled", seed=7, keep="cross")
    with refused("labels was sampled", "its usual value"):
        check(sampled)
    with refused("labels was its usual value, and not sampled"):
        check(kept, labels="sampled")
    with refused("seed was 7, and not 42"):
        check(sampled, labels="sampled")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "everything"}, ("unknown keep 'everything'", "classes, cross")),
        ({"keep": ["cross", 3]}, ("unknown keep '3'",)),
        ({"sinks": "last"}, ("unknown sinks 'last'", "first, attended")),
        ({"labels": "own"}, ("unknown labels 'own'", "gold, sampled")),
        ({"labels": "sampled", "seed": "x"}, ("seed", "'x'")),
        ({"sinks": "attended"}, ("sinks='attended'", "keep='classes'")),
        ({"sinks": "attended", "keep": "cross"}, ("sinks='attended'", "keep='classes'")),
    ],
    ids=str,
)
def test_choices_that_there_are_not(tiny_pair, options, words):
    with refused(*words):
        taken(tiny_pair, **options)
