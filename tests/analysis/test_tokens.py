"""Where the gradient sits: energies against moments and plain float64, categories on texts with known parts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from spd_lens import Example, ModelPair, Site, SPDError, extract
from spd_lens.analysis.common.token_text import pieces_of, tokens_of
from spd_lens.analysis.tokens.categories import CATEGORIES, categories
from spd_lens.analysis.tokens.command import category_shares, main, say, share_figure, token_energy
from spd_lens.analysis.tokens.page import text_page
from spd_lens.output.console import single_command
from spd_lens.runs.run_dir import Run
from spd_lens.subspaces.extract import token_gradients

ASK = " Answer with a number."
EXAMPLES = [
    Example(f"Tom has {a} apples and buys {b}. How many?{ASK}", f"{a} + {b} = {a + b}. #### {a + b} ok", (), id=f"e{a}")
    for a, b in ((12, 30), (7, 5), (40, 2))
]
EXAMPLES = [
    Example(e.prompt, e.completion, ((at := e.completion.index("#### ") + 5, len(e.completion) - 3),), e.id)
    for e in EXAMPLES
]


@pytest.fixture(scope="module", params=[True, False], ids=["per head", "joint"])
def energy(request: pytest.FixtureRequest, tiny_pair: ModelPair) -> tuple[pd.DataFrame, object]:
    moments = extract(tiny_pair, EXAMPLES, layers=[1, 3], progress=False)
    subspace = moments.subspace(3, per_head=request.param)
    return token_energy(tiny_pair, EXAMPLES, subspace, progress=False), (moments, subspace)


def test_energies_add_up_to_the_trace_of_the_moments(energy):
    frame, (moments, subspace) = energy
    for site in moments.sites:
        part = frame[frame["site"] == str(site)]
        assert part["energy"].sum() == pytest.approx(moments.blocks(site, False)[0].trace().item(), rel=1e-9)
        # tr(P C): what the subspace holds of it, from the moments alone
        held = (subspace.projector(site) * moments.blocks(site, subspace.per_head)).sum().item()
        assert part["inside"].sum() == pytest.approx(held, rel=1e-9)


def test_each_token_against_its_projected_row(energy, tiny_pair):
    frame, (_, subspace) = energy
    site = Site(3, "v")
    rows = next(r for r in token_gradients(tiny_pair, EXAMPLES, layers=[3], kinds="v", progress=False) if r.index == 1)
    part = frame[(frame["site"] == "3.v") & (frame["example"] == 1)]
    g = rows.gradient[site].reshape(len(part), 2, 8)
    np.testing.assert_allclose(part["energy"], g.square().sum(dim=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(part["inside"], subspace(g, site).square().sum(dim=(1, 2)), rtol=1e-9, atol=1e-15)


def test_tokens_at_and_after_the_last_answer_cannot_matter(energy, tiny_pair):
    frame, _ = energy
    assert (frame.loc[~frame["reachable"], "energy"] == 0).all()
    assert (frame.loc[frame["category"] == "after", "energy"] == 0).all()
    assert set(frame.loc[frame["category"] == "after", "id"]) == {e.id for e in EXAMPLES}  # " ok"
    # the position that predicts the first scored token is the cue, and matters
    cue = frame[frame["category"] == "cue"]
    assert (cue["energy"] > 0).all() and cue.groupby("example")["position"].nunique().eq(1).all()
    for index, example in enumerate(EXAMPLES):
        scored = tiny_pair.encode(example).scored
        assert set(cue.loc[cue["example"] == index, "position"]) == {scored[0] - 1}
        part = frame[frame["example"] == index]
        assert part.loc[part["reachable"], "position"].max() == scored[-1] - 1
        assert (part.loc[part["position"] == scored[-1] - 1, "energy"] > 0).all()


@pytest.mark.parametrize("chat", [False, True])
def test_categories_are_the_parts_of_the_text(chat, tiny_pair, tiny_qwen2_pair):
    pair = tiny_qwen2_pair if chat else tiny_pair
    for (tokens, names), example in zip(categories(EXAMPLES, pair.format), EXAMPLES, strict=True):
        text = {name: "".join(t.text for t, n in zip(tokens, names, strict=True) if n == name) for name in CATEGORIES}
        a, b = re.findall(r"\d+", example.prompt)
        assert re.sub(r"\D", "", text["operands"]) == a + b
        assert "apples" in text["question"] and not re.search(r"\d", text["question"])
        assert text["instruction"].strip().endswith("number.") and "apples" not in text["instruction"]
        assert text["answer"].strip() == str(int(a) + int(b))
        assert re.sub(r"\D", "", text["worked numbers"]) == f"{a}{b}{int(a) + int(b)}"
        assert not re.search(r"\d", text["worked text"])
        assert text["after"].strip() == "ok"
        assert names[0] == "first token" and names.count("first token") == 1
        assert ("assistant" in text["template"]) == chat


def test_instructions_need_different_prompts_and_end_at_words(tiny_pair):
    same = [EXAMPLES[0], EXAMPLES[0]]
    assert "instruction" not in {name for _, names in categories(same, tiny_pair.format) for name in names}
    close = [Example(f"Count {word}s", "1", ((0, 1),), word) for word in ("apple", "appendix")]
    tokens, names = categories(close, tiny_pair.format)[0]
    shared = "".join(t.text for t, n in zip(tokens, names, strict=True) if n in ("instruction", "first token"))
    assert "app" not in shared


def _frame(energies: list[list[float]], names: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"example": e, "id": str(e), "position": p, "category": names[p], "scored": False, "reachable": p < 4,
             "site": "1.k", "layer": 1, "kind": "k", "head": "all", "energy": value, "inside": value / 4}
            for e, row in enumerate(energies) for p, value in enumerate(row)
        ]
    )  # fmt: skip


NAMES = ["first token", "question", "question", "cue", "answer"]


def test_shares_of_a_constructed_case():
    # example 0: 6 of 10 on the first token; example 1, a hundred times louder, counts the same
    frame = _frame([[6, 1, 1, 2, 0], [800, 0, 100, 100, 0]], NAMES)
    shares = category_shares(frame).query("site == 'all'").pivot(index="category", columns="measure", values="value")
    assert shares["energy"].to_dict() == pytest.approx({"first token": 0.7, "question": 0.15, "cue": 0.15})
    assert shares["tokens"].to_dict() == pytest.approx({"first token": 0.25, "question": 0.5, "cue": 0.25})
    assert shares["excess"].to_dict() == pytest.approx({"first token": 0.45, "question": -0.35, "cue": -0.1})
    assert shares["inside"].to_numpy() == pytest.approx(0.25)
    rest = category_shares(frame, skip_first=True).query("site == 'all' and measure == 'energy'")
    assert dict(zip(rest["category"], rest["value"], strict=True)) == pytest.approx({"question": 0.5, "cue": 0.5})


def test_shuffled_answers_are_paired_by_example():
    frame, null = _frame([[6, 1, 1, 2, 0], [2, 2, 2, 4, 0]], NAMES), _frame([[5, 1, 2, 2, 0], [1, 3, 2, 4, 0]], NAMES)
    rows = category_shares(frame, null).query("site == '1.k'").set_index(["category", "measure"])
    specific = rows.loc[("first token", "specific")]
    assert specific["value"] == pytest.approx(0.1) and specific["low"] == pytest.approx(specific["high"])  # 0.1 in both
    assert rows.loc[("question", "shuffled"), "value"] == pytest.approx(0.4)


def test_what_is_said_follows_the_numbers():
    rng = np.random.default_rng(0)
    energies = [[60, 1 + rng.random(), 1, 30, 0] for _ in range(12)]
    frame = _frame(energies, NAMES)
    shares = pd.concat([category_shares(frame, frame, skip_first=s) for s in (False, True)])
    said = say(frame, shares)
    assert "first token alone holds 64%" in said or "first token alone holds 65%" in said
    assert "More of the energy than of the tokens (in brackets): cue" in said and "Less of the energy" in said
    assert "the same within noise" in said  # the null is the data itself
    assert "exactly zero" in said
    frame.loc[frame["position"] == 4, "energy"] = 1.0
    assert "NOT all of them are zero" in say(frame, shares)


def test_figure_has_data_titles_and_nulls():
    frame = _frame([[6, 1, 1, 2, 0], [2, 2, 2, 4, 0]], NAMES)
    fig = share_figure(category_shares(frame, frame))
    assert [trace.name for trace in fig.data] == [
        "tokens (null)",
        "gradient energy, shuffled answers (null)",
        "gradient energy",
    ]
    bars = dict(zip(fig.data[2].y, fig.data[2].x, strict=True))
    assert bars == pytest.approx({"first token": 0.4, "question": 0.3, "cue": 0.3})
    assert "share" in fig.layout.xaxis.title.text
    assert all(np.isfinite(trace.x).all() and np.isfinite(trace.error_x.array).all() for trace in fig.data)


def test_the_page_shows_text_and_runs_nothing(tiny_pair):
    nasty = Example("<script>alert(1)</script> \u202e what is 2 & 3?", 'a <b> "5"', ((7, 8),), id="<i>nasty</i>")
    examples = [nasty, EXAMPLES[0]]
    moments = extract(tiny_pair, examples, layers=[3], progress=False)
    frame = token_energy(tiny_pair, examples, moments.subspace(2), progress=False)
    shares = pd.concat([category_shares(frame, skip_first=s) for s in (False, True)])
    read = [tokens_of(pieces) for pieces in pieces_of(examples, tiny_pair.format)]
    page = text_page("run", read, examples, frame, shares, says="<u>", model="m")
    assert "default-src 'none'" in page and "<script" not in page and "<i>nasty" not in page and "\u202e" not in page
    assert "&lt;u&gt;" in page
    text = re.sub(r"<[^>]+>", "", page.partition('<article class="card">')[2])
    assert "&lt;script&gt;alert(1)" in text and "2 &amp; 3?" in text
    # the token with the largest norm behind the first is as dark as it gets
    part = frame[(frame["example"] == 1) & (frame["position"] > 0)].groupby("position")["energy"].sum()
    spans = re.findall(r"<span([^>]*title=[^>]*)>", page.split('<article class="card">')[2])
    assert "--n0:1.00" in spans[part.idxmax()]


def test_command(finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = Path(shutil.copytree(finished_run.path, tmp_path / "a run"))
    with pytest.raises(SystemExit) as stop:
        single_command(main)([str(path), "--quiet"])
    assert stop.value.code == 0
    shares = pd.read_csv(path / "analysis" / "tokens.csv")
    assert {"energy", "tokens", "excess", "shuffled", "specific", "inside"} == set(shares["measure"])
    assert not shares.drop(columns=["layer", "kind"]).isna().any().any()
    sums = shares.query("site == 'all' and measure in ['energy', 'tokens']").groupby(["of", "measure"])["value"].sum()
    assert sums.to_numpy() == pytest.approx(1.0)
    by_token = pd.read_csv(path / "analysis" / "tokens-by-token.csv")
    trace = Run.open(path).moments.blocks(Site(1, "k"), False)[0].trace().item()
    assert by_token.query("site == '1.k'")["energy"].sum() == pytest.approx(trace, rel=1e-6)
    assert (path / "analysis" / "tokens.html").exists() and (path / "analysis" / "tokens-text.html").exists()
    assert "exactly zero" in " ".join(capsys.readouterr().out.split())


def test_an_example_without_a_span_is_refused(tiny_pair):
    with pytest.raises(SPDError, match="'e' cannot be read"):
        pieces_of([Example("q", "a", id="e")], tiny_pair.format)
    with pytest.raises(SPDError, match="no tokens"):
        category_shares(pd.DataFrame())


def test_without_gradients_shares_are_zero_and_not_missing():
    shares = category_shares(_frame([[0, 0, 0, 0, 0]], NAMES)).query("measure == 'energy'")
    assert (shares["value"] == 0).all()
    assert torch.tensor(shares["value"].to_numpy()).isfinite().all()
