"""Short passes in bfloat16 and steps of one query on a CPU: attentions put back afterwards, as near to the truth."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spd_lens.models import attention
from spd_lens.models.attention import fastest_attention, one_query_at_a_time, one_query_attention
from spd_lens.models.load import load
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


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_over_a_cache_is_attention_written_down_in_float64(monkeypatch, group, dtype, apart, scaling):
    monkeypatch.setattr(attention, "_LARGE", 0)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)  # not what is tested
    rows, kv_heads, columns, d_head, d_value = 3, 2, 7, 8, 5
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(getattr(torch, dtype))

    query, cache = normal(rows, kv_heads * group, 1, d_head), normal(rows + 1, kv_heads, columns + 4, d_head)
    key, value = cache[:rows, :, :columns], normal(rows, kv_heads, columns, d_value)  # as slots hand them on
    lengths = torch.tensor([7, 1, 4])
    readable = torch.arange(columns) < lengths[:, None]
    mask = torch.zeros(rows, 1, 1, columns).masked_fill(~readable[:, None, None], torch.finfo(torch.float32).min)
    found, weights = one_query_attention(
        None, query, key, value, mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min), scaling
    )
    assert weights is None
    assert found.shape == (rows, 1, kv_heads * group, d_value)
    for row, length in enumerate(lengths):
        for head in range(kv_heads * group):
            keys, values = (x[row, head // group, :length].double() for x in (key, value))
            scores = keys @ query[row, head, 0].double() * (d_head**-0.5 if scaling is None else scaling)
            expected = scores.softmax(0) @ values
            assert (found[row, 0, head].double() - expected).norm() <= apart * values.norm()


def test_what_products_are_not_faster_for_is_left_to_sdpa(monkeypatch):
    def made(n_queries, dtype=torch.float32, group=2):
        query, key = torch.randn(2, 3 * group, n_queries, 4).to(dtype), torch.randn(2, 3, 5, 4).to(dtype)
        return None, query, key, torch.randn_like(key), torch.zeros(2, 1, n_queries, 5, dtype=dtype)

    asked = []

    def sdpa(*args, **kwargs):
        asked.append(args[1].shape)
        return sdpa_attention_forward(*args, **kwargs)

    class Grouped:
        num_key_value_groups = 2

    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa)
    one = made(1)
    small, _ = one_query_attention(Grouped, *one[1:])
    assert len(asked) == 1
    monkeypatch.setattr(attention, "_LARGE", 0)
    large, _ = one_query_attention(Grouped, *one[1:])
    assert len(asked) == 1
    torch.testing.assert_close(small, large)
    others = [made(3), made(1, torch.float16), (*made(1)[:4], None), (*made(1)[:4], torch.ones(2, 1, 1, 5) > 0)]
    others.append((None, *(x[:1] for x in made(1, torch.bfloat16)[1:])))  # one row
    for n, arguments in enumerate([*others, made(1, group=5)]):
        Grouped.num_key_value_groups = arguments[1].shape[1] // 3
        one_query_attention(Grouped, *arguments[1:])
        assert len(asked) == n + 2
    monkeypatch.setattr(
        attention, "_LARGE", 10**9
    )  # in bfloat16 the size does not count: a row's tokens would depend on it
    Grouped.num_key_value_groups = 2
    one_query_attention(Grouped, *made(1, torch.bfloat16)[1:])
    assert len(asked) == len(others) + 2


@pytest.mark.parametrize("name", sorted(ZOO))
def test_attention_of_steps_is_put_back(name, caplog):
    model = build_twin(name)
    own = model.config._attn_implementation
    with pytest.raises(KeyError), one_query_at_a_time(model) as taken:
        assert taken == (own == "sdpa" and model._can_set_attn_implementation())
        assert (model.config._attn_implementation == own) != taken
        raise KeyError
    assert model.config._attn_implementation == own
    assert not caplog.records
