"""Where the published files are, and small files in their form."""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip("the published benchmark files are not at ../shared/data")
    return DATA


@pytest.fixture
def write(tmp_path):
    """Writes one file under `tmp_path`; lists become JSON lines, or a JSON list for `.json`."""

    def _write(name: str, content) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".json"):
            path.write_text(json.dumps(content), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")
        return tmp_path

    return _write


@pytest.fixture
def hub(monkeypatch):
    """Puts data sets in the hub's column form where `datasets.load_dataset` looks; returns what was asked for."""
    import datasets

    def _hub(splits: dict, features=None) -> list:
        asked = []

        def load_dataset(name, config=None, *, split, revision=None):
            asked.append((name, config, split, revision))
            key = split if split in splits else f"{config}/{split}"
            return datasets.Dataset.from_list(splits[key], features=features)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return _hub
