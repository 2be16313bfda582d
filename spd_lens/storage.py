"""Files that are whole or not there: safetensors with a JSON header, JSON, and a clear word when one is damaged."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd_lens.errors import SPDError

_FORMAT = "spd_lens"


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write atomically: a reader finds the old file or the whole new one.

    Raises `SPDError` where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    # one entry: safetensors writes several in random order, and equal contents should be equal files
    metadata = {_FORMAT: json.dumps({"kind": kind, "header": header})}
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, handle = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, handle, metadata=metadata)
        os.chmod(handle, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(handle, path)
    except (OSError, SafetensorError) as error:
        if handle is not None:
            Path(handle).unlink(missing_ok=True)
        raise SPDError(f"{path} cannot be written ({error}); free some space or choose another place") from error
    return path


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `save_tensors` wrote with the same `kind`.

    Raises `SPDError` if the file is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise SPDError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise SPDError(f"{path} is not a readable safetensors file ({error}); make it again") from error
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
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SPDError(f"{path} has a damaged header ({error!r}); make it again") from error


def write_text(path: str | Path, text: str) -> Path:
    """Write text atomically; `SPDError` where the disk is full or the folder cannot be written."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the name must not survive a crash that the content does not
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise SPDError(f"{path} cannot be written ({error}); free some space or choose another place") from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; `SPDError` if the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SPDError(f"{path} cannot be read as JSON: {error}") from error
