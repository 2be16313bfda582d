"""Damaged files of every kind are refused, or give what was written; `make reliability` tries more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from spd_lens.files import MANIFEST, Manifest
from tests.reliability.flips import READERS, make, tried

N = {"flip": 40, "cut": 10, "append": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flips") / "run"
    make(place)
    return place


@pytest.mark.parametrize("name", READERS)
def test_damage_is_seen(folder, name):
    """Each file speaks for itself: no manifest lists it, but for the settings in YAML, which have no digest."""
    manifest = folder / MANIFEST
    alone = name not in ("config.yaml", MANIFEST)
    aside = manifest.rename(folder / "aside") if alone else manifest
    try:
        for fault, n in N.items():
            found = tried(folder, name, READERS[name], fault, n)
            assert not found.wrong
            assert found.refused + found.same == n
            assert found.refused > n / 4 or fault == "append"
    finally:
        aside.rename(manifest)


def test_the_manifest_names_the_stages(folder):
    listed = Manifest.of(folder)
    assert listed is not None
    stages = {name: entry.stage for name, entry in listed.files.items()}
    assert stages == {
        "adapter/adapter_model.safetensors": "finetune", "adapter/training.json": "finetune",
        "config.yaml": "settings", "corpus.jsonl": "generate", "corpus.settings.json": "generate",
        "data_card.json": "settings", "effects/synthetic-math.json": "effects",
        "eval/synthetic-math/spd.json": "evaluate", "findings.json": "report", "moments.safetensors": "extract",
        "subspace.safetensors": "extract",
    }  # fmt: skip
