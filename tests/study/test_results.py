"""The tables of a study: every number against the file it comes from."""

import json

import pandas as pd
import pytest

import spd_lens as spd
from spd_lens.evaluation.corpus_diagnostics import corpus_diagnostics
from spd_lens.files import read_json
from spd_lens.study.results import COLUMNS, DIAGNOSTICS, corpora_frame, results_frame
from tests.helpers import refused

FORCED = {"aligned_loss": "aligned loss", "completion_loss": "completion loss", "kl": "KL from base"}


@pytest.fixture(scope="module")
def frame(finished_study):
    return results_frame(finished_study.path)


def test_the_file_is_the_frame(finished_study, frame):
    written = pd.read_csv(finished_study.path / "results.csv", keep_default_na=False, dtype=str)
    assert list(written.columns) == list(frame.columns) == COLUMNS
    assert len(written) == len(frame)
    assert written["value"].astype(float).tolist() == frame["value"].tolist()  # every digit


def test_one_row_per_item_and_measure(frame):
    keys = [column for column in COLUMNS if column != "value"]
    assert not frame.duplicated(keys).any()
    assert frame["value"].notna().all()
    assert set(frame["role"]) == {"target", "side effect"}


def test_the_base_has_no_source_phase_or_seed_and_no_kl(frame):
    base = frame[frame["method"] == "base"]
    assert set(base["source"]) == set(base["phase"]) == set(base["seed"]) == {""}
    assert "KL from base" not in set(base["measure"])
    assert {"aligned loss", "accuracy", "format", "finished", "tokens"} <= set(base["measure"])


def test_every_number_is_that_of_its_file(finished_study, frame):
    """Read as plain JSON, without the code that wrote it."""
    for method, seed in (("psr", 1), ("spd", 2)):
        folder = finished_study.path / "synthetic-math" / method / str(seed)
        mine = frame[(frame.method == method) & (frame.seed == seed)]
        for role, where in (("target", "effects"), ("side effect", "side_effects")):
            for file in sorted((folder / where).glob("*.json")):
                for phase, items in read_json(file).items():
                    rows = mine[(mine.role == role) & (mine.target == file.stem) & (mine.phase == phase)]
                    for field, measure in FORCED.items():
                        found = rows[rows.measure == measure].set_index("item")["value"].to_dict()
                        expected = {item["id"]: item[field] for item in items}
                        # the answer of a side effect's text is its every token: one loss says it
                        assert found == ({} if (role, field) == ("side effect", "aligned_loss") else expected)
        phases = {"trained": "eval", "projected": "eval-projected"}
        for phase in ("trained", *(["projected"] if method == "spd" else [])):
            for target in ("synthetic-math", "synthetic-qa"):
                items = read_json(folder / phases[phase] / f"{target}.json")["items"]
                rows = mine[(mine.role == "target") & (mine.target == target) & (mine.phase == phase)]

                def values(measure, rows=rows):
                    return rows[rows.measure == measure].set_index("item")["value"].to_dict()

                assert values("accuracy") == {item["id"]: item["score"] for item in items}
                assert values("tokens") == {item["id"]: item["n_tokens"] for item in items}
                assert values("finished") == {item["id"]: float(item["finish_reason"] == "eos") for item in items}
                task = spd.tasks.get(target)
                assert values("format") == {i["id"]: float(task.in_asked_form(i["completion"])) for i in items}
                chosen = {item["id"]: item["choice_score"] for item in items if item["choice_score"] is not None}
                assert values("accuracy by likelihood") == chosen
                assert bool(chosen) == (target == "synthetic-qa")
    assert set(frame[frame.phase == "projected"].method) == {"spd"}


def test_all_methods_and_seeds_have_the_same_items(frame):
    for _, rows in frame.groupby(["role", "target", "measure", "phase"]):
        items = [tuple(sorted(part["item"])) for _, part in rows.groupby(["method", "seed"])]
        assert len(set(items)) == 1


def test_corpora(finished_study):
    table = corpora_frame(finished_study.path)
    assert list(table.columns) == ["source", "method", "seed", *DIAGNOSTICS]
    assert list(zip(table.method, table.seed, strict=True)) == [("psr", 1), ("psr", 2), ("spd", 1), ("spd", 2)]
    corpus = spd.Corpus.load(finished_study.path / "synthetic-math" / "spd" / "2" / "corpus.jsonl")
    row = table.iloc[3]
    assert row["completions"] == len(corpus) == 6
    assert row["length"] == pytest.approx(sum(record.n_completion_tokens for record in corpus) / 6)
    assert row["truncated"] == pytest.approx(sum(record.finish_reason == "length" for record in corpus) / 6)
    expected = corpus_diagnostics(corpus, task=spd.tasks.get("synthetic-math")).set_index("measure")["value"]
    assert row["answered"] == expected["answered"]
    written = pd.read_csv(finished_study.path / "corpora.csv")
    assert written["length"].tolist() == table["length"].tolist()


def test_a_corpus_without_an_answer_has_a_gap_and_no_error(copied_study):
    path = copied_study.cell("synthetic-math", "spd", 2).corpus_path
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["sum"]  # the change is meant
    silent = [{**record, "completion": "no"} if "completion" in record else record for record in records]
    assert silent != records
    path.write_text("".join(json.dumps(record) + "\n" for record in silent))
    row = corpora_frame(copied_study.path).iloc[3]
    assert row["answered"] == 0
    assert pd.isna(row["after the answer"])


def test_a_study_that_is_not_finished_has_the_rows_that_there_are(copied_study, frame):
    cell = copied_study.cell("synthetic-math", "spd", 2)
    for path in (*(cell.path / "effects").iterdir(), *(cell.path / "eval").iterdir()):
        path.unlink()
    cell.corpus_path.unlink()
    left = results_frame(copied_study.path)
    gone = frame[(frame.method == "spd") & (frame.seed == 2)]
    still = gone[
        (gone.role == "side effect") | (gone.measure.isin(["accuracy", "tokens"]) & (gone.phase == "projected"))
    ]
    rest = left[(left.method == "spd") & (left.seed == 2)]
    assert 0 < len(still) <= len(rest) < len(gone)
    assert len(left) == len(frame) - len(gone) + len(rest)
    assert len(corpora_frame(copied_study.path)) == 3


def test_what_is_no_study_is_refused(tmp_path, copied_study):
    with refused("is not a study"):
        results_frame(tmp_path)
    copied_study.cell("synthetic-math", "spd", 2).effects_path("synthetic-qa").write_text("[1, 2]")
    with refused("effects/synthetic-qa.json"):
        results_frame(copied_study.path)
