"""Damaged files of every kind, read as they are used: a flipped bit, a cut, something appended.

Each is refused, or gives the content that was written. `make` writes one file of each kind without a model, `tried`
damages one again and again. Nothing here needs pytest, so that a script can try thousands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

import spd_lens as spd
from spd_lens.errors import SPDError
from spd_lens.evaluation import ForcedItem
from spd_lens.evaluation.results import ItemResult
from spd_lens.files import Manifest, read_json, write_json
from spd_lens.generation import Record
from spd_lens.generation.corpus import CorpusWriter
from spd_lens.models import Fingerprint, adapter_damage, trained_files
from spd_lens.runs import Run
from spd_lens.stats import Finding
from spd_lens.stats.estimate import Estimate
from spd_lens.subspaces import read_findings, write_findings

Fault = Literal["flip", "cut", "append"]
Read = Callable[[Path], Any]
"""Reads a run directory's file as it is used, and returns all that is used of it, in values that compare."""


@dataclass
class Tried:
    """How often a damaged file was refused, or gave the same content; and what else happened, in words."""

    refused: int = 0
    same: int = 0
    wrong: list[str] = field(default_factory=list)


def make(folder: Path) -> dict[str, Read]:
    """Write a run directory with one file of each kind. Returns how each is read, by its path below the folder."""
    fingerprint = Fingerprint(2, 16, 4, 2, 4, tuple(round(x, 8) for x in (torch.ones(64) / 8).tolist()))
    run = Run.open(folder, spd.SPDConfig.make({"model": "tiny", "n_train": 3, "task": "synthetic-math"}))
    sites = [spd.Site(1, "k"), spd.Site(1, "v")]
    moments = spd.GradientMoments.empty(fingerprint, sites, 2, {"loss": "aligned", "dtype": "float32"})
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for site in sites:
        for shard in range(2):
            moments.gradient[site][shard] += rows.mT @ rows
            moments.activation[site][shard] += rows.mT @ rows
    moments.n_examples += 1
    moments.n_tokens += 12
    moments.n_scored += 2
    moments.save(run.moments_path)
    subspace = moments.subspace(2)
    subspace.save(run.subspace_path)
    records = [_record(number) for number in range(3)]
    settings = {"model": "tiny", "seed": 1, "fingerprint": fingerprint.to_dict()}
    with CorpusWriter(run.corpus_path, settings, [record.key for record in records]) as writer:
        writer.append(records)
    item = ItemResult("a", "What is 2 + 2?", "4", "It is 4.", "4", 1.0, 5, "eos", aligned_loss=0.25, kl=0.125)
    spd.EvalResult("spd", "synthetic-math", [item], {"seed": 1}).save(run.result_path("synthetic-math", "spd"))
    run.write_effects("synthetic-math", {"base": [ForcedItem("a", 0.5, 0.75, 0.0, 0.5)]})
    run.note(versions={"torch": "2"}, machine={"threads": 1}, weights="0" * 16, seconds={"extract": 1.5})
    write_json(run.path / "data_card.json", {"synthetic-math": {"counts": {"train": 3}, "sources": {"x": "0" * 64}}})
    finding = Finding(
        "subspace", subspace.digest(), "spd", "aligned_loss", "synthetic-math", "held-out", "base",
        Estimate(-0.5, -0.75, -0.25, 8, "bootstrap"), "tiny", fingerprint.digest(), {"effects/x.json": "0" * 64},
    )  # fmt: skip
    write_findings(run.path, [finding])
    adapter = run.path / "adapter"
    adapter.mkdir()
    save_file({"base_model.lora_A.weight": torch.ones(2, 8)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["k_proj"]}')
    write_json(adapter / "training.json", {"settings": {"lr": 1.0}, **trained_files(adapter)})
    run.record()
    return READERS


def _record(number: int) -> Record:
    text = f"The answer is {number}."
    return Record(f"p{number}", f"What is {number}?", text, (0, 5, 6 + number), (7, 8, 1), "eos")


def tried(folder: Path, name: str, read: Read, fault: Fault, n: int, seed: int = 0) -> Tried:
    """Damage one file of a run directory `n` times, each time from its whole content, and read it.

    Args:
        folder: Where `make` wrote; the file is whole again afterwards.
        name: The file's path below it.
        read: How it is read.
        fault: A bit that is flipped, an end that is cut off, or bytes that are appended.
        n: How often.
        seed: Of the places, and of what is appended.
    """
    file, found = folder / name, Tried()
    whole, content = file.read_bytes(), read(folder)
    try:
        for place, damaged in _damaged(whole, fault, n, random.Random(f"{name} {fault} {seed}")):
            file.write_bytes(damaged)
            try:
                if read(folder) == content:
                    found.same += 1
                else:
                    found.wrong.append(f"{name}, {fault} at {place}: other content")
            except SPDError:
                found.refused += 1
            except Exception as error:  # a traceback, on the command line
                found.wrong.append(f"{name}, {fault} at {place}: {error!r:.200}")
    finally:
        file.write_bytes(whole)
    return found


def _damaged(whole: bytes, fault: Fault, n: int, drawn: random.Random) -> Iterator[tuple[int, bytes]]:
    for _ in range(n):
        place = drawn.randrange(len(whole))
        if fault == "flip":
            flipped = bytearray(whole)
            flipped[place] ^= 1 << drawn.randrange(8)
            yield place, bytes(flipped)
        elif fault == "cut":
            yield place, whole[:place]
        else:
            yield len(whole), whole + drawn.randbytes(1 + place % 64)


def _subspace(folder: Path) -> Any:
    found = spd.Subspace.load(folder / "subspace.safetensors")
    parts = [found.bases, found.offset, found.singular_values]
    tensors = [{str(site): value.tolist() for site, value in part.items()} for part in parts]
    return tensors, dict(found.ranks), found.rank, found.fingerprint, dict(found.origin)


def _moments(folder: Path) -> Any:
    found = spd.GradientMoments.load(folder / "moments.safetensors")
    return [value.tolist() for value in found.sums], found.n_heads, found.fingerprint, found.settings


def _corpus(folder: Path) -> Any:
    """A corpus whose last record is gone is the unfinished one that it was before: what it has must be as it was."""
    found = spd.Corpus.load(folder / "corpus.jsonl")
    if not found.complete:
        raise SPDError("it is not finished")
    return list(found), found.settings


def _adapter(folder: Path) -> Any:
    if problem := adapter_damage(folder / "adapter"):
        raise SPDError(problem)
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return weights, read_json(folder / "adapter" / "adapter_config.json"), read_json(folder / "adapter/training.json")


READERS: dict[str, Read] = {
    "moments.safetensors": _moments,
    "subspace.safetensors": _subspace,
    "corpus.jsonl": _corpus,
    "corpus.settings.json": _corpus,
    "adapter/adapter_model.safetensors": _adapter,
    "adapter/adapter_config.json": _adapter,
    "adapter/training.json": _adapter,
    "eval/synthetic-math/spd.json": lambda folder: asdict(Run(folder).result("synthetic-math", "spd")),
    "effects/synthetic-math.json": lambda folder: Run(folder).effects("synthetic-math"),
    "config.yaml": lambda folder: Run.open(folder).config,
    "run.json": lambda folder: Run(folder).notes,
    "data_card.json": lambda folder: read_json(folder / "data_card.json"),
    "findings.json": lambda folder: read_findings(folder),
    "manifest.json": lambda folder: Manifest.of(folder),
}
"""How each kind of file is read, by its name in a run directory."""
