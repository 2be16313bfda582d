"""A study: what it makes, that it is made once, survives being killed, grows, and refuses before it begins."""

import json
import multiprocessing
import shutil
import sys

import pytest
import torch

import spd_lens as spd
from spd_lens import methods
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.outcomes import with_answer_only
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.methods.base import Method
from spd_lens.study import engine
from spd_lens.study.costs import Machine
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study
from spd_lens.study.plan import unit_costs
from spd_lens.study.shapes import shape_of
from spd_lens.study.side_effects import side_effect_examples
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from tests.helpers import killed_once_there, refused
from tests.study.conftest import counting

MATH = {"synthetic-math": {"max_new_tokens": 8}}
TASK_OPTIONS = {**MATH, "synthetic-qa": {"max_new_tokens": 4}}
REPORTS = {"study.json", "report.md", "report.html", "comparisons.csv", "manifest.json"}
"""Reports and notes speak of times, and the manifest has their digests."""
LOGGERS = {"spd_lens.runs.stages", "spd_lens.study.engine"}
TABLES = {*REPORTS, "study.yaml", "results.csv", "corpora.csv", "findings.json", "README.md"}
"""What every start writes anew, or may: an adapter's card says what is known of it by now."""


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """Reports have tests of their own, and take as long as all else here; the finished study has its own."""
    monkeypatch.setattr(engine, "_report", lambda study: None)


def task_of(name):
    return spd.tasks.get(name, **TASK_OPTIONS[name])


def outcomes_of(pair, name, n, policies):
    """What is measured teacher-forced of a task's first items."""
    task = task_of(name)
    items = task.test(n, 42)
    found = teacher_forced(pair, items, policies, progress=False)
    return with_answer_only(pair, task, items, policies, found, progress=False)


def contents(folder):
    """Content of every file that a study is made of, without the seconds that a training notes.

    Hidden files are locks, and what a killed process was about to give its name.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in REPORTS and not path.name.endswith(".lock") and path.name[0] != ".":
            name = str(path.relative_to(folder))
            found[name] = path.read_bytes()
            if path.name == "training.json":
                found[name] = {**json.loads(found[name]), "seconds": None, "sha256": None}
            elif path.name == "adapter_config.json":  # PEFT writes a set, in another order in every process
                record = json.loads(found[name])
                found[name] = {**record, "target_modules": sorted(record["target_modules"])}
    return found


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.fixture
def calls():
    """How often the expensive library calls were made; they do their work."""
    with counting() as made:
        yield made


# what a study leaves behind


def test_every_cell_is_done(finished_study, study_of):
    study = Study.open(finished_study.path)
    assert study.config == study_of()
    cells = study.cells()
    assert [(cell.source, cell.method, cell.seed) for cell in cells] == [
        ("synthetic-math", method, seed) for method in ("psr", "spd") for seed in (1, 2)
    ]
    assert all(cell.done for cell in cells)
    for cell in cells:
        assert len(spd.Corpus.load(cell.corpus_path)) == 6
        assert (cell.projection is not None) == (cell.method == "spd")
        assert (cell.path / "subspace.safetensors").exists() == (cell.method == "spd")
        assert list(cell.effects("synthetic-math")) == ["trained", "projected"][: 1 + (cell.method == "spd")]
        assert len(cell.effects("synthetic-qa")["trained"]) == 5
        assert [len(cell.result(target).items) for target in ("synthetic-math", "synthetic-qa")] == [4, 4]
        assert cell.result_path("synthetic-qa", "projected").exists() == (cell.method == "spd")
    leftovers = [path for path in study.path.rglob("*") if "training" in path.name and path.is_dir()]
    assert not leftovers
    assert (study.path / "report.md").exists()


def test_the_record_says_how(finished_study):
    notes = finished_study.notes
    assert notes["resolved"]["sampling"] == {"temperature": 0.7, "top_p": 0.95, "top_k": None}
    assert notes["versions"]["torch"] == torch.__version__
    assert set(notes["data"]) == {"synthetic-math", "synthetic-qa"}
    assert set(notes["measured"]) == {"extract", "generate", "finetune", "measure", "side effects", "score"}
    assert all(entry["seconds"] > 0 and entry["work"] > 0 for entry in notes["measured"].values())


def test_stages_are_the_library_calls(finished_study, tiny_pair, tmp_path):
    """One cell, made again by hand: nothing depends on what is done together."""
    math = task_of("synthetic-math")
    subspace = extract(tiny_pair, math.calibration(4, 42), progress=False).subspace(0.5)
    corpora = {}
    for seed in (1, 2):
        cell = finished_study.cell("synthetic-math", "spd", seed)
        for site in subspace.sites:
            assert torch.allclose(cell.subspace.projector(site), subspace.projector(site), atol=1e-6)
        corpora[seed] = spd.generate(
            tiny_pair, math.train(6, 42), subspace=cell.subspace, seed=seed, max_new_tokens=8, progress=False
        )  # fmt: skip
        assert spd.Corpus.load(cell.corpus_path).records == corpora[seed].records
    assert corpora[1].records != corpora[2].records
    adapter = spd.finetune(
        tiny_pair, corpora[2], out=tmp_path / "adapter", lr=0.01, epochs=1, batch_size=3, seed=2, progress=False
    )
    policies = [Policy("trained", adapter=adapter), Policy("projected", cell.subspace)]
    for name, n in (("synthetic-math", 6), ("synthetic-qa", 5)):
        assert cell.effects(name) == outcomes_of(tiny_pair, name, n, policies)
        own = evaluate(tiny_pair, task_of(name), 4, adapter=adapter, name="spd", progress=False)
        assert cell.result(name).items == own.items
        under = evaluate(tiny_pair, task_of(name), 4, cell.subspace, name="spd", progress=False)
        assert cell.result(name, "projected").items == under.items


def test_the_base_is_measured_without_anything(finished_study, tiny_pair):
    base = finished_study.base()
    for name, n in (("synthetic-math", 6), ("synthetic-qa", 5)):
        assert base.effects(name)["trained"] == outcomes_of(tiny_pair, name, n, [Policy("base")])["base"]
        assert base.result(name).items == evaluate(tiny_pair, task_of(name), 4, progress=False).items


def test_side_effects_are_on_texts_that_are_neither_source_nor_target(finished_study, study_of, tiny_pair):
    sets = side_effect_examples(study_of(), tiny_pair)
    assert sets and not {"synthetic-math", "synthetic-qa"} & set(sets)
    for cell in finished_study.cells():
        found = {path.stem for path in (cell.path / "side_effects").iterdir()}
        assert found == set(sets)
        for name, items in sets.items():
            assert [item.id for item in cell.effects(name, side=True)["trained"]] == [item.id for item in items]


def test_training_and_projection_have_an_effect(finished_study):
    """Or the tests above would compare nothing with nothing."""
    for cell in finished_study.cells():
        for phase, items in cell.effects("synthetic-math").items():
            assert max(item.kl for item in items) > 1e-3, (cell, phase)
    assert max(item.kl for item in finished_study.base().effects("synthetic-math")["trained"]) == 0


# shared


def test_everything_is_done_once(finished_study):
    assert [path.name for path in finished_study.path.rglob("moments*")] == ["moments-aligned.safetensors"]
    calls = finished_study.calls
    assert (calls["extract"], calls["generate"], calls["finetune"]) == (1, 4, 4)
    # per pass: the base alone, then for each target and set of texts the methods; SPD's projection only with the first
    # seed, since its subspace does not depend on the seed
    n_sets = len(calls["forced"]) // 3
    assert calls["forced"] == [["base"]] * n_sets + [["psr", "spd", "projected"]] * n_sets + [["psr", "spd"]] * n_sets
    first, second = (finished_study.cell("synthetic-math", "spd", seed) for seed in (1, 2))
    assert first.effects("synthetic-qa")["projected"] == second.effects("synthetic-qa")["projected"]
    assert first.result("synthetic-qa", "projected").items == second.result("synthetic-qa", "projected").items


def test_a_finished_study_does_nothing_again(study_of, tiny_pair, copied_study, calls):
    before = times(copied_study.path)
    run_study(study_of(), copied_study.path, pair=tiny_pair)
    assert calls == {"extract": 0, "generate": 0, "finetune": 0, "forced": []}
    after = times(copied_study.path)
    assert {path.name for path in before if before[path] != after[path]} <= TABLES


def test_what_methods_share_and_what_not(study_of, tiny_pair, tmp_path, calls):
    """With the loss on all tokens, `spd` and its control `spd-full-loss` are one method; the others are not."""

    class Half(Method):
        """Drops half of what `psr` would write."""

        name = "half"

        def curated(self, corpus):
            return spd.Corpus(corpus.records[: len(corpus) // 2], settings=corpus.settings)

    names = ["spd", "spd-full-loss", "spd-random", "psr", "ssd", "half"]
    shape = shape_of("tiny", tiny_pair.hf)
    methods.register(Half)
    try:
        config = study_of(
            methods=names, seeds=[1], settings={"loss": "full"}, n_side_effects=0, targets=["synthetic-math"],
            task_options=MATH, score_projected=False,
        )  # fmt: skip
        study = run_study(config, tmp_path / "study", pair=tiny_pair)
        costs = unit_costs(config, shape, Machine.assumed("cpu", 4))
    finally:
        del sys.modules["spd_lens.methods.registry"]._METHODS["half"]
    assert (calls["extract"], calls["generate"], calls["finetune"]) == (1, 4, 6)
    # what was copied took no time, and would make the others look faster than they are
    works = [cost.seconds for unit, cost in costs.items() if unit.stage == "generate"]
    assert len(works) == 6
    assert study.measured()["generate"]["work"] == pytest.approx(4 * works[0])
    assert calls["forced"] == [
        ["base"], ["spd", "projected", "spd-full-loss", "spd-random", "projected", "psr", "ssd", "half"]
    ]  # fmt: skip
    cells = {name: study.cell("synthetic-math", name, 1) for name in names}
    corpora = {name: spd.Corpus.load(cell.corpus_path) for name, cell in cells.items()}
    for one, other in (("spd", "spd-full-loss"), ("psr", "half")):
        assert cells[one].corpus_path.read_bytes() == cells[other].corpus_path.read_bytes()
        assert corpora[one].settings == corpora[other].settings
    assert len({tuple(r.completion for r in corpora[name]) for name in ("spd", "spd-random", "psr", "ssd")}) == 4
    assert corpora["ssd"].settings["temperature"] == 1.6
    assert cells["spd"].effects("synthetic-math") == cells["spd-full-loss"].effects("synthetic-math")
    assert (
        cells["spd"].effects("synthetic-math")["projected"]
        != cells["spd-random"].effects("synthetic-math")["projected"]
    )
    done = json.loads((cells["half"].path / "done.json").read_text())
    assert (done["n_generated"], done["n_trained_on"]) == (6, 3)
    assert json.loads((cells["half"].adapter / "training.json").read_text())["n_sequences"] == 3


# stopped and continued


@pytest.fixture(scope="module")
def processes():
    """Processes that start in a moment, from a server that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(variable, "1")  # as in the tests' own process
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["spd_lens.study.engine"])
        yield context


PSR, SPD = (f"synthetic-math/{method}" for method in ("psr", "spd"))
STAGES = [
    "study.yaml",
    "base/eval/synthetic-math.jsonl",
    f"{SPD}/1/subspace.safetensors",
    f"{PSR}/1/corpus.jsonl",
    f"{SPD}/1/adapter.training",
    f"{SPD}/1/side_effects/*.json",
    f"{SPD}/1/eval-projected/synthetic-qa.json",
    f"{SPD}/2/corpus.jsonl",
]


def test_killed_at_every_stage(study_of, tmp_path, tiny_pair, finished_study, processes):
    """SIGKILL each time; what is left goes on to the same files, bit for bit."""
    out = tmp_path / "study"
    for stage in STAGES:
        killed_once_there(processes, out, stage, run_study, study_of(), out)
        assert not (out / "results.csv").exists(), stage
    run_study(study_of(), out, pair=tiny_pair)
    mine, theirs = contents(out), contents(finished_study.path)
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if mine[name] != theirs[name]} == set()


def test_stopped_while_a_corpus_is_copied(study_of, tiny_pair, copied_study, monkeypatch):
    """The settings of a corpus without the corpus itself: it is made."""
    cell = copied_study.cell("synthetic-math", "psr", 2)
    before = contents(copied_study.path)
    cell.corpus_path.unlink()
    shutil.rmtree(cell.adapter)
    run_study(study_of(), copied_study.path, pair=tiny_pair)
    assert contents(copied_study.path) == before


# growing


def test_another_seed_leaves_what_is_there_untouched(study_of, tiny_pair, copied_study):
    study = copied_study
    before, kept = times(study.path), contents(study.path)
    run_study(study_of(seeds=[1, 2, 3]), study.path, pair=tiny_pair)
    after, now = times(study.path), contents(study.path)
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= TABLES
    assert all(now[name] == kept[name] for name in kept if name.rpartition("/")[2] not in TABLES)
    assert {name.split("/")[2] for name in now if name not in kept and "/" in name} == {"3"}
    assert study.config.seeds == [1, 2, 3]
    assert study.cell("synthetic-math", "spd", 3).done


def test_another_method_leaves_what_is_there_untouched(study_of, tiny_pair, copied_study, calls):
    study = copied_study
    before = times(study.path)
    run_study(study_of(methods=["spd-random", "base", "psr", "spd"]), study.path, pair=tiny_pair)
    assert (calls["extract"], calls["generate"], calls["finetune"]) == (0, 2, 2)
    after = times(study.path)
    changed = {path for path in before if before[path] != after[path] and "synthetic-math" in path.parts}
    assert {path.name for path in changed} <= {"README.md"}
    assert study.config.methods == ["base", "psr", "spd", "spd-random"]


# refused


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"settings": {"lr": 0.5}}, ("holds a study with other settings", "lr: 0.01 there, 0.5 now", "another --out")),
        ({"seeds": [1]}, ("seeds: 2 there and not now",)),
        ({"methods": ["base", "spd"]}, ("methods: psr there and not now",)),
    ],
)
def test_a_folder_of_another_study_is_refused(changes, words, study_of, tiny_pair, copied_study):
    before = contents(copied_study.path)
    with refused(*words):
        run_study(study_of(**changes), copied_study.path, pair=tiny_pair)
    assert contents(copied_study.path) == before


def test_refused_before_anything_is_written(study_of, tiny_pair, tmp_path):
    out = tmp_path / "study"
    file = tmp_path / "few.jsonl"
    records = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "answer": f"{i + 1}"} for i in range(10)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    few = {"sources": [str(file)], "targets": [str(file)], "task_options": {}}
    cases = [
        ({**few, "n_forced": 2, "settings": {"n_eval": 2}}, ()),
        ({**few, "n_forced": 2, "settings": {"n_eval": 2, "n_train": 60}}, ("60 train examples", "there are 7")),
        ({**few, "n_forced": 90, "settings": {"n_eval": 2}}, ("90 test examples", "there are 3")),
        ({"settings": {"layers": [9]}}, ("layer",)),
        ({"settings": {"max_new_tokens": 250}}, ("room",)),
        ({"settings": {"lora_targets": ["c_attn"]}}, ("c_attn",)),
        ({"settings": {"device": "cuda:7"}}, ("device",)),
        ({"targets": ["synthetic-code"], "task_options": {}, "n_forced": 4}, ("allow-code-execution",)),
    ]
    for changes, words in cases:
        config = study_of(**changes)
        if words:
            with refused(*words):
                run_study(config, out, pair=tiny_pair)
        else:  # or the cases of too few examples would be refused for something else
            engine._check(config, engine.experiments_of(config, tmp_path))
        assert not out.exists()


def test_a_folder_of_something_else_is_refused(study_of, tiny_pair, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refused("exists and is not a study"):
        run_study(study_of(), tmp_path, pair=tiny_pair)
    with refused("is not a study: it has no study.yaml"):
        Study.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_weights_are_refused(study_of, copied_study, fresh_pair):
    with torch.no_grad():
        fresh_pair.hf.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with refused("the model is not what", "weights differs"):
        run_study(study_of(), copied_study.path, pair=fresh_pair)


def test_two_at_once_are_refused(study_of, tiny_pair, copied_study):
    with copied_study.locked(), refused("another process is working on"):
        run_study(study_of(seeds=[1, 2, 3]), copied_study.path, pair=tiny_pair)
    assert copied_study.config.seeds == [1, 2]


def test_every_unit_says_what_is_left(study_of, tiny_pair, copied_study, caplog):
    shutil.rmtree(copied_study.cell("synthetic-math", "psr", 2).path)
    with caplog.at_level("INFO", logger="spd_lens"):
        run_study(study_of(), copied_study.path, pair=tiny_pair)
    lines = [record.getMessage() for record in caplog.records if record.name in LOGGERS]
    assert lines[0] == "7 of 33 units to do"
    assert lines[1].startswith("[1/7] generate: psr, from synthetic-math, seed 2: ") and "about" in lines[1]
    assert lines[-1].endswith("about 0 s left")


def test_a_study_takes_another_published_name(copied_study, study_of):
    named = study_of(settings={"published_name": "Qwen2.5-0.5B-Instruct"})
    copied_study.begin(copied_study.admits(named))
    assert copied_study.config == named
    copied_study.begin(copied_study.admits(study_of()))
    assert copied_study.config == study_of()
