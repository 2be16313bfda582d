"""Extraction by several processes: the sums of one process, and a refusal in all of them where they differ."""

import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from spd_lens.cli.commands import main
from spd_lens.errors import SPDError
from spd_lens.models.load import load
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.moments import GradientMoments
from tests.helpers import EXAMPLES, relative_error

N = 2
OPTIONS = {"engine": "twin", "keep": ["classes", "cross"], "layers": "all", "progress": False}


def in_group(rank, place, work, *args):
    """Run `work` as one of `N` processes of torch.distributed; what it returns is in a file of its rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=N, timeout=timedelta(seconds=200)
    )
    (place / f"{rank}.json").write_text(json.dumps(work(rank, place, *args)))


@pytest.fixture
def as_group(processes, tmp_path):
    """Call a function in `N` processes that form a group; returns what each of them returned, None if it died."""

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
        files = [tmp_path / f"{rank}.json" for rank in range(N)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    return _as_group


CASES = {
    "chosen": {},
    "given": {"batch_tokens": 60, "shards": 3, "sinks": "attended"},
    "one batch": {"batch_tokens": 999},
}


def extracted_and_refused(rank, place, directory):
    """The moments of all cases, as files; then what is said where process 1 does something else."""
    pair = load(directory, dtype="float64", device="cpu")
    for name, options in CASES.items():
        extract(pair, EXAMPLES, **OPTIONS, **options).save(place / f"{name}-{rank}.safetensors")
    extract(pair, EXAMPLES[: 1 + rank], parallel=False, **OPTIONS)  # each on its own, whatever the other does
    found = {}
    for fault in ("texts", "number", "settings", "error", "weights", "late error"):
        examples, options = EXAMPLES, dict(OPTIONS)
        if rank == 1 and fault == "texts":
            examples = [*EXAMPLES[:-1], EXAMPLES[0]]
        elif rank == 1 and fault == "number":
            examples = EXAMPLES[:-1]
        elif rank == 1 and fault == "settings":
            options["layers"] = "last_mid"
        elif rank == 1 and fault == "error":
            examples = []
        elif rank == 1 and fault == "weights":
            pair.hf.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
        elif fault == "late error":  # the weights are those of the file again, but for one where no digest looks
            pair.hf.load_state_dict(load(directory, dtype="float64", device="cpu").hf.state_dict())
            if rank == 1:
                pair.hf.lm_head.weight.data.view(-1)[1] = torch.inf
        with pytest.raises(SPDError) as caught:
            extract(pair, examples, **options)
        found[fault] = str(caught.value)
    return found


def test_two_processes_find_the_sums_of_one_and_refuse_as_one(as_group, pair_of, tiny_qwen2_dir, tmp_path):
    first, second = as_group(extracted_and_refused, str(tiny_qwen2_dir))
    pair = pair_of("qwen2", dtype="float64")
    for name, options in CASES.items():
        alone = extract(pair, EXAMPLES, **OPTIONS, **options)
        both = [GradientMoments.load(tmp_path / f"{name}-{rank}.safetensors") for rank in range(N)]
        assert int(alone.n_examples.sum()) == len(EXAMPLES)
        for one in both:
            assert (one.settings, one.fingerprint, one.n_heads) == (alone.settings, alone.fingerprint, alone.n_heads)
        for key, expected in alone._tensors().items():
            found = [one._tensors()[key] for one in both]
            assert torch.equal(*found), (name, key)  # the same bits in both
            if expected.is_floating_point() and expected.any():
                assert relative_error(found[0], expected) < 1e-12, (name, key)
            else:
                assert torch.equal(found[0], expected), (name, key)

    for fault, words in {
        "texts": "the digest of their tokens",
        "number": "the number of examples is 5 in process 1 and 6 in process 0",
        "settings": "the choice of settings",
        "weights": "the digest of its weights",
    }.items():
        assert words in first[fault] and "process 1" in first[fault] and first[fault] == second[fault]
    for fault, words in {"error": "no calibration examples", "late error": "not finite"}.items():
        assert words in second[fault] and "process" not in second[fault]
        assert first[fault] == f"process 1 of 2 (counted from 0) stopped, so all do: {second[fault]}"


def one_dies(rank, place, directory):
    pair = load(directory, dtype="float32", device="cpu")
    if rank == 1:
        os._exit(7)
    with pytest.raises(SPDError) as caught:
        extract(pair, EXAMPLES, **OPTIONS)
    return str(caught.value)


def test_a_process_that_dies_ends_the_others_with_a_sentence(as_group, tiny_llama_dir):
    first, second = as_group(one_dies, str(tiny_llama_dir))
    assert second is None
    assert first.startswith("another of the processes that work together has ended or does not answer")


def test_the_command_under_torchrun_writes_one_file_which_is_that_of_one_process(tiny_llama_dir, tmp_path, monkeypatch):
    def arguments(out):
        return [
            "extract", "--model", str(tiny_llama_dir), "--dtype", "float64", "--device", "cpu", "--engine", "twin",
            "--task", "synthetic-math", "--n-calibration", "7", "--out", str(out),
        ]  # fmt: skip

    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(N), "-m", "spd_lens"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = subprocess.run([*launcher, *arguments(tmp_path / "both")], env=environment, capture_output=True, text=True)
    assert both.returncode == 0, both.stderr[-3000:]
    assert both.stdout.count("written to") == 1
    assert both.stderr.count("extracting gradients of 7") == 1  # the second process logs errors alone
    monkeypatch.setattr(sys, "argv", ["spd-lens", *arguments(tmp_path / "one"), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found, alone = (GradientMoments.load(tmp_path / name / "moments.safetensors") for name in ("both", "one"))
    assert (found.settings, found.fingerprint) == (alone.settings, alone.fingerprint)
    for key, expected in alone._tensors().items():
        assert relative_error(found._tensors()[key].double(), expected.double()) < 1e-12, key
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "moments.safetensors",
        "subspace.safetensors",
    ]
