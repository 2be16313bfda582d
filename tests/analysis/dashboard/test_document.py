"""What goes into the page: numbers of the run's own files, text made safe, and what is refused."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from spd_lens.analysis.common.style import plotly_script
from spd_lens.analysis.common.subject import Subject, spectrum_note, subjects
from spd_lens.analysis.dashboard.command import write_dashboard
from spd_lens.analysis.dashboard.document import assemble, from_sources
from spd_lens.analysis.dashboard.page import page
from spd_lens.analysis.dashboard.rank_curves import Source
from spd_lens.analysis.dashboard.records import effects, relative_to
from spd_lens.files import read_json, write_json
from spd_lens.generation.corpus import Corpus
from spd_lens.output.pages import digest
from spd_lens.output.safe_text import visible
from spd_lens.runs.run_dir import Run
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import refused

from .conftest import BETA, HOSTILE


@pytest.fixture(scope="module")
def document(two_runs):
    return assemble(subjects(two_runs), link=relative_to(two_runs[0].parent / "out" / "page.html"))


def test_effects_are_paired_differences_of_the_runs_own_items(finished_run):
    found = effects(finished_run, "synthetic-math")
    raw = read_json(finished_run.path / "effects" / "synthetic-math.json")
    base = np.array([item["aligned_loss"] for item in raw["base"]])
    projected = np.array([item["aligned_loss"] for item in raw["projected"]])
    value, low, high = found["projected"]["aligned_loss"]
    assert value == pytest.approx((projected - base).mean())
    assert low < value < high
    controls = [name for name in raw if name.startswith("random-")]
    each = [np.mean([item["aligned_loss"] for item in raw[name]]) - base.mean() for name in controls]
    assert found["each"]["aligned_loss"] == pytest.approx(each)
    assert found["random"]["aligned_loss"][0] == pytest.approx(np.mean(each))
    assert found["spd"]["kl"][0] == pytest.approx(np.mean([item["kl"] for item in raw["spd"]]))
    assert found["says"]["aligned_loss"].startswith("Aligned loss, projected minus random")
    whole = [np.mean([item["completion_loss"] for item in raw[name]]) for name in ("spd", "base")]
    assert found["spd"]["completion_loss"][0] == pytest.approx(whole[0] - whole[1])
    assert {"aligned_loss", "completion_loss", "kl"} <= set(found["fields"]) == set(found["projected"])
    assert list(found["says"]) == found["fields"]


def test_outcomes_are_of_the_items_that_have_them_and_other_text_stands_beside(finished_run, tmp_path):
    """Results decide where they were measured; texts that no run aims at have one loss."""
    shutil.copytree(finished_run.path, tmp_path / "run")
    path = tmp_path / "run" / "effects" / "synthetic-math.json"
    raw = read_json(path)
    for policy, items in raw.items():
        for i, item in enumerate(items):
            item |= {"results_loss": None if i == 0 else 1.0 + i + (policy == "projected") / 4, "copies_loss": None}
    write_json(path, raw)
    run = Run(tmp_path / "run")
    run.write_effects("neutral", run.effects("synthetic-math"), side=True)
    found = effects(run, "synthetic-math")
    assert found["decides"] == "results_loss" and "copies_loss" not in found["fields"]
    assert found["projected"]["results_loss"] == [0.25] * 3 and found["random"]["results_loss"][0] == 0
    shown = assemble([Subject(run)])["runs"][0]["effects"]
    assert [one["task"] for one in shown] == ["synthetic-math", "other text"]
    assert shown[1]["fields"] == ["completion_loss", "kl"] and shown[1]["decides"] == "completion_loss"


def test_completions_are_the_runs_with_what_changed(document, two_runs):
    training, test = document["runs"][0]["texts"]
    run = Run(two_runs[0])
    assert training["columns"] == ["base", "projected"] and training["total"] == len(run.unprojected)
    after = {record.id: record.completion for record in run.corpus}
    assert len(training["items"]) == 6
    for item, record in zip(training["items"][1:], list(run.unprojected)[1:], strict=True):
        pieces = item["pieces"]["projected"]
        assert item["text"] == visible(record.completion)
        assert "".join(piece[0] for piece in pieces) == visible(record.completion)
        assert "".join(piece[1] if len(piece) > 1 else piece[0] for piece in pieces) == visible(after[record.id])
    assert test["columns"] == ["base", "projected", "spd"]
    assert set(test["items"][0]["scores"]) == {"base", "projected", "spd"}


def test_an_estimator_without_singular_values_is_named(finished_run):
    own = finished_run.subspace
    moments = finished_run.moments
    other = replace(own, singular_values={}, origin={**own.origin, "estimator": "attribution"})
    notes = [
        from_sources([Source("x", of, subspace)])["runs"][0]["used"]["note"]
        for of, subspace in ((moments, own), (moments, other), (None, other), (None, own))
    ]
    assert notes[0] == notes[3] == ""
    assert notes[1].startswith("The subspace is of the estimator 'attribution', which has no singular values; spectra")
    assert notes[2].endswith("has no singular values, so there is no spectrum to show.")
    kept = replace(other, singular_values=own.singular_values)
    assert spectrum_note(kept, of_gradients=False) == "" and "which has" not in spectrum_note(kept, of_gradients=True)


def test_text_is_made_visible_and_cannot_end_the_script(document, two_runs):
    first = document["runs"][0]["texts"][0]["items"][0]
    assert first["prompt"] == HOSTILE
    assert "\\u202e" in first["text"] and "\u202e" not in json.dumps(first, ensure_ascii=False)
    html = page(document, title=HOSTILE)
    data = html[html.index('id="data">') + 10 :]
    data = data[: data.index("</script>")]
    assert json.loads(data)["runs"][0]["texts"][0]["items"][0]["prompt"] == HOSTILE
    assert "<" not in data and "&" not in data
    assert html.count("<img") == plotly_script().count("<img")
    assert document["runs"][1]["name"] == BETA


def test_the_policy_names_the_scripts_that_are_there_and_no_other_source(document):
    html = page(document, title="x")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        assert f"'sha256-{digest(script)}'" in policy
    assert policy.startswith("default-src 'none'") and "http" not in policy and "unsafe-inline' 'sha" not in policy


def test_json_has_no_nan(document):
    data = re.search(r'id="data">(.*?)</script>', page(document, title="x"), re.DOTALL)[1]
    assert "NaN" not in data and "Infinity" not in data
    with pytest.raises(ValueError):
        page({"value": float("nan")}, title="x")


def test_saved_sweeps_are_drawn_from_their_tables(document):
    (family,) = document["runs"][0]["rank_sweep"]
    assert family["own"] and family["per_head"] and family["width"] == 8
    assert [row["rank"] for row in family["rows"]] == [2, 6]
    assert family["fields"] == ["aligned_loss", "kl"] and family["decides"] == "aligned_loss"
    assert family["rows"][0]["aligned_loss"] == pytest.approx([-0.25, -0.35, -0.15])
    assert family["rows"][1]["kl"] == pytest.approx([1.75, 1.65, 1.85])
    assert family["rows"][0]["random"]["aligned_loss"] == pytest.approx([0.5, 0.4, 0.6])
    layers = document["runs"][0]["layer_sweep"]
    assert layers["columns"] == ["KV, rank 2", "KV, rank 6"] and layers["z"] == [pytest.approx([-0.75, 0.25])]
    assert layers["text"] == [["−0.75*", "+0.25*"]]
    assert document["runs"][1]["rank_sweep"] == [] and document["runs"][1]["layer_sweep"] is None


def test_saved_tables_are_previewed_and_linked(document, two_runs):
    tables = {table["name"]: table for table in document["runs"][0]["saved"]}
    assert tables["rank_sweep"]["rows"] == 4 and tables["rank_sweep"]["href"] == "../alpha/analysis/rank_sweep.html"
    assert tables["layer_sweep"]["href"] is None
    assert tables["rank_sweep"]["question"]


def test_all_layers_are_shown_where_an_analysis_extracted_them(two_runs, tmp_path):
    copy = tmp_path / "all"
    shutil.copytree(two_runs[0], copy)
    (copy / "analysis").mkdir(exist_ok=True)
    moments = Run(copy).moments
    few = moments.at(moments.sites[:1])
    few.save(copy / "analysis" / "moments-all-layers.safetensors")
    assert list(assemble([Subject(copy)])["runs"][0]["blocks"]) == [str(moments.sites[0])]


def test_provenance_says_settings_versions_and_proofs(document, finished_run):
    tables = {table["title"]: dict(table["rows"]) for table in document["runs"][0]["provenance"]}
    config = finished_run.config
    assert tables["All settings"]["n_calibration"] == str(config.n_calibration)
    assert "seed" not in tables["Settings that are not the default"]
    assert tables["Versions and machine"]["torch"] == finished_run.notes["versions"]["torch"]
    grade = finished_run.subspace.grade
    assert document["runs"][0]["evidence"].startswith(f"evidence: subspace {grade}, adapter ")
    assert tables["Evidence"]["subspace"] == "; ".join([str(grade), *grade.reasons])
    assert "1.k: 1" in tables["What was proved"]["hook firings in one forward pass of the lens model"]
    assert float(tables["Seconds per stage"]["total"]) == pytest.approx(
        sum(finished_run.notes["seconds"].values()), abs=0.1
    )


def test_an_unfinished_run_shows_what_it_has(finished_run, tmp_path):
    copy, later = tmp_path / "young", ("effects", "side_effects", "eval", "corpus*", "adapter")
    shutil.copytree(finished_run.path, copy, ignore=shutil.ignore_patterns(*later))
    (shown,) = assemble([Subject(copy)])["runs"]
    assert shown["effects"] == [] and shown["texts"] == [] and shown["blocks"]
    assert write_dashboard([copy], tmp_path / "page.html").stat().st_size > 1_000_000


def test_wrong_input_is_one_sentence(finished_run, tmp_path):
    with refused("no run"):
        write_dashboard([], tmp_path / "page.html")
    with refused(tmp_path, "not a run directory"):
        write_dashboard([tmp_path], tmp_path / "page.html")
    with refused("is a directory"):
        write_dashboard([finished_run.path], tmp_path)
    with refused("two of the run directories"):
        write_dashboard([finished_run.path, finished_run.path], tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    shutil.copy(finished_run.config_path, tmp_path / "empty" / "config.yaml")
    with refused("moments.safetensors"):
        write_dashboard([tmp_path / "empty"], tmp_path / "page.html")


def test_explore_takes_subspaces_and_moments(finished_run):
    subspace, moments = finished_run.subspace, finished_run.moments
    alone = subspace.explore()
    assert "<iframe" in alone._repr_html_() and "srcdoc" in alone._repr_html_()
    assert "</script>" not in alone._repr_html_()  # all of it is inside an attribute
    subspace.explore(moments, others={"random": subspace.random_like(1), "again": moments})
    with refused("others['x']", "int"):
        subspace.explore(moments, others={"x": 3})
    with refused("'this'"):
        subspace.explore(moments, others={"this": subspace})
    joint = moments.subspace(0.5, per_head=False)
    assert isinstance(joint, Subspace) and "MB of HTML" in repr(joint.explore())


def test_only_so_many_completions_go_in(two_runs):
    document = assemble([Subject(two_runs[0])], texts=2)
    for texts in document["runs"][0]["texts"]:
        assert len(texts["items"]) == 2 < texts["total"]
    assert len(Corpus.load(two_runs[0] / "unprojected.jsonl")) == document["runs"][0]["texts"][0]["total"]
