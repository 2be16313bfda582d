from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spd_lens.generation.corpus import Corpus, Record
from spd_lens.generation.generate import generate
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.training.finetune import finetune
from spd_lens.training.rows import collated, token_rows
from spd_lens.training.trainer import CorpusTrainer
from tests.helpers import assert_same_bits, refused

QUICK = {"lr": 1e-3, "epochs": 2, "batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def corpus(tiny_pair, tiny_prompts) -> Corpus:
    """Six completions of unequal length; some ended by themselves."""
    made = generate(
        tiny_pair, tiny_prompts, max_new_tokens=24, temperature=3.0, top_p=1.0, seed=9, progress=False, batch_size=6
    )
    assert {r.finish_reason for r in made} == {"eos", "length"}
    return made


def trained(pair: ModelPair, corpus: Corpus, out: Path, **options) -> Path:
    return finetune(pair, corpus, out=out, **(QUICK | options))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(directory: Path) -> list[dict[str, float]]:
    return json.loads((directory / "training.json").read_text())["log"]


def everything(model: torch.nn.Module) -> dict[str, object]:
    """Names of modules, their attributes and hooks, flags and config: what a trainer leaves behind shows here."""
    seen: dict[str, object] = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        fields = {key: len(value) if isinstance(value, dict) else id(value) for key, value in vars(module).items()}
        seen[name] = (id(module), type(module), fields)
    seen["flags"] = {name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return seen


def eq14(model, corpus: Corpus, rows: list[int], *, completion_only: bool = False) -> float:
    """Eq. 14 written out, one unpadded sequence at a time: mean over predicted tokens."""
    total, count = 0.0, 0
    for row in rows:
        record = corpus[row]
        ids = [*record.prompt_ids, *record.completion_ids]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for t in range(len(record.prompt_ids) if completion_only else 1, len(ids)):
            total -= log_p[t - 1, ids[t]].item()
            count += 1
    return total / count


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_loss_is_eq_14_over_the_corpus_own_tokens(tiny_pair, corpus, tmp_path, method, loss_on):
    # one step over everything; LoRA starts without effect, so this is the base model's loss
    options = {"batch_size": 6, "epochs": 1, "method": method, "loss_on": loss_on, "dropout": 0.0}
    out = trained(tiny_pair, corpus, tmp_path / "out", **options)
    expected = eq14(tiny_pair.hf, corpus, range(6), completion_only=loss_on == "completion")
    assert log_of(out)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulated_batches_count_their_tokens_as_one_batch(tiny_pair, corpus, tmp_path):
    # unequal lengths: the mean of the batches' means would be another number
    at_once = trained(tiny_pair, corpus, tmp_path / "a", batch_size=6, dropout=0.0)
    in_parts = trained(tiny_pair, corpus, tmp_path / "b", batch_size=2, gradient_accumulation=3, dropout=0.0)
    assert [e["loss"] for e in log_of(in_parts)] == pytest.approx([e["loss"] for e in log_of(at_once)], rel=1e-5)
    for name, value in weights(at_once).items():
        torch.testing.assert_close(weights(in_parts)[name], value, rtol=1e-2, atol=2e-5)  # AdamW magnifies rounding


def test_rows_are_the_sampled_ids_and_padding_has_no_loss():
    ended = Record("a", "p", "c", (0, 5, 6), (7, 1), "eos")
    cut = Record("b", "p", "c", (0, 5), (7, 8, 9, 8), "length")
    batch = collated(token_rows([ended, cut], "all"), pad_id=1)  # pad is EOS, as often
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 1, 1], [0, 5, 7, 8, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch["labels"].tolist() == [[-100, 5, 6, 7, 1, -100], [-100, 5, 7, 8, 9, 8]]
    rows = token_rows([ended, cut], "completion")
    assert [row["labels"] for row in rows] == [[-100] * 3 + [7, 1], [-100] * 2 + [7, 8, 9, 8]]
    assert sum(label != -100 for row in rows for label in row["labels"]) == 6
    bos_alone = Record("c", "", "c", (0,), (7, 1), "eos")
    for loss_on in ("all", "completion"):
        assert token_rows([bos_alone], loss_on)[0]["labels"] == [-100, 7, 1]


def test_training_lowers_the_loss_and_follows_the_schedule(tiny_pair, corpus, tmp_path):
    log = log_of(trained(tiny_pair, corpus, tmp_path / "out", epochs=8, batch_size=6, lr=5e-3))
    assert len(log) == 8
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    steps = np.arange(8)
    np.testing.assert_allclose([e["learning_rate"] for e in log], 5e-3 * (1 + np.cos(np.pi * steps / 8)) / 2, atol=1e-9)


def test_the_adapter_is_a_standard_one(tiny_pair, tiny_llama_dir, corpus, tmp_path):
    out = trained(tiny_pair, corpus, tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_pair.name == str(tiny_llama_dir)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 8, 0.05)
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config["task_type"] == "CAUSAL_LM"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32), out)
    own = load(str(out), dtype="float32", device="cpu")
    tokens = torch.tensor([corpus[1].prompt_ids])
    with torch.no_grad():
        base, tuned, merged = (m(tokens).logits for m in (tiny_pair.hf, plain.eval(), own.hf))
    assert (tuned - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-4)


def test_a_full_checkpoint_is_a_model_and_an_adapter(tiny_pair, corpus, tmp_path):
    out = trained(tiny_pair, corpus, tmp_path / "out", method="full")
    tuned = load(str(out), dtype="float32", device="cpu")
    moved = [not torch.equal(a, b) for a, b in zip(tuned.hf.parameters(), tiny_pair.hf.parameters(), strict=True)]
    assert all(moved)
    options = {"max_new_tokens": 10, "temperature": 0.0, "progress": False}
    prompts = [r.prompt for r in corpus]
    assert generate(tiny_pair, prompts, adapter=out, **options).records == generate(tuned, prompts, **options).records


@pytest.mark.parametrize("options", [{}, {"method": "full"}, {"gradient_checkpointing": True}])
def test_the_twin_is_left_as_it_was(fresh_pair, corpus, tmp_path, state_of, monkeypatch, options):
    before, inside = state_of(fresh_pair.hf), everything(fresh_pair.hf)
    random.seed("neither 42 nor what an earlier test left")
    globals_before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    trained(fresh_pair, corpus, tmp_path / "out", **options)
    assert_same_bits(fresh_pair.hf, before)
    assert everything(fresh_pair.hf) == inside

    def interrupted(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        raise KeyboardInterrupt if self.state.global_step else ZeroDivisionError
        return result

    step = CorpusTrainer.training_step
    monkeypatch.setattr(CorpusTrainer, "training_step", interrupted)
    with pytest.raises(ZeroDivisionError):
        trained(fresh_pair, corpus, tmp_path / "broken", **options)
    assert_same_bits(fresh_pair.hf, before)
    assert everything(fresh_pair.hf) == inside
    assert not (tmp_path / "broken").exists()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == globals_before


def test_a_seed_names_one_adapter_whatever_the_global_state(tiny_pair, corpus, tmp_path):
    first = trained(tiny_pair, corpus, tmp_path / "a")
    torch.manual_seed(123)
    again = trained(tiny_pair, corpus, tmp_path / "b")
    other = trained(tiny_pair, corpus, tmp_path / "c", seed=1)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


def test_gradient_checkpointing_recomputes_and_changes_nothing(fresh_pair, corpus, tmp_path):
    calls = {"plain": 0, "checkpointed": 0}
    for name in calls:

        def count(*_, name=name):
            calls[name] += torch.is_grad_enabled()

        # the first thing a layer does: recomputation stops once it has what it needs
        hook = fresh_pair.hf.model.layers[1].input_layernorm.register_forward_hook(count)
        trained(fresh_pair, corpus, tmp_path / name, gradient_checkpointing=name == "checkpointed")
        hook.remove()
    assert calls["checkpointed"] == 2 * calls["plain"] > 0
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "checkpointed"))


def test_lora_weights_are_float32_on_a_bfloat16_base(tiny_llama_dir, corpus, tmp_path, state_of):
    pair = load(str(tiny_llama_dir), dtype="bfloat16", device="cpu")
    before = state_of(pair.hf)
    adapter = trained(pair, corpus, tmp_path / "lora", lr=1e-6)  # below what bfloat16 weights could take up
    assert {value.dtype for value in weights(adapter).values()} == {torch.float32}
    assert all(value.any() for name, value in weights(adapter).items() if "lora_B" in name)
    full = trained(pair, corpus, tmp_path / "full", method="full", lr=1e-6)
    assert {value.dtype for value in load_file(full / "model.safetensors").values()} == {torch.float32}
    assert_same_bits(pair.hf, before)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import spd_lens.training.trainer as trainer
from spd_lens.generation.corpus import Corpus
from spd_lens.models import load
from spd_lens.training import finetune

torch.set_num_threads(1)
save, complete = trainer.CorpusTrainer._save, trainer._Guard.on_save

def dying(self, output_dir=None, state_dict=None):
    save(self, output_dir, state_dict)
    if self.state.global_step == 4:  # in the middle of the second checkpoint: weights there, the rest not
        os.kill(os.getpid(), signal.SIGKILL)

trainer.CorpusTrainer._save = dying
directory, corpus, out, method = sys.argv[1:]
pair = load(directory, dtype="float32", device="cpu")
options = {"lr": 1e-3, "epochs": 3, "batch_size": 2, "save_steps": 2, "progress": False}
finetune(pair, Corpus.load(corpus), out=out, method=method, **options)
"""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_and_continued_equals_undisturbed(tiny_llama_dir, tiny_pair, tiny_prompts, tmp_path, method):
    path = tmp_path / "corpus.jsonl"
    corpus = generate(tiny_pair, tiny_prompts, max_new_tokens=12, path=path, progress=False)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tiny_llama_dir), str(path), str(out), method]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not out.exists()  # never a half-trained adapter
    left = {p.name for p in (tmp_path / "out.training" / "checkpoints").iterdir()}
    assert left == {"checkpoint-2", "checkpoint-4"}  # the second of them is not whole

    options = {"epochs": 3, "method": method, "save_steps": 2}
    undisturbed = trained(tiny_pair, corpus, tmp_path / "undisturbed", **options)
    with refused("lr = 0.001", "lr = 0.002"):
        trained(tiny_pair, corpus, out, **options, lr=2e-3)
    first_steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = CorpusTrainer.training_step
        patch.setattr(
            CorpusTrainer,
            "training_step",
            lambda s, *a, **k: first_steps.append(s.state.global_step) or step(s, *a, **k),
        )
        trained(tiny_pair, corpus, out, **options)
    assert first_steps == [2, 3, 4, 5, 6, 7, 8]  # 9 steps, of which 2 were kept
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert same(load_file(out / name), load_file(undisturbed / name))
    assert log_of(out) == log_of(undisturbed)
    assert not (tmp_path / "out.training").exists()


def test_a_finished_training_is_returned_refused_or_done_anew(tiny_pair, corpus, tmp_path, monkeypatch):
    out = trained(tiny_pair, corpus, tmp_path / "out")
    first = weights(out)
    with monkeypatch.context() as patch:
        patch.setattr(CorpusTrainer, "train", lambda *_, **__: 1 / 0)
        assert trained(tiny_pair, corpus, out) == out
    with refused("rank = 8", "rank = 4", out):
        trained(tiny_pair, corpus, out, rank=4)
    with refused("corpus"):
        trained(tiny_pair, Corpus(corpus.records[:3]), out)
    other_weights = copy.copy(tiny_pair)
    other_weights.hf = copy.deepcopy(tiny_pair.hf)
    other_weights.drop_lens()
    with torch.no_grad():
        other_weights.hf.lm_head.weight.mul_(1.01)
    with refused("weights"):
        trained(other_weights, corpus, out)
    assert same(weights(out), first)
    trained(tiny_pair, corpus, out, seed=5, resume=False)
    assert not same(weights(out), first)


def test_default_places(tiny_pair, tiny_prompts, corpus, tmp_path):
    kept = generate(tiny_pair, tiny_prompts[:2], max_new_tokens=4, path=tmp_path / "c.jsonl", progress=False)
    assert finetune(tiny_pair, kept, **QUICK) == tmp_path / "adapter"
    elsewhere = finetune(tiny_pair, corpus, **QUICK)
    assert (elsewhere / "adapter_config.json").exists()


def test_an_empty_directory_is_taken_and_a_foreign_one_is_not(tiny_pair, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    trained(tiny_pair, corpus, tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for resume in (True, False):
        with refused(tmp_path / "mine", "does not come from finetune"):
            trained(tiny_pair, corpus, tmp_path / "mine", resume=resume)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_lens_that_has_left_the_twin_stops_the_training(fresh_pair, corpus, tmp_path):
    trained(fresh_pair, corpus, tmp_path / "a")  # no lens yet, none built
    assert not fresh_pair.has_lens
    with torch.no_grad():
        next(p for name, p in fresh_pair.lens.named_parameters() if "embed" in name).mul_(1.5)
    with refused("disagree", "sync"):
        trained(fresh_pair, corpus, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method": "qlora"}, "qlora"),
        ({"loss_on": "prompt"}, "prompt"),
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "2.5"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "nan"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"gradient_accumulation": 0}, "gradient_accumulation"),
        ({"save_steps": 0}, "save_steps"),
        ({"targets": ["q_proj", "c_attn"]}, "c_attn"),
        ({"targets": []}, "targets"),
    ],
)
def test_bad_parameters_are_refused_and_nothing_is_written(tiny_pair, corpus, tmp_path, options, word):
    with refused(word):
        trained(tiny_pair, corpus, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_corpora_that_cannot_be_trained_on_are_refused(tiny_pair, tiny_qwen2_pair, corpus, tmp_path):
    out = tmp_path / "out"
    with refused("empty"):
        trained(tiny_pair, Corpus([]), out)
    with refused("not finished", "2 completions"):
        trained(tiny_pair, Corpus(corpus.records[:2], expected=6), out)
    with refused("the corpus", "another model"):
        trained(tiny_qwen2_pair, corpus, out)
    with refused("'x'", "4000", "vocabulary 400"):
        trained(tiny_pair, Corpus([Record("x", "p", "c", (0, 4000), (1,), "eos")]), out)
    with refused("'x'", "0 tokens"):
        trained(tiny_pair, Corpus([Record("x", "p", "c", (), (), "eos")]), out)
    sample = [float("nan")] * 64
    for change in ({"sample": [1.0]}, {"sample": "text"}, {"sample": None}, {"n_layers": None}, {"sample": sample}):
        settings = {"fingerprint": {**tiny_pair.fingerprint.to_dict(), **change}}
        with refused("the corpus"):
            trained(tiny_pair, Corpus(corpus.records, settings=settings), out)
    with refused("'x'", "300 tokens"):
        trained(tiny_pair, Corpus([Record("x", "p", "c", (5,) * 299, (1,), "eos")]), out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_of_the_last_step_that_is_no_number_gives_no_adapter(
    tiny_pair, corpus, tmp_path, monkeypatch, value
):
    backward = CorpusTrainer.training_step

    def overflow(trainer, model, inputs, *rest):
        loss = backward(trainer, model, inputs, *rest)
        if trainer.state.global_step == trainer.state.max_steps - 1:  # which no other loss follows
            next(weight for weight in model.parameters() if weight.grad is not None).grad[0, 0] = value
        return loss

    monkeypatch.setattr(CorpusTrainer, "training_step", overflow)
    with refused("norm of the gradients became", "step 2", "dtype='float32'"):
        trained(tiny_pair, corpus, tmp_path / "out", epochs=2, batch_size=len(corpus))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_training(fresh_pair, corpus, tmp_path):
    with torch.no_grad():
        fresh_pair.hf.lm_head.weight[7] = torch.inf
    with refused("loss became", "step 1", "lower lr"):
        trained(fresh_pair, corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ["memory", "batch_size"]),
        (OSError(28, "No space left on device"), ["No space left", "make room"]),
    ],
)
def test_memory_or_disk_running_out_is_explained(tiny_pair, corpus, tmp_path, monkeypatch, error, words):
    def failing(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise error
        return step(self, *args, **kwargs)

    step = CorpusTrainer.training_step
    undisturbed = trained(tiny_pair, corpus, tmp_path / "undisturbed", save_steps=1)
    with monkeypatch.context() as patch, refused(*words):
        patch.setattr(CorpusTrainer, "training_step", failing)
        trained(tiny_pair, corpus, tmp_path / "out", save_steps=1)
    assert same(weights(trained(tiny_pair, corpus, tmp_path / "out", save_steps=1)), weights(undisturbed))


def test_two_trainings_in_one_place_are_refused(tiny_pair, fresh_pair, corpus, tmp_path, monkeypatch):
    def meanwhile(self, **_):
        with refused("another process"):
            trained(fresh_pair, corpus, tmp_path / "out")
        raise ZeroDivisionError

    monkeypatch.setattr(CorpusTrainer, "train", meanwhile)
    with pytest.raises(ZeroDivisionError):
        trained(tiny_pair, corpus, tmp_path / "out")


@pytest.fixture(scope="module")
def undisturbed(tiny_pair, corpus, tmp_path_factory) -> Path:
    """A training of one epoch in a process of its own."""
    return trained(tiny_pair, corpus, tmp_path_factory.mktemp("undisturbed") / "out", epochs=1)


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        {"ACCELERATE_TORCH_DEVICE": "cuda:3"},
        {"LOCAL_RANK": "0"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"},
        {"PMI_SIZE": "4", "PMI_RANK": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"WANDB_PROJECT": "mine", "MLFLOW_TRACKING_URI": "http://localhost:1", "TORCHDYNAMO_DISABLE": "1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_no_variable_changes_what_a_seed_names(tiny_pair, corpus, undisturbed, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    own = dict(os.environ)
    found = trained(tiny_pair, corpus, tmp_path / "found", epochs=1)
    assert dict(os.environ) == own
    assert same(weights(found), weights(undisturbed))


def test_the_callers_own_accelerator_stays_theirs(tiny_pair, corpus, undisturbed, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=4)
    try:
        found = trained(tiny_pair, corpus, tmp_path / "found", epochs=1)
        assert accelerator.mixed_precision == "bf16"
        assert accelerator.gradient_accumulation_steps == 4
        assert same(weights(found), weights(undisturbed))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_a_process_group_of_the_callers_is_left_alone(tiny_pair, corpus, undisturbed, tmp_path):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert same(weights(trained(tiny_pair, corpus, tmp_path / "found", epochs=1)), weights(undisturbed))
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_that_were_left_on_the_twin_are_not_trained_with(fresh_pair, corpus, tmp_path):
    plain = {
        method: trained(fresh_pair, corpus, tmp_path / f"plain-{method}", method=method, epochs=1)
        for method in ("lora", "full")
    }
    fresh_pair.hf.requires_grad_(True)
    for parameter in fresh_pair.hf.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    for method, before in plain.items():
        found = trained(fresh_pair, corpus, tmp_path / f"found-{method}", method=method, epochs=1)
        [file] = [path.name for path in before.glob("*.safetensors")]
        assert (found / file).read_bytes() == (before / file).read_bytes()
    assert all(parameter.requires_grad for parameter in fresh_pair.hf.parameters())
    assert all((parameter.grad == 1e3).all() for parameter in fresh_pair.hf.parameters())
