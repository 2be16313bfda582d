"""The content of files: safetensors with a JSON header, JSON and text; an error that says so where one is damaged."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spd_lens.errors import UNREADABLE, DamagedFile, SPDError
from spd_lens.files.digests import DIGEST, signed, tensors_digest, unsigned
from spd_lens.files.limits import check_header, json_within
from spd_lens.files.manifest import check_recorded, forget
from spd_lens.files.publishing import is_blank, replacing
from spd_lens.files.schemas import fitting
from spd_lens.files.stand_ins import refuse_stand_in

log = logging.getLogger(__name__)

_FORMAT = "spd_lens"
_T = TypeVar("_T")


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write atomically: a reader finds the old file or the whole new one.

    Raises `SPDError` where the disk is full or the folder cannot be written.
    """
    metadata = {_FORMAT: json.dumps({"kind": kind, "header": header})}
    metadata[DIGEST] = tensors_digest(tensors, metadata)
    content = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata))
    length = int.from_bytes(content[:8], "little")
    forget(path)
    with replacing(path) as scratch, scratch.open("wb") as file:
        file.write(_in_order(bytes(content[8 : 8 + length])))
        file.write(content[8 + length :])
    return Path(path)


def _in_order(header: bytes) -> bytes:
    """The header of a safetensors file behind its length, with the metadata in order.

    safetensors writes several entries in random order, and equal contents should be equal files.
    """
    record = json.loads(header)
    record["__metadata__"] = dict(sorted(record["__metadata__"].items()))
    text = json.dumps(record, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # as safetensors does, so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `save_tensors` wrote with the same `kind`.

    Raises `SPDError` if the file is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise SPDError(f"there is no file {path}")
    refuse_stand_in(path)
    check_recorded(path)
    try:
        check_header(Path(path))
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # copies: tensors that stay mapped to the file would change with it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} is not a readable safetensors file ({error}); make it again") from error
    if _FORMAT not in metadata:
        raise SPDError(f"{path} does not hold {kind} of spd_lens but is a file of another program; give the right file")
    if metadata.keys() == {_FORMAT}:
        note_undigested(path)
    elif metadata.get(DIGEST) != tensors_digest(tensors, metadata):
        raise DamagedFile(
            f"{path} has changed since it was written (its sha256 is another); restore it, or make it again"
        )
    with reading(path):
        record = json.loads(metadata[_FORMAT])
        found, header = record["kind"], record["header"]
    if found != kind:
        raise SPDError(f"{path} does not hold {kind} of spd_lens but {found}; give the right file")
    return tensors, header


def note_undigested(path: str | Path) -> None:
    """Say, once for each folder, that an earlier version wrote something whose damage cannot be seen."""
    if (folder := Path(path).absolute().parent) not in _NOTED:
        _NOTED.add(folder)
        log.warning("%s is of an earlier version, without a sha256: whether it has changed cannot be seen", path)


_NOTED: set[Path] = set()


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what a header raises that lacks a field, or has something else there, into an `SPDError`."""
    try:
        yield
    except UNREADABLE as error:
        raise DamagedFile(f"{path} has a damaged header ({error!r}); make it again") from error


@contextlib.contextmanager
def holding(path: str | Path, what: str) -> Iterator[None]:
    """Whatever is refused or fails while a file becomes an object: say that it does not hold `what` it should."""
    try:
        yield
    except DamagedFile:
        raise
    except (SPDError, *UNREADABLE) as error:
        reason = error if isinstance(error, SPDError) else repr(error)
        raise DamagedFile(f"{path} does not hold {what} that can be: {reason}; make it again") from error


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
    forget(path)
    with replacing(path) as scratch:
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))
    return Path(path)


def update_text(path: str | Path, text: str) -> Path:
    """Write text atomically, unless the file holds it already: its time then says since when."""
    same = Path(path).is_file() and Path(path).read_bytes() == text.encode("utf-8", "backslashreplace")
    return Path(path) if same else write_text(path, text)


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically. A table gets the `sha256` of all else in it, which `read_json` compares and leaves out."""
    return write_text(path, signed(value))


@overload
def read_json(path: str | Path) -> Any: ...
@overload
def read_json(path: str | Path, kind: type[_T]) -> _T: ...
def read_json(path: str | Path, kind: Any = None) -> Any:
    """Read JSON, of any program; what `write_json` wrote is compared with its digest.

    Args:
        path: The file.
        kind: What it must hold, as in `fitting`; None: anything.

    Raises:
        DamagedFile: it is no JSON, not what was written, or not of the `kind`.
        SPDError: the file is missing, too large, or stands for another.
    """
    refuse_stand_in(path)
    check_recorded(path)
    try:
        value = unsigned(json_within(Path(path)))
    except OSError as error:
        raise SPDError(f"{path} cannot be read as JSON: {error}") from error
    except (DamagedFile, *UNREADABLE) as error:
        reason = "it is empty" if is_blank(Path(path)) else error
        raise DamagedFile(f"{path} cannot be read as JSON: {reason}") from error
    return value if kind is None else fitting(kind, value, path)
