"""Files by the hash of their content, in a directory and in memory: what was stored comes back, or is refused."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import fsspec
import pytest

from spd_lens.errors import DamagedFile
from spd_lens.files.store import Store
from tests.helpers import refused

CONTENTS = {"a/corpus.jsonl": b'{"id": 1}\n', "b/empty": b"", "c/tensors": os.urandom(3000)}


@pytest.fixture(params=["directory", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = tmp_path / "store"
    return {"directory": str(place), "file": place.as_uri(), "memory": f"memory://{secrets.token_hex(4)}"}[
        request.param
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (path := tmp_path / "mine" / name).parent.mkdir(parents=True)
        path.write_bytes(content)
    return tmp_path / "mine"


def objects(store: Store) -> dict[str, bytes]:
    """What is in a store, without its library, by the last piece of the name."""
    files, root = fsspec.core.url_to_fs(store.url)
    return {path.rpartition("/")[2]: files.cat_file(path) for path in files.find(root)}


def test_files_come_back_in_another_place(url: str, folder: Path, tmp_path: Path) -> None:
    store = Store(url)
    store.check()
    recorded = store.put(folder, CONTENTS)
    assert objects(store) == {hashlib.sha256(content).hexdigest(): content for content in CONTENTS.values()}
    Store(store.url).get(recorded, tmp_path / "other")  # by the whole address, as another process has it
    there = (path for path in (tmp_path / "other").rglob("*") if path.is_file())
    assert {path.relative_to(tmp_path / "other").as_posix(): path.read_bytes() for path in there} == CONTENTS


def test_records_are_replaced_whole(url: str) -> None:
    store = Store(url)
    assert store.read("manifests/a/1.json") is None
    for record in ({"units": ["é"]}, {"units": []}):
        store.write("manifests/a/1.json", record)
        assert store.read("manifests/a/1.json") == record
    assert list(objects(store)) == ["1.json"]


@pytest.mark.parametrize("damaged", [b'{"id": 2}\n', b'{"id"', None], ids=["changed", "cut", "missing"])
def test_a_wrong_object_is_refused_by_name(url: str, folder: Path, tmp_path: Path, damaged: bytes | None) -> None:
    store, name, other = Store(url), "a/corpus.jsonl", tmp_path / "other"
    recorded = store.put(folder, CONTENTS)
    digest = hashlib.sha256(CONTENTS[name]).hexdigest()
    files, root = fsspec.core.url_to_fs(url)
    place = f"{root}/sha256/{digest[:2]}/{digest}"
    files.rm_file(place)
    if damaged is not None:
        files.pipe_file(place, damaged)
    (other / "a").mkdir(parents=True)
    (other / name).write_text("mine")
    with refused(digest, name):
        store.get(recorded, other)
    assert (other / name).read_text() == "mine" and len(list((other / "a").iterdir())) == 1
    store.put(folder, [name])  # whoever makes it again mends it
    store.get(recorded, other)
    assert (other / name).read_bytes() == CONTENTS[name]


def test_what_is_known_is_not_sent_and_what_is_there_not_fetched_again(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    recorded = store.put(folder, CONTENTS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert store.put(folder, CONTENTS, recorded) == recorded
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for path in before:
        path.unlink()
    store.get(recorded, folder)
    (folder / "a/corpus.jsonl").write_bytes(b"other")
    assert store.put(folder, ["a/corpus.jsonl"], recorded)["a/corpus.jsonl"]["size"] == 5
    assert objects(store) == {hashlib.sha256(b"other").hexdigest(): b"other"}


def test_a_place_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with refused("the store nowhere://x cannot be opened", "nowhere", "another URL"):
        Store("nowhere://x")
    with refused("cannot be written", "NotADirectoryError", "your rights"):
        Store(tmp_path / "file" / "store").check()
    with refused("cannot be read", "IsADirectoryError"):
        Store(tmp_path.parent).read(tmp_path.name)


def test_what_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "store" / "a.json").mkdir(parents=True)
    with refused("cannot be written", "IsADirectoryError"):
        Store(tmp_path / "store").write("a.json", {})
    assert [place.name for place in (tmp_path / "store").iterdir()] == ["a.json"]


def test_a_scheme_without_its_package_says_which_is_missing() -> None:
    missing = [name for name in ("gs", "abfs", "s3", "oci") if not _has_package(name)]
    if not missing:
        pytest.skip("the packages of all schemes that are tried here are installed")
    with refused("cannot be opened", "nstall", "its scheme"):
        Store(f"{missing[0]}://bucket/study")


def _has_package(scheme: str) -> bool:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "a\\..\\out", ""])
def test_a_record_cannot_lead_out_of_the_folder(name: str, folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    entry = store.put(folder, ["a/corpus.jsonl"])["a/corpus.jsonl"]
    with refused(repr(name), "outside"):
        store.get({name: entry}, tmp_path / "deep" / "er")
    assert not list(tmp_path.glob("**/out"))


@pytest.mark.parametrize("entry", [{}, {"sha256": "../../x", "size": 1}, {"sha256": "0" * 64, "size": "1"}])
def test_an_entry_that_was_never_recorded_is_damage(entry: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="what is recorded of mine is not a size with a sha256"):
        Store(tmp_path).get({"mine": entry}, tmp_path / "other")


def test_a_damaged_record_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"half": ')
    with pytest.raises(DamagedFile, match=r"a\.json in .* cannot be read as JSON"):
        Store(tmp_path).read("a.json")
