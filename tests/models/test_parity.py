"""What counts as the same model: logits, KL and fingerprints."""

import math
import re

import pytest
import torch

from spd_lens.models.adapters import adapted, merged_copy
from spd_lens.models.batches import right_pad
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.models.parity import CHECK_TEXTS, Parity, kl_divergence
from tests.helpers import make_adapter, refused


def test_kl_is_the_sum_over_the_vocabulary():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert kl_divergence(p.log() + 3, q.log() - 1).item() == pytest.approx(expected, rel=1e-5), "logits, not log p"
    assert kl_divergence(p.log(), p.log()).item() == 0
    assert kl_divergence(p.log(), q.log()[[2, 1, 0]]).item() == pytest.approx(0, abs=1e-7)
    assert kl_divergence(torch.zeros(2, 5, 7), torch.ones(2, 5, 7).bfloat16()).shape == (2, 5)
    skewed = kl_divergence(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
    back = kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert skewed.item() != pytest.approx(back.item(), rel=0.1), "the order of the two matters"


def test_parity_is_relative_to_the_spread_of_the_reference():
    reference = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = reference.clone()
    other[2, 3] += 0.1
    parity = Parity.between(reference, other)
    assert parity.logits == pytest.approx(0.1 / reference.std().item())
    assert Parity.between(100 * reference, 100 * other).logits == pytest.approx(parity.logits)
    assert 0 < parity.kl < 1e-3
    assert Parity.between(reference, reference) == Parity(0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_wider_types_allow_less_and_nan_is_never_within(dtype):
    assert Parity(0.0, 0.0).within(dtype)
    assert not Parity(9.0, 0.0).within(dtype)
    assert not Parity(0.0, 0.1).within(dtype)
    assert not Parity(math.nan, 0.0).within(dtype)
    assert not Parity(0.0, math.nan).within(dtype)
    assert {"8.5", str(dtype).removeprefix("torch.")} <= set(re.split(r"[ :]", Parity(8.5, 0.0).against(dtype)))
    assert Parity(0.01, 1e-4).within(torch.bfloat16)
    assert not Parity(0.01, 1e-4).within(torch.float32)


def test_the_check_texts_compare_real_tokens_alone(tiny_pair):
    logits = tiny_pair.check_logits(tiny_pair.hf)
    rows = [tiny_pair.tokenizer(text)["input_ids"] for text in CHECK_TEXTS]
    assert len({len(row) for row in rows}) == 2, "padding is part of what is compared"
    assert logits.shape == (sum(map(len, rows)), len(tiny_pair.tokenizer))
    with torch.no_grad():
        alone = torch.cat([tiny_pair.hf(torch.tensor([row])).logits[0] for row in rows]).double()
    assert (logits - alone).abs().max() < 1e-4


def test_padding_goes_to_the_right():
    tokens, mask = right_pad([[5, 6, 7], [8]], 2, "cpu")
    assert tokens.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_fingerprint_is_that_of_the_model_whatever_holds_it(pair_of, family, backend, tmp_path):
    mine = pair_of(family).fingerprint
    assert (mine.n_layers, mine.d_model, mine.n_heads, mine.n_kv_heads, mine.d_head) == (4, 32, 4, 2, 8)
    assert Fingerprint.of(pair_of(family, backend).lens) == mine
    for dtype in ("bfloat16", "float16", "float64"):
        mine.check(pair_of(family, backend, dtype).fingerprint, "it")
        mine.check(Fingerprint.of(pair_of(family, backend, dtype).lens), "it")
    assert Fingerprint.from_dict(mine.to_dict()) == mine


def test_an_adapter_does_not_change_who_a_model_is(tiny_pair, tmp_path):
    adapter = make_adapter(tiny_pair.hf, tmp_path / "adapter")
    with adapted(tiny_pair.hf, adapter) as tuned:
        assert Fingerprint.of(tuned) == tiny_pair.fingerprint
    assert Fingerprint.of(merged_copy(tiny_pair.hf, adapter)) == tiny_pair.fingerprint


def test_other_models_have_other_fingerprints(tiny_pair, tiny_qwen2_pair):
    with refused("the moments", "same shape"):
        tiny_pair.fingerprint.check(tiny_qwen2_pair.fingerprint, "the moments")
    assert tiny_pair.fingerprint != tiny_qwen2_pair.fingerprint
