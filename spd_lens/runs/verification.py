"""`verify`: every file of a run, a study or a corpus read as it would be used, and compared with what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spd_lens.errors import UNREADABLE, SPDError
from spd_lens.evaluation import EvalResult, ForcedItem
from spd_lens.files import MANIFEST, Manifest, check_recorded, fitting, hash_again, read_json, refuse_special
from spd_lens.generation import Corpus, settings_path
from spd_lens.models import TRAINING_LOG, adapter_damage
from spd_lens.runs.config import read_kept
from spd_lens.runs.run_dir import Notes
from spd_lens.subspaces import GradientMoments, Subspace, read_findings


@dataclass(frozen=True)
class Verified:
    """What was found."""

    n_files: int
    """Files that were looked at, and those that a manifest lists and that are missing."""
    n_recorded: int
    """Those that a `manifest.json` lists with their sha256."""
    damaged: tuple[str, ...]
    """One sentence for each file that is not what was written, is missing, or cannot be read."""


def verify(path: str | Path) -> Verified:
    """Read every file of a run, a study, rounds or a corpus again, or one file, and hash what a manifest lists.

    Files are changed by nobody here. Hidden files, locks and links are left out, as are files of others of which
    nothing is known.

    Raises:
        SPDError: there is no such path.
    """
    path = Path(path)
    if not path.exists():
        raise SPDError(f"there is no {path} to verify")
    hash_again()
    files = dict.fromkeys(_files(path) if path.is_dir() else [path])
    recorded: set[Path] = set()
    for folder in [place.parent for place in files if place.name == MANIFEST]:
        if (listed := _manifest(folder)) is not None:
            recorded |= {folder / name for name in listed.files}
    files |= dict.fromkeys(sorted(recorded))
    problems = {file: problem for file in files if (problem := _problem(file)) is not None}
    # a corpus whose settings are damaged is not damaged itself
    own = [file for file, problem in problems.items() if str(file) in problem]
    rest = [problem for problem in problems.values() if not any(str(file) in problem for file in own)]
    return Verified(len(files), len(recorded), (*(problems[file] for file in own), *dict.fromkeys(rest)))


def _files(folder: Path) -> Iterator[Path]:
    for place in sorted(folder.iterdir()):
        if place.name.startswith(".") or place.suffix == ".lock" or place.is_symlink():
            continue
        if place.is_dir():
            yield from _files(place)
        else:
            yield place


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.of(folder)
    except SPDError:  # which is the problem of the manifest itself
        return None


def _problem(file: Path) -> str | None:
    """What is wrong with a file, in a sentence; None if nothing is, as far as anything is known of it."""
    try:
        refuse_special(file)
        check_recorded(file)
        _reader(file)(file)
    except (SPDError, OSError, *UNREADABLE) as error:
        text = " ".join(str(error).split()).removesuffix("; make it again")
        return text if isinstance(error, SPDError) else f"{file} cannot be read ({text})"
    return None


def _reader(file: Path) -> Callable[[Path], object]:
    """How a file is read, by its name and its place."""
    if file.suffix == ".safetensors":
        return _read_tensors
    if file.suffix == ".jsonl":
        return Corpus.load if settings_path(file).exists() else check_recorded
    if file.name in _BY_NAME:
        return _BY_NAME[file.name]
    if file.suffix != ".json":
        return check_recorded
    return _read_effects if file.parent.name in ("effects", "side_effects") else _read_json


def _read_tensors(file: Path) -> None:
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise SPDError(f"{file} is not a readable safetensors file ({error})") from error
    if "spd_lens" in metadata:  # others are another program's: the weights of adapters
        _OF_KIND[json.loads(metadata["spd_lens"])["kind"]](file)


def _read_effects(file: Path) -> None:
    read_json(file, dict[str, list[ForcedItem]])


def _read_json(file: Path) -> None:
    value = read_json(file)
    if isinstance(value, dict) and value.get("kind") == "EvalResult":
        EvalResult.load(file)


def _read_training(file: Path) -> None:
    if (problem := adapter_damage(file.parent)) is not None:
        raise SPDError(problem)


def _read_notes(file: Path) -> None:
    fitting(Notes, read_json(file), file)


_OF_KIND: dict[str, Callable[[Path], object]] = {"a subspace": Subspace.load, "gradient moments": GradientMoments.load}
_BY_NAME: dict[str, Callable[[Path], object]] = {
    "config.yaml": read_kept, "study.yaml": read_kept, "run.json": _read_notes, "study.json": _read_notes,
    "rounds.json": _read_notes, TRAINING_LOG: _read_training, "findings.json": read_findings,
    MANIFEST: lambda file: Manifest.of(file.parent),
}  # fmt: skip
