"""Passes that begin in the middle of the model give the bits of whole ones, or run in full."""

import torch

from spd_lens import extract
from spd_lens.evaluation.skip_layers import Prefix, exact_prefix
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.subspaces.policy import Policy
from tests.helpers import EXAMPLES


def test_effects_are_those_of_whole_passes(tiny_pair):
    moments = extract(tiny_pair, EXAMPLES, layers=[2, 3], shards=2, progress=False)
    policies = [Policy("base"), Policy("late", moments.subspace(2), 0.5)]
    prefix = exact_prefix(tiny_pair, EXAMPLES, {0, 2})
    whole = teacher_forced(tiny_pair, EXAMPLES, policies, progress=False)
    assert prefix is not None
    assert teacher_forced(tiny_pair, EXAMPLES, policies, prefix=prefix, progress=False) == whole
    assert whole["late"] != whole["base"]


def test_there_is_no_prefix_below_the_first_layer(tiny_pair):
    assert exact_prefix(tiny_pair, EXAMPLES, {0}) is None


def test_a_prefix_of_other_tokens_is_not_used(tiny_pair):
    hf, prefix = tiny_pair.hf, Prefix(tiny_pair.hf, [2])
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 6, 7, 8]])
    with torch.no_grad():
        expected = hf(input_ids=second).logits
        with prefix.watching():
            hf(input_ids=first)
            with prefix.starting_at(2):
                assert torch.equal(hf(input_ids=second).logits, expected)


def test_an_architecture_that_needs_its_lower_layers_is_noticed(tiny_pair):
    """Something that a block leaves behind for a later one is missing when the block is skipped."""
    left: list[torch.Tensor] = []
    low, high = tiny_pair.hf.model.layers[0], tiny_pair.hf.model.layers[2]
    handles = [
        low.mlp.register_forward_hook(lambda _m, _a, output: left.append(output)),
        high.register_forward_hook(lambda _m, _a, output: output + left.pop() if left else output),
    ]
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert not Prefix(tiny_pair.hf, [2]).agrees(lambda: tiny_pair.hf(input_ids=tokens).logits)
        for handle in handles:
            handle.remove()
        assert Prefix(tiny_pair.hf, [2]).agrees(lambda: tiny_pair.hf(input_ids=tokens).logits)
