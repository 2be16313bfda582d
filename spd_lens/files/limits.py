"""How much of a file from elsewhere is read: limits that no artefact comes near, checked before there is work."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spd_lens.errors import DamagedFile, SPDError

_JSON_BYTES = 2**30
_HEADER_BYTES = 2**25
_TENSORS = 30_000
"""Moments of 200 layers that keep everything are 25,000 tensors; their library takes 40 s for 300,000."""
_ANY = TypeAdapter(Any)


def refuse_special(path: str | Path) -> None:
    """Raise `SPDError` where a pipe, a device or a socket stands in place of a file: reading it may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever reads the file says so
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SPDError(f"{path} is no file but a pipe, a device or a socket; put the file itself there")


def json_within(path: Path) -> Any:
    """The JSON in a file: at most 1 GiB of UTF-8, nested at most some 200 deep.

    Raises what a damaged file raises (`errors.UNREADABLE`), `OSError`, or `SPDError` for a file that is too large.
    """
    refuse_special(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _JSON_BYTES:
            raise SPDError(f"{path} has {size} bytes, and no JSON of spd_lens has more than {_JSON_BYTES}")
        text = file.read(_JSON_BYTES + 1).decode("utf-8")
    try:
        _ANY.validate_json(text)  # fast, and it stops at a depth that everything else can work with
    except ValidationError as error:
        if "recursion" in str(error):
            raise ValueError("it is nested more than some 200 deep, the limit of recursion") from error
    return json.loads(text)  # which takes half characters, too


def check_header(path: Path) -> None:
    """Raise `DamagedFile` for a safetensors file whose header is larger than any of ours, before it is taken up."""
    refuse_special(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
            raise DamagedFile(f"{path} is not a readable safetensors file (its header does not fit); make it again")
        if file.read(length).count(b'"data_offsets"') > _TENSORS:
            raise DamagedFile(f"{path} lists more than {_TENSORS} tensors, which no artefact does; make it again")
