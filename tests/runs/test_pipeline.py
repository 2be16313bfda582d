"""A whole run: what it leaves behind, that it is done once, survives being killed, and refuses before it begins."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import spd_lens as spd
from spd_lens.evaluation import Format
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.outcomes import fitting, other_texts, with_answer_only
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.examples import Example
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.stages import note_set_up
from spd_lens.runs.summary import write_summary
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from tests.completions_server import NEEDS_OPENAI, serving
from tests.conftest import N_CTX
from tests.helpers import assert_same_bits, killed_once_there, publish, refused

SITES = [Site(1, "k"), Site(1, "v"), Site(3, "k"), Site(3, "v")]
NOTES = ("run.json", "data_card.json", "summary.md", "manifest.json", ".lock")
"""What every start writes, whatever there is left to do."""


def config_of(settings, **changes):
    return spd.SPDConfig.make({**settings, **changes})


def files_of(directory):
    """Content of every file, but for locks."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in found if path.name != ".lock"}


def assert_same_results(one, other):
    """Two runs made the same artefacts: bit for bit, except for times and paths."""
    assert one.config.to_yaml() == other.config.to_yaml()
    for get in (lambda run: run.moments.gradient, lambda run: run.moments.activation, lambda run: run.subspace.bases):
        mine, theirs = get(one), get(other)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[site], theirs[site]) for site in mine)
    assert one.corpus.records == other.corpus.records
    assert one.unprojected.records == other.unprojected.records
    mine, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one.effects("neutral", side=True) == other.effects("neutral", side=True)
    for task in one.config.targets:
        assert one.effects(task) == other.effects(task)
        for policy in one.config.policies:
            assert one.result(task, policy) == other.result(task, policy)
    tail = re.compile(r"## Time.*", re.DOTALL)  # seconds differ
    assert tail.sub("", one.summary) == tail.sub("", other.summary)


# what a run leaves behind


def test_every_artefact_is_there_and_readable(finished_run, tiny_settings):
    run = spd.Run.open(finished_run.path)
    assert run.config == config_of(tiny_settings)
    assert (run.moments.sites, run.subspace.sites) == (SITES, SITES)
    assert int(run.moments.n_examples.sum()) == 6
    assert (len(run.corpus), len(run.unprojected)) == (12, 6)
    assert run.corpus.complete
    assert {path.name for path in run.adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert list(run.effects("synthetic-math")) == ["base", "projected", "spd", "random-0", "random-1"]
    for policy in ("base", "projected", "spd"):
        result = run.result("synthetic-math", policy)
        assert (result.policy, result.task, len(result.items)) == (policy, "synthetic-math", 12)
    leftovers = [path.name for path in run.path.rglob("*") if path.is_dir() and "training" in path.name]
    assert not leftovers


def test_the_record_says_how(finished_run, tiny_settings):
    notes = finished_run.notes
    assert notes["resolved"] == {
        "dtype": "float32", "device": "cpu", "backend": notes["resolved"]["backend"], "format": "raw",
        "sampling": {"temperature": 0.7, "top_p": 0.95, "top_k": None},
    }  # fmt: skip
    assert notes["versions"]["torch"] == torch.__version__
    assert notes["fingerprint"]["n_layers"] == 4
    assert list(notes["eval_data"]) == ["synthetic-math"]
    assert set(notes["seconds"]) == {"extract", "generate", "compare", "finetune", "effects", "evaluate"}
    assert all(n > 0 for n in notes["hooks"]["firings"].values())
    assert list(notes["hooks"]["firings"]) == [str(site) for site in SITES]
    assert notes["hooks"]["fold_parity"]["kl"] < 1e-6


def test_stages_are_the_library_calls(finished_run, tiny_settings, tiny_pair, tmp_path):
    run, task = finished_run, spd.tasks.get("synthetic-math", max_new_tokens=8)
    moments = extract(tiny_pair, task.calibration(6, 42), progress=False)
    subspace = moments.subspace(0.5)
    for site in SITES:
        assert torch.allclose(run.moments.gradient[site], moments.gradient[site], rtol=1e-6)
        assert torch.allclose(run.subspace.projector(site), subspace.projector(site), atol=1e-6)
    options = {"max_new_tokens": 8, "progress": False}
    projected = spd.generate(tiny_pair, task.train(12, 42), subspace=run.subspace, **options)
    plain = spd.generate(tiny_pair, task.train(12, 42)[:6], **options)
    assert run.corpus.records == projected.records
    assert run.unprojected.records == plain.records
    assert run.corpus.records[:6] != run.unprojected.records
    held_out = task.test(12, 42)
    policies = [
        Policy("base"),
        Policy("projected", run.subspace),
        Policy("spd", adapter=run.adapter),
        *(Policy(f"random-{i}", run.subspace.random_like(42 + i)) for i in range(2)),
    ]
    forced = teacher_forced(tiny_pair, held_out, policies, progress=False)
    forced = with_answer_only(tiny_pair, task, held_out, policies, forced, progress=False)
    assert run.effects("synthetic-math") == forced
    texts = fitting(tiny_pair, other_texts(16))
    assert texts and run.effects("neutral", side=True) == teacher_forced(tiny_pair, texts, policies, progress=False)
    for policy in policies[:3]:
        again = evaluate(tiny_pair, task, 12, policy.subspace, policy.adapter, name=policy.name, progress=False)
        assert run.result("synthetic-math", policy.name).items == again.items


def test_a_run_in_a_session_of_whatever_state_is_the_same(finished_run, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            found = spd.run(config_of(tiny_settings), tmp_path / "run", progress=False)
            assert_same_results(found, finished_run)
            assert torch.get_default_device() == torch.device("meta")
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


def test_controls_and_training_have_an_effect(finished_run):
    """Or the tests above would compare nothing with nothing."""
    kl = {name: max(item.kl for item in items) for name, items in finished_run.effects("synthetic-math").items()}
    assert kl.pop("base") == 0
    assert min(kl.values()) > 1e-3
    assert len({round(value, 6) for value in kl.values()}) == len(kl)


# done once


def test_a_second_call_does_no_stage_again(finished_run, tiny_settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished_run.path, out)
    content = files_of(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name not in NOTES}
    spd.run(config_of(tiny_settings), out, progress=False)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert files_of(out) == content


STAGES = [
    "run.json",
    "moments.safetensors",
    "subspace.safetensors",
    "corpus.jsonl",
    "unprojected.jsonl",
    "adapter.training",
    "adapter.training/checkpoints/*/complete",
    "adapter",
    "effects/synthetic-math.json",
    "side_effects/neutral.json",
    "eval/synthetic-math/base.jsonl",
    "eval/synthetic-math/projected.json",
]


def test_a_run_killed_at_every_stage_ends_with_the_same_result(finished_run, tiny_settings, processes, tmp_path):
    out, config = tmp_path / "run", config_of(tiny_settings)
    for stage in STAGES:
        killed_once_there(processes, out, stage, spd.run, config, out, progress=False)
        assert not (out / "summary.md").exists(), stage
    assert_same_results(spd.run(config, out, progress=False), finished_run)
    assert not list(out.glob("adapter.training"))


def test_a_half_written_line_and_a_torn_file_are_made_good(finished_run, tiny_settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished_run.path, out)
    corpus = out / "corpus.jsonl"
    records = corpus.read_bytes().splitlines(keepends=True)
    corpus.write_bytes(b"".join(records[:5]) + records[5][:30])
    (out / "side_effects" / "neutral.json").write_text("[")
    for name in ("adapter", "effects", "eval"):
        shutil.rmtree(out / name)
    (out / "moments.safetensors").unlink()  # and one that the stages after it do not need
    assert_same_results(spd.run(config_of(tiny_settings), out, progress=False), finished_run)


def test_interrupted_between_moments_and_subspace(finished_run, tiny_settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished_run.path, out)
    (out / "subspace.safetensors").unlink()
    before = (out / "moments.safetensors").stat().st_mtime_ns
    assert_same_results(spd.run(config_of(tiny_settings), out, progress=False), finished_run)
    assert (out / "moments.safetensors").stat().st_mtime_ns == before


def test_the_models_own_generation_config_is_in_the_notes_and_the_summary(
    finished_run, tiny_settings, fresh_pair, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(finished_run.path, out)
    run, config = spd.Run(out), config_of(tiny_settings)
    fresh_pair.hf.generation_config = GenerationConfig(eos_token_id=1, num_beams=3)
    note_set_up(run, config, fresh_pair)  # nothing that is applied differs
    assert run.notes["generation_config_not_applied"] == {"num_beams": 3}
    assert run.notes["resolved"] == finished_run.notes["resolved"]
    fresh_pair.hf.generation_config = GenerationConfig(eos_token_id=1, repetition_penalty=1.2)
    with refused("the set-up", "resolved differs"):
        note_set_up(run, config, fresh_pair)
    (out / "run.json").write_text(json.dumps({k: v for k, v in run.notes.items() if k != "resolved"}))
    note_set_up(run, config, fresh_pair)
    assert run.notes["resolved"]["generation_config"] == {"repetition_penalty": 1.2}
    assert "of the model's own, `repetition_penalty = 1.2`" in write_summary(run)


def test_later_versions_are_noted_beside_the_first(finished_run, tiny_settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished_run.path, out)
    run = spd.Run(out)
    first = {**run.notes["versions"], "torch": "0.1"}
    run.note(versions=first)
    for _ in range(2):
        spd.run(config_of(tiny_settings), out, progress=False)
    assert run.notes["versions"] == first
    assert [later["versions"]["torch"] for later in run.notes["continued_with"]] == [torch.__version__]


# refused, and nothing changed


@pytest.mark.parametrize("changes", [{"lr": 0.02}, {"rank": 4}, {"seed": 1, "policies": ["base"]}])
def test_other_settings(finished_run, tiny_settings, changes):
    before = files_of(finished_run.path)
    with refused(str(finished_run.path), *changes, "--out"):
        spd.run(config_of(tiny_settings, **changes), finished_run.path, progress=False)
    assert files_of(finished_run.path) == before


def test_one_direction_is_not_all_directions(finished_run, tiny_settings, tmp_path):
    spd.Run.open(tmp_path / "run", config_of(tiny_settings, rank=1))
    with refused("rank: 1 there, 1.0 now"):
        spd.Run.open(tmp_path / "run", config_of(tiny_settings, rank=1.0))


def test_another_process_holds_the_directory(finished_run, tiny_settings):
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    before = files_of(finished_run.path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(finished_run.path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with refused("another process", str(finished_run.path)):
            spd.run(config_of(tiny_settings), finished_run.path, progress=False)
        other.communicate()
    assert files_of(finished_run.path) == before


def test_model_changed_meanwhile(finished_run, tiny_settings, tiny_llama_dir, tmp_path):
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_llama_dir, model)
    config = config_of(tiny_settings, model=str(model))
    with spd.Run.open(out, config).locked():
        pass
    pair = spd.load(str(model), dtype="float32", device="cpu")
    spd.run(config, out, progress=False, pair=pair)
    before = files_of(out)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 0.01  # embeddings, and so the fingerprint, are the same
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with refused("the model is not what", "weights differs"):
        spd.run(config, out, progress=False)
    assert files_of(out) == before


@pytest.fixture
def roomy_model(tiny_llama_dir, tmp_path):
    """With a context that holds a prompt and the 256 tokens that tasks ask for by default."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 600}))
    return str(model)


def test_data_changed_meanwhile(tiny_settings, roomy_model, tmp_path):
    data = tmp_path / "mine.jsonl"
    records = [{"prompt": f"{n} + 1?", "completion": f"It is {n + 1}.", "answer": str(n + 1)} for n in range(30)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config_of(
        tiny_settings, model=roomy_model, eval_tasks=[str(data)], n_eval=4, policies=["base"], n_random=0, epochs=1
    )
    out = tmp_path / "run"
    run = spd.run(config, out, progress=False)
    assert run.result("mine", "base").items[0].id.startswith("mine-")  # kept under the file's stem
    assert "## `mine`: 4 test items" in run.summary
    data.write_text("".join(json.dumps({**record, "prompt": "?" + record["prompt"]}) + "\n" for record in records))
    before = files_of(out)
    with refused("the data of the evaluation is not what", "eval_data differs"):
        spd.run(config, out, progress=False)
    assert files_of(out) == before


@pytest.mark.parametrize("what", ["file", "foreign", "below a file"])
def test_not_a_run_directory(tiny_settings, tmp_path, what):
    out = tmp_path / "thing"
    if what == "foreign":
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    else:
        out.write_text("x")
    place = out / "run" if what == "below a file" else out
    before = files_of(tmp_path)
    with refused(str(place)):
        spd.run(config_of(tiny_settings), place, progress=False)
    assert files_of(tmp_path) == before


def test_an_empty_directory_will_do(tiny_settings, tmp_path):
    (tmp_path / ".lock").touch()  # killed between the lock and the settings
    assert spd.Run.open(tmp_path, config_of(tiny_settings)).config_path.exists()


def test_reading_what_is_not_a_run(tmp_path):
    with refused("is not a run directory", str(tmp_path)):
        spd.Run.open(tmp_path)


def test_reading_what_is_not_finished(tiny_settings, tmp_path):
    run = spd.Run.open(tmp_path / "run", config_of(tiny_settings))
    assert run.notes == {}
    for get, words in [
        (lambda: run.moments, "moments.safetensors"),
        (lambda: run.subspace, "subspace.safetensors"),
        (lambda: run.corpus, "corpus.jsonl"),
        (lambda: run.adapter, "no adapter yet"),
        (lambda: run.effects("synthetic-math"), "synthetic-math.json"),
        (lambda: run.result("synthetic-math", "base"), "base.json"),
        (lambda: run.summary, "no summary yet"),
    ]:
        with refused(words):
            get()


@pytest.mark.parametrize("content", ["[]", '{"base": [{"loss": 1}]}', '{"base": 3}'])
def test_foreign_effects(tiny_settings, tmp_path, content):
    run = spd.Run.open(tmp_path / "run", config_of(tiny_settings))
    (run.path / "effects").mkdir()
    (run.path / "effects" / "t.json").write_text(content)
    with refused("t.json"):
        run.effects("t")


CANNOT_WORK = {
    "task": ({"task": "synthetic-meth"}, ["synthetic-meth", "synthetic-math"]),
    "task option": ({"task_options": {"dificulty": "easy"}}, ["dificulty", "difficulty"]),
    "evaluation task": ({"eval_tasks": ["synthetic-math", "svmap"]}, ["svmap", "svamp"]),
    "missing data": ({"task": "gsm8k", "data_dir": "no/such/place"}, ["no/such/place"]),
    "layer": ({"layers": "1,4"}, ["layer 4", "0 to 3"]),
    "rank above the width of a head": ({"rank": 9}, ["rank 9", "8"]),
    "rank above the joint width": ({"rank": 17, "per_head": False}, ["rank 17", "16"]),
    "LoRA target": ({"lora_targets": ["q_proj", "w_proj"]}, ["w_proj", "q_proj"]),
    "no chat template": ({"prompt_format": "chat"}, ["chat template", "raw"]),
    "device": ({"device": "tpu"}, ["'tpu'", "cuda"]),
    "dtype": ({"dtype": "int3"}, ["'int3'", "float32"]),
    "model": ({"model": "./no/model"}, ["./no/model"]),
    "prompt beyond the context": ({"max_new_tokens": N_CTX}, [f"context of {N_CTX}", "max_new_tokens"]),
    "system message without a template": ({"system": "Be brief."}, ["system='Be brief.'", "raw prompts", "'chat'"]),
    "thoughts without a template": ({"enable_thinking": False}, ["enable_thinking=False", "raw prompts"]),
    "evaluation beyond the context": ({"task_options": {"max_new_tokens": 200}}, ["synthetic-math", "context"]),
    "code that may not be run": ({"eval_tasks": ["synthetic-code"]}, ["synthetic-code", "--allow-code-execution"]),
}


@pytest.mark.parametrize(("changes", "words"), CANNOT_WORK.values(), ids=CANNOT_WORK)
def test_what_cannot_work_is_refused_before_anything_is_written(tiny_settings, tmp_path, changes, words):
    with refused(*words):
        spd.run(config_of(tiny_settings, **changes), tmp_path / "run", progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tiny_settings, tmp_path):
    with refused("'cuda'", "0 CUDA devices", "cpu"):
        spd.run(config_of(tiny_settings, device="cuda"), tmp_path / "run", progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["n_calibration", "n_train", "n_eval"])
def test_more_than_the_data_set_has(tiny_settings, tmp_path, setting):
    data = tmp_path / "own.jsonl"
    records = [{"prompt": f"{n}?", "completion": f"{n}!", "spans": [[0, 1]]} for n in range(20)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {"task": str(data), "task_options": {}, "n_calibration": 2, "n_train": 2, "n_eval": 2, "n_compared": 1}
    with refused("99", "own" if setting != "n_train" else "jsonl"):
        spd.run(config_of(tiny_settings, **{**changes, setting: 99}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# other ways to run


def test_other_choices_are_followed(tiny_settings, tiny_llama_dir, tmp_path):
    """Engine twin, joint, full loss, half strength, Q too, two evaluation tasks, one of them without the source's."""
    config = config_of(
        tiny_settings, engine="twin", per_head=False, loss="full", strength=0.5, kinds="k,q", rank="3", layers="0",
        eval_tasks="synthetic-qa,synthetic-math", policies="projected", n_eval=3, epochs=1,
    )  # fmt: skip
    pair = spd.load(str(tiny_llama_dir), dtype="float32", device="cpu")
    run = spd.run(config, tmp_path / "run", progress=False, pair=pair)
    assert not pair.has_lens
    assert "hooks" not in run.notes
    assert "No lens model was built" in run.summary
    subspace = run.subspace
    assert subspace.ranks == {Site(0, "k"): (3,), Site(0, "q"): (3,)}  # joint: one block
    assert subspace.origin["loss"] == "full"
    task = spd.tasks.get("synthetic-math")
    moments = extract(pair, task.calibration(6, 42), layers=0, kinds="k,q", loss="full", engine="twin", progress=False)
    assert torch.allclose(run.moments.gradient[Site(0, "q")], moments.gradient[Site(0, "q")], rtol=1e-6)
    corpus = spd.generate(
        pair, task.train(12, 42), subspace=subspace, strength=0.5, max_new_tokens=8, progress=False
    )  # fmt: skip
    assert run.corpus.records == corpus.records
    assert list(run.notes["eval_data"]) == ["synthetic-qa", "synthetic-math"]
    for name, options in (("synthetic-qa", {}), ("synthetic-math", {"max_new_tokens": 8})):
        again = evaluate(pair, spd.tasks.get(name, **options), 3, subspace, strength=0.5, progress=False)
        assert run.result(name, "projected").items == again.items
        assert f"## `{name}`: 3 test items" in run.summary
        forced = run.effects(name)["projected"]
        assert [item.kl for item in forced] == pytest.approx([item.kl for item in again.items], rel=1e-5)


def test_full_fine_tuning(tiny_settings, tiny_pair, tmp_path):
    config = config_of(tiny_settings, method="full", lr=1e-3, epochs=1, n_eval=3, policies="base,spd", n_random=0)
    run = spd.run(config, tmp_path / "run", progress=False)
    assert (run.adapter / "config.json").exists()
    assert max(item.kl for item in run.effects("synthetic-math")["spd"]) > 1e-4


def test_a_pair_of_ones_own(tiny_settings, tiny_llama_dir, tmp_path, state_of):
    config = config_of(tiny_settings, model="any/name", n_eval=3, policies="base", epochs=1, n_random=0)
    pair = spd.load(str(tiny_llama_dir), dtype="float32", device="cpu")
    lens, before = pair.lens, state_of(pair.hf)
    run = spd.run(config, tmp_path / "run", progress=False, pair=pair)
    assert pair.lens is lens  # a lens model that was there stays
    assert_same_bits(pair.hf, before)
    assert run.config.model == str(tiny_llama_dir)  # what was run, not what was not
    pair.drop_lens()
    spd.run(config, tmp_path / "again", progress=False, pair=pair)
    assert not pair.has_lens


def test_an_edited_lens_model_is_refused(tiny_settings, fresh_pair, tmp_path):
    with torch.no_grad():
        next(p for name, p in fresh_pair.lens.named_parameters() if "mlp" in name and p.ndim == 2).add_(0.5)
    with refused("sync"):
        spd.run(config_of(tiny_settings), tmp_path / "run", progress=False, pair=fresh_pair)
    assert not any(tmp_path.iterdir())


# the package's own face


def test_public_names():
    public = (
        "load ModelPair Example Site tasks estimators extract GradientMoments Subspace projected folded fold_to "
        "generate Corpus finetune evaluate EvalResult run Run SPDConfig protocol SPDError "
        "Guardrail push_to_hub from_hub explain detect"
    ).split()
    assert sorted(spd.__all__) == sorted(public)
    for name in public:
        assert getattr(spd, name).__doc__, name
        assert name in dir(spd)
    with pytest.raises(AttributeError, match="extrakt"):
        _ = spd.extrakt
    assert dataclasses.is_dataclass(spd.Example)


def test_a_finished_run_takes_another_published_name(finished_run, tiny_settings, tmp_path, monkeypatch):
    publish(monkeypatch, {("Known", "synthetic-math"): [(77.0, Format(4, "chat"))]})
    out = shutil.copytree(finished_run.path, tmp_path / "run")
    before = {path: content for path, content in files_of(out).items() if path not in (*NOTES, "config.yaml")}
    again = spd.run(config_of(tiny_settings, published_name="known"), out, progress=False)
    assert again.config == finished_run.config.model_copy(update={"published_name": "known"})
    assert "published of Known" in again.summary
    made = files_of(out)
    assert {path: made[path] for path in made if path not in (*NOTES, "config.yaml")} == before
    assert "published" not in spd.run(config_of(tiny_settings), out, progress=False).summary


# generated by a server


@NEEDS_OPENAI
def test_a_run_waits_for_the_projected_model_to_be_served(tiny_settings, tiny_llama_dir, tmp_path, monkeypatch):
    def settings(served):
        return config_of(
            tiny_settings, engine="twin", generation_engine="openai", engine_url=served.url, temperature=0.0
        )

    out = tmp_path / "run"
    with (
        serving({"base": tiny_llama_dir}) as served,
        refused("'base'", f"export {out}", "subspace.safetensors", "again"),
    ):
        spd.run(settings(served), out, progress=False)
    subspace = spd.Subspace.load(out / "subspace.safetensors")
    pair = spd.load(str(tiny_llama_dir), dtype="float32", device="cpu")
    spd.fold_to(pair.hf, subspace, tmp_path / "folded", tokenizer=pair.tokenizer)

    def until_here(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "finetune", until_here)
    with serving({"projected": tmp_path / "folded"}) as served, pytest.raises(KeyboardInterrupt):
        spd.run(settings(served), out, progress=False)  # another port and another name, and the same run
    run = spd.Run.open(out)
    assert (run.corpus.settings["engine"], run.unprojected.settings["engine"]) == ("openai", "twin")
    prompts = [Example(record.prompt, id=record.id) for record in run.corpus]
    new = run.config.max_new_tokens
    options = {"subspace": subspace, "temperature": 0.0, "max_new_tokens": new, "progress": False}
    assert [r.completion_ids for r in spd.generate(pair, prompts, **options)] == [r.completion_ids for r in run.corpus]
