"""Aligned loss, completion loss and KL against the definition, one item at a time in float64."""

import contextlib
import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from spd_lens.evaluation.teacher_forced import ForcedItem, teacher_forced
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from tests.helpers import EXAMPLES, assert_same_bits, make_adapter, norms_in_full_precision, refused

SITES = {"layers": [1, 3], "kinds": ("k", "v")}


def measured(pair, policies, examples=EXAMPLES, **options):
    return teacher_forced(pair, examples, policies, progress=False, **options)


@pytest.fixture(scope="module")
def subspace(any_tiny_pair):
    return extract(any_tiny_pair, EXAMPLES, **SITES, engine="twin", progress=False).subspace(0.5)


@pytest.fixture(scope="module")
def adapter(any_tiny_pair, tmp_path_factory):
    return make_adapter(any_tiny_pair.hf, tmp_path_factory.mktemp("adapter"))


def merged(hf, adapter):
    """A float64 copy with `W + alpha / r · B A` written out from the adapter's file."""
    wide = copy.deepcopy(hf).double()
    config = json.loads((adapter / "adapter_config.json").read_text())
    state = load_file(adapter / "adapter_model.safetensors")
    for name, a in state.items():
        if "lora_A" in name:
            b = state[name.replace("lora_A", "lora_B")].double()
            module = wide.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += config["lora_alpha"] / config["r"] * b @ a.double()
    return wide


@contextlib.contextmanager
def projecting(model, subspace, strength):
    """`(1 - s) x + s x P` on the outputs of k_proj and v_proj: Eq. 12, as plain forward hooks."""
    with contextlib.ExitStack() as stack:
        for site in subspace.sites:
            matrix = torch.block_diag(*subspace.projector(site)).double()

            def hook(_module, _args, x, matrix=matrix):
                return (1 - strength) * x + strength * x @ matrix

            module = model.model.layers[site.layer].self_attn.get_submodule(f"{site.kind}_proj")
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def reference(base, tuned, pair, examples, subspace=None, strength=1.0):
    """The three measures by their definitions: one item, all logits, log_softmax, no padding."""
    items = []
    for example in examples:
        e = pair.encode(example)
        ids = torch.tensor([e.ids])
        with torch.no_grad(), norms_in_full_precision():
            p = base(ids, use_cache=False).logits[0].log_softmax(-1)
            with projecting(tuned, subspace, strength) if subspace else contextlib.nullcontext():
                q = tuned(ids, use_cache=False).logits[0].log_softmax(-1)
        completion = range(e.completion_start, len(e.ids))
        nll = {t: -q[t - 1, e.ids[t]].item() for t in completion}
        kl = [(p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item() for t in completion]
        aligned = [nll[t] for t in e.scored]
        right = [q[t - 1].argmax().item() == e.ids[t] for t in completion]
        means = [sum(values) / len(values) for values in (aligned, nll.values(), kl, right)]
        items.append(ForcedItem(example.id, *means))
    return items


def assert_close(found, expected, rel=1e-4):
    assert [item.id for item in found] == [item.id for item in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("aligned_loss", "completion_loss", "kl", "token_accuracy"):
            # a KL is a difference of two sums of the size of the logits: an absolute error remains
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=rel, abs=2e-6), (mine.id, name)


@pytest.mark.parametrize(
    ("projects", "strength", "adapts"), [(False, 1.0, False), (True, 1.0, False), (True, 0.4, False),
                                         (False, 1.0, True), (True, 1.0, True), (True, 0.4, True)]
)  # fmt: skip
def test_measures_are_what_they_are_called(any_tiny_pair, subspace, adapter, projects, strength, adapts):
    pair = any_tiny_pair
    policy = Policy("p", subspace if projects else None, strength, adapter if adapts else None)
    base = copy.deepcopy(pair.hf).double()
    tuned = merged(pair.hf, adapter) if adapts else base
    expected = reference(base, tuned, pair, EXAMPLES, policy.subspace, strength)
    found = measured(pair, [policy])["p"]
    assert_close(found, expected)
    if projects or adapts:
        assert min(item.kl for item in found) > 1e-3  # the reference tells a policy that does nothing


def test_batches_do_not_matter(any_tiny_pair, subspace, adapter):
    policies = [Policy("projected", subspace), Policy("tuned", adapter=adapter)]
    one_by_one = measured(any_tiny_pair, policies, batch_tokens=1)
    together = measured(any_tiny_pair, policies, batch_tokens=10**6)
    for name in ("projected", "tuned"):
        assert_close(together[name], one_by_one[name], rel=1e-5)


def test_base_is_at_no_distance_from_itself(any_tiny_pair):
    assert [item.kl for item in measured(any_tiny_pair, [Policy("base")])["base"]] == [0.0] * len(EXAMPLES)


def test_strength_0_is_the_base_exactly(any_tiny_pair, subspace):
    found = measured(any_tiny_pair, [Policy("base"), Policy("none", subspace, 0.0)])
    assert found["base"] == found["none"]


def test_policies_differ_and_random_subspaces_too(any_tiny_pair, subspace, adapter):
    policies = [
        Policy("base"),
        Policy("projected", subspace),
        Policy("tuned", adapter=adapter),
        *(Policy(f"random-{seed}", subspace.random_like(seed)) for seed in (0, 1)),
    ]
    found = measured(any_tiny_pair, policies)
    losses = {name: tuple(round(item.aligned_loss, 4) for item in items) for name, items in found.items()}
    assert list(losses) == [policy.name for policy in policies]
    assert len(set(losses.values())) == len(policies)
    assert measured(any_tiny_pair, [Policy("again", subspace.random_like(1))])["again"] == found["random-1"]


def test_order_is_that_of_the_items(any_tiny_pair, subspace):
    policy = [Policy("projected", subspace)]
    forward, backward = measured(any_tiny_pair, policy), measured(any_tiny_pair, policy, EXAMPLES[::-1])
    assert [item.id for item in backward["projected"]] == [example.id for example in EXAMPLES[::-1]]
    assert_close(backward["projected"][::-1], forward["projected"], rel=1e-5)


def test_the_model_is_left_as_it_was(any_tiny_pair, subspace, adapter, state_of):
    before, modules = state_of(any_tiny_pair.hf), [type(m) for m in any_tiny_pair.hf.modules()]
    measured(any_tiny_pair, [Policy("both", subspace, adapter=adapter)])
    assert_same_bits(any_tiny_pair.hf, before)
    assert [type(m) for m in any_tiny_pair.hf.modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_tiny_pair.hf.modules())


def test_no_items(tiny_pair):
    with refused("no items"):
        measured(tiny_pair, [Policy("base")], [])


def test_two_policies_of_one_name(tiny_pair):
    with refused("a, b, a"):
        measured(tiny_pair, [Policy("a"), Policy("b"), Policy("a")])
