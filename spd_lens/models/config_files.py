"""What a model's JSON files say, looked at before transformers builds the model: counts, types, places of weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from spd_lens.errors import SPDError, one_line, shortened
from spd_lens.files import read_json
from spd_lens.models.architectures import numbers_in

_COUNTS = re.compile(r"layers?$|n_layer|depth$|num_blocks|experts$")
"""Names of settings that say how many modules are made."""
_FEW = 1024


class _Settings(BaseModel):
    """Settings of which transformers does not look at the types when it reads them; all others are left to it."""

    model_config = ConfigDict(strict=True, extra="ignore")


_Stop = Annotated[str, Field(max_length=1000)]
"""A stop string, which transformers compares with the whole vocabulary, part by part."""


class _Architecture(_Settings):
    """`config.json`. A kind of attention that is an address would be code from the hub."""

    sliding_window: int | None = None
    attn_implementation: str | None = Field(None, pattern=r"^[\w|]*$")
    private_attn_implementation: str | None = Field(None, pattern=r"^[\w|]*$", alias="_attn_implementation")


class _Generation(_Settings):
    """`generation_config.json`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_length: int | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    stop_strings: _Stop | Annotated[list[_Stop], Field(max_length=64)] | None = None


def read_settings(directory: Path) -> dict[str, Any]:
    """What is in `config.json`, once it and the files beside it have been looked at.

    Raises:
        SPDError: a file is no settings by name, or one of them has a type or a count that the model cannot have; or
            the index of the weights leads out of the directory.
    """
    settings = _checked(directory / "config.json", _Architecture)
    if (directory / "generation_config.json").exists():  # transformers leaves out one that it cannot read
        _checked(directory / "generation_config.json", _Generation)
    _check_index(directory)
    return settings


def _checked(path: Path, kind: type[_Settings]) -> dict[str, Any]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise SPDError(f"{path} holds no settings by name; get a complete copy")
    try:
        kind(**settings)
    except ValidationError as error:
        problem = error.errors()[0]
        given = shortened(repr(problem["input"]))
        raise SPDError(
            f"{path} says {problem['loc'][0]} = {given}, which is not possible ({problem['msg']}); get a complete copy"
        ) from error
    return settings


def _check_index(directory: Path) -> None:
    """Refuse an index that leads out of the model's directory, or that is none."""
    for file in directory.glob("*.safetensors.index.json"):
        index = read_json(file)
        names = index.get("weight_map") if isinstance(index, dict) else None
        inside = isinstance(names, dict) and all(
            isinstance(name, str) and not {*name} & {"/", "\\", "\0"} for name in names.values()
        )
        if not inside:
            raise SPDError(f"{file} does not name the files beside it that hold the weights; get a complete copy")


def check_layers(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse a number of layers or experts that the weights cannot have, before transformers makes them all.

    Args:
        directory: The model's.
        settings: What `read_settings` read there.
    """
    n_weights = 0
    for file in directory.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                n_weights += len(weights.keys())
        except (OSError, SafetensorError) as error:
            raise SPDError(f"the model in {directory} cannot be loaded: {file.name}: {one_line(error)}") from error
    for name, n in numbers_in(settings):
        if _COUNTS.search(name) and n > max(n_weights, _FEW):
            raise SPDError(
                f"{directory / 'config.json'} says {name} = {n}, but there are {n_weights} weights in its files; get a "
                "complete copy"
            )
