"""`spd-lens verify`: whole folders are, damaged files are named, one sentence each."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from spd_lens.cli.commands import app
from spd_lens.errors import SPDError
from spd_lens.files import write_json
from spd_lens.runs import verify
from tests.helpers import refused
from tests.reliability.flips import READERS, make

ARTEFACTS = Path(__file__).parents[1] / "fixtures" / "artefacts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "run")
    return tmp_path / "run"


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_written_is_whole(folder):
    found = verify(folder)
    assert not found.damaged and found.n_files == len(READERS) and found.n_recorded == 11
    result = CliRunner().invoke(app, ["verify", str(folder), str(folder / "corpus.jsonl")])
    assert result.exit_code == 0
    assert f"{len(READERS) + 1} files, 11 of them listed in a manifest.json: none is damaged" in result.output


@pytest.mark.parametrize("name", READERS)
def test_each_damaged_file_is_named_once(folder, name):
    spoil(folder / name)
    found = verify(folder)
    assert [name in problem and "\n" not in problem for problem in found.damaged] == [True]
    assert verify(folder / name).damaged == found.damaged


def test_several_are_named(folder):
    (folder / "moments.safetensors").unlink()
    spoil(folder / "subspace.safetensors")
    (folder / "mine.txt").write_text("a note of somebody")
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert isinstance(result.exception, SPDError) and f"2 of {len(READERS) + 1}" in str(result.exception)
    assert sorted("missing" in line for line in result.output.splitlines() if line) == [False, True]


def test_damage_that_has_a_digest_is_seen_by_what_it_holds(folder):
    """A forged record, with a digest of its own, in a folder without a manifest."""
    (folder / "manifest.json").unlink()
    write_json(folder / "effects/synthetic-math.json", {"base": [{"id": "a"}]})
    write_json(folder / "run.json", {"seconds": {"extract": "long"}})
    assert [Path(problem.split()[0]).name for problem in verify(folder).damaged] == ["synthetic-math.json", "run.json"]


@pytest.mark.parametrize("name", ["run", "study", "rounds", "killed", "moments.safetensors", "run/corpus.jsonl"])
def test_what_earlier_versions_wrote_is_whole(name):
    found = verify(ARTEFACTS / name)
    assert not found.damaged and found.n_files and not found.n_recorded


def test_nothing_there(tmp_path):
    with refused(tmp_path / "x"):
        verify(tmp_path / "x")
