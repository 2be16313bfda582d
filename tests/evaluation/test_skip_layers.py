"""Passes that begin in the middle of the model give the bits of whole ones, or run in full."""

import importlib

import pytest
import torch

from spd_lens import extract
from spd_lens.evaluation.skip_layers import exact_starts
from spd_lens.evaluation.teacher_forced import ForcedPasses, teacher_forced
from spd_lens.models.load import load
from spd_lens.subspaces.policy import Policy
from tests.helpers import EXAMPLES, make_adapter, refused

teacher_forced_file = importlib.import_module("spd_lens.evaluation.teacher_forced")


@pytest.fixture(scope="module")
def late(tiny_pair):
    """A subspace of the last two of four layers."""
    return extract(tiny_pair, EXAMPLES, layers=[2, 3], shards=2, progress=False).subspace(2)


@pytest.fixture
def runs_of(tiny_pair):
    """How often each layer ran since the fixture was made."""
    exact_starts(tiny_pair, range(5))  # tried once for a model, in passes of its own
    runs = [0] * 4
    blocks = tiny_pair.hf.model.layers

    def count(layer):
        runs[layer] += 1

    handles = [b.mlp.register_forward_hook(lambda *_, n=n: count(n)) for n, b in enumerate(blocks)]
    yield runs
    for handle in handles:
        handle.remove()


def late_adapter(pair, place, layer=2):
    targets = [f"layers.{n}.self_attn.{name}" for n in range(layer, 4) for name in ("v_proj", "o_proj")]
    return make_adapter(pair.hf, place, targets=targets)


def test_effects_are_those_of_whole_passes(tiny_pair, late, tmp_path, runs_of, monkeypatch):
    """Base, projections and an adapter, whose lowest layers differ, in batches of two."""
    adapter = late_adapter(tiny_pair, tmp_path / "late", layer=3)
    policies = [
        Policy("base"), Policy("late", late, 0.5), Policy("random", late.random_like(0)),
        Policy("tuned", adapter=adapter), Policy("both", late, adapter=adapter),
    ]  # fmt: skip
    shared = teacher_forced(tiny_pair, EXAMPLES, policies, batch_tokens=10**6, progress=False)
    assert runs_of == [1, 1, 4, 5]  # `both` begins where the lower of its two changes begins
    monkeypatch.setattr(Policy, "first_layer", lambda policy, pair: 0)
    assert shared == teacher_forced(tiny_pair, EXAMPLES, policies, batch_tokens=10**6, progress=False)
    assert runs_of == [6, 6, 9, 10]
    assert len({items[0].kl for items in shared.values()}) == len(policies)


def test_another_batch_has_a_prefix_of_its_own(tiny_pair, late, monkeypatch):
    policies = [Policy("late", late)]
    shared = teacher_forced(tiny_pair, EXAMPLES, policies, batch_tokens=1, progress=False)
    monkeypatch.setattr(Policy, "first_layer", lambda policy, pair: 0)
    assert shared == teacher_forced(tiny_pair, EXAMPLES, policies, batch_tokens=1, progress=False)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["layers.0.self_attn.k_proj", "layers.3.self_attn.k_proj"]])
def test_an_adapter_of_the_first_layer_shares_nothing(tiny_pair, tmp_path, runs_of, targets):
    policy = Policy("tuned", adapter=make_adapter(tiny_pair.hf, tmp_path / "low", targets=targets))
    assert policy.first_layer(tiny_pair) == 0
    teacher_forced(tiny_pair, EXAMPLES, [policy], batch_tokens=10**6, progress=False)
    assert runs_of == [2, 2, 2, 2]


def test_a_policy_that_does_not_say_where_it_begins_runs_all_layers(tiny_pair):
    class Other(Policy):
        is_base = False

    assert Other("other").first_layer(tiny_pair) == 0


def test_an_architecture_that_needs_its_lower_layers_is_noticed(tiny_llama_dir):
    """Something that a block leaves behind for a later one is missing when the block is skipped."""
    pair = load(str(tiny_llama_dir), dtype="float32", device="cpu")
    left: list[torch.Tensor] = []
    low, high = pair.hf.model.layers[0].mlp, pair.hf.model.layers[2].mlp
    own = low.forward, high.forward

    def leave(x):
        left.append(own[0](x))
        return left[-1]

    low.forward, high.forward = leave, lambda x: own[1](x) + (left.pop() if left else 0)
    assert exact_starts(pair, {2, 3}) == {3}
    assert exact_starts(load(str(tiny_llama_dir), dtype="float32", device="cpu"), {2, 3}) == {2, 3}


def test_what_the_base_computed_is_kept_for_texts_that_come_again(tiny_pair, late, runs_of, monkeypatch):
    """Seeds of a study, steps of a search, chunks of a sweep: the base model's layers run once, and no bit moves."""
    weak = Policy("weak", late, 0.5)
    calls = [[Policy("base")], [Policy("late", late)], [Policy("base"), weak], [Policy("late", late)]]
    passes = ForcedPasses(tiny_pair, keep=True)
    how = {"batch_tokens": 10**6, "progress": False}
    kept = [teacher_forced(tiny_pair, EXAMPLES, policies, passes=passes, **how) for policies in calls]
    # again in the second call, since the first did not say where passes would begin
    assert runs_of == [2, 2, 5, 5]
    monkeypatch.setattr(Policy, "first_layer", lambda policy, pair: 0)
    assert kept == [teacher_forced(tiny_pair, EXAMPLES, policies, **how) for policies in calls]
    shorter = teacher_forced(tiny_pair, EXAMPLES[:2], [Policy("base")], passes=passes, **how)["base"]
    assert shorter == teacher_forced(tiny_pair, EXAMPLES[:2], [Policy("base")], **how)["base"]


def test_no_more_is_kept_than_there_is_room_for(tiny_pair, late, runs_of, monkeypatch):
    widest = max(len(tiny_pair.encode(example).ids) for example in EXAMPLES)
    size = 2 * widest * tiny_pair.hf.config.hidden_size * 4  # what enters layer 2 and what leaves the last, of one text
    monkeypatch.setattr(teacher_forced_file, "_KEPT", size)
    passes = ForcedPasses(tiny_pair, keep=True)
    for _ in range(2):
        teacher_forced(tiny_pair, EXAMPLES, [Policy("late", late)], passes=passes, batch_tokens=1, progress=False)
    n = len(EXAMPLES)
    assert runs_of == [2 * n - 1, 2 * n - 1, 4 * n - 1, 4 * n - 1]


def test_nothing_is_kept_of_other_weights_or_another_model(tiny_pair, tiny_llama_dir, late):
    pair, how = load(str(tiny_llama_dir), dtype="float32", device="cpu"), {"batch_tokens": 10**6, "progress": False}
    passes, policies = ForcedPasses(pair, keep=True), [Policy("base"), Policy("late", late)]
    before = teacher_forced(pair, EXAMPLES, policies, passes=passes, **how)
    with torch.no_grad():
        pair.hf.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    after = teacher_forced(pair, EXAMPLES, policies, passes=passes, **how)
    assert after == teacher_forced(pair, EXAMPLES, policies, **how) != before
    with refused("another pair"):
        teacher_forced(tiny_pair, EXAMPLES, policies, passes=passes, **how)
