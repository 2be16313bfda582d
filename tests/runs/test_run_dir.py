"""Folders that a process was killed in: begun again where nothing was made, made good where something was."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import spd_lens as spd
from spd_lens.cli.commands import app
from spd_lens.errors import SPDError
from spd_lens.generation.corpus import Corpus, CorpusWriter
from spd_lens.runs.comparison import compare
from spd_lens.runs.rounds import Rounds, _check_place
from spd_lens.runs.run_dir import Folder, Run
from spd_lens.study.config import StudyConfig
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study
from tests.helpers import refused

KILLED = [
    [],
    [".lock"],
    [".{settings}.123"],
    [".{settings}.123-0a1b2c3d.tmp", ".lock"],
    ["{settings}"],
    ["{settings}", "{notes}", ".lock", ".DS_Store"],
]


@pytest.fixture(params=KILLED, ids=str)
def killed(request, tmp_path):
    """`killed(Run)`: a folder where a process was killed, or the power failed, before it had made anything."""

    def make(kind: type[Folder]) -> Path:
        folder = tmp_path / kind.__name__
        folder.mkdir()
        for name in request.param:
            name = name.format(settings=kind.settings_file, notes=kind.notes_file)
            (folder / name).write_bytes(b"\0" * 10 if name == kind.settings_file else b"")
        return folder

    return make


@pytest.fixture
def config(tiny_settings):
    return spd.SPDConfig.make(tiny_settings)


@pytest.fixture
def study_config(tiny_llama_dir):
    settings = {"model": str(tiny_llama_dir), "n_train": 6, "n_eval": 4, "n_calibration": 4, "max_new_tokens": 8}
    plan = {"methods": ["base", "psr"], "sources": ["synthetic-math"], "seeds": [1]}
    options = {"synthetic-math": {"max_new_tokens": 8}}
    return StudyConfig.make({**plan, "settings": settings, "task_options": options})


def test_a_run_begins_where_one_was_killed(killed, config):
    run = Run.open(killed(Run), config)
    assert Run.open(run.path).config == config
    assert run.notes == {}


def test_a_study_begins_where_one_was_killed(killed, study_config):
    study = Study(killed(Study))
    assert study.admits(study_config) == study_config
    with study.locked():
        study.begin(study.admits(study_config))
    assert Study.open(study.path).config == study_config
    assert study.notes == {}


def test_rounds_begin_where_some_were_killed(killed):
    folder = Rounds(killed(Rounds))
    _check_place(folder)
    with folder.locked():
        folder.note_once("the settings", settings={"n": 1})
    assert folder.notes == {"settings": {"n": 1}}


def _begin_run(folder, run_config, _):
    Run.open(folder, run_config)
    return Run.open(folder).config == run_config


def _begin_study(folder, _, study_config):
    study = Study(folder)
    with study.locked():
        study.begin(study.admits(study_config))
        study.note(weights="x")
    return Study.open(folder).config == study_config


def _begin_rounds(folder, *_):
    rounds = Rounds(folder)
    _check_place(rounds)
    with rounds.locked():
        rounds.note_once("the settings", settings={"n": 1})
    return rounds.notes == {"settings": {"n": 1}}


def _begin_corpus(folder, *_):
    with CorpusWriter(folder / "corpus.jsonl", {"seed": 1}, [("a", 0)]):
        pass
    return Corpus.load(folder / "corpus.jsonl").settings == {"seed": 1}


@pytest.mark.parametrize("begin", [_begin_run, _begin_study, _begin_rounds, _begin_corpus])
def test_a_beginning_that_is_killed_at_any_call_of_the_disk_is_begun_again(begin, config, study_config, tmp_path):
    """A child is killed before its N-th call, for every N until it is through; then this process begins."""
    for number in range(1, 100):
        folder = tmp_path / str(number)
        child = os.fork()
        if not child:
            through = False
            try:
                _die_at(number)
                through = begin(folder, config, study_config)
            finally:
                os._exit(0 if through else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert begin(folder, config, study_config), number
        assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp")), number
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert number > 5


def _die_at(number: int) -> None:
    """Kill this process before its n-th call that the disk could see."""
    left = [number]

    def counted(call):
        def wrapper(*args, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapper

    for name in ("open", "mkdir", "fsync", "replace", "unlink", "truncate"):
        setattr(os, name, counted(getattr(os, name)))
    io.open = counted(io.open)  # what pathlib calls
    builtins.open = counted(builtins.open)


@pytest.mark.parametrize("notes", [{}, {"fingerprint": {}, "weights": "x", "data": {}}])
def test_a_study_that_an_earlier_version_had_only_noted_begins(tmp_path, study_config, notes):
    (tmp_path / "study.json").write_text(json.dumps(notes))
    study = Study(tmp_path)
    with study.locked():
        study.begin(study.admits(study_config))
        assert study.notes == {}  # of a study that was none


def test_another_programs_study_json_is_left_alone(tmp_path, study_config):
    (tmp_path / "study.json").write_text('{"patients": 12}')
    with refused(tmp_path, "is not a study"):
        Study(tmp_path).admits(study_config)


def test_settings_that_are_lost_are_said_where_something_was_made(tmp_path, config, study_config):
    for folder, settings in ((Run(tmp_path / "r"), config), (Study(tmp_path / "s"), study_config)):
        folder.path.mkdir()
        (folder.path / folder.settings_file).touch()
        (folder.path / "moments.safetensors").touch()
        check = folder.check if isinstance(folder, Run) else folder.admits
        with refused(folder.path / folder.settings_file, "empty or cut off"):
            check(settings)
        with refused(folder.path / folder.settings_file, "empty or cut off"):
            type(folder).open(folder.path)


def test_the_settings_of_a_study_are_its_first_file(tiny_pair, study_config, tmp_path, monkeypatch):
    def dying(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("spd_lens.study.engine._note", dying)
    with pytest.raises(KeyboardInterrupt):
        run_study(study_config, tmp_path / "s", pair=tiny_pair)
    assert {path.name for path in (tmp_path / "s").iterdir()} - {".lock", ".manifest.lock", "manifest.json"} == {
        "study.yaml"
    }
    Study.open(tmp_path / "s")


def test_a_cut_settings_file_is_never_a_shorter_one(tmp_path, config):
    run = Run.open(tmp_path / "r", config)
    whole = run.config_path.read_bytes()
    assert yaml.safe_load(whole) == config.model_dump(mode="json")
    cut = [whole[:length] for length in range(len(whole) - 1)]
    for content in (*cut, b"\0" * len(whole), whole[:200] + b"\0" * (len(whole) - 200)):
        run.config_path.write_bytes(content)
        for read in (lambda: Run.open(run.path).config, lambda: run.config):
            with pytest.raises(SPDError):
                read()


def test_settings_without_marks_are_an_earlier_versions(tmp_path, config):
    run = Run.open(tmp_path / "r", config)
    run.config_path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert Run.open(run.path).config == config
    assert spd.SPDConfig.read(run.config_path) == config


@pytest.mark.parametrize("content", ["", "---\nmodel: x\n"])
def test_readers_of_runs_refuse_lost_settings(finished_run, tmp_path, content):
    shutil.copytree(finished_run.path, tmp_path / "r")
    (tmp_path / "r" / "config.yaml").write_text(content)
    with refused("config.yaml", "empty or cut off"):
        compare([Run.open(tmp_path / "r")], [finished_run])
    for command in (
        ["compare", tmp_path / "r", finished_run.path],
        ["dashboard", tmp_path / "r", "--out", tmp_path / "d"],
    ):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert isinstance(result.exception, SPDError) and "empty or cut off" in str(result.exception)


def test_notes_that_are_lost_are_none_and_rounds_without_them_are_no_rounds(tmp_path):
    (tmp_path / "run.json").write_bytes(b"")
    (tmp_path / "moments.safetensors").touch()
    assert Run(tmp_path).notes == {}
    (tmp_path / "rounds.json").write_bytes(b"\0" * 9)
    with refused(tmp_path, "does not hold rounds"):
        _check_place(Rounds(tmp_path))
    (tmp_path / "run.json").write_text("{")
    with refused(tmp_path / "run.json"):
        Run(tmp_path).notes  # noqa: B018 (reading is what is tested)


def test_what_stopped_a_stage_is_what_is_said(tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / "run.json").mkdir()  # the seconds cannot be noted either
    with refused("the corpus cannot be written"), folder.stage("generate"):
        raise SPDError("the corpus cannot be written")
    with pytest.raises(SPDError), folder.stage("generate"):
        pass


SPOILED = {
    "moments.safetensors": lambda content: content[: len(content) // 2],
    "subspace.safetensors": lambda content: b"",
    "adapter/adapter_model.safetensors": lambda content: b"\0" * len(content),
    "corpus.jsonl": lambda content: b"",
    "unprojected.jsonl": lambda content: content[:100],
    "effects/synthetic-math.json": lambda content: b"",
    "eval/synthetic-math/base.json": lambda content: b"\0" * len(content),
    "eval/synthetic-math/spd.json": lambda content: content[:-9],
    "data_card.json": lambda content: b"",
    "summary.md": lambda content: b"",
}


def test_damaged_artefacts_of_a_finished_run_are_made_again(finished_run, tiny_settings, tiny_pair, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "r")
    for name, spoil in SPOILED.items():
        path = tmp_path / "r" / name
        path.write_bytes(spoil(path.read_bytes()))
    spd.run(spd.SPDConfig.make(tiny_settings), tmp_path / "r", progress=False, pair=tiny_pair)
    for name in SPOILED:
        if not name.endswith((".md", "jsonl")):
            assert (tmp_path / "r" / name).read_bytes() == (finished_run.path / name).read_bytes(), name
    for name in ("corpus", "unprojected"):
        assert getattr(Run(tmp_path / "r"), name).records == getattr(finished_run, name).records
    assert not [path for path in (tmp_path / "r").rglob("*") if path.name.endswith(".tmp")]


def test_an_empty_adapter_of_a_run_is_trained_again(finished_run, tiny_settings, tiny_pair, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "adapter")
    (tmp_path / "r" / "adapter").mkdir()
    spd.run(spd.SPDConfig.make(tiny_settings), tmp_path / "r", progress=False, pair=tiny_pair)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "r" / name).read_bytes() == (finished_run.path / name).read_bytes()


@pytest.mark.parametrize("name", ["...jsonl", "..jsonl", "....jsonl"])
def test_a_file_named_by_dots_alone_names_no_results(tiny_settings, study_config, tmp_path, name):
    data = tmp_path / name
    data.write_text('{"prompt": "a", "completion": "1", "answer": "1"}\n')
    config = spd.SPDConfig.make({**tiny_settings, "task": str(data), "task_options": {}})
    with refused(data, "rename the file"):
        config.targets  # noqa: B018 (reading is what is tested)
    with refused(data, "rename the file"):
        spd.run(config, tmp_path / "r", progress=False)
    study = {**study_config.model_dump(), "task_options": {}}
    with refused(data, "rename the file"):
        StudyConfig.make({**study, "sources": [str(data)], "targets": ["synthetic-math"]})
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["evaluate", "extract", "spans", "compare", "dashboard"])
def test_a_place_that_cannot_be_written_is_found_out_first(command, tmp_path):
    out = tmp_path / "out"
    out.write_text("x") if command == "extract" else out.mkdir()
    arguments = {
        "evaluate": ["--model", "/no/model", "--task", "synthetic-math", "--out", out],
        "extract": ["--model", "/no/model", "--task", "synthetic-math", "--out", out],
        "spans": ["synthetic-math", "--model", "/no/model", "--html", out],
        "compare": ["/no/run", "/no/other", "--out", out],
        "dashboard": ["/no/run", "--out", out],
    }[command]
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert isinstance(result.exception, SPDError)
    assert str(out) in str(result.exception) and "choose another" in str(result.exception)


@pytest.mark.parametrize("kind", [Run, Study, Rounds])
@pytest.mark.parametrize("content", ["[]", "null", '"text"', "3"])
def test_notes_that_are_no_table_are_refused(kind, content, tmp_path):
    folder = kind(tmp_path)
    (tmp_path / folder.notes_file).write_text(content)
    with refused(tmp_path / folder.notes_file, f"notes of a {kind.__name__.lower()}"):
        _ = folder.notes
