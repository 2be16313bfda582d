"""The paper's numbers against its text; tables and figure 4 from constructed studies; the page of a study's report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from spd_lens.analysis.common.printed import ABLATED, CODE_MATH_QA, FIGURE_4, QA_MATH_CODE, TABLES
from spd_lens.analysis.paper import study_page as study_report
from spd_lens.analysis.paper.figure_4 import figure_4, points, points_sentence
from spd_lens.analysis.paper.tables import NOT_RUN, fill, main, model_of, to_markdown
from spd_lens.errors import SPDError
from spd_lens.evaluation import published
from spd_lens.study.reporting.differences import differences, means
from spd_lens.study.reporting.evidence import Evidence
from spd_lens.study.reporting.setup import BACKBONES
from tests.studies import planted, write_study

PAPER = Path(__file__).parents[3] / "shared" / "paper" / "paper.txt"
QWEN = {"settings": {"model": "Qwen/Qwen2.5-0.5B-Instruct"}}


def _paper_study(
    folder: Path, *, n_items: int = 12, phases: tuple[str, ...] = ("trained",), **plan: object
) -> Evidence:
    results = planted(
        {("spd", "accuracy"): 0.5}, methods=("base", "psr", "ssd", "spd", "spd-full-loss"), seeds=(1, 2),
        sources=("gsm8k", "mmlu"), targets=("gsm8k", "svamp", "codealpaca"), n_items=n_items, phases=phases,
        measures=("accuracy", "completion loss"),
    )  # fmt: skip
    return Evidence.read(write_study(folder, results, **{**QWEN, **plan}))


# the paper's numbers


@pytest.mark.skipif(not PAPER.exists(), reason="needs the paper's text in ../shared/paper")
@pytest.mark.parametrize("number", sorted(TABLES))
def test_numbers_are_as_printed(number: int) -> None:
    text = PAPER.read_text(encoding="utf-8")
    block = text[text.index(f"Table {number}: ") :]
    printed = []
    backbone = ABLATED
    for line in block.splitlines()[1:]:
        values = re.findall(r"\\cellcolorsoft[a-z]+?\s?(\d+\.\d+)%?", line)
        if len(values) == 6:
            label = line.partition("\\")[0].strip()
            for name in BACKBONES:
                if label.startswith(name):
                    backbone, label = name, label.removeprefix(name).strip()
            printed.append((backbone, label, tuple(map(float, values))))
        elif printed:
            break
    ours = [(row.backbone, row.label.replace("w/ ", "w/"), row.values) for row in TABLES[number].rows]
    assert ours == [(backbone, label.replace("w/ ", "w/"), values) for backbone, label, values in printed]
    assert TABLES[number].title in block.splitlines()[0]
    header = next(line for line in block.splitlines() if "MBPP" in line)
    assert [name.lower() for name in re.findall(r"(\w+) \\(?:up|down)arrow", header)] == list(TABLES[number].columns)


def test_numbers_agree_with_each_other() -> None:
    """Tables 2-5 repeat rows of table 1."""
    first = {row.method: row.values for row in TABLES[1].rows if row.backbone == ABLATED}
    assert all(len(table.rows) == (20 if number == 1 else 3) for number, table in TABLES.items())
    for number in (3, 4, 5):
        for row in TABLES[number].rows:
            if row.phase == "trained" and row.method in first:
                assert row.values == first[row.method]
    base = dict(zip(QA_MATH_CODE, TABLES[2].rows[0].values, strict=True))
    assert tuple(base[name] for name in CODE_MATH_QA) == first["base"]
    spd = dict(zip(CODE_MATH_QA, first["spd"], strict=True))
    outside = [name for name, (low, high) in FIGURE_4.items() if not low <= spd[name] <= high]
    assert outside == ["bbh"]  # as the comment in paper_numbers says


def test_the_base_rows_are_those_that_a_measured_base_is_compared_with() -> None:
    for row in TABLES[1].rows:
        if row.method == "base":
            ours = [published(row.backbone, task)[0] for task in CODE_MATH_QA]
            assert tuple(number.value for number in ours) == row.values
            assert all("2605.22675, table 1" in number.source for number in ours)


# tables


def test_what_is_published_of_the_base_stands_under_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _paper_study(tmp_path / "study", n_items=40).name
    results = pd.read_csv(tmp_path / folder / "results.csv", dtype={"seed": str})
    base = (results.method == "base") & (results.measure == "accuracy")
    results.loc[base, "value"] = (np.arange(base.sum()) % 40 < 4).astype(float)
    results.to_csv(tmp_path / folder / "results.csv", index=False)
    monkeypatch.setenv("COLUMNS", "400")
    main("1", [tmp_path / folder], quiet=True)
    text = (tmp_path / folder / "tables" / "table1.md").read_text(encoding="utf-8")
    under = text.partition(f"## What is published of the base model of `{folder}`")[2]
    assert "| 49.6 | shots and prompt not stated |" in under and "| 0.683 |" in under
    assert "**The base scores 10.0 [" in under
    assert "gsm8k: The base scores 10.0 [" in capsys.readouterr().out


def test_table_1_has_the_papers_rows_and_ours_beside_them(tmp_path: Path) -> None:
    study = _paper_study(tmp_path / "study")
    cells = fill(1, [study])
    assert list(cells[["backbone", "method"]].drop_duplicates().itertuples(index=False, name=None)) == [
        (backbone, method) for backbone in BACKBONES for method in ("Base model", "PSR", "SSD", "SPD")
    ]
    found = cells[cells.ours.notna()]
    # no study on code: neither MBPP nor CodeAlpaca but for the base, which has no source; MMLU was not evaluated
    assert set(found.backbone) == {ABLATED}
    by_cell = {(r.method, r.dataset): r for r in found.itertuples()}
    assert {key for key in by_cell if key[0] == "SPD"} == {("SPD", "GSM8K"), ("SPD", "SVAMP")}
    assert ("Base model", "CodeAlpaca") in by_cell
    results = study.results
    own = results[(results.method == "spd") & (results.source == "gsm8k") & (results.target == "svamp")]
    cell = by_cell["SPD", "SVAMP"]
    assert cell.ours == pytest.approx(100 * own[own.measure == "accuracy"].value.mean())
    assert cell.low < cell.ours < cell.high
    assert (cell.paper, cell.n, cell.seeds, cell.study) == (32.0, 12, 2, "study")
    nll = by_cell["Base model", "CodeAlpaca"]
    base = results[(results.method == "base") & (results.target == "codealpaca")]
    assert nll.ours == pytest.approx(base[base.measure == "completion loss"].value.mean())


def test_another_model_has_a_block_of_its_own(tmp_path: Path) -> None:
    other = _paper_study(tmp_path / "study", settings={"model": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    assert model_of(other) == "SmolLM2-135M-Instruct"
    cells = fill(1, [other])
    own = cells[cells.backbone == "SmolLM2-135M-Instruct"]
    assert len(own) == 24
    assert own.paper.isna().all()
    assert cells[cells.backbone != "SmolLM2-135M-Instruct"].ours.isna().all()
    table_4 = fill(4, [other])
    assert set(table_4.backbone) == {"SmolLM2-135M-Instruct"}
    assert table_4.paper.notna().all()
    # which are another model's than the row's, and must not pass for its own
    assert f"The paper's numbers are of {ABLATED}, ours of the model that the row names." in to_markdown(table_4, [])
    assert "ours of the model" not in to_markdown(cells, [])


def test_table_2_is_from_qa_alone(tmp_path: Path) -> None:
    study = _paper_study(tmp_path / "study")
    cells = fill(2, [study])
    assert list(cells.dataset.unique()) == ["MMLU", "BBH", "GSM8K", "SVAMP", "MBPP", "CodeAlpaca"]
    own = study.results[(study.results.method == "spd") & (study.results.source == "mmlu")]
    value = 100 * own[(own.target == "gsm8k") & (own.measure == "accuracy")].value.mean()
    assert cells[(cells.method == "SPD-QA") & (cells.dataset == "GSM8K")].ours.item() == pytest.approx(value)


def test_table_3_is_from_before_training(tmp_path: Path) -> None:
    study = _paper_study(tmp_path / "study", phases=("trained", "projected"), n_items=50)
    cells = fill(3, [study]).set_index(["method", "dataset"])
    own = study.results[(study.results.source == "gsm8k") & (study.results.target == "gsm8k")]
    own = own[(own.method == "spd") & (own.measure == "accuracy")].groupby("phase").value.mean()
    ours = cells.loc[("SPD-Generated Data", "GSM8K"), "ours"]
    assert ours == pytest.approx(100 * own["projected"])
    assert ours != pytest.approx(100 * own["trained"])
    assert np.isnan(cells.loc[("SSD-Generated Data", "GSM8K"), "ours"])


def test_table_5_is_of_the_two_losses(tmp_path: Path) -> None:
    study = _paper_study(tmp_path / "study")
    cells = fill(5, [study]).set_index(["method", "dataset"])
    rows = study.results[(study.results.method == "spd-full-loss") & (study.results.source == "gsm8k")]
    value = 100 * rows[(rows.target == "svamp") & (rows.measure == "accuracy")].value.mean()
    assert cells.loc[("SPD w/ Full-sequence loss", "SVAMP"), "ours"] == pytest.approx(value)


def test_methods_of_the_reference_code_stand_in_the_papers_rows(tmp_path: Path) -> None:
    """Both where a study has them; else the published method of that name."""
    effects = {("psr-reference", "accuracy"): 0.5, ("ssd-reference", "accuracy"): -0.3}
    there = ("base", "psr-reference", "ssd", "ssd-reference", "spd")
    results = planted(effects, methods=there, sources=("gsm8k",), targets=("gsm8k",), measures=("accuracy",))
    study = Evidence.read(write_study(tmp_path / "study", results, **QWEN))
    cells = fill(1, [study]).set_index(["backbone", "method", "dataset"])
    for label, method in (("PSR", "psr-reference"), ("SSD", "ssd-reference"), ("SPD", "spd")):
        value = 100 * results[results.method == method].value.mean()
        assert cells.loc[(ABLATED, label, "GSM8K"), "ours"] == pytest.approx(value)
    assert "these methods stand for the paper's: psr-reference, ssd-reference." in to_markdown(
        fill(1, [study]), [study]
    )


def test_studies_complete_each_other(tmp_path: Path) -> None:
    first = _paper_study(tmp_path / "first")
    code = planted(methods=("base", "spd"), sources=("mbpp",), targets=("mbpp", "gsm8k"), n_items=10, seed=9,
                   measures=("accuracy",))  # fmt: skip
    second = Evidence.read(write_study(tmp_path / "second", code, **QWEN))
    cells = fill(4, [first, second]).set_index(["method", "dataset"])
    assert cells.loc[("SPD", "MBPP"), "study"] == "second"
    assert cells.loc[("SPD", "GSM8K"), "study"] == "first"


def test_markdown_shows_both_numbers_and_what_differs(tmp_path: Path) -> None:
    study = _paper_study(tmp_path / "study")
    cells = fill(1, [study])
    text = to_markdown(cells, [study])
    row = next(line for line in text.splitlines() if line.startswith(f"| {ABLATED} | SPD |"))
    values = [cell.strip() for cell in row.split("|")[3:-1]]
    assert values[0] == f"25.5 · {NOT_RUN}"
    ours = cells[(cells.method == "SPD") & (cells.dataset == "SVAMP") & (cells.backbone == ABLATED)].iloc[0]
    assert values[3] == f"32.0 · {ours.ours:.1f} [{ours.low:.1f}, {ours.high:.1f}]"
    assert values[1].startswith("0.679 · ")
    assert "| n_calibration of gsm8k" not in text  # 50, as in the paper
    assert "| seeds | 1 (42) | 2 (1, 2) |" in text
    assert "| MBPP ↑ | CodeAlpaca ↓ |" in text
    assert f"{int(cells.ours.notna().sum())} of 120 cells were run." in text


def test_there_is_no_table_6(tmp_path: Path) -> None:
    study = _paper_study(tmp_path / "study")
    with pytest.raises(SPDError, match="tables 1 to 5 with results, not 6"):
        fill(6, [study])
    with pytest.raises(SPDError, match="unknown table 'three'; choose from 1, 2, 3, 4, 5, figure4"):
        main("three", [tmp_path / "study"], None, True)


def test_the_command_writes_beside_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _paper_study(tmp_path / "study")
    main("table-4", [tmp_path / "study"], None, True)
    said = " ".join(capsys.readouterr().out.split())
    frame = pd.read_csv(tmp_path / "study" / "tables" / "table4.csv")
    assert len(frame) == 18
    assert f"{int(frame.ours.notna().sum())} of 18 cells were run" in said
    assert "What differs" in (tmp_path / "study" / "tables" / "table4.md").read_text(encoding="utf-8")


# figure 4


def test_figure_4_from_studies_of_several_sizes(tmp_path: Path) -> None:
    folders = []
    for size in (20, 100):
        _paper_study(tmp_path / f"n{size}", settings={**QWEN["settings"], "n_calibration": size})
        folders.append(tmp_path / f"n{size}")
    frame = points(folders)
    own = frame[(frame.method == "spd") & (frame.target == "svamp") & (frame.source == "gsm8k")]
    assert list(own.n_calibration) == [20, 100]
    results = Evidence.read(folders[0]).results
    mine = results[(results.method == "spd") & (results.source == "gsm8k") & (results.target == "svamp")]
    assert own.value.iloc[0] == pytest.approx(100 * mine[mine.measure == "accuracy"].value.mean())
    drawn = figure_4(frame[frame.target == "svamp"])[0]
    lines = [trace for trace in drawn.data if trace.name and trace.name.startswith("spd, source gsm8k")]
    assert list(lines[0].x) == [20, 100]
    assert all(trace.line.dash == "dot" for trace in drawn.data if trace.name and trace.name.startswith("base"))
    bands = [trace for trace in drawn.data if trace.fill == "tonexty" or (trace.name is None and not trace.fill)]
    assert sorted({y for trace in bands for y in trace.y}) == list(FIGURE_4["svamp"])
    assert "all intervals overlap: within noise" in points_sentence(own)
    assert "so nothing about size" in points_sentence(own.head(1))


def test_figure_4_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "analysis").mkdir(parents=True)
    rows = [("20 examples", -0.1), ("50 examples", -0.2), ("random", 0.1)]
    pd.DataFrame(
        [{"label": label, "measure": m, "value": v, "low": v - 0.05, "high": v + 0.05, "n": 24}
         for label, v in rows for m in ("change of aligned loss", "KL from base")]
    ).to_csv(tmp_path / "run" / "analysis" / "calibration_size-losses.csv", index=False)  # fmt: skip
    frame = points([tmp_path / "run"])
    spd, null = frame[frame.method == "spd"], frame[frame.method == "spd-random"]
    assert list(zip(spd.n_calibration, spd.value, strict=True)) == [(20, -0.1), (50, -0.2)]
    assert list(zip(null.n_calibration, null.value, strict=True)) == [(20, 0.1), (50, 0.1)]
    with pytest.raises(SPDError, match="neither a study with results nor a run"):
        points([tmp_path])


# the page


def test_page_has_answers_figures_and_tables(tmp_path: Path) -> None:
    evil = "a|b<img src=x onerror=alert(1)>"
    results = planted({("spd", "aligned loss"): -0.3}, targets=(evil,), side_effects=("neutral",), n_items=12)
    written = study_report.write_page(write_study(tmp_path / "study", results))
    html = written.read_text(encoding="utf-8")
    assert written == tmp_path / "study" / "report.html"
    assert "<strong>Did SPD help?</strong> By aligned loss yes." in html
    body = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "<img" not in body
    assert html.index("Did SPD help?</strong>") < html.index("plotly-graph-div") < html.index("How to read this</h2>")
    assert body.count("<table>") >= 4


def test_figures_show_the_differences_with_controls_grey() -> None:
    evidence = Evidence.of(planted({("spd", "aligned loss"): -0.3}, n_items=12))
    table = differences(evidence)
    figures = study_report.figures(means(evidence), table)
    assert len(figures) == 4  # no side effects were measured
    first = figures[0]
    row = table[(table.method == "spd") & (table.reference == "base") & (table.target == "svamp")]
    row = row[row.measure == "aligned loss"].iloc[0]
    trace = next(t for t in first.data if t.name == "svamp" and "spd" in t.x)
    place = list(trace.x).index("spd")
    assert trace.y[place] == pytest.approx(row.value)
    assert trace.error_y.array[place] == pytest.approx(row.high - row.value)
    assert trace.error_y.arrayminus[place] == pytest.approx(row.value - row.low)
    grey = [t for t in first.data if "spd-random" in t.x]
    assert grey
    assert all(t.marker.color == "#8A8A8A" and t.marker.symbol.endswith("-open") for t in grey)
    assert all("spd-random" not in t.x for t in figures[1].data)  # that one is the reference
    trade = figures[2]
    kl = evidence.results[(evidence.results.method == "spd") & (evidence.results.measure == "KL from base")]
    spd = next(t for t in trade.data if t.name == "spd")
    assert sorted(spd.x) == pytest.approx(sorted(kl.groupby("target").value.mean()))


def test_losses_stand_side_by_side_and_results_decide_where_there_are_any() -> None:
    both = ("aligned loss", "results loss", "completion loss", "KL from base", "accuracy")
    results = planted({("spd", "results loss"): -0.2}, measures=both, n_items=12)
    results = results[~((results.target == "svamp") & (results.measure == "results loss"))]  # it computes nothing
    evidence = Evidence.of(results)
    table = differences(evidence)
    drawn = study_report.losses_figure(table[table.role == "target"], "base", "Every loss")
    assert [note.text for note in drawn.layout.annotations] == ["aligned loss", "results loss", "completion loss"]
    by_panel = [{trace.name for trace in drawn.data if trace.xaxis == axis} for axis in ("x", "x2", "x3")]
    assert by_panel == [{"synthetic-math", "svamp"}, {"synthetic-math"}, {"synthetic-math", "svamp"}]
    row = table[(table.method == "spd") & (table.reference == "base") & (table.measure == "results loss")].iloc[0]
    trace = next(t for t in drawn.data if t.xaxis == "x2" and "spd" in t.x)
    assert trace.y[list(trace.x).index("spd")] == pytest.approx(row.value)
    decides = study_report.deciding_loss(table[table.role == "target"])
    assert set(decides[["target", "measure"]].itertuples(index=False, name=None)) == {
        ("synthetic-math", "results loss"), ("svamp", "aligned loss")
    }  # fmt: skip
    trade = study_report.trade_figure(means(evidence), decides, "title")
    spd = next(t for t in trade.data if t.name == "spd")
    assert row.value in list(spd.y) and "synthetic-math, results loss" in spd.customdata


def test_markdown_becomes_html() -> None:
    text = "## A `b|c`\n\nplain *(x)* **bold** 1 < 2\n\n- one\n- `<i>`\n\n| a | b |\n| --- | --- |\n| 1 \\| 2 | **3** |"
    html = re.sub(r">\n<", "><", study_report.html_of(text).strip())
    assert html == (
        "<h2>A <code>b|c</code></h2><p>plain <em>(x)</em> <strong>bold</strong> 1 &lt; 2</p>"
        "<ul><li>one</li><li><code>&lt;i&gt;</code></li></ul>"
        '<div class="wide"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1 | 2</td><td><strong>3</strong></td></tr></tbody></table></div>"
    )


@pytest.mark.parametrize("text", ["<b>x</b>", "<img src=x>", "[x](http://a.b)", "![x](y)", "<http://a.b>", "[x]: /y"])
def test_markdown_lets_no_markup_in(text: str) -> None:
    assert not re.search(r"<(?!/?p>)|href", study_report.html_of(text))
