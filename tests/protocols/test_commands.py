"""`--protocol` from the command line: every stage alone, a run and a study, on a tiny model and published problems."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import spd_lens as spd
from spd_lens.cli.commands import main
from spd_lens.runs.loading import load_pair
from spd_lens.study.config import StudyConfig
from spd_lens.study.folder import Study

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FEW = ["--n-calibration", "8", "--n-train", "5"]
SHORT = ["--max-new-tokens", "6", "--quiet"]


@pytest.fixture(scope="module")
def model(tiny_llama_dir, tmp_path_factory):
    """The tiny Llama with a context in which the reference code's limits fit, and digits as Qwen's tokenizer has them.

    Else the numbers of GSM8K are tokens with the space before them, and none lies inside a span.
    """
    path = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_llama_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    (path / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": split}), encoding="utf-8")
    return path


@pytest.fixture
def call(monkeypatch, tmp_path, model):
    """Run a command under the reference protocol on GSM8K, in the test's own folder."""
    if not DATA.exists():
        pytest.skip("the published benchmark files are not at ../shared/data")
    monkeypatch.chdir(tmp_path)
    common = ["--protocol", "reference", "--model", model, "--dtype", "float32", "--device", "cpu"]

    def run(command, *arguments, data=True, common=common):
        data_flags = ["--data-dir", DATA] if data else []
        monkeypatch.setattr(sys, "argv", ["spd-lens", command, *map(str, [*common, *data_flags, *arguments])])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0

    return run


def test_every_stage_alone(call, tmp_path):
    assert call("extract", *FEW[:2], "--quiet", "--out", "subspace") == 0
    subspace = spd.Subspace.load(tmp_path / "subspace" / "subspace.safetensors")
    assert {site.layer for site in subspace.sites} == {3, 2}  # of four blocks, counted from 0: [n - 1, n // 2]
    assert not subspace.per_head
    moments = spd.GradientMoments.load(tmp_path / "subspace" / "moments.safetensors")
    assert (moments.settings["max_calibration_tokens"], moments.settings["span_rule"]) == (256, "inside")

    assert call("generate", *FEW[2:], *SHORT, "--subspace", "subspace/subspace.safetensors") == 0
    corpus = spd.Corpus.load(tmp_path / "corpus.jsonl")
    asked = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 6, "max_prompt_tokens": 384}
    assert {name: corpus.settings[name] for name in asked} == asked
    first = json.loads((DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    assert corpus[0].prompt == f"Question: {first['question'].strip()}\nAnswer:"

    assert call("finetune", "--corpus", "corpus.jsonl", "--epochs", "2", "--quiet", data=False) == 0
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    text = json.dumps(record)
    for name in ("early_stop", "retokenise", "loss_on_padding"):
        assert f'"{name}": true' in text
    assert '"max_length": 256' in text and '"warmup_epochs": 0.5' in text and '"batch_size": 4' in text

    evaluate = ["--n-eval", "3", "--max-new-tokens", "6", "--adapter", "adapter", "--quiet"]
    assert call("evaluate", "--task", "svamp", *evaluate) == 0
    result = spd.EvalResult.load(tmp_path / "eval.json")
    assert result.settings["task_options"]["scoring"] == "reference"
    recorded = (moments.settings, subspace.origin, corpus.settings, record["settings"], result.settings)
    assert [settings["protocol"] for settings in recorded] == ["reference"] * 5


def test_mmlu_is_evaluated_from_files_that_have_no_training_questions(call, tmp_path, capfd):
    evaluate = ["--task", "mmlu", "--n-eval", "2", "--max-new-tokens", "3", "--quiet"]
    assert call("evaluate", *evaluate) == 0
    settings = spd.EvalResult.load(tmp_path / "eval.json").settings
    assert (settings["task_options"]["scoring"], settings["task_options"]["order"]) == ("reference", "file")
    capfd.readouterr()
    assert call("generate", "--task", "mmlu", *FEW[2:], *SHORT) == 2
    err = capfd.readouterr().err
    assert "auxiliary" in err and "protocol 'reference' sets" in err and "train_source" in err


def test_the_audit_of_spans(call, model, capfd):
    assert call("spans", "gsm8k", "--n", "2", common=["--protocol", "reference", "--model", model]) == 0
    out = capfd.readouterr().out
    assert "verbatim" in out and "prompt_template=reference" in out


def test_a_run_and_its_directory(call, tmp_path, capfd):
    flags = [*FEW, *SHORT, "--n-eval", "2", "--epochs", "1", "--n-random", "1", "--n-compared", "2"]
    assert call("run", *flags, "--task-option", "max_new_tokens=6", "--out", "run") == 0
    run = spd.Run.open(tmp_path / "run")
    assert (run.config.protocol, run.config.lr, run.config.train_batch_size) == ("reference", 1e-5, 4)
    assert "- Protocol: reference (docs/protocols.md), but for " in run.summary
    assert "epochs 1 (there 5)" in run.summary
    assert "lora, 1 of at most 1 epochs (the weights are those of epoch 1, whose" in run.summary
    capfd.readouterr()
    other = ["--protocol", "paper", "--model", run.config.model, "--dtype", "float32", "--device", "cpu"]
    assert call("run", *flags, "--task-option", "max_new_tokens=6", "--out", "run", common=other) == 2
    err = capfd.readouterr().err
    assert "protocol: 'reference' there, 'paper' now" in err and "Traceback" not in err


def test_a_study(call, model, tmp_path, capfd):
    settings = {
        "sources": ["gsm8k"], "methods": ["base", "psr-reference", "ssd-reference", "spd"], "n_side_effects": 0,
        "task_options": {"gsm8k": {"max_new_tokens": 4}},
        "settings": {
            "protocol": "reference", "model": str(model), "dtype": "float32", "device": "cpu", "data_dir": str(DATA),
            "n_calibration": 8, "n_train": 4, "n_eval": 2, "max_new_tokens": 4, "epochs": 1,
        },
    }  # fmt: skip
    Path("study.yaml").write_text(yaml.safe_dump(settings))
    assert call("study", "study.yaml", "--out", "study", "--quiet", data=False, common=[]) == 0
    study = Study(tmp_path / "study")
    stops = {cell.method: json.loads((cell.adapter / "training.json").read_text()) for cell in study.cells()}
    assert '"early_stop": true' in json.dumps(stops["ssd-reference"]) == json.dumps(stops["ssd-reference"])
    assert '"early_stop": true' not in json.dumps(stops["psr-reference"])
    sampling = {cell.method: spd.Corpus.load(cell.corpus_path).settings["top_p"] for cell in study.cells()}
    assert sampling == {"psr-reference": 1.0, "ssd-reference": 0.9, "spd": 0.9}
    done = {cell.method: json.loads((cell.path / "done.json").read_text()).get("training") for cell in study.cells()}
    assert done == {"psr-reference": {"early_stop": False}, "ssd-reference": None, "spd": None}
    report = (tmp_path / "study" / "report.md").read_text()
    assert "- Protocol: reference" in report and "early\\_stop" in report.replace("early_stop", "early\\_stop")


def test_an_unknown_protocol(call, capfd, tmp_path):
    for command in ("run", "extract", "generate", "evaluate", "rounds"):
        assert call(command, common=["--protocol", "refrence"]) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: setting protocol = 'refrence'") and "apple-ssd" in err
    assert not any(tmp_path.iterdir())


def test_simple_self_distillation_without_a_projection(call, model, tmp_path):
    flags = ["--task", "synthetic-math", "--n-calibration", "2", "--n-train", "4", "--n-eval", "2", "--epochs", "1"]
    own = ["--protocol", "apple-ssd", "--model", model, "--dtype", "float32", "--device", "cpu", "--n-random", "1"]
    assert call("run", *flags, *SHORT, "--method", "lora", "--out", "run", common=own, data=False) == 0
    run = spd.Run.open(tmp_path / "run")
    assert [record.completion_ids for record in run.corpus] == [record.completion_ids for record in run.unprojected]
    assert (run.corpus.settings["temperature"], run.corpus.settings["top_k"]) == (1.6, 20)
    assert "Protocol: apple-ssd" in run.summary and "method lora (there full)" in run.summary


def test_the_reference_prompts_in_a_chat_template(tiny_qwen2_dir):
    settings = {"protocol": "reference", "prompt_format": "chat", "loss_on_padding": False, "data_dir": str(DATA)}
    if not DATA.exists():
        pytest.skip("the published benchmark files are not at ../shared/data")
    config = StudyConfig.make({"sources": ["gsm8k"], "settings": {**settings, "model": str(tiny_qwen2_dir)}})
    cell = config.cell("gsm8k", 42)
    assert (cell.prompt_format, cell.loss_on_padding, cell.retokenise) == ("chat", False, True)
    assert set(cell.departures) == {"prompt_format", "loss_on_padding"}
    pair = load_pair(cell.model_copy(update={"device": "cpu", "dtype": "float32"}))
    [example] = config.task("gsm8k").train(1)
    text = pair.tokenizer.decode(pair.prompt_ids(example))
    assert f"<|start|>user\n{example.prompt}<|end|>" in text and example.prompt.startswith("Question: ")
    assert example.prompt.endswith("\nAnswer:")
