"""What a training says of its adapter: digests, by which damage is told from what was trained."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from spd_lens.errors import UNREADABLE, SPDError
from spd_lens.files import Schema, canonical, damage, inventory, read_json

TRAINING_LOG = "training.json"
_CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"
"""The one field of an adapter's configuration that its owner may change: where the base model is."""


class _File(Schema):
    size: int
    sha256: str


class _Log(Schema, extra="ignore"):
    """What `training.json` holds of files; earlier versions noted none."""

    files: dict[str, _File] | None = None
    config: str | None = None


def trained_files(directory: Path) -> dict[str, Any]:
    """What a training notes of a finished adapter or checkpoint: its files, and the digest of its configuration."""
    return {"files": inventory(directory), "config": _config_digest(directory)}


def adapter_damage(directory: Path) -> str | None:
    """What is wrong with the weights or the configuration of an adapter that finetune wrote; None if nothing is known.

    Raises:
        SPDError: its `training.json` or its configuration cannot be read.
    """
    if not (directory / TRAINING_LOG).is_file():
        return None
    noted = read_json(directory / TRAINING_LOG, _Log)
    if noted.config is not None and noted.config != _config_digest(directory):
        return f"{directory / _CONFIG} is not that of the adapter that was trained"
    files = {name: entry.model_dump() for name, entry in (noted.files or {}).items() if name.endswith(".safetensors")}
    return damage(directory, files)


def check_trained(directory: Path) -> None:
    """Raise `SPDError` for an adapter of finetune with other weights than were trained."""
    try:
        problem = adapter_damage(directory)
    except (SPDError, OSError, *UNREADABLE) as error:
        problem = f"the adapter in {directory} is damaged ({error})"
    if problem is not None:
        raise SPDError(f"{problem}; restore it or train again, or remove its {TRAINING_LOG} if the change is yours")


def _config_digest(directory: Path) -> str | None:
    file = directory / _CONFIG
    if not file.is_file():
        return None
    settings = read_json(file, dict[str, Any])
    return hashlib.sha256(canonical({key: value for key, value in settings.items() if key != _BASE})).hexdigest()
