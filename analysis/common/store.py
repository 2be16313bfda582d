"""`JsonFolder`: what was measured, piece by piece, so that a killed analysis goes on and other settings are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError
from spd_lens.files import read_json, write_json


class JsonFolder:
    """Finished pieces as one JSON file each, written whole; in memory alone if there is no folder."""

    what = "measurements"
    """What a folder holds, in messages."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Any] = {}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise `SPDError` unless the folder is new or holds pieces that were made with these settings; begin it."""
        if self._folder is None:
            return
        path = self._folder / "settings.json"
        if not path.exists():
            write_json(path, dict(settings))
            return
        known = read_json(path, dict[str, Any])
        differ = [key for key in {**settings, **known} if known.get(key) != settings.get(key)]
        if differ:
            shown = "; ".join(
                f"{key}: {_short(known.get(key))} there, {_short(settings.get(key))} now" for key in differ
            )
            raise SPDError(
                f"{self._folder} holds {self.what} with other settings ({shown}); move it away or use the same settings"
            )

    def __contains__(self, name: str) -> bool:
        return self.read(name) is not None

    def path(self, name: str) -> Path:
        """The file of a piece."""
        return (self._folder or Path()) / f"{name}.json"

    def read(self, name: str) -> Any:
        """A piece, or None."""
        if name not in self._memory and self._folder is not None and self.path(name).exists():
            self._memory[name] = read_json(self.path(name), dict[str, Any])
        return self._memory.get(name)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Keep a piece."""
        self._memory[name] = record
        if self._folder is not None:
            write_json(self.path(name), record)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{len(value)} of them" if isinstance(value, list) and len(text) > 60 else text
