"""Extraction by several processes: the sums of one process, and a refusal in all of them where they differ."""

import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from spd_lens.errors import SPDError
from spd_lens.models.load import load
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.moments import GradientMoments
from tests.helpers import EXAMPLES, refused, relative_error

N = 2
OPTIONS = {"engine": "twin", "keep": ["classes", "cross"], "layers": "all", "progress": False}


def in_group(rank, place, work, *args):
    """Run `work` as one of `N` processes of torch.distributed; what it returns or says is in a file of its rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=N, timeout=timedelta(seconds=100)
    )
    try:
        found = work(rank, place, *args)
    except SPDError as error:
        found = f"refused: {error}"
    (place / f"{rank}.txt").write_text(str(found))
    # no barrier: a process that refuses must not have to wait for another


@pytest.fixture
def as_group(processes, tmp_path):
    """Call a function in `N` processes that form a group; returns what each of them returned, as text."""

    def _as_group(work, *args):
        started = [processes.Process(target=in_group, args=(rank, tmp_path, work, *args)) for rank in range(N)]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout=250)
        hung = [process for process in started if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung
        return [path.read_text() if (path := tmp_path / f"{rank}.txt").exists() else "" for rank in range(N)]

    return _as_group


def extracted(rank, place, directory, cases):
    pair = load(directory, dtype="float64", device="cpu")
    for name, options in cases.items():
        moments = extract(pair, EXAMPLES, **OPTIONS, **options)
        moments.save(place / f"{name}-{rank}.safetensors")
    extract(pair, EXAMPLES[: 1 + rank], parallel=False, **OPTIONS)  # each on its own, whatever the other does
    return pair.device


def tensors(moments):
    return {**moments._tensors()}


def test_two_processes_find_the_sums_of_one(as_group, pair_of, tiny_qwen2_dir, tmp_path):
    cases = {"chosen": {}, "given": {"batch_tokens": 60, "shards": 3, "sinks": "attended"}, "one": {"batch_tokens": 999}}
    assert as_group(extracted, str(tiny_qwen2_dir), cases) == ["cpu"] * N
    pair = pair_of("qwen2", dtype="float64")
    for name, options in cases.items():
        alone = extract(pair, EXAMPLES, **OPTIONS, **options)
        first, second = (GradientMoments.load(tmp_path / f"{name}-{rank}.safetensors") for rank in range(N))
        assert first.settings == second.settings == alone.settings
        assert first.fingerprint == alone.fingerprint and first.n_heads == alone.n_heads and first.kept == alone.kept
        assert int(alone.n_examples.sum()) == len(EXAMPLES)
        for key, expected in tensors(alone).items():
            assert torch.equal(tensors(first)[key], tensors(second)[key]), (name, key)  # the same bits in both
            if expected.is_floating_point() and expected.any():
                assert relative_error(tensors(first)[key], expected) < 1e-12, (name, key)
            else:
                assert torch.equal(tensors(first)[key], expected), (name, key)


def with_a_fault(rank, place, directory, fault):
    pair = load(directory, dtype="float32", device="cpu")
    examples, options = EXAMPLES, dict(OPTIONS)
    if rank == 1 and fault == "texts":
        examples = [*EXAMPLES[:-1], EXAMPLES[0]]
    elif rank == 1 and fault == "number":
        examples = EXAMPLES[:-1]
    elif rank == 1 and fault == "weights":
        with torch.no_grad():
            pair.hf.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    elif rank == 1 and fault == "settings":
        options["layers"] = "last"
    elif rank == 1 and fault == "error":
        examples = []
    elif rank == 1 and fault == "not finite":
        pair.hf.lm_head.weight.data[:] = torch.inf
        options["weights"] = None
    elif rank == 1 and fault == "dies":
        os._exit(7)
    options.pop("weights", None)
    return extract(pair, examples, **options)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("texts", ["digest of their tokens", "in process 1", "in process 0"]),
        ("number", ["the number of examples is 5 in process 1 and 6 in process 0"]),
        ("weights", ["digest of its weights", "in process 1"]),
        ("settings", ["the choice of settings", "in process 1"]),
    ],
)
def test_processes_that_differ_are_refused_in_both(as_group, tiny_llama_dir, fault, words):
    first, second = as_group(with_a_fault, str(tiny_llama_dir), fault)
    assert first == second and first.startswith("refused: ")
    assert all(word in first for word in words), first


def test_an_error_in_one_process_ends_all(as_group, tiny_llama_dir):
    first, second = as_group(with_a_fault, str(tiny_llama_dir), "error")
    assert second == "refused: there are no calibration examples; give at least one"
    assert first == f"refused: process 1 of 2 (counted from 0) stopped, so all do: {second.removeprefix('refused: ')}"


def test_a_process_that_dies_ends_the_others_with_a_sentence(as_group, tiny_llama_dir):
    first, second = as_group(with_a_fault, str(tiny_llama_dir), "dies")
    assert second == ""
    assert "refused: another of the processes that work together has ended or does not answer" in first


def command(directory, out, *, seed=42):
    return [
        "-m", "spd_lens", "extract", "--model", str(directory), "--dtype", "float64", "--device", "cpu", "--task",
        "synthetic-math", "--n-calibration", "7", "--seed", str(seed), "--engine", "twin", "--out", str(out),
    ]  # fmt: skip
