"""Training by several processes: it is the training of one, whatever kills it, and what goes wrong is one sentence."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from spd_lens.errors import SPDError
from spd_lens.generation.corpus import Corpus
from spd_lens.generation.generate import generate
from spd_lens.models.launchers import own_device
from spd_lens.models.load import load
from spd_lens.training.finetune import finetune
from spd_lens.training.parallel import Processes
from spd_lens.training.trainer import CorpusTrainer
from tests.helpers import refused, signal_once_there

ROOT = Path(__file__).parents[2]
N = 2
OPTIONS = {"lr": 1e-3, "epochs": 2, "batch_size": 2, "dropout": 0.0, "progress": False}
UNEVEN = {"gradient_accumulation": 2, "loss_on": "completion"}
"""Of five texts, batches of 2, 2 and 1: in the last, a process has no text of its own."""


@pytest.fixture(scope="module")
def corpus(tiny_pair, tiny_prompts, tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return generate(
        tiny_pair, tiny_prompts[:5], max_new_tokens=24, temperature=3.0, top_p=1.0, seed=9, progress=False, path=path
    )


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch` makes of docs/accelerate/fsdp2.yaml."""


def sharded_on_the_cpu() -> None:
    """accelerate shards weights on GPUs alone; here it takes this machine's processes for such. The rest is real."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    step = CorpusTrainer.training_step

    def checked(self, model, *args, **kwargs):
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        return step(self, model, *args, **kwargs)

    CorpusTrainer.training_step = checked


def one_of(index, port, model, corpora, calls, said, killed_at, sharded) -> None:
    """One process of `N`: trains each of `calls` in turn, and sends the sentences of those that are refused."""
    own = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": N, "LOCAL_WORLD_SIZE": N, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if sharded:
        os.environ.update(FSDP)
    if sharded == "anyway":
        sharded_on_the_cpu()
    if killed_at and index == 0:
        signal_once_there(*killed_at, signal.SIGKILL)
    pair, corpus = load(model, dtype="float32", device="cpu"), Corpus.load(corpora[index])
    for options in calls:
        try:
            finetune(pair, corpus, parallel=True, **OPTIONS | options)
        except SPDError as error:
            said.put((index, str(error)))
    torch.distributed.destroy_process_group()


def together(processes, corpora, calls, *, killed_at=None, sharded="") -> list[tuple[int, str]]:
    """Run `one_of` in `N` processes; with `killed_at` all are killed once a file of that pattern is in that folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = processes.Queue()
    files, model = [str(corpus.path) for corpus in corpora], corpora[0].settings["model"]
    group = [
        processes.Process(target=one_of, args=(index, port, model, files, calls, said, killed_at, sharded))
        for index in range(N)
    ]
    for process in group:
        process.start()
    if killed_at:
        group[0].join(timeout=250)  # the first process writes, and kills itself
        for process in group[1:]:
            process.kill()
    for process in group:
        process.join(timeout=250)
    codes = [process.exitcode for process in group]
    assert codes[0] == -signal.SIGKILL if killed_at else not any(codes), codes
    return sorted((said.get() for _ in range(said.qsize())), key=lambda pair: pair[0])


def weights(out: Path) -> dict[str, torch.Tensor]:
    [file] = out.glob("*.safetensors")
    return load_file(file)


def noted(out: Path) -> dict:
    return json.loads((out / "training.json").read_text())


def assert_close(out: Path, expected: Path) -> None:
    """Within what the order of additions does to float32: 1e-5 of each matrix's norm."""
    ours, theirs = weights(out), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name
    log, alone = noted(out)["log"], noted(expected)["log"]
    for field in ("loss", "grad_norm", "learning_rate", "step"):
        assert [e[field] for e in log] == pytest.approx([e[field] for e in alone], rel=1e-5)


def test_two_processes_train_the_adapter_and_the_model_of_one(tiny_pair, corpus, tmp_path, processes):
    calls = {
        "uneven": UNEVEN,
        "full": {"method": "full", "early_stop": True, "lr": 0.01, "gradient_checkpointing": True},
        "padded": {"max_length": 40, "loss_on_padding": True, "batch_size": 4, "epochs": 1},
    }
    said = together(processes, [corpus] * N, [{**how, "out": tmp_path / f"{name}-2"} for name, how in calls.items()])
    assert not said
    for name, how in calls.items():
        alone = finetune(tiny_pair, corpus, out=tmp_path / f"{name}-1", **OPTIONS | how)
        assert_close(tmp_path / f"{name}-2", alone)
        assert noted(tmp_path / f"{name}-2")["processes"] == {"count": N, "engine": "ddp"}
        assert noted(tmp_path / f"{name}-2")["settings"] == noted(alone)["settings"]
        assert "processes" not in noted(alone)
    assert noted(tmp_path / "full-2")["early_stop"]["epoch"] == noted(tmp_path / "full-1")["early_stop"]["epoch"]


def test_killed_and_continued_it_is_the_undisturbed_training(tiny_pair, corpus, tmp_path, processes):
    how = {"dropout": 0.3, "save_steps": 2, "batch_size": 2}
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    together(
        processes, [corpus] * N, [{**how, "out": out}],
        killed_at=(tmp_path / "out.training/checkpoints", "checkpoint-4/complete"),
    )  # fmt: skip
    assert not out.exists()
    with refused("processes = ", '"count": 2', "processes = null"):
        finetune(tiny_pair, corpus, out=out, **OPTIONS | how)
    assert not together(processes, [corpus] * N, [{**how, "out": out}, {**how, "out": undisturbed}])
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(out).items())
    assert noted(out)["log"] == noted(undisturbed)["log"]
    assert finetune(tiny_pair, corpus, out=out, **OPTIONS | how) == out  # finished is finished, whoever trained it


def test_sharded_weights_train_the_adapter_and_the_model_of_one_killed_or_not(tiny_pair, corpus, tmp_path, processes):
    calls = {"lora": UNEVEN | {"save_steps": 1}, "full": {"method": "full", "save_steps": 1}}
    calls = {name: {**how, "out": tmp_path / f"{name}-2"} for name, how in calls.items()}
    killed_at = (tmp_path / "lora-2.training/checkpoints", "checkpoint-2/complete")
    together(processes, [corpus] * N, [calls["lora"]], killed_at=killed_at, sharded="anyway")
    assert not (tmp_path / "lora-2").exists()
    assert not together(processes, [corpus] * N, list(calls.values()), sharded="anyway")
    for name, how in calls.items():
        alone = finetune(tiny_pair, corpus, **OPTIONS | how | {"out": tmp_path / f"{name}-1"})
        assert_close(tmp_path / f"{name}-2", alone)
        assert noted(tmp_path / f"{name}-2")["processes"] == {"count": N, "engine": "fsdp"}


def test_what_processes_cannot_do_together_is_said_by_all(corpus, tmp_path, processes):
    part = Corpus(corpus.records[:4], settings=corpus.settings, path=tmp_path / "part.jsonl")
    part.path.write_text("".join(f"{record.to_json()}\n" for record in part))
    (tmp_path / "linked.training").symlink_to(tmp_path)
    batch = {"batch_size": 3, "out": tmp_path / "batch"}
    linked = {"out": tmp_path / "linked"}
    said = together(processes, [corpus] * N, [batch, linked])
    assert [index for index, _ in said] == [0, 0, 1, 1]
    assert all("batch_size is 3, which 2 processes cannot share" in text for _, text in said[::2])
    assert all("linked.training is a link" in text for _, text in said[1::2])  # which the first alone looks at
    said = together(processes, [corpus, part], [{"out": tmp_path / "other"}])
    assert len(said) == N and all("the processes of one training differ in corpus" in text for _, text in said)
    said = together(processes, [corpus] * N, [{"out": tmp_path / "other"}], sharded="as asked")
    assert len(said) == N and all("asks for fsdp, which accelerate does on GPUs alone" in text for _, text in said)


def test_one_process_alone_cannot_train_in_parallel(tiny_pair, corpus, tmp_path, monkeypatch):
    with refused("started alone", "accelerate launch", "--parallel"):
        finetune(tiny_pair, corpus, out=tmp_path / "out", parallel=True, **OPTIONS)
    assert not torch.distributed.is_initialized()
    assert own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("auto") == own_device("cuda") == "cuda:3" and own_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_row_is_run_once_and_every_process_goes_through_every_pass(count):
    sizes = [1, 3, 2, 5, 1]
    rows = torch.arange(sum(sizes))
    parts = [{"input_ids": ids[:, None], "labels": ids[:, None]} for ids in rows.split(sizes)]
    shares = [Processes(index, count, "ddp").shares(parts) for index in range(count)]
    scored = [[int(id) for part in share for id in part["labels"] if id != -100] for share in shares]
    assert sorted(sum(scored, [])) == rows.tolist()
    assert max(map(len, scored)) - min(map(len, scored)) <= 1
    assert all(len(part["input_ids"]) for share in shares for part in share)
    assert Processes().shares(parts)[3]["labels"].equal(parts[3]["labels"])


def launched(*arguments) -> subprocess.CompletedProcess:
    """`accelerate launch` of the command, as docs/parallel-training.md has it."""
    command = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "docs/accelerate/ddp-cpu.yaml"]
    return subprocess.run(
        [sys.executable, *command, "-m", "spd_lens", "finetune", "--parallel", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_the_launcher_trains_on_two_processes(tiny_pair, tiny_llama_dir, corpus, tmp_path):
    flags = ["--model", tiny_llama_dir, "--dtype", "float32", "--device", "cpu", "--corpus", corpus.path]
    flags += ["--lr", "1e-3", "--epochs", "1", "--train-batch-size", "2", "--lora-dropout", "0"]
    done = launched(*flags, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert_close(tmp_path / "out", finetune(tiny_pair, corpus, out=tmp_path / "one", **OPTIONS | {"epochs": 1}))
    assert noted(tmp_path / "out")["processes"]["count"] == N


def test_of_processes_that_fail_one_says_why(tmp_path):
    failed = launched("--corpus", tmp_path / "none.jsonl", "--out", tmp_path / "out", "--device", "cpu")
    assert failed.returncode != 0
    assert failed.stderr.count("none.jsonl does not exist") == 1, failed.stderr
