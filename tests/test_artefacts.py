"""Directories and files that an earlier version wrote still load with the same numbers, and are still resumed.

`fixtures/artefacts` was written on the model of `build_pair`, whose weights are made again here from their seed. Its
`values.json` holds what was read from each artefact at that time. The files are never made anew: what a later version
writes belongs beside them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import spd_lens as spd
from spd_lens.files.digests import unsigned
from spd_lens.runs.rounds import Rounds, run_rounds
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study
from spd_lens.study.results import results_frame
from tests.conftest import build_tokenizer, randomise

FOLDER = Path(__file__).parent / "fixtures" / "artefacts"
NOTES = ("run.json", "study.json", "rounds.json", "summary.md", "report.md", ".lock", "manifest.json")
"""Notes on when and where a folder was worked on, and reports that name seconds: written at every start."""


def build_pair() -> spd.ModelPair:
    """A Llama of two layers with two key/value heads of four dimensions. It has a name and no path."""
    tokenizer = build_tokenizer(chat=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return spd.ModelPair(randomise(LlamaForCausalLM(config)), tokenizer, name="tiny", backend="bridge")


def digest_of(pair: spd.ModelPair) -> str:
    """Of all weights and the vocabulary, without the library's own digests."""
    digest = hashlib.sha256(json.dumps(pair.tokenizer.get_vocab(), sort_keys=True).encode())
    for name, value in sorted(pair.hf.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def of_moments(moments: spd.GradientMoments) -> dict[str, Any]:
    """What moments hold, in numbers."""
    found = {f"singular values {site}": moments.singular_values(site).flatten().tolist() for site in moments.sites}
    counts = [moments.n_examples.tolist(), moments.n_tokens.tolist(), moments.n_scored.tolist()]
    means = [moments.mean(site).norm().item() for site in moments.sites]
    return {**found, "counts": counts, "loss": moments.mean_loss, "means": means, "settings": dict(moments.settings)}


def of_subspace(subspace: spd.Subspace) -> dict[str, Any]:
    """What a subspace holds, in numbers."""
    found = {f"projector {site}": subspace.projector(site).flatten().tolist() for site in subspace.sites}
    offsets = {str(site): value.flatten().tolist() for site, value in subspace.offset.items()}
    ranks = {str(site): list(rank) for site, rank in subspace.ranks.items()}
    return {**found, "ranks": ranks, "rank": subspace.rank, "offset": offsets, "origin": dict(subspace.origin)}


def of_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are younger than the artefacts, which are then at their defaults."""
    known = json.loads((FOLDER / "values.json").read_text(encoding="utf-8"))["settings.yaml"]
    defaults = spd.SPDConfig.make({}).model_dump(mode="json")
    return {name: value for name, value in settings.items() if name in known or value != defaults[name]}


def of_run(run: spd.Run) -> dict[str, Any]:
    """What a run directory holds, in numbers and texts."""
    effects = run.effects("synthetic-math")
    results = {policy: run.result("synthetic-math", policy) for policy in run.config.policies}
    return {
        "config": of_config(run.config.model_dump(mode="json")),
        "moments": of_moments(run.moments),
        "subspace": of_subspace(run.subspace),
        "corpus": [[record.id, record.completion] for record in run.corpus],
        "unprojected": [record.completion for record in run.unprojected],
        "effects": {policy: [[item.aligned_loss, item.kl] for item in items] for policy, items in effects.items()},
        "accuracy": {policy: result.accuracy.value for policy, result in results.items()},
        "answers": {policy: [item.completion for item in result.items] for policy, result in results.items()},
        "tables": [line for line in run.summary.splitlines() if line.startswith("|")][:4],
    }


def of_study(study: Study) -> dict[str, Any]:
    """What a study's folder holds."""
    frame = results_frame(study.path)
    cell = study.cell("synthetic-math", "spd", 2)
    config = study.config.model_dump(mode="json")
    means = frame.groupby(["method", "role", "phase", "measure"], dropna=False).value.mean()
    return {
        "config": {**config, "settings": of_config(config["settings"])},
        "means": {" ".join(map(str, key)): value for key, value in means.items()},
        "subspace": of_subspace(cell.subspace),
        "corpus": [record.completion for record in spd.Corpus.load(cell.corpus_path)],
    }


def of_rounds(rounds: Rounds) -> dict[str, Any]:
    """What a folder of rounds holds."""
    return {
        "table": rounds.table.to_dict("list"),
        "run": of_run(rounds.run(1)),
        "moments": of_moments(rounds.moments(1)),
    }


READERS = {
    "run": lambda path: of_run(spd.Run.open(path)),
    "study": lambda path: of_study(Study.open(path)),
    "rounds": lambda path: of_rounds(Rounds(path)),
    "moments.safetensors": lambda path: of_moments(spd.GradientMoments.load(path)),
    "subspace.safetensors": lambda path: of_subspace(spd.Subspace.load(path)),
}


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Nested values by their place, for one comparison that names what differs."""
    if not isinstance(value, dict | list | tuple):
        return {place: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, part in parts for key, leaf in flat(part, f"{place}/{name}").items()}


def files_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file that is written once."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in NOTES)
    return {str(p.relative_to(directory)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found if p.suffix != ".lock"}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return json.loads((FOLDER / "values.json").read_text(encoding="utf-8"))


@pytest.fixture
def pair(values: dict[str, Any]) -> spd.ModelPair:
    made = build_pair()
    if digest_of(made) != values["model"]:
        pytest.skip("the generators of this torch or tokenizers make another model than the one of the artefacts")
    return made


@pytest.fixture
def copied(tmp_path: Path):
    """A copy of an artefact, to work on."""
    return lambda name: Path(shutil.copytree(FOLDER / name, tmp_path / name))


@pytest.mark.parametrize("name", READERS)
def test_it_loads_with_the_same_values(name, values):
    read, stored = flat(json.loads(json.dumps(READERS[name](FOLDER / name)))), flat(values[name])
    numbers = [key for key, value in stored.items() if type(value) is float]
    assert {key: read.pop(key) for key in numbers} == pytest.approx({key: stored.pop(key) for key in numbers}, rel=1e-9)
    assert read == stored


def test_every_flat_setting_is_read(values):
    config = spd.SPDConfig.read(FOLDER / "settings.yaml")
    assert of_config(config.model_dump(mode="json")) == values["settings.yaml"]
    written = yaml.safe_load((FOLDER / "settings.yaml").read_text(encoding="utf-8"))
    assert set(written) <= set(spd.SPDConfig.model_fields)
    default = spd.SPDConfig.make({})
    assert {name for name in written if getattr(config, name) == getattr(default, name)} <= {"device"}


def assert_left(before: dict[str, tuple[bytes, int]], now: dict[str, tuple[bytes, int]], again: set[str]) -> None:
    """No file was written, but for those of `again`, which say the same."""
    assert {name: now[name] for name in before.keys() - again} == {name: before[name] for name in before.keys() - again}
    for name in again:  # other processors add the same numbers in another order, which shows in the last digit
        there, here = before[name][0], now[name][0]
        if name.endswith(".csv"):
            pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(here)), pd.read_csv(io.BytesIO(there)), rtol=1e-9)
        elif name.endswith(".json"):  # which now has a digest of its content
            assert unsigned(json.loads(here)) == json.loads(there)
        else:
            assert here == there
    new = {name for name in now.keys() - before.keys() if not name.endswith(("findings.json", "adapter/README.md"))}
    assert new <= {"report.html"}, "a study's page is not kept beside the others for its size"


def test_a_finished_run_is_left_as_it_is(pair, copied):
    path = copied("run")
    before = files_of(path)
    after = spd.run(spd.Run.open(path).config, path, progress=False, pair=pair)
    assert_left(before, files_of(path), {"data_card.json"})
    summary = re.sub("## Evidence\n.*?(?=## )", "", after.summary, flags=re.DOTALL)  # which is younger
    written = (FOLDER / "run/summary.md").read_text()  # where the name of a task stood as it is
    here, there = (text.replace("`synthetic-math`", "synthetic-math") for text in (summary, written))
    assert here.partition("## Time")[0] == there.partition("## Time")[0]


def test_a_run_that_was_killed_while_it_generated_goes_on(pair, copied):
    path = copied("killed")
    begun, before = (path / "corpus.jsonl").read_bytes(), files_of(path)
    assert begun and not begun.endswith(b"\n")
    run, finished = spd.run(spd.Run.open(path).config, path, progress=False, pair=pair), spd.Run.open(FOLDER / "run")
    assert run.corpus.records == finished.corpus.records
    assert (path / "corpus.jsonl").read_bytes().startswith(begun.rpartition(b"\n")[0])
    now = files_of(path)
    for name in before.keys() - {"corpus.jsonl", "data_card.json"}:
        assert now[name] == before[name], name
    for policy in ("base", "projected"):  # as they come from the model alone, without any training
        mine, theirs = (
            [item.aligned_loss for item in one.effects("synthetic-math")[policy]] for one in (run, finished)
        )
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_finished_study_is_left_as_it_is(pair, copied):
    path = copied("study")
    before = files_of(path)
    run_study(Study.open(path).config, path, pair=pair)
    assert_left(before, files_of(path), {"results.csv", "corpora.csv", "comparisons.csv"})


def test_finished_rounds_are_left_as_they_are(pair, copied):
    path = copied("rounds")
    before, settings = files_of(path), Rounds(path).notes["settings"]
    config = spd.SPDConfig.make(settings["config"])
    run_rounds(config, path, 1, n_held_out=settings["n_held_out"], progress=False, pair=pair)
    assert_left(before, files_of(path), {name for name in before if name.endswith(("data_card.json", "rounds.csv"))})
