"""Files and directories that are whole or not there, and what killed processes leave of them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spd_lens.files.contents import load_tensors, read_json, save_tensors, write_json, write_text
from spd_lens.files.publishing import (
    check_writable,
    damage,
    filling,
    inventory,
    is_blank,
    is_free,
    replacing,
    unreadable_weights,
)
from tests.helpers import refused


@contextlib.contextmanager
def disk_calls():
    """What is synced and renamed meanwhile, in order: `("sync", path)` and `("rename", from, to)`."""
    calls: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        sync, rename = os.fsync, os.replace

        def fsync(descriptor):
            calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
            sync(descriptor)

        def replace(source, target):
            calls.append(("rename", Path(source), Path(target)))
            rename(source, target)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        yield calls


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


WRITERS = {
    "text": lambda path: write_text(path, "x"),
    "json": lambda path: write_json(path, {"x": 1}),
    "tensors": lambda path: save_tensors(path, "a thing", {"x": torch.zeros(3)}, {}),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@writers
def test_content_is_on_the_disk_before_its_name_and_the_name_after(write, tmp_path):
    place = tmp_path / "new" / "place" / "x"
    with disk_calls() as calls:
        write(place)
    [rename] = [i for i, call in enumerate(calls) if call[0] == "rename"]
    scratch, final = calls[rename][1:]
    assert final == place
    assert ("sync", scratch) in calls[:rename]
    assert ("sync", place.parent) in calls[rename + 1 :]
    assert {("sync", tmp_path), ("sync", tmp_path / "new")} <= set(calls)  # the folders' own names
    assert [p.name for p in place.parent.iterdir()] == ["x"]


def test_every_file_of_a_directory_is_on_the_disk_before_its_name(tmp_path):
    with disk_calls() as calls, filling(tmp_path / "model") as scratch:
        (scratch / "inner").mkdir()
        for name in ("a", "inner/b"):
            (scratch / name).write_text("x")
    [rename] = [i for i, call in enumerate(calls) if call[0] == "rename"]
    wanted = {("sync", place) for place in (scratch, scratch / "a", scratch / "inner", scratch / "inner" / "b")}
    assert wanted <= set(calls[:rename])
    assert calls[rename + 1 :] == [("sync", tmp_path)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    (tmp_path / "x").write_text("before")
    with pytest.raises(error), replacing(tmp_path / "x") as scratch:
        scratch.write_text("half")
        raise error
    with pytest.raises(error), filling(tmp_path / "y") as scratch:
        (scratch / "z").write_text("half")
        raise error
    assert (tmp_path / "x").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in WRITERS.values():
        with refused(tmp_path / "x", "No space left", "free some space"):
            write(tmp_path / "x")
    with refused(tmp_path / "y", "No space left", "elsewhere"), filling(tmp_path / "y", "go elsewhere"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_is_honoured(tmp_path, mask):
    before = os.umask(mask)
    try:
        for name, write in WRITERS.items():
            write(tmp_path / name)
        with filling(tmp_path / "model") as scratch:
            save_file({"x": torch.zeros(2)}, scratch / "x.safetensors")  # which makes files for their owner alone
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (*WRITERS, "model/x.safetensors")}
    assert modes == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~mask


@writers
def test_leftovers_of_dead_processes_go_and_those_of_others_stay(write, tmp_path):
    dead = dead_pid()
    gone = [f".x.{dead}-0123abcd.tmp"]
    kept = [
        f".x.{os.getpid()}-0123abcd.tmp", f".x.{os.getppid()}-0123abcd.tmp", f".y.{dead}-0123abcd.tmp", ".x", ".x.tmp",
        f".x.{dead}", "x.backup",
    ]  # fmt: skip
    for name in gone + kept:
        (tmp_path / name).touch()
    (tmp_path / f".x.{dead}-00000000.tmp").mkdir()
    (tmp_path / f".x.{dead}-00000000.tmp" / "weights").touch()
    write(tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "x"])


def test_leftovers_of_earlier_versions_go(tmp_path):
    (tmp_path / f".run.json.{dead_pid()}").touch()
    (tmp_path / f".run.json.{os.getpid()}").touch()
    write_json(tmp_path / "run.json", {})
    (tmp_path / ".moments.safetensors.ab_3defg").touch()
    save_tensors(tmp_path / "moments.safetensors", "a thing", {"x": torch.zeros(1)}, {})
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"run.json", "moments.safetensors", f".run.json.{os.getpid()}"}


@writers
def test_links_with_guessed_names_are_not_followed(write, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("x", *(f".x.{pid}" for pid in range(os.getpid() - 2, os.getpid() + 3))):
        (run / name).symlink_to(victim)
    write(run / "x")
    assert victim.read_text() == "precious"
    assert not (run / "x").is_symlink()


def make(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        place = directory / name.rstrip("/")
        place.mkdir() if name.endswith("/") else place.touch()
    return directory


@pytest.mark.parametrize(
    "names",
    [
        (),
        (".lock",),
        (".DS_Store",),
        (".config.yaml.123",),
        (".config.yaml.123-0a1b2c3d.tmp", ".lock", ".DS_Store"),
        (".model.123-0a1b2c3d.tmp/",),
        ("config.yaml",),
        ("config.yaml", "run.json", ".lock"),
    ],
)
def test_a_place_with_nothing_but_a_killed_beginning_is_free(tmp_path, names):
    assert is_free(make(tmp_path / "r", *names), "config.yaml", "run.json")
    assert is_free(tmp_path / "missing")


@pytest.mark.parametrize(
    "names", [("thesis.tex",), (".git/",), (".notes.2024",), (".bashrc.1",), (".lock", "moments.safetensors")]
)
def test_a_place_with_something_else_is_not(tmp_path, names):
    assert not is_free(make(tmp_path / "r", *names), "config.yaml", "run.json")


def test_what_is_no_empty_directory_is_not_free(tmp_path):
    make(tmp_path / "r", "config.yaml")
    assert not is_free(tmp_path / "r")  # of no file that is written first
    (tmp_path / "r" / "config.yaml").write_text("seed: 1\n")
    assert not is_free(tmp_path / "r", "config.yaml")
    (tmp_path / "file").touch()
    assert not is_free(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not is_free(tmp_path / "link")


def test_blank_files(tmp_path):
    for content, blank in ((b"", True), (b"\0" * 5000, True), (b"\0\0a", False), (b" ", False)):
        (tmp_path / "x").write_bytes(content)
        assert is_blank(tmp_path / "x") is blank
    assert not is_blank(tmp_path / "missing")
    assert not is_blank(tmp_path)


def test_a_directory_that_is_free_is_taken(tmp_path):
    make(tmp_path / "model", ".DS_Store", ".lock")
    with filling(tmp_path / "model") as scratch:
        (scratch / "x").touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["x"]


def test_places_that_cannot_be_written_are_found_out_and_left_as_they_were(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, options in (
        (tmp_path, {}), (tmp_path / "file", {"directory": True}), (tmp_path / "file" / "x", {}),
        (Path("/proc/x"), {}), (Path("/proc/a/b"), {"directory": True}),
    ):  # fmt: skip
        with refused(path, "--out"):
            check_writable(path, **options)
    check_writable(tmp_path / "new" / "eval.json")
    check_writable(tmp_path / "file")
    check_writable(tmp_path, directory=True)
    check_writable(tmp_path / "new", directory=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["missing", "empty", "half", "zeros", "one bit"])
def test_damage_is_found(tmp_path, kind):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(os.urandom(1000))
    recorded = json.loads(json.dumps(inventory(tmp_path)))
    (tmp_path / "more").touch()
    assert damage(tmp_path, recorded) is None
    spoil(tmp_path / "b", kind)
    assert str(tmp_path / "b") in damage(tmp_path, recorded)
    assert (damage(tmp_path, recorded, hashed_up_to=10) is None) == (kind in ("zeros", "one bit"))


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    changed = {"empty": b"", "half": content[: len(content) // 2], "zeros": b"\0" * len(content)}
    changed["one bit"] = content[:-1] + bytes([content[-1] ^ 1])
    path.unlink()
    if kind != "missing":
        path.write_bytes(changed[kind])


@pytest.mark.parametrize("kind", ["missing", "empty", "half", "zeros"])
def test_weights_without_an_inventory_are_looked_at(tmp_path, kind):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({name[0]: torch.ones(50)}, tmp_path / name)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert unreadable_weights(tmp_path) is None
    spoil(tmp_path / "b.safetensors", kind)
    assert "damaged" in unreadable_weights(tmp_path)
    assert "no weights" in unreadable_weights(make(tmp_path / "none"))


def test_loaded_tensors_are_no_longer_the_file(tmp_path):
    path = save_tensors(tmp_path / "x.safetensors", "a thing", {"x": torch.ones(5000)}, {})
    tensors, _ = load_tensors(path, "a thing")
    size = path.stat().st_size
    with path.open("r+b") as file:  # as `cp other x.safetensors` does: the same file, other bytes
        file.write(b"\0" * size)
        file.truncate(100)
    assert torch.equal(tensors["x"], torch.ones(5000))


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", ["", "\0\0\0", "{", DEEP, "1" * 5000, '"\xff'.encode("latin1")])
def test_json_that_cannot_be_read_is_one_sentence(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(tmp_path / "x.json", "cannot be read as JSON"):
        read_json(tmp_path / "x.json")


def test_half_characters_survive_in_json_and_stop_no_text(tmp_path):
    assert read_json(write_json(tmp_path / "x.json", {"id": "a\udc80€"})) == {"id": "a\udc80€"}
    assert write_text(tmp_path / "x.md", "a\udc80€").read_text() == "a\\udc80€"


@pytest.mark.parametrize("header", [DEEP, '{"kind": "a thing"}', "[]", '{"kind": 1e400, "header": {}}'])
def test_hostile_headers_are_one_sentence(tmp_path, header):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"spd_lens": header})
    with refused(tmp_path / "x.safetensors"):
        load_tensors(tmp_path / "x.safetensors", "a thing")
