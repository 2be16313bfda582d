"""The command line: settings as flags, each stage alone, and every mistake as one sentence with exit code 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spd_lens as spd
from spd_lens.cli.commands import app
from spd_lens.models.backends import choose_backends
from spd_lens.sites import Site
from spd_lens.subspaces import random_basis
from tests.completions_server import NEEDS_OPENAI, serving
from tests.conftest import BACKENDS, N_CTX
from tests.helpers import make_adapter

COMMANDS = [command.name for command in app.registered_commands]


@pytest.fixture
def in_tmp(monkeypatch, tmp_path):
    """Commands write where they are called: an empty directory, which must stay empty when they refuse."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def flags(tiny_settings):
    """The settings of the shared run as flags."""
    settings = {name: value for name, value in tiny_settings.items() if name not in ("task_options", "policies")}
    given = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [*given, "--task-option", "max_new_tokens=8", "--policies", "base,projected,spd", "--quiet"]


@pytest.fixture(scope="module")
def model_flags(tiny_llama_dir):
    return ["--model", str(tiny_llama_dir), "--dtype", "float32", "--device", "cpu"]


def one_error(result, *words):
    """Exit code 2, nothing on stdout, and on stderr one line, which begins with `error:`."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    missing = [word for word in map(str, words) if word not in lines[0]]
    assert not missing, lines[0]


# settings


@pytest.mark.parametrize("command", COMMANDS)
def test_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"spd-lens {command}" in out
    assert "--" in out


def test_the_commands_are_there():
    assert {"run", "demo", "extract", "generate", "finetune", "evaluate"} <= set(COMMANDS)


def test_help_names_the_commands_and_needs_no_torch():
    code = (
        "import sys; sys.argv = ['spd-lens', '--help']\n"
        "from spd_lens.cli.commands import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_a_flag_for_every_setting(call):
    _, out, _ = call("run", "--help")
    named = {"task_options": "--task-option", "per_head": "--joint", "center": "--no-center"}
    for name in spd.SPDConfig.model_fields:
        assert named.get(name, f"--{name.replace('_', '-')}") in out, name


def test_flags_stand_under_headings_in_the_order_of_the_settings(call):
    _, out, _ = call("run", "--help")
    heads = ["─ Options ", "─ Model and prompts ", "─ Tasks and sizes ", "─ Subspace ", "─ Self-generation ",
             "─ Training ", "─ Evaluation and seeds "]  # fmt: skip
    assert [out.count(head) for head in heads] == [1] * len(heads)
    parts = re.split("|".join(heads), out)[1:]
    firsts = ["--protocol", "--model", "--task", "--layers", "--max-new-tokens", "--lora-rank", "--data-seed"]
    assert all(f"{first} " in part for first, part in zip(firsts, parts, strict=True))


def test_show_config_prints_all_settings_and_reads_back(call, in_tmp):
    code, out, _ = call("run", "--show-config")
    assert code == 0
    assert list(yaml.safe_load(out)) == list(spd.SPDConfig.model_fields)
    (in_tmp / "c.yaml").write_text(out)
    assert not spd.SPDConfig.read(in_tmp / "c.yaml").differences(spd.SPDConfig.make({}))
    assert sorted(path.name for path in in_tmp.iterdir()) == ["c.yaml"]


def test_flags_over_file_over_defaults(call, in_tmp):
    (in_tmp / "c.yaml").write_text("rank: 16\nlr: 1e-3\nper_head: true\ntask_options: {difficulty: hard, span: line}\n")
    _, out, _ = call(
        "run", "--show-config", "--config", "c.yaml", "--rank", "0.25", "--joint", "--kinds", "k , v,q",
        "--layers", "3,1", "--task-option", "difficulty=easy", "--task-option", "max_new_tokens=8",
        "--temperature", "0", "--center",
    )  # fmt: skip
    shown = yaml.safe_load(out)
    expected = {
        "rank": 0.25, "lr": 1e-3, "per_head": False, "kinds": ["k", "v", "q"], "layers": [1, 3], "temperature": 0.0,
        "center": True, "epochs": 5, "task_options": {"difficulty": "easy", "span": "line", "max_new_tokens": 8},
    }  # fmt: skip
    assert {name: repr(shown[name]) for name in expected} == {name: repr(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("flags", "thinking"), [([], None), (["--enable-thinking"], True), (["--no-enable-thinking"], False)]
)
def test_thinking_has_two_flags_and_a_default_of_its_own(call, flags, thinking):
    shown = yaml.safe_load(call("run", "--show-config", *flags, "--system", "Be brief.")[1])
    assert (shown["enable_thinking"], shown["system"]) == (thinking, "Be brief.")


@pytest.mark.parametrize(("text", "rank"), [("16", 16), ("0.5", 0.5), ("1", 1), ("1.0", 1.0)])
def test_rank_as_a_flag(call, text, rank):
    shown = yaml.safe_load(call("run", "--show-config", "--rank", text)[1])["rank"]
    assert (shown, type(shown)) == (rank, type(rank))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run", "--modle", "x"], "No such option: --modle"),
        (["run", "--n-train", "many"], "--n-train"),
        (["finetune"], "Missing option '--corpus'"),
        (["run", "--epochs"], "'--epochs' requires an argument"),
        (["spans"], "Missing argument"),
        (["demo", "--size", "huge"], "huge"),
    ],
)
def test_usage_errors_are_clicks_own(call, in_tmp, arguments, word):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Error" in err
    assert word in err
    assert "Traceback" not in err
    assert not any(in_tmp.iterdir())


# refused


FAULTS = {
    "model": (["--model", "no/such/model"], ["no/such/model"]),
    "model directory": (["--model", "./nowhere"], ["./nowhere", "does not exist"]),
    "task": (["--task", "gsm9k"], ["'gsm9k'", "gsm8k"]),
    "evaluation task": (["--eval-tasks", "synthetic-math,svmap"], ["'svmap'", "svamp"]),
    "layer": (["--layers", "0,4"], ["layer 4", "0 to 3"]),
    "layers": (["--layers", "top"], ["layers", "'top'"]),
    "kind": (["--kinds", "k,x"], ["'x'", "k, v, q"]),
    "rank 0": (["--rank", "0"], ["rank", "'0'"]),
    "rank 0.0": (["--rank", "0.0"], ["rank", "'0.0'"]),
    "rank above the width": (["--rank", "9"], ["rank 9", "8"]),
    "rank above the joint width": (["--rank", "17", "--joint"], ["rank 17", "16"]),
    "no calibration": (["--n-calibration", "0"], ["n_calibration", "0"]),
    "policy": (["--policies", "base,sdp"], ["policies", "'sdp'"]),
    "loss": (["--loss", "half"], ["loss", "'half'"]),
    "strength": (["--strength", "2"], ["strength", "2"]),
    "context": (["--max-new-tokens", str(N_CTX)], [f"context of {N_CTX}"]),
    "dtype": (["--dtype", "float8"], ["'float8'"]),
    "device": (["--device", "gpu"], ["'gpu'", "cuda"]),
    "task option": (["--task-option", "difficulty"], ["--task-option", "KEY=VALUE"]),
    "unknown task option": (["--task-option", "dificulty=easy"], ["'dificulty'", "difficulty"]),
    "bad difficulty": (["--task-option", "difficulty=[bold]"], ["[bold]"]),
    "data directory": (["--task", "gsm8k", "--data-dir", "/no/data"], ["/no/data"]),
    "system message without a template": (["--system", "Be brief."], ["system='Be brief.'", "raw prompts"]),
    "thoughts without a template": (["--no-enable-thinking"], ["enable_thinking=False", "raw prompts"]),
    "long texts": (["--too-long", "cut"], ["too_long", "'cut'", "drop"]),
    "config file": (["--config", "none.yaml"], ["none.yaml"]),
}


@pytest.mark.parametrize(("arguments", "words"), FAULTS.values(), ids=FAULTS)
def test_a_mistake_is_one_sentence_and_nothing_is_written(call, in_tmp, flags, arguments, words):
    one_error(call("run", *flags, "--out", "run", *arguments), *words)
    assert not any(in_tmp.iterdir())


@pytest.mark.parametrize("command", ["run", "extract", "generate", "evaluate"])
def test_stages_refuse_alike(call, in_tmp, model_flags, command):
    one_error(call(command, *model_flags, "--task", "gsm9k"), "'gsm9k'")
    one_error(call(command, "--model", "no/such", "--task", "synthetic-math"), "no/such")
    one_error(call(command, *model_flags, "--task", "gsm8k", "--data-dir", "/no/data"), "/no/data")
    assert not any(in_tmp.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("command", ["run", "extract", "generate", "evaluate"])
def test_cuda_where_there_is_none(call, in_tmp, model_flags, command):
    one_error(call(command, *model_flags, "--task", "synthetic-math", "--device", "cuda"), "'cuda'", "device='cpu'")
    assert not any(in_tmp.iterdir())


@pytest.mark.skipif("hooked" in BACKENDS, reason="this transformer-lens has HookedTransformer")
def test_hooked_with_transformer_lens_4(call, in_tmp, flags):
    one_error(call("run", *flags, "--backend", "hooked"), "transformer-lens>=3.9,<4", "bridge")
    assert not any(in_tmp.iterdir())


def test_backend_of_this_lane():
    assert choose_backends("auto")[0].name == BACKENDS[0]


def test_unknown_key_in_a_file(call, in_tmp, flags):
    (in_tmp / "c.yaml").write_text("n_trian: 3\n")
    one_error(call("run", *flags, "--config", "c.yaml"), "'n_trian'", "n_train")
    assert [path.name for path in in_tmp.iterdir()] == ["c.yaml"]


def test_more_than_there_is(call, in_tmp, model_flags):
    rows = [{"prompt": f"{n}?", "completion": f"{n}!", "spans": [[0, 1]]} for n in range(10)]
    (in_tmp / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_error(call("run", *model_flags, "--task", "own.jsonl", "--n-calibration", "99"), "99", "own")
    assert [path.name for path in in_tmp.iterdir()] == ["own.jsonl"]


def test_extraction_checks_ranks_before_it_extracts(call, in_tmp, model_flags, monkeypatch):
    def extract(*_args, **_options):
        raise AssertionError("an expensive stage was begun")

    monkeypatch.setattr("spd_lens.runs.experiment.extract", extract)
    one_error(call("extract", *model_flags, "--task", "synthetic-math", "--rank", "9"), "rank 9")
    assert not any(in_tmp.iterdir())


def test_extraction_as_the_reference_code_does_it(call, in_tmp, model_flags):
    asked = ["--layers", "last_mid_from_0", "--max-calibration-tokens", "200", "--center-gradients", "--joint"]
    flags = [*model_flags, "--task", "synthetic-math", "--n-calibration", "6", "--quiet", *asked]
    code, _, err = call("extract", *flags, "--energy", "0.9", "--out", "x")
    assert code == 0, err
    moments, subspace = (spd.GradientMoments.load("x/moments.safetensors"), spd.Subspace.load("x/subspace.safetensors"))
    assert {site.layer for site in subspace.sites} == {2, 3}
    assert moments.settings["max_calibration_tokens"] == 200
    wanted = moments.subspace(energy=0.9, per_head=False, center_gradients=True)
    assert (subspace.digest(), subspace.origin) == (wanted.digest(), wanted.origin)
    for energy in ("0", "1.5", "nan"):
        one_error(call("extract", *flags, "--energy", energy, "--out", "y"), "energy", energy)
    one_error(call("extract", *flags, "--max-calibration-tokens", "1", "--out", "y"), "max_calibration_tokens = 1")
    one_error(call("extract", *flags, "--max-calibration-tokens", "3", "--out", "y"), "no scored token", "first 3")
    assert not (in_tmp / "y").exists()


def test_extraction_for_other_estimators(call, in_tmp, model_flags):
    flags = [*model_flags, "--task", "synthetic-math", "--n-calibration", "6", "--quiet", "--engine", "twin"]
    code, out, err = call("extract", *flags, "--estimator", "contrast", "--span", "results", "--keep", "cross,classes")
    assert code == 0, err
    place = in_tmp / "runs" / "extract"
    moments, subspace = (
        spd.GradientMoments.load(place / "moments.safetensors"),
        spd.Subspace.load(place / "subspace.safetensors"),
    )
    assert moments.kept == ("classes", "cross") and subspace.origin["estimator"] == "contrast"
    own = call("extract", *flags, "--estimator", "fisher", "--seed", "7", "--out", "x")
    assert (
        own[0] == 0 and spd.GradientMoments.load(in_tmp / "x" / "moments.safetensors").settings["labels"] == "sampled"
    )
    for flag, value in (("keep", "class"), ("sinks", "last"), ("labels", "silver"), ("estimator", "papr")):
        one_error(call("extract", *flags, f"--{flag}", value, "--out", "y"), flag, value)
    one_error(call("extract", *flags, "--span", "reslts", "--out", "y"), "span", "reslts")
    assert not (in_tmp / "y").exists()


def test_from_a_run_to_its_tokens_and_from_weights_to_a_projection(call, finished_run, in_tmp, tiny_llama_dir):
    code, out, err = call("explain", finished_run.path, "--show", "1", "--out", "chain.json")
    assert code == 0 and out.count("checked ") == 6 and "⟦" in out, err
    chain = json.loads((in_tmp / "chain.json").read_text())
    assert len(chain["tokens"]) == finished_run.subspace.origin["n_scored"]
    broken = Path(shutil.copytree(finished_run.path, in_tmp / "run"))
    finished_run.subspace.random_like(1).save(broken / "subspace.safetensors")
    code, out, _ = call("explain", broken)
    assert code == 1 and "BROKEN corpus" in out
    one_error(call("explain", tiny_llama_dir), str(tiny_llama_dir), "no run directory")
    code, out, _ = call("detect", tiny_llama_dir, "--out", "found.safetensors")
    assert code == 0 and "no projection in 8 sites" in out and not (in_tmp / "found.safetensors").exists()
    one_error(call("detect", tiny_llama_dir, "--kinds", "k,x"), "'x'", "k, v, q, z")
    model = ["--model", tiny_llama_dir, "--dtype", "float32", "--device", "cpu", "--as", "checkpoint"]
    assert call("export", finished_run.subspace_path, *model, "--out", "folded", "--quiet")[0] == 0
    code, out, _ = call("detect", "folded", "--subspaces", finished_run.subspace_path, "--out", "found.safetensors")
    assert code == 0 and "this is the projection" in out
    assert spd.Subspace.load("found.safetensors").ranks == finished_run.subspace.ranks
    one_error(call("push", "nothing", "me/x"), "nothing", "no subspace's file")


def test_settings_of_another_run(call, finished_run, flags):
    before = (finished_run.path / "config.yaml").read_bytes()
    one_error(call("run", *flags, "--out", finished_run.path, "--lr", "0.5"), "lr: 0.01 there, 0.5 now", "--out")
    assert (finished_run.path / "config.yaml").read_bytes() == before


GENERATE = ["--task", "synthetic-math", "--n-train", "2", "--max-new-tokens", "4", "--out", "c.jsonl", "--quiet"]
EVALUATE = ["--task", "synthetic-math", "--n-eval", "2", "--max-new-tokens", "4", "--out", "e.json", "--quiet"]


@pytest.mark.parametrize("command", [["generate", *GENERATE], ["evaluate", *EVALUATE]], ids=["generate", "evaluate"])
class TestSubspaceFiles:
    def test_missing(self, call, in_tmp, model_flags, command):
        one_error(call(*command, *model_flags, "--subspace", "none.safetensors"), "none.safetensors")
        assert not any(in_tmp.iterdir())

    def test_corrupt(self, call, in_tmp, model_flags, finished_run, command):
        whole = (finished_run.path / "subspace.safetensors").read_bytes()
        (in_tmp / "s.safetensors").write_bytes(whole[: len(whole) // 2])
        one_error(call(*command, *model_flags, "--subspace", "s.safetensors"), "s.safetensors", "not a readable")
        assert [path.name for path in in_tmp.iterdir()] == ["s.safetensors"]

    def test_foreign(self, call, in_tmp, model_flags, finished_run, command):
        save_file({"x": torch.zeros(2)}, "s.safetensors")
        one_error(call(*command, *model_flags, "--subspace", "s.safetensors"), "s.safetensors", "another program")
        moments = finished_run.path / "moments.safetensors"
        one_error(call(*command, *model_flags, "--subspace", moments), "a subspace", "gradient moments")

    @pytest.mark.parametrize("why", ["embeddings", "width", "layers"])
    def test_of_another_model(self, call, in_tmp, tiny_llama_dir, tiny_qwen2_dir, finished_run, command, why):
        """The Qwen2 has the Llama's shape and other embeddings; the others are the Llama with another shape."""
        model = tiny_qwen2_dir
        if why != "embeddings":
            model = in_tmp.parent / "model"
            shutil.copytree(tiny_llama_dir, model)
            config = json.loads((model / "config.json").read_text())
            weights = load_file(model / "model.safetensors")
            if why == "layers":
                config["num_hidden_layers"] = 3
                weights = {name: value for name, value in weights.items() if ".layers.3." not in name}
            else:
                config |= {"num_key_value_heads": 1}
                weights = {n: v[:8].clone() if "k_proj" in n or "v_proj" in n else v for n, v in weights.items()}
            (model / "config.json").write_text(json.dumps(config))
            save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        subspace = finished_run.path / "subspace.safetensors"
        one_error(call(*command, "--model", model, "--dtype", "float32", "--subspace", subspace), "another model")
        assert not any(in_tmp.iterdir())  # a corpus file that was begun would refuse the right subspace later

    def test_foreign_adapter(self, call, in_tmp, model_flags, tiny_pair, command):
        make_adapter(tiny_pair.hf, in_tmp.parent / "a")
        config = in_tmp.parent / "a" / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 2', '"r": 3'))  # not the file's shapes
        one_error(call(*command, *model_flags, "--adapter", in_tmp.parent / "a"), "does not fit LlamaForCausalLM")
        assert not [path for path in in_tmp.iterdir() if path.suffix != ".lock"]

    def test_missing_adapter(self, call, in_tmp, model_flags, command):
        one_error(call(*command, *model_flags, "--adapter", "none"), "none", "not an adapter")
        assert not any(in_tmp.iterdir())


def test_corpus_files(call, in_tmp, model_flags):
    command = ["finetune", *model_flags, "--quiet", "--corpus"]
    one_error(call(*command, "none.jsonl"), "none.jsonl", "does not exist")
    (in_tmp / "c.jsonl").write_text("not json\n")
    one_error(call(*command, "c.jsonl"), "line 1 of c.jsonl", "no record")
    (in_tmp / "c.jsonl").write_text("")
    one_error(call(*command, "c.jsonl"), "empty")
    assert [path.name for path in in_tmp.iterdir()] == ["c.jsonl"]


def test_corpus_of_another_model(call, in_tmp, tiny_qwen2_dir, finished_run):
    corpus = finished_run.path / "corpus.jsonl"
    one_error(call("finetune", "--model", tiny_qwen2_dir, "--dtype", "float32", "--corpus", corpus), "another model")
    assert not any(in_tmp.iterdir())


def test_errors_are_shown_as_they_are(call, in_tmp):
    """No markup, emoji codes or wrapping: names come from users."""
    name = "[bold]x[/bold]:smile:" + "y" * 150
    one_error(call("run", "--show-config", "--config", name), name)


# the stages


def test_run_is_the_library_call(call, in_tmp, flags, finished_run):
    code, out, err = call("run", *flags, "--out", "run")
    assert code == 0, err
    assert "within noise" in out or "lower" in out or "higher" in out
    assert "Everything is in run." in out
    run = spd.Run.open("run")
    assert not run.config.differences(finished_run.config)
    assert run.corpus.records == finished_run.corpus.records
    assert run.effects("synthetic-math") == finished_run.effects("synthetic-math")
    code, out, _ = call("run", *flags, "--out", "run")
    assert (code, "Everything is in run." in out) == (0, True)


def test_stages_in_sequence_are_the_run(call, in_tmp, flags, model_flags, finished_run):
    """extract, generate, finetune and evaluate give what the whole run gave."""
    data = ["--task", "synthetic-math", "--task-option", "max_new_tokens=8"]
    code, out, err = call("extract", *model_flags, *data, "--n-calibration", "6", "--out", "x", "--quiet")
    assert code == 0, err
    assert "written to x" in out
    moments, subspace = (spd.GradientMoments.load("x/moments.safetensors"), spd.Subspace.load("x/subspace.safetensors"))
    for site in finished_run.subspace.sites:
        assert torch.equal(moments.gradient[site], finished_run.moments.gradient[site])
        assert torch.equal(subspace.bases[site], finished_run.subspace.bases[site])
    assert Site(3, "v") in subspace.bases

    made = ["--n-train", "12", "--max-new-tokens", "8", "--subspace", "x/subspace.safetensors", "--out", "c.jsonl"]
    for _ in range(2):  # the second call has nothing left to do
        code, out, err = call("generate", *model_flags, *data, *made, "--generation-batch-size", "4", "--quiet")
        assert code == 0, err
        assert "Corpus(12 completions" in out
    corpus = spd.Corpus.load("c.jsonl")
    assert corpus.records == finished_run.corpus.records

    train = ["--corpus", "c.jsonl", "--epochs", "2", "--lr", "0.01", "--train-batch-size", "4", "--out", "a", "--quiet"]
    code, out, err = call("finetune", *model_flags, *train)
    assert code == 0, err
    mine, theirs = (load_file(place / "adapter_model.safetensors") for place in (in_tmp / "a", finished_run.adapter))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    code, out, err = call(
        "evaluate", *model_flags, *data, "--n-eval", "12", "--adapter", "a", "--out", "e.json", "--quiet"
    )
    assert code == 0, err
    result, expected = spd.EvalResult.load("e.json"), finished_run.result("synthetic-math", "spd")
    assert (result.policy, [i.completion for i in result.items]) == ("tuned", [i.completion for i in expected.items])
    assert [i.kl for i in result.items] == pytest.approx([i.kl for i in expected.items], rel=1e-6)
    assert str(result.accuracy) in out


@pytest.fixture
def subspace_file(tiny_pair, tmp_path):
    """Half of the directions of each head's keys in block 1 and values in block 3, at random."""
    generator = torch.Generator().manual_seed(0)
    blocks = {site: list(random_basis(8, 4, generator, 2)) for site in (Site(1, "k"), Site(3, "v"))}
    return spd.Subspace.from_blocks(blocks, fingerprint=tiny_pair.fingerprint).save(tmp_path / "s.safetensors")


@pytest.mark.parametrize("form", ["lora", "checkpoint"])
def test_export_is_the_library_call(call, in_tmp, model_flags, subspace_file, tiny_pair, form):
    """What other engines read computes what the folded twin computes, in plain transformers and PEFT."""
    command = ["export", subspace_file, "--as", form, *model_flags, "--strength", "0.5", "--out", "x", "--quiet"]
    code, out, err = call(*command)
    assert code == 0, err
    note = "vLLM takes it with --enable-lora --max-lora-rank 8\n" if form == "lora" else "every engine"
    assert out.startswith("written to x\n") and note in out
    tokens = torch.tensor([tiny_pair.tokenizer("7 * 3").input_ids])
    plain = AutoModelForCausalLM.from_pretrained(tiny_pair.name if form == "lora" else "x")
    model = PeftModel.from_pretrained(plain, "x") if form == "lora" else plain
    with torch.no_grad():
        base = tiny_pair.hf(tokens).logits
        with spd.folded(tiny_pair.hf, spd.Subspace.load(subspace_file), 0.5):
            expected = tiny_pair.hf(tokens).logits
        assert (model(tokens).logits - expected).abs().max() < 1e-4 * expected.std() < (base - expected).abs().max()
    one_error(call(*command), "x is not empty")


def test_export_refuses_in_one_sentence(call, in_tmp, model_flags, subspace_file, tiny_qwen2_dir):
    save_file({"x": torch.zeros(2)}, in_tmp.parent / "foreign.safetensors")
    one_error(call("export", "none.safetensors", *model_flags), "none.safetensors")
    one_error(call("export", in_tmp.parent / "foreign.safetensors", *model_flags), "another program")
    one_error(call("export", subspace_file, "--model", tiny_qwen2_dir, "--dtype", "float32"), "the subspace")
    one_error(call("export", subspace_file, *model_flags, "--strength", "2"), "strength", "2")
    code, _, err = call("export", subspace_file, *model_flags, "--as", "gguf")
    assert code == 2 and "'gguf'" in err
    assert not any(in_tmp.iterdir())


@NEEDS_OPENAI
def test_generate_with_a_server(call, in_tmp, model_flags, tiny_llama_dir):
    command = ["generate", *model_flags, *GENERATE, "--temperature", "0"]
    with serving({"tiny": tiny_llama_dir}) as served:
        server = ["--engine", "openai", "--engine-url", served.url, "--engine-model", "tiny"]
        assert call(*command, *server, "--engine-concurrency", "2", "--out", "s.jsonl")[0] == 0
        one_error(call(*command, "--engine-url", served.url, "--out", "x.jsonl"), "'twin'", "engine_url")
        one_error(call(*command, *server, "--engine-retries", "-1", "--out", "x.jsonl"), "engine_retries", "-1")
    one_error(call(*command, *server, "--out", "x.jsonl"), served.url, "no answer")
    assert call(*command, "--out", "t.jsonl")[0] == 0
    assert spd.Corpus.load("s.jsonl").records == spd.Corpus.load("t.jsonl").records
    assert not (in_tmp / "x.jsonl").exists()


def test_generate_with_the_lens_engine_gives_the_same(call, in_tmp, model_flags, finished_run):
    command = ["generate", *model_flags, *GENERATE, "--subspace", finished_run.path / "subspace.safetensors"]
    for engine, out in (("lens", "l.jsonl"), ("twin", "t.jsonl")):
        assert call(*command, "--engine", engine, "--out", out)[0] == 0
    lens, twin = spd.Corpus.load("l.jsonl"), spd.Corpus.load("t.jsonl")
    assert lens.records == twin.records
    one_error(call(*command, "--engine", "lense", "--out", "x.jsonl"), "'lense'", "twin")
    assert not (in_tmp / "x.jsonl").exists()


def test_interrupted_runs_say_that_the_same_command_goes_on(call, flags, finished_run, tmp_path):
    """A real process, the signal of Ctrl-C in the midst of it, and then the same command again."""
    out = tmp_path / "run"
    program = (
        "import signal\nfrom tests.helpers import signal_once_there\nfrom spd_lens.cli.commands import main\n"
        f"signal_once_there({str(out)!r}, 'subspace.safetensors', signal.SIGINT)\nmain()"
    )
    command = [sys.executable, "-c", program, "run", *flags, "--out", str(out)]

    def as_in_a_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it

    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": root}
    stopped = subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=as_in_a_terminal, timeout=250
    )
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.strip().splitlines()[-1] == "stopped; the same command continues where it was"
    assert "Traceback" not in stopped.stderr
    assert stopped.stdout == ""
    assert not (out / "summary.md").exists()
    code, said, err = call(*command[3:])
    assert (code, "Everything is in" in said) == (0, True), err
    run = spd.Run.open(out)
    assert run.corpus.records == finished_run.corpus.records
    assert run.effects("synthetic-math") == finished_run.effects("synthetic-math")


def test_a_mistake_in_a_real_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "spd_lens", "run", "--rank", "0"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: setting rank = '0' is not possible")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
