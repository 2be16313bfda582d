"""The content of files: safetensors with a JSON header, JSON and text; an error that says so where one is damaged."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spd_lens.errors import UNREADABLE, DamagedFile, SPDError
from spd_lens.files.publishing import is_blank, replacing
from spd_lens.files.stand_ins import refuse_stand_in

log = logging.getLogger(__name__)

_FORMAT = "spd_lens"


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write atomically: a reader finds the old file or the whole new one.

    Raises `SPDError` where the disk is full or the folder cannot be written.
    """
    # one entry: safetensors writes several in random order, and equal contents should be equal files
    metadata = {_FORMAT: json.dumps({"kind": kind, "header": header})}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    with replacing(path) as scratch:
        scratch.write_bytes(content)
    return Path(path)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `save_tensors` wrote with the same `kind`.

    Raises `SPDError` if the file is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise SPDError(f"there is no file {path}")
    refuse_stand_in(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # copies: tensors that stay mapped to the file would change with it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} is not a readable safetensors file ({error}); make it again") from error
    if _FORMAT not in metadata:
        raise SPDError(f"{path} does not hold {kind} of spd_lens but is a file of another program; give the right file")
    with reading(path):
        record = json.loads(metadata[_FORMAT])
        found, header = record["kind"], record["header"]
    if found != kind:
        raise SPDError(f"{path} does not hold {kind} of spd_lens but {found}; give the right file")
    return tensors, header


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what a header raises that lacks a field, or has something else there, into an `SPDError`."""
    try:
        yield
    except UNREADABLE as error:
        raise DamagedFile(f"{path} has a damaged header ({error!r}); make it again") from error


def is_made(path: Path, load: Callable[[Path], object]) -> bool:
    """Whether an artefact is there and whole. One that `load` finds damaged is as good as none; the log says so."""
    if not path.exists():
        return False
    try:
        load(path)
    except DamagedFile as error:
        log.warning("%s: making it again", str(error).removesuffix("; make it again"))
        return False
    return True


def write_text(path: str | Path, text: str) -> Path:
    """Write text atomically; `SPDError` where the disk is full or the folder cannot be written.

    Half characters, which no UTF-8 can hold, are spelled out as JSON does.
    """
    with replacing(path) as scratch:
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))
    return Path(path)


def update_text(path: str | Path, text: str) -> Path:
    """Write text atomically, unless the file holds it already: its time then says since when."""
    same = Path(path).is_file() and Path(path).read_bytes() == text.encode("utf-8", "backslashreplace")
    return Path(path) if same else write_text(path, text)


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; `SPDError` if the file is missing or damaged."""
    refuse_stand_in(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SPDError(f"{path} cannot be read as JSON: {error}") from error
    except UNREADABLE as error:
        reason = "it is empty" if is_blank(Path(path)) else error
        raise DamagedFile(f"{path} cannot be read as JSON: {reason}") from error
