"""Heads: energies against traces, one-head projections against hooks written by hand, attention against the twin."""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from spd_lens import Example, ModelPair, Site, SPDError, extract
from spd_lens.analysis.heads.ablation import head_effects, only_head
from spd_lens.analysis.heads.attention import attention_of, attention_patterns
from spd_lens.analysis.heads.command import effect_map, energy_map, head_energy, main, say
from spd_lens.analysis.heads.page import heads_page
from spd_lens.models.hooks import LensHook
from spd_lens.output.console import single_command
from spd_lens.runs.run_dir import Run
from spd_lens.subspaces.extract import token_gradients
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.projection import folded

HEADS, WIDTH = 2, 8
EXAMPLES = [
    Example(f"Tom has {a} apples and buys {b}.", f"{a} + {b} = {a + b}", ((0, len(f"{a}")),), f"e{a}")
    for a, b in ((12, 30), (7, 5), (40, 2), (3, 9))
]


@pytest.fixture(scope="module")
def moments(tiny_pair: ModelPair) -> GradientMoments:
    return extract(tiny_pair, EXAMPLES, layers="all", shards=4, progress=False)


def test_energy_is_the_share_of_the_trace(moments):
    frame = head_energy(moments)
    for kind, part in frame.groupby("kind"):
        total = sum(moments.blocks(s, False)[0].trace().item() for s in moments.sites if s.kind == kind)
        assert part["value"].sum() == pytest.approx(1)
        for row in part.itertuples():
            block = moments.blocks(Site.parse(row.site))[int(row.head)]
            assert row.value == pytest.approx(block.trace().item() / total, rel=1e-9)
            assert row.low <= row.value <= row.high and row.uniform == 1 / 8


def test_energy_against_another_extraction(moments):
    loud = copy.deepcopy(moments)
    loud.gradient[Site(2, "v")] *= 3  # one site three times louder under wrong answers
    frame = head_energy(moments, loud).set_index(["site", "head"])
    plain = head_energy(moments).set_index(["site", "head"])
    values = plain.query("kind == 'v'")["value"]
    expected = values * np.where(values.index.get_level_values("site") == "2.v", 3, 1)
    null = frame.query("kind == 'v'")["null"]
    np.testing.assert_allclose(null, expected / expected.sum(), rtol=1e-9)
    np.testing.assert_allclose(frame["ratio"], frame["value"] / frame["null"])
    np.testing.assert_allclose(frame.query("kind == 'k'")["ratio"], 1.0)


def test_only_one_head_is_projected(moments):
    subspace = moments.subspace(3)
    site = Site(1, "v")
    alone = only_head(subspace, site, 1)
    assert alone.sites == [site] and alone.ranks[site] == (WIDTH, 3)
    projector = alone.projector(site)
    assert torch.equal(projector[0], torch.eye(WIDTH, dtype=torch.float64))  # the identity, exactly
    torch.testing.assert_close(projector[1], subspace.projector(site)[1])
    x = torch.randn(2, 5, HEADS, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone(x, site)[..., 0, :], x[..., 0, :])
    torch.testing.assert_close(alone(x, site)[..., 1, :], subspace(x, site)[..., 1, :])


def test_a_centred_head_keeps_its_mean_and_others_nothing(moments):
    subspace = moments.subspace(3, center=True)
    site = Site(1, "k")
    x = torch.randn(7, HEADS, WIDTH, generator=torch.Generator().manual_seed(0))
    out = only_head(subspace, site, 0)(x, site)
    assert torch.equal(out[:, 1], x[:, 1])
    torch.testing.assert_close(out[:, 0], subspace(x, site)[:, 0])


def test_folding_one_head_leaves_the_rows_of_the_others(moments, tiny_pair):
    weight = tiny_pair.hf.model.layers[1].self_attn.v_proj.weight
    before = weight.clone()
    with folded(tiny_pair.hf, only_head(moments.subspace(3), Site(1, "v"), 1)):
        assert torch.equal(weight[:WIDTH], before[:WIDTH])
        assert not torch.allclose(weight[WIDTH:], before[WIDTH:])
    assert torch.equal(weight, before)


def test_effects_against_hooks_written_by_hand(moments, tiny_pair):
    sites = [Site(1, "k"), Site(3, "v")]
    subspace = moments.subspace(2, sites=sites)
    frame = head_effects(tiny_pair, EXAMPLES, subspace, n_random=2, seed=5, progress=False)
    controls = [subspace.random_like(5), subspace.random_like(6)]
    lens = tiny_pair.lens

    def measured(example: Example, site: Site | None = None, head: int = 0, basis: torch.Tensor | None = None):
        encoded = tiny_pair.encode(example)

        def project(x: torch.Tensor) -> torch.Tensor:
            out = x.clone()
            out[:, :, head] = x[:, :, head] @ (basis @ basis.T).float()
            return out

        hook = LensHook(lens, site, project) if site else None
        log_p = lens(torch.tensor([encoded.ids]), return_type="logits")[0].double().log_softmax(dim=-1).detach()
        if hook:
            hook.remove()
        loss = -np.mean([log_p[t - 1, encoded.ids[t]].item() for t in encoded.scored])
        return loss, log_p[encoded.completion_start - 1 : len(encoded.ids) - 1]

    base = [measured(e) for e in EXAMPLES]
    for site in sites:
        for head in range(HEADS):
            for name, sources in (("subspace", [subspace]), ("random", controls)):
                runs = [[measured(e, site, head, s.bases[site][head]) for e in EXAMPLES] for s in sources]
                loss = np.mean([[r[0] - b[0] for r, b in zip(run, base, strict=True)] for run in runs])
                pairs = [(r[1], b[1]) for run in runs for r, b in zip(run, base, strict=True)]
                kl = np.mean([(b.exp() * (b - r)).sum(dim=-1).mean().item() for r, b in pairs])
                rows = frame.query(f"site == '{site}' and head == '{head}' and policy == '{name}'").set_index("measure")
                assert rows["value"]["aligned_loss"] == pytest.approx(loss, abs=2e-4)
                assert rows["value"]["kl"] == pytest.approx(kl, abs=2e-4)
            cell = frame.query(f"site == '{site}' and head == '{head}' and measure == 'kl'").set_index("policy")
            assert cell["value"]["difference"] == pytest.approx(cell["value"]["subspace"] - cell["value"]["random"])
    assert set(frame["n"]) == {len(EXAMPLES)} and set(frame["rank"]) == {2}


def test_full_rank_does_nothing(moments, tiny_pair):
    frame = head_effects(tiny_pair, EXAMPLES, moments.subspace(WIDTH, sites=[Site(2, "k")]), progress=False)
    assert frame["value"].abs().max() < 1e-4


def test_attention_is_the_twins(tiny_pair):
    ids = tiny_pair.encode(EXAMPLES[0]).ids
    pattern = attention_patterns(tiny_pair, ids, range(4))
    twin = copy.deepcopy(tiny_pair.hf)
    twin.set_attn_implementation("eager")
    expected = twin(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    torch.testing.assert_close(pattern, torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_the_page_holds_the_patterns_and_gradients(moments, tiny_pair):
    nasty = Example("</script> <b> @MAPS@", "5", ((0, 1),), id="</script><script>alert(1)</script>")
    shown = attention_of(tiny_pair, [*EXAMPLES, nasty], nasty.id)
    page = heads_page("heads of <i>", [energy_map(head_energy(moments))], shown, says="<u>")
    assert page.count("alert(1)") == 1 and "alert(1)<" not in page and "<i></h1>" not in page and "&lt;u&gt;" in page
    record = json.loads(re.search(r'id="data-example">(.*?)</script>', page, re.DOTALL).group(1))
    assert "".join(record["tokens"]).endswith("@MAPS@\n5")
    encoded = tiny_pair.encode(nasty)
    n = len(encoded.ids)
    assert record["rows"][-1] == max(encoded.scored) - 1
    pattern = attention_patterns(tiny_pair, encoded.ids, range(4))
    for layer in range(4):
        for head in range(4):
            found = np.frombuffer(base64.b64decode(record["pattern"][layer][head]), np.uint8).reshape(-1, n)
            np.testing.assert_allclose(found / 255, pattern[layer, head, record["rows"]], atol=1 / 500)
    g = next(iter(token_gradients(tiny_pair, [nasty], layers=[2], kinds="v", progress=False))).gradient[Site(2, "v")]
    norms = g.reshape(n, HEADS, WIDTH).norm(dim=-1)[:, 1]
    found = np.frombuffer(base64.b64decode(record["gradient"]["2.v"][1]), np.uint8)
    np.testing.assert_allclose(found / 255, norms / norms.max(), atol=1 / 500)


def test_the_shortest_example_is_shown_and_unknown_ones_refused(tiny_pair):
    shown = attention_of(tiny_pair, EXAMPLES)
    assert len(shown.tokens) == min(len(tiny_pair.encode(e).ids) for e in EXAMPLES)
    assert shown.group == 2
    with pytest.raises(SPDError, match="no calibration example is called 'nobody'"):
        attention_of(tiny_pair, EXAMPLES, "nobody")


def _effects(values: dict[tuple[int, str], float], width: float) -> pd.DataFrame:
    rows = []
    for (layer, kind), value in values.items():
        for head in ("0", "1"):
            for policy in ("subspace", "random", "difference"):
                for measure in ("aligned_loss", "kl"):
                    rows.append(
                        {"site": f"{layer}.{kind}", "layer": layer, "kind": kind, "head": head, "rank": 2,
                         "measure": measure, "policy": policy, "value": value + 10 * int(head), "n": 8,
                         "low": value + 10 * int(head) - width, "high": value + 10 * int(head) + width}
                    )  # fmt: skip
    return pd.DataFrame(rows)


def test_maps_put_heads_and_layers_where_they_belong(moments):
    effects = _effects({(1, "k"): 1.0, (3, "k"): -3.0, (1, "v"): 5.0, (3, "v"): 7.0}, width=2)
    fig = effect_map(effects, "kl")
    keys, values = fig.data
    assert (keys.meta, values.meta) == ("k", "v")
    assert list(keys.x) == ["1", "3"] and list(keys.y) == ["0", "1"]
    np.testing.assert_allclose(np.array(keys.z, float), [[1, -3], [11, 7]])
    np.testing.assert_allclose(np.array(values.z, float), [[5, 7], [15, 17]])
    assert [list(row) for row in keys.text] == [["", "•"], ["•", "•"]]  # 1 ± 2 holds 0
    assert "7 of 8 heads" in fig.layout.title.text and "by chance" in fig.layout.title.text
    energy = energy_map(head_energy(moments))
    assert all(np.isfinite(np.array(trace.z, float)).all() for trace in energy.data)
    assert "layer" in {axis.title.text for axis in energy.select_xaxes()}
    with pytest.raises(SPDError, match="unknown measure"):
        effect_map(effects, "beauty")


def test_sentences_count_what_is_sure(moments):
    effects = _effects({(1, "k"): 1.0, (3, "k"): -3.0}, width=2)
    said = say(head_energy(moments), effects)
    assert "of 4 heads projected alone, 1 leave it lower and 2 higher" in said
    assert "by chance" in said and "uniform 12.5%" in said


def test_refusals(moments):
    with pytest.raises(SPDError, match="joint"):
        only_head(moments.subspace(2, per_head=False), Site(1, "k"), 0)
    with pytest.raises(SPDError, match="no head 2"):
        only_head(moments.subspace(2), Site(1, "k"), 2)


def test_command(finished_run: Run, tmp_path: Path):
    path = Path(shutil.copytree(finished_run.path, tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        single_command(main)([str(path), "--quiet", "--layers", "1,2", "--n", "3", "--rank", "2"])
    assert stop.value.code == 0
    effects = pd.read_csv(path / "analysis" / "heads-effects.csv")
    assert set(effects["layer"]) == {1, 2} and set(effects["rank"]) == {2} and len(effects) == 2 * 2 * 2 * 3 * 3
    energy = pd.read_csv(path / "analysis" / "heads.csv")
    assert set(energy["layer"]) == {0, 1, 2, 3} and not energy.isna().any().any()
    page = (path / "analysis" / "heads.html").read_text()
    maps = json.loads(re.search(r'id="data-maps">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(maps) == 10
