"""A study made part by part, by workers here, on Ray or by submitit: what it makes is what one process makes."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import threading
from concurrent.futures import Future

import fsspec
import pytest

from spd_lens.files.store import Store
from spd_lens.study import engine
from spd_lens.study.cluster import assemble, here, on_ray, on_submitit, run_parts
from spd_lens.study.command import workers_of
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study
from spd_lens.study.parts import Manifest, Part, Record, make_part, parts_of, units_of
from spd_lens.study.plan import schedule
from spd_lens.study.reporting.report import write_report
from tests.helpers import refused
from tests.study.conftest import counting
from tests.study.test_engine import contents

BASE, SOURCE = Part(method="base"), Part("synthetic-math")
PSR, SPD = (Part("synthetic-math", method, 1) for method in ("psr", "spd"))
CORPUS = f"{SPD.path}/corpus.jsonl"


@pytest.fixture(scope="module", autouse=True)
def without_pages():
    """The page of a report has tests of its own, and takes as long as a cell here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_report", lambda study: write_report(study.path))
        yield


@pytest.fixture(scope="module")
def config(study_of):
    """Two cells, of which one projects."""
    math = {"synthetic-math": {"max_new_tokens": 8}}
    return study_of(
        targets=["synthetic-math"], seeds=[1], task_options=math, n_forced=4, n_side_effects=1,
        settings={"n_train": 4, "n_eval": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The study as one process makes it."""
    return run_study(config, tmp_path_factory.mktemp("alone") / "study")


@pytest.fixture(scope="module")
def parted(config, tmp_path_factory):
    """The study made in parts, by way of a store in memory; to be left as it is."""
    return run_parts(config, tmp_path_factory.mktemp("parted") / "study", store="memory://parted")


@pytest.fixture
def url(parted):
    """A copy of the store of the finished study."""
    files, name = fsspec.filesystem("memory"), secrets.token_hex(4)
    for path in files.find("/parted"):
        files.pipe_file(path.replace("/parted", f"/{name}", 1), files.cat_file(path))
    return f"memory://{name}"


def damage(url, name, part=SPD):
    """Change one byte of the object that holds a part's file; returns its sha256."""
    digest = Manifest.of(Store(url), part).files[name]["sha256"]
    files, root = fsspec.core.url_to_fs(url)
    place = f"{root}/sha256/{digest[:2]}/{digest}"
    content = bytearray(files.cat_file(place))
    content[len(content) // 2] ^= 1
    files.pipe_file(place, bytes(content))
    return digest


def failing(part, times):
    """Workers that are lost `times` times when they are given a part; `.tries` counts how often they were."""

    @contextlib.contextmanager
    def workers(folder):
        with here(folder) as submit:

            def or_fail(url, asked):
                if asked != part or workers.tries == times:
                    return submit(url, asked)
                workers.tries += 1
                job = Future()
                job.set_exception(RuntimeError("the machine is gone"))
                return job

            yield or_fail

    workers.tries = 0
    return workers


def same(study, other):
    mine, theirs = contents(study.path), contents(other.path)
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if mine[name] != theirs[name]} == set()


# what parts make


def test_parts_are_the_whole_plan(study_of):
    """Each unit once; but a source extracts for its cells, and what is measured of all cells is, cell by cell."""
    config = study_of()
    parts = parts_of(config)
    assert parts[:2] == [BASE, SOURCE] and len(parts) == 2 + 2 * 2
    found = [unit for part in parts for unit in units_of(config, part)]
    shared = [unit for unit in found if unit.stage in ("measure", "side effects") and unit.source]
    assert len(shared) == len(set(shared)) == 4 * (2 + 1)
    whole = [unit for unit in schedule(config) if unit.stage not in ("measure", "side effects") or not unit.source]
    rest = [unit for unit in found if unit not in shared]
    assert set(rest) == set(whole) and [unit for unit in set(rest) if rest.count(unit) > 1] == units_of(config, SOURCE)
    assert parts_of(study_of(methods=["psr"])) == [BASE, PSR, PSR._replace(seed=2)]  # nothing to extract


def test_parts_make_what_one_process_makes(parted, alone):
    same(parted, alone)
    assert parted.notes["weights"] == alone.notes["weights"] and parted.notes["versions"] == alone.notes["versions"]
    assert all(cell.done for cell in parted.cells())


def test_what_is_finished_is_put_together_elsewhere(parted, url, tmp_path):
    with counting() as calls:
        study = assemble(url, tmp_path / "study")
        again = run_parts(study.config, tmp_path / "study", store=url)  # nothing is left to do
    assert calls == {"extract": 0, "generate": 0, "finetune": 0, "forced": []}
    same(again, parted)


def test_a_wrong_object_is_refused_by_name_and_its_cell_made_again(parted, url, tmp_path):
    digest = damage(url, CORPUS)
    with refused("1 of 4 parts", str(SPD), digest, CORPUS, "the rest"):
        assemble(url, tmp_path / "study")
    assert not (tmp_path / "study" / CORPUS).exists()
    report = (tmp_path / "study/report.md").read_text()
    assert "not complete" in report and "spd from synthetic-math has no results" in report.replace("`", "")
    with counting() as calls:
        study = run_parts(parted.config, tmp_path / "study", store=url)
    assert (calls["extract"], calls["generate"], calls["finetune"]) == (0, 1, 0)  # all else was whole
    same(study, parted)
    same(assemble(url, tmp_path / "third"), parted)


def test_a_study_of_one_process_goes_on_in_parts(alone, tmp_path):
    shutil.copytree(alone.path, tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / SPD.path / "adapter")
    (tmp_path / "study" / SPD.path / "done.json").unlink()
    with counting() as calls:
        study = run_parts(alone.config, tmp_path / "study")
    assert (calls["extract"], calls["generate"], calls["finetune"], calls["forced"]) == (0, 0, 1, [])
    same_but_store = tmp_path / "bare"
    shutil.copytree(study.path, same_but_store, ignore=shutil.ignore_patterns(".store"))
    same(Study(same_but_store), alone)


# workers that fail


def test_a_lost_worker_is_replaced_twice(parted, url, tmp_path, caplog):
    fsspec.filesystem("memory").rm_file(f"/{url.removeprefix('memory://')}/manifests/{PSR.path}.json")
    workers = failing(PSR, times=2)
    with caplog.at_level("WARNING", logger="spd_lens"):
        study = run_parts(parted.config, tmp_path / "study", workers, store=url)
    assert workers.tries == 2
    tried = [r.getMessage() for r in caplog.records if "is tried again" in r.getMessage()]
    assert tried == [f"{PSR} is tried again: its worker was lost (the machine is gone)"] * 2
    same(study, parted)


def test_a_part_that_cannot_be_made_is_named_and_the_rest_reported(parted, url, tmp_path):
    store = Store(url)
    for part in (SOURCE, SPD):  # the cell has all of its files, and is to be looked at again
        Manifest.of(store, part).model_copy(update={"units": []}).write(store, part)
    workers = failing(SOURCE, times=9)
    with refused("1 of 4 parts", f"{SOURCE} (its worker was lost (the machine is gone))", "goes on"):
        run_parts(parted.config, tmp_path / "study", workers, store=url)
    assert workers.tries == 3
    assert Study(tmp_path / "study").cell(*SPD).done
    assert "spd" in (tmp_path / "study/report.md").read_text()


# other versions, other models, other data


def test_a_part_of_another_version_is_refused_by_name(parted, url, tmp_path):
    store = Store(url)
    manifest = Manifest.of(store, SPD)
    other = {**manifest.notes, "versions": {**manifest.notes["versions"], "torch": "1.0"}, "code": "f" * 64}
    manifest.model_copy(update={"notes": other, "host": "node7"}).write(store, SPD)
    with refused(str(SPD), "node7", "versions of torch", "1.0 here", "code:", "the same packages"):
        assemble(url, tmp_path / "study")
    assert not (tmp_path / "study" / SPD.path).exists()


def test_a_worker_with_other_weights_or_data_refuses_before_it_works(url):
    store = Store(url)
    record = Record.of(store)
    other = {"weights": "0" * 64, "data": {"synthetic-math": {"file": "0" * 64}}}
    record.model_copy(update={"notes": {**record.notes, **other}}).write(store)
    with counting() as calls:
        why = make_part(url, SPD)
    assert "weights: " in why and "data of synthetic-math: " in why
    assert "give all machines the same packages, model and data" in why
    assert calls["generate"] == calls["finetune"] == 0


def test_a_folder_of_another_model_takes_nothing_from_a_store(alone, url, tmp_path):
    shutil.copytree(alone.path, tmp_path / "study")
    study = Study(tmp_path / "study")
    study.note(weights="0" * 64)
    before = contents(study.path)
    with refused("was not begun with what the study in", "weights: ", "another --out"):
        assemble(url, study.path)
    assert contents(study.path) == before


# refused before any work


def test_refused_before_any_work(parted, url, tmp_path):
    out, settings = tmp_path / "study", parted.config.settings
    (tmp_path / "file").write_text("")
    with refused("holds a study with other settings", "lr", "another --store"):
        run_parts(parted.config.model_copy(update={"settings": {**settings, "lr": 0.5}}), out, store=url)
    with refused("cannot be read", "your rights"):
        run_parts(parted.config, out, store=str(tmp_path / "file" / "store"))
    with refused("cannot be written", "your rights"):  # where not even root may
        run_parts(parted.config, out, store="/proc/store")
    with refused("cannot be opened", "nowhere"):
        run_parts(parted.config, out, store="nowhere://x")
    with refused("there is no study in memory:"):
        assemble("memory://nothing", out)
    assert not out.exists()
    assert "on_ray" and make_part("memory://nothing", SPD).startswith(
        "memory:///nothing holds no study where the worker"
    )


def test_flags_that_name_no_workers(tmp_path):
    assert workers_of(None, None, []) is None
    with refused("either --ray or --submitit"):
        workers_of("local", "local", [])
    with refused("--worker is about"):
        workers_of(None, None, ["num_gpus=1"])
    with refused("--worker 'gpus' must be KEY=VALUE", "num_gpus=1"):
        workers_of("local", None, ["gpus"])
    pytest.importorskip("submitit", reason="submitit is not installed (extra cluster)")
    for cluster, options, words in [("nowhere", [], "'nowhere'"), ("local", ["gpus=1"], "gpus")]:
        with refused("submitit cannot give jobs", words), workers_of(None, cluster, options)(tmp_path):
            pass


# other processes


def killed_after(url, part, stage):
    """Kill the process that makes a part, with signal 9, once it has published a unit of a stage."""

    def watch():
        store = Store(url)
        while not stop.wait(0.02):
            manifest = Manifest.of(store, part)
            if any(unit.startswith(stage) for unit in manifest.units):
                os.kill(manifest.pid, signal.SIGKILL)
                return

    stop, thread = threading.Event(), threading.Thread(target=watch)
    thread.start()
    return lambda: (stop.set(), thread.join())


def test_ray_with_a_worker_killed_in_the_middle(config, alone, tmp_path, caplog, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed (extra cluster)")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the tests' own process
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it would kill ours for the memory of others
    store = str(tmp_path / "store")
    end = killed_after(store, SPD, "generate")
    try:
        with caplog.at_level(logging.WARNING, logger="spd_lens"):
            study = run_parts(config, tmp_path / "study", on_ray("local", num_cpus=1), store=store, at_once=2)
    finally:
        end()
    assert [r.getMessage() for r in caplog.records if str(SPD) in r.getMessage()][0].startswith(
        f"{SPD} is tried again: its worker was lost"
    )
    same(study, alone)


def test_submitit_runs_parts_as_jobs(config, alone, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed (extra cluster)")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = config.model_copy(update={"methods": ["base", "psr"]})
    study = run_parts(small, tmp_path / "study", on_submitit("local"), at_once=2)
    for part in (BASE, PSR):
        mine, theirs = (contents(place / part.path) for place in (study.path, alone.path))
        assert {name for name in theirs if mine[name] != theirs[name]} <= {"adapter/README.md"}  # it knows of all cells
    assert list((study.path / ".jobs").glob("*_log.out"))
