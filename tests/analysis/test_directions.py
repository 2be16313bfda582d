"""What directions read and write: against the twin itself with a direction added, and plain definitions."""

from __future__ import annotations

import re
import shutil
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from spd_lens import Example, ModelPair, Site, SPDError, extract
from spd_lens.analysis.common.token_text import pieces_of
from spd_lens.analysis.directions.command import (
    MEASURES,
    main,
    measure_figure,
    random_directions,
    read_directions,
    say,
)
from spd_lens.analysis.directions.page import cards_page
from spd_lens.analysis.directions.readout import Unembedding, _gain, matches, written
from spd_lens.models.hooks import LensHook
from spd_lens.output.console import single_command
from spd_lens.runs.run_dir import Run
from spd_lens.subspaces.extract import token_gradients
from spd_lens.subspaces.moments import GradientMoments

LAST, HEADS, GROUP, WIDTH = 3, 2, 2, 8


def _sum(a: int, b: int) -> Example:
    work = f"{a} + {b} = "
    return Example(
        f"Tom has {a} apples and buys {b}.", f"{work}{a + b}", ((len(work), len(f"{work}{a + b}")),), f"e{a}"
    )


EXAMPLES = [_sum(12, 30), _sum(7, 5), _sum(40, 2), _sum(3, 9)]
Read = tuple[pd.DataFrame, pd.DataFrame, GradientMoments]


@pytest.fixture(scope="module")
def read(tiny_pair: ModelPair) -> Read:
    moments = extract(tiny_pair, EXAMPLES, layers=[1, LAST], progress=False)
    measures, tokens = read_directions(tiny_pair, EXAMPLES, moments, n=2, top=3, n_random=40, progress=False)
    return measures, tokens, moments


@pytest.mark.parametrize("head", range(HEADS))
def test_value_directions_change_the_logits_as_read(head, pair_of, family):
    """A direction is added to the last layer's values at every token, so that attention, which sums to 1, passes it on
    whole; the MLP is silenced and the final norm's scale held, which the read-out leaves out."""
    pair = pair_of(family, dtype="float64")
    hf, direction = pair.hf, random_directions(torch.zeros(HEADS, WIDTH, 1), 1, seed=3)
    residual = written(hf, LAST, direction)[head, :, 0]
    read_out = Unembedding.of(hf)(residual).sum(dim=0)  # all query heads of the group write

    layer, tokens = hf.model.layers[LAST], torch.tensor([pair.encode(EXAMPLES[0]).ids])
    stream = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out)),
        hf.model.norm.register_forward_pre_hook(lambda _m, args: stream.update(x=args[0])),
    ]
    try:
        hf(input_ids=tokens)
        before = stream["x"].clone()
        added = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
        added[head] = 0.01 * direction[head, :, 0]
        hooks.append(layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out: out + added.flatten()))
        hf(input_ids=tokens)
        after = stream["x"]
    finally:
        for hook in hooks:
            hook.remove()
    change = hf.lm_head((after - before) / 0.01 * hf.model.norm.weight)[0]
    change = change - change.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(change, read_out.expand_as(change), rtol=1e-6, atol=1e-6)


def test_each_query_head_reads_its_own_group():
    """With W_O the identity, KV head j's direction appears at the query heads j·g ... (j+1)·g - 1 and nowhere else."""
    from tests.conftest import build_llama, build_tokenizer

    hf = build_llama(build_tokenizer(chat=False))
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight.copy_(torch.eye(32))
    direction = random_directions(torch.zeros(HEADS, WIDTH, 1), 1, seed=0)
    out = written(hf, 1, direction)
    assert out.shape == (HEADS, GROUP, 1, 32)
    for head in range(HEADS):
        for member in range(GROUP):
            expected = torch.zeros(4, WIDTH)
            expected[head * GROUP + member] = direction[head, :, 0].float()
            torch.testing.assert_close(out[head, member, 0], expected.flatten())


def test_gain_is_measured_for_every_kind_of_norm():
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer_norm, rms = nn.LayerNorm(16).double(), nn.RMSNorm(16, eps=1e-8).double()

    class OnePlus(nn.Module):
        def forward(self, x):
            return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + weight)

    with torch.no_grad():
        layer_norm.weight.copy_(weight)
        layer_norm.bias.fill_(3.0)
        rms.weight.copy_(weight)
    for norm, expected, centres in ((layer_norm, weight, True), (rms, weight, False), (OnePlus(), 1 + weight, False)):
        gain, centred = _gain(norm, weight)
        torch.testing.assert_close(gain, expected, rtol=1e-4, atol=1e-5)
        assert centred == centres


def test_a_layer_norm_takes_the_mean_out():
    weight = torch.eye(4)
    logits = Unembedding(weight, torch.ones(4), centred=True)(torch.tensor([3.0, 1.0, 1.0, 1.0]))
    same = Unembedding(weight, torch.ones(4), centred=False)(torch.tensor([1.5, -0.5, -0.5, -0.5]))
    torch.testing.assert_close(logits, same)


@pytest.mark.parametrize("head", range(HEADS))
def test_key_directions_change_scores_by_the_query_match(head, tiny_pair):
    """Along the diagonal (relative position 0) RoPE cancels: a key moved by d changes the score by q·d / √d_head."""
    lens, layer = tiny_pair.lens, 2
    tokens = torch.tensor([tiny_pair.encode(EXAMPLES[1]).ids])
    direction = random_directions(torch.zeros(HEADS, WIDTH, 1), 1, seed=5)
    names = [f"blocks.{layer}.attn.hook_{name}" for name in ("q", "attn_scores")]

    def run():
        _, cache = lens.run_with_cache(tokens, names_filter=lambda name: name in names)
        return cache[names[0]][0], cache[names[1]][0].diagonal(dim1=1, dim2=2)

    queries, before = run()
    added = torch.zeros(HEADS, WIDTH)
    added[head] = direction[head, :, 0].float()
    hook = LensHook(lens, Site(layer, "k"), lambda k: k + added)
    try:
        _, after = run()
    finally:
        hook.remove()
    cosine = matches(tiny_pair.hf, layer, queries, direction)[..., 0]  # token head group
    lengths = queries.norm(dim=-1).reshape(-1, HEADS, GROUP)
    expected = torch.zeros(len(queries), HEADS, GROUP)
    expected[:, head] = (cosine * lengths)[:, head].float() / WIDTH**0.5
    torch.testing.assert_close((after - before).T.reshape(-1, HEADS, GROUP), expected, rtol=1e-3, atol=2e-4)


def test_energy_share_is_the_singular_value_squared(read):
    measures, _, moments = read
    part = measures[measures["measure"] == "energy share"]
    for row in part.itertuples():
        block = moments.blocks(Site.parse(row.site))[int(row.head)]
        assert row.value == pytest.approx(row.singular_value**2 / block.trace().item(), rel=1e-6)
        # random directions hold 1 / d_head in the mean; 40 of them scatter around that
        assert row.null_low < 1 / WIDTH < row.null_high
        assert row.null == pytest.approx(1 / WIDTH, rel=0.5)


def test_measures_against_plain_definitions(read, tiny_pair):
    measures, tokens, moments = read
    site, head = Site(LAST, "v"), 1
    d = moments.subspace(2).bases[site][head, :, 1]
    per_example = {}
    for rows in token_gradients(tiny_pair, EXAMPLES, layers=[LAST], kinds="v", progress=False):
        per_example[rows.index] = (rows.gradient[site].reshape(-1, HEADS, WIDTH)[:, head] @ d).numpy()
    every = np.concatenate(list(per_example.values()))
    energy = np.array([np.sum(p**2) for p in per_example.values()])
    mine = measures.query(f"site == '{site}' and head == '{head}' and direction == 2").set_index("measure")
    assert mine["value"]["one-sidedness"] == pytest.approx(abs(every.sum()) / np.abs(every).sum())
    assert mine["value"]["effective examples"] == pytest.approx(energy.sum() ** 2 / np.sum(energy**2))
    first = sum(p[0] ** 2 for p in per_example.values())
    assert mine["value"]["first-token share"] == pytest.approx(first / energy.sum())
    # the sign: moving along the direction as turned lowers the loss on average
    sign = mine["sign"].iloc[0]
    assert sign * every.sum() < 0
    pulls = tokens.query(f"site == '{site}' and head == '{head}' and direction == 2 and role == 'pull'")
    hardest = sorted(((np.abs(p[1:]).max(), i) for i, p in per_example.items()), reverse=True)[:3]
    assert pulls["value"].tolist() == pytest.approx([value for value, _ in hardest])
    for row in pulls.itertuples():
        asks = -sign * per_example[row.example][row.position]
        assert row.position > 0 and row.pole == ("+" if asks > 0 else "-")
        assert abs(asks) == pytest.approx(row.value)


@pytest.mark.parametrize("head", range(HEADS))
def test_keys_are_turned_to_their_queries_and_both_poles_are_read(head, read, tiny_pair):
    measures, tokens, moments = read
    site = Site(1, "k")
    passes = list(token_gradients(tiny_pair, EXAMPLES, layers=[1], kinds=("k", "q"), progress=False))
    for direction in (1, 2):
        d = moments.subspace(2).bases[site][head, :, direction - 1]
        cosines = []
        for rows in passes:
            q = rows.activation[Site(1, "q")].double().reshape(-1, 4, WIDTH)[:, head * GROUP : (head + 1) * GROUP]
            cosines.append((q @ d / q.norm(dim=-1)).numpy())
        where = f"site == '{site}' and head == '{head}' and direction == {direction}"
        mine = measures.query(where).set_index("measure")
        sign = mine["sign"].iloc[0]
        assert sign * sum(c.sum() for c in cosines) > 0
        every = np.concatenate([c.ravel() for c in cosines])
        assert mine["value"]["query energy"] == pytest.approx(np.mean(every**2) * WIDTH)
        for pole, turn in (("+", sign), ("-", -sign)):
            best = sorted(((turn * c[1:]).max() for c in cosines), reverse=True)[:3]
            rows = tokens.query(f"{where} and role == 'query' and pole == '{pole}'")
            assert rows["value"].tolist() == pytest.approx([b for b in best if b > 0], rel=1e-5)
            for row in rows.itertuples():
                at = cosines[[r.index for r in passes].index(row.example)][row.position]
                assert turn * at[row.query_head - head * GROUP] == pytest.approx(row.value, rel=1e-5)


def test_vocabulary_is_sorted_and_has_its_null(read, tiny_pair):
    measures, tokens, moments = read
    site, head, query = Site(LAST, "v"), 1, 3
    sign = measures.query(f"site == '{site}' and head == '{head}' and direction == 1")["sign"].iloc[0]
    residual = written(tiny_pair.hf, LAST, sign * moments.subspace(1).bases[site])[head, query - head * GROUP, 0]
    logits = tiny_pair.hf.lm_head(residual * tiny_pair.hf.model.norm.weight)
    z = (logits - logits.mean()) / logits.std(correction=0)
    where = (
        f"site == '{site}' and head == '{head}' and direction == 1 and role == 'vocabulary' and query_head == {query}"
    )
    for pole, order in (("+", z), ("-", -z)):
        rows = tokens.query(f"{where} and pole == '{pole}'").sort_values("place")
        best = order.topk(3)
        assert rows["value"].tolist() == pytest.approx(best.values.tolist(), rel=1e-3)
        spelled = [tiny_pair.tokenizer.decode([i]) for i in best.indices.tolist()]
        plain = [(s, t) for s, t in zip(spelled, rows["token"], strict=True) if "\ufffd" not in s]
        assert all(s == t for s, t in plain)
        assert rows["null"].between(0, 1).all()
    kurtosis = measures.query(
        f"site == '{site}' and head == '{head}' and direction == 1 and measure == 'vocabulary kurtosis'"
    )
    residuals = written(tiny_pair.hf, LAST, moments.subspace(1).bases[site])[head, :, 0]
    z = tiny_pair.hf.lm_head(residuals * tiny_pair.hf.model.norm.weight).double()
    z = (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True)
    assert kurtosis["value"].item() == pytest.approx((z.pow(4).mean(-1) - 3).mean().item(), rel=1e-3)


def test_p_values_count_random_directions(read):
    measures, _, _ = read
    assert measures["p"].between(1 / 41, 1).all()
    assert (measures.query("measure == 'energy share' and direction == 1")["p"] <= 0.1).all()
    assert set(measures["measure"]) == set(MEASURES)
    assert not measures.isna().any().any()


def test_the_same_seed_reads_the_same(read, tiny_pair):
    measures, tokens, moments = read
    again, tokens_again = read_directions(tiny_pair, EXAMPLES, moments, n=2, top=3, n_random=40, progress=False)
    pd.testing.assert_frame_equal(measures, again)
    pd.testing.assert_frame_equal(tokens, tokens_again)


def test_figures_and_sentences(read):
    measures, _, _ = read
    for measure in MEASURES:
        fig = measure_figure(measures, measure)
        points = [trace for trace in fig.data if "null" not in trace.name]
        shown = np.concatenate([trace.y for trace in points])
        assert sorted(shown) == pytest.approx(sorted(measures[measures["measure"] == measure]["value"]))
        assert np.isfinite(shown).all() and fig.layout.yaxis.title.text == measure
        assert any("null" in trace.name for trace in fig.data)
    with pytest.raises(SPDError, match="no measure 'beauty'"):
        measure_figure(measures, "beauty")
    assert "random" in say(measures) and "by chance" in say(measures)


def test_the_page_escapes_and_runs_nothing(read, tiny_pair):
    measures, tokens, _ = read
    tokens = tokens.copy()
    tokens.loc[tokens.index[tokens["role"] == "vocabulary"][0], "token"] = "<script>x</script>"
    pieces = pieces_of(EXAMPLES, tiny_pair.format)
    page = cards_page("run", measures, tokens, EXAMPLES, pieces, says="<b>", model="m")
    assert "<script" not in page and "&lt;script&gt;x" in page and "default-src 'none'" in page and "&lt;b&gt;" in page
    assert page.count("<article") == len(measures.groupby(["site", "head", "direction"]))
    # contexts are read around the token itself
    pulls = tokens[tokens["role"] == "pull"]
    marked = re.findall(r"<mark>(.*?)</mark>", page)
    assert len(marked) == len(tokens[tokens["role"] != "vocabulary"])
    assert set(marked) >= {escape(str(token)).replace("\n", "↵") for token in pulls["token"]}


def test_command(finished_run: Run, tmp_path: Path):
    path = Path(shutil.copytree(finished_run.path, tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        single_command(main)([str(path), "--quiet", "--n", "1", "--n-random", "19", "--layers", "0"])
    assert stop.value.code == 0
    measures = pd.read_csv(path / "analysis" / "directions.csv")
    assert set(measures["site"]) == {"0.k", "0.v"}  # not a layer of the run: extracted for this
    assert not measures.isna().any().any()
    assert "<mark>" in (path / "analysis" / "directions-cards.html").read_text()
    assert (path / "analysis" / "directions-tokens.csv").exists()


def test_what_cannot_be_read_is_refused(tiny_pair, tiny_qwen2_pair):
    moments = extract(tiny_pair, EXAMPLES, layers=[1], kinds="q", progress=False)
    with pytest.raises(SPDError, match="keys and values"):
        read_directions(tiny_pair, EXAMPLES, moments, progress=False)
    moments = extract(tiny_pair, EXAMPLES, layers=[1], progress=False)
    with pytest.raises(SPDError, match="another model"):
        read_directions(tiny_qwen2_pair, EXAMPLES, moments, progress=False)
