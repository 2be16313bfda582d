"""Whatever a crash leaves on the disk: what was published is whole, and a job that is started again ends as ever.

`make reliability` tries all states of all jobs; here some are taken evenly.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from spd_lens.files.contents import save_tensors, write_text
from spd_lens.files.publishing import filling
from spd_lens.files.store import Store
from tests.reliability.crash_states import recording, states, unsynced, write
from tests.reliability.faults import fill_disk, kill, n_writes, seconds_of
from tests.reliability.jobs import JOBS, ends, results

TRIED = {"generate": 30, "finetune": 3, "run": 1, "study": 0, "rounds": 0}
"""How many states of each job; generating has fewer in all. Of those that take seconds only the order is looked at."""


def naive(path: Path, *, data: bool, folder: bool) -> None:
    """Write another file and rename it, with or without having it and its name on the disk."""
    with path.with_name("new").open("w") as file:
        file.write("new")
        file.flush()
        if data:
            os.fsync(file.fileno())
    os.replace(path.with_name("new"), path)
    if folder:
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def found(made, name):
    """What a file holds in each of the states; None where it is missing."""
    return {tree.get(name) for _, tree in states(made)}


@pytest.mark.parametrize(
    ("data", "folder", "says", "left"),
    [
        (True, True, [], {b"old", b"new"}),
        (True, False, ["the name x was never synced"], {b"old", b"new"}),
        (False, True, ["x was given its name before its content was synced"], {b"old", b"new", b"", b"n", b"\0\0\0"}),
    ],
)
def test_a_rename_without_its_syncs_is_seen(tmp_path, data, folder, says, left):
    (tmp_path / "x").write_text("old")
    with recording(tmp_path) as made:
        naive(tmp_path / "x", data=data, folder=folder)
    assert [problem for problem in unsynced(made) if "content of" not in problem] == says
    assert found(made, "x") >= left
    assert data == (found(made, "x") == {b"old", b"new"})


def test_two_names_may_reach_the_disk_in_either_order(tmp_path):
    with recording(tmp_path) as made:
        for name in "ab":
            naive(tmp_path / name, data=True, folder=False)
    assert any("before that to a was synced" in problem for problem in unsynced(made))
    pairs = {("a" in tree, "b" in tree) for _, tree in states(made)}
    assert pairs == {(False, False), (True, False), (False, True), (True, True)}


def test_of_what_is_appended_the_synced_part_is_sure(tmp_path):
    with recording(tmp_path) as made, (tmp_path / "x").open("wb", buffering=0) as file:
        file.write(b"first")
        os.fsync(file.fileno())
        file.write(b"+second")
        os.stat(tmp_path)
        os.fsync(file.fileno())
    assert found(made, "x") == {
        None, b"", b"fi", b"\0" * 5, b"\0\0rst", b"first", b"first+se", b"first" + b"\0" * 7, b"first\0\0\0cond",
        b"first+second",
    }  # fmt: skip


def fill(place: Path) -> None:
    with filling(place / "model") as scratch:
        (scratch / "weights").write_text("x")


def test_what_a_dead_process_left_goes_when_the_same_is_made_again(tmp_path):
    (tmp_path / "it").mkdir()
    with recording(tmp_path / "it") as made:
        fill(tmp_path / "it")
    left = set()
    for number, (_, tree) in enumerate(states(made)):
        (place := tmp_path / str(number)).mkdir()
        write(tree, place)
        left |= {path.suffix for path in place.iterdir()}
        if not (place / "model").exists():
            fill(place)
        assert [path.name for path in place.iterdir()] == ["model"]
    assert left == {"", ".tmp"}


def put(place: Path) -> None:
    (place / "mine").write_text("x")
    store = Store(place / "store")
    store.put(place, ["mine"])
    store.write("manifests/a.json", {"files": 1})


WRITERS = {
    "text": lambda place: write_text(place / "new" / "x", "new"),
    "tensors": lambda place: save_tensors(place / "new" / "x", "a thing", {"x": torch.zeros(3)}, {}),
    "store": put,
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_has_a_name_is_whole_and_stays(writer, tmp_path):
    with recording(tmp_path) as made:
        writer(tmp_path)
    assert not [problem for problem in unsynced(made) if "mine" not in problem]
    named = {}
    for _, tree in states(made):
        for name, content in tree.items():
            if content is not None and not name.endswith(".tmp") and name != "mine":
                named.setdefault(name, set()).add(content)
    assert named and all(len(contents) == 1 for contents in named.values()), named


@pytest.mark.parametrize("job", JOBS)
def test_a_job_ends_as_ever_from_whatever_a_crash_leaves(job, tiny_pair, tmp_path):
    (tmp_path / "undisturbed").mkdir()
    with recording(tmp_path / "undisturbed") as made:
        JOBS[job](tiny_pair, tmp_path / "undisturbed")
    assert not unsynced(made)
    undisturbed, left = results(tmp_path / "undisturbed"), list(states(made))
    tried = min(TRIED[job], len(left))
    for number in range(tried):
        name, tree = left[(2 * number + 1) * len(left) // (2 * tried)]
        (place := tmp_path / str(number)).mkdir()
        write(tree, place)
        assert (name, ends(job, tiny_pair, place, undisturbed)) == (name, "same")


def test_a_job_goes_on_after_a_kill_and_after_a_full_disk(tiny_pair, tmp_path):
    places = {name: tmp_path / name for name in ("undisturbed", "counted", "killed", "full")}
    for place in places.values():
        place.mkdir()
    seconds = seconds_of("generate", tiny_pair, places["undisturbed"])
    undisturbed = results(places["undisturbed"])
    assert kill("generate", tiny_pair, places["killed"], seconds / 2)
    n = n_writes("generate", tiny_pair, places["counted"])
    assert fill_disk("generate", tiny_pair, places["full"], n // 2) is None
    assert len(list(places["full"].rglob("*.json*"))) < len(undisturbed)
    for name in ("killed", "full"):
        assert ends("generate", tiny_pair, places[name], undisturbed) == "same"


def test_what_differs_is_lost(tiny_pair, tmp_path):
    assert ends("generate", tiny_pair, tmp_path, {}).startswith("lost: new/")
    (tmp_path / "new" / "corpus.settings.json").write_text("{}")
    assert ends("generate", tiny_pair, tmp_path, {}).startswith("refused: ")
