"""Short passes in bfloat16 on a CPU: plain attention, put back afterwards, no further from the truth."""

from __future__ import annotations

import pytest
import torch

from spd_lens.models import load
from spd_lens.models.attention import fastest_attention
from tests.models.zoo import ZOO, build_twin


@pytest.mark.parametrize("name", sorted(ZOO))
def test_no_architecture_is_asked_for_what_it_cannot_do(name, caplog):
    model = build_twin(name).bfloat16()
    own, seen = model.config._attn_implementation, []
    with fastest_attention(model, 10):
        seen.append(model.config._attn_implementation)
    assert seen == ["eager" if model._can_set_attn_implementation() else own]
    assert model.config._attn_implementation == own
    assert not caplog.records


def test_attention_of_short_bfloat16_passes_is_plain_and_put_back(tiny_llama_dir, tiny_pair):
    model = load(str(tiny_llama_dir), dtype="bfloat16", device="cpu").hf
    kinds = []
    for length in (512, 513):
        with fastest_attention(model, length):
            kinds.append(model.config._attn_implementation)
    assert kinds == ["eager", "sdpa"]
    assert model.config._attn_implementation == "sdpa"
    with fastest_attention(tiny_pair.hf, 10):
        assert tiny_pair.hf.config._attn_implementation == "sdpa"
    tokens = torch.randint(5, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, own = tiny_pair.hf(tokens).logits, model(tokens).logits
        with fastest_attention(model, 40):
            plain = model(tokens).logits
    assert (plain - exact).norm() <= 1.1 * (own - exact).norm()
