"""What a folder's manifest lists is compared whenever it is read, and never stands in the way of whoever writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spd_lens.errors import DamagedFile, SPDError
from spd_lens.files import (
    MANIFEST,
    Manifest,
    check_recorded,
    forget,
    hash_again,
    read_json,
    record_files,
    save_tensors,
    write_json,
    write_text,
)
from spd_lens.files.digests import signed
from tests.helpers import refused


def recorded(folder: Path, *names: str, stage: str = "extract") -> None:
    record_files(folder, [folder / name for name in names], lambda _: stage)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "a.json", {"x": 1})
    write_text(tmp_path / "deep" / "er" / "b.md", "text")
    recorded(tmp_path, "a.json", "deep/er/b.md")
    return tmp_path


def listed(folder: Path) -> set[str]:
    found = Manifest.of(folder)
    return set() if found is None else set(found.files)


def test_it_is_plain_json(folder):
    content = json.loads((folder / MANIFEST).read_text())
    assert content["files"]["deep/er/b.md"] == {
        "size": 4, "sha256": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1", "stage": "extract",
    }  # fmt: skip


def test_another_whole_file_in_its_place_is_seen(folder, tmp_path_factory):
    other = write_json(tmp_path_factory.mktemp("other") / "a.json", {"x": 2})
    assert read_json(other) == {"x": 2}
    (folder / "a.json").write_bytes(other.read_bytes())
    with refused("a.json", "'extract'", "manifest.json", kind=DamagedFile):
        read_json(folder / "a.json")


def test_size_and_times_are_not_trusted(folder):
    path = folder / "deep/er/b.md"
    check_recorded(path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("tent")
    os.utime(path, ns=times)
    with refused("b.md", kind=DamagedFile):
        check_recorded(path)
    hash_again()
    with refused("b.md", kind=DamagedFile):
        check_recorded(path)


def test_what_is_written_anew_is_no_longer_listed(folder):
    write_text(folder / "deep/er/b.md", "other")
    assert listed(folder) == {"a.json"}
    check_recorded(folder / "deep/er/b.md")  # also if this process is killed before it lists it
    recorded(folder, "a.json", "deep/er/b.md", stage="report")
    found = Manifest.of(folder)
    assert found is not None and found.files["deep/er/b.md"].stage == "report"
    assert found.files["a.json"].stage == "extract", "what was listed stays as it was written"
    write_json(folder / "a.json", {"x": 3})
    assert read_json(folder / "a.json") == {"x": 3}
    save_tensors(folder / "deep/er/b.md", "things", {}, {})
    assert listed(folder) == set()


def test_damage_is_not_listed_over(folder):
    (folder / "a.json").write_text("{}")
    recorded(folder, "a.json")
    with refused("a.json", kind=DamagedFile):
        check_recorded(folder / "a.json")


def test_a_directory_is_forgotten_with_all_that_is_in_it(folder):
    write_text(folder / "deeper.md", "x")
    recorded(folder, "deeper.md")
    forget(folder / "deep")
    assert listed(folder) == {"a.json", "deeper.md"}


def test_the_nearest_one_counts(folder):
    inner = folder / "deep" / "er"
    write_text(inner / "c.md", "c")
    recorded(inner, "c.md")
    (folder / "deep/er/b.md").write_text("changed")
    check_recorded(inner / "b.md")
    forget(inner / "c.md")
    assert listed(folder) == {"a.json", "deep/er/b.md"} and not listed(inner)


def test_another_programs_is_none(tmp_path):
    for content in ('{"name": "app", "icons": []}', "[]", '{"kind": "other", "files": 3}'):
        (tmp_path / MANIFEST).write_text(content)
        assert Manifest.of(tmp_path) is None
        assert read_json(write_json(tmp_path / "a.json", {})) == {}


@pytest.mark.parametrize(
    "files",
    [
        {"../x": {"size": 1, "sha256": "0" * 64, "stage": "s"}},
        {"/etc/passwd": {"size": 1, "sha256": "0" * 64, "stage": "s"}},
        {"x": {"size": -1, "sha256": "0" * 64, "stage": "s"}},
        {"x": {"size": 1, "sha256": "0" * 63, "stage": "s"}},
        {"x": {"size": True, "sha256": "0" * 64, "stage": "s"}},
        {"x": {"size": 1, "sha256": "0" * 64}},
        [],
    ],
)
def test_one_that_is_forged_or_damaged_says_so_itself(folder, files):
    """Not of the files that it lists, which would be made again."""
    (folder / MANIFEST).write_text(signed({"kind": "manifest of spd_lens", "files": files}))
    with refused(folder / MANIFEST, "delete it"):
        read_json(folder / "a.json")
    try:
        read_json(folder / "a.json")
    except SPDError as error:
        assert not isinstance(error, DamagedFile)


def test_a_flipped_manifest_is_damaged(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"extract"', '"extrict"', 1))
    with refused(path, "sha256"):
        check_recorded(folder / "a.json")
