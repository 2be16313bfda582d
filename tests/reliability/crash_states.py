"""What a disk may hold after a crash: every state that a program's file operations could leave, one by one.

A program that is killed leaves what it had done. A machine that loses power leaves less: only what was synced is sure,
and the rest may be there or not, in any order. `recording` watches a directory while a program works in it; `states`
then lists what might be found there after a crash at any moment. Whoever starts the program again in each of them knows
whether it survives. The idea is that of ALICE (Pillai et al., OSDI 2014) and of LazyFS, without a file system of one's
own: the directory is looked at before and after every operation of Python's `os`, so that what C++ or Rust wrote in
between is seen, too.

The model of a disk is the strict reading of POSIX. A file's content is safe once the file was synced, a name once its
directory was. A rename is done or not, never half.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

WATCHED = (
    "open", "fsync", "fdatasync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir", "truncate", "ftruncate",
)  # fmt: skip
"""The functions of `os` before and after which the directory is looked at."""
DEAD = "99999999"
"""A number that no process has."""
_CLOCK = 0.05
"""Seconds in which a file may change without another time of change."""

Name = tuple[int, str]
"""The node of a directory, and a name in it."""
Tree = Mapping[str, bytes | None]
"""Content of every file by its path; None for a directory."""


@dataclass(frozen=True)
class Named:
    """A node gets a name (`new`), loses one (`old`), or both: a rename."""

    node: int
    old: Name | None = None
    new: Name | None = None

    def apply(self, names: dict[Name, int]) -> None:
        if self.old is not None and names.get(self.old) == self.node:
            del names[self.old]
        if self.new is not None:
            names[self.new] = self.node


@dataclass(frozen=True)
class Written:
    """A file has this content now."""

    node: int
    content: bytes


@dataclass(frozen=True)
class Synced:
    """A file's content, or a directory's names, are on the disk."""

    node: int


Operation = Named | Written | Synced


@dataclass
class Recording:
    """What happened below a directory, in order. Node 0 is the directory itself."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    n_before: int = 0
    """How many of them stand for what was there already."""
    directories: set[int] = field(default_factory=lambda: {0})
    _nodes: dict[int, int] = field(default_factory=dict)
    """The node of each inode that has a name."""
    _names: dict[Name, int] = field(default_factory=dict)
    _new: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _stamps: dict[int, tuple[int, int]] = field(default_factory=dict)
    _contents: dict[int, bytes] = field(default_factory=dict)

    def look(self) -> None:
        """Note what has changed since the last look."""
        found: dict[Name, tuple[int, os.DirEntry[str]]] = {}
        inodes = {os.stat(self.root).st_ino: 0}
        self._walk(self.root, 0, found, inodes)
        self._nodes = inodes
        names = {name: node for name, (node, _) in found.items()}
        lost = {node: name for name, node in self._names.items() if names.get(name) != node}
        for name, node in names.items():
            if self._names.get(name) != node:
                self.operations.append(Named(node, old=lost.pop(node, None), new=name))
        self.operations += [Named(node, old=name) for node, name in lost.items() if name not in names]
        self._names = names
        for node, entry in found.values():
            if node not in self.directories:
                self._read(node, entry)

    def _walk(self, place: Path, node: int, found: dict[Name, Any], inodes: dict[int, int]) -> None:
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if entry.name == "lock" or entry.name.endswith(".lock"):
                continue  # nothing depends on whether it is there
            inode = entry.stat(follow_symlinks=False).st_ino
            known = self._nodes.get(inode)
            inner = inodes[inode] = self._new_node(entry.is_dir()) if known is None else known
            found[node, entry.name] = inner, entry
            if inner in self.directories:
                self._walk(place / entry.name, inner, found, inodes)

    def _new_node(self, is_directory: bool) -> int:
        node = next(self._new)
        if is_directory:
            self.directories.add(node)
        return node

    def _read(self, node: int, entry: os.DirEntry[str]) -> None:
        status = entry.stat(follow_symlinks=False)
        stamp = status.st_size, status.st_mtime_ns
        if self._stamps.get(node) == stamp and time.time() - status.st_mtime > _CLOCK:
            return
        content = Path(entry.path).read_bytes()
        self._stamps[node] = stamp
        if content != self._contents.get(node, b""):
            self._contents[node] = content
            self.operations.append(Written(node, content))

    def after(self, name: str, *args: Any) -> None:
        """Note what a call of a `WATCHED` function has done."""
        if "sync" in name and (node := self._nodes.get(os.fstat(args[0]).st_ino)) is not None:
            self.operations.append(Synced(node))
        self.look()


@contextlib.contextmanager
def recording(root: Path) -> Iterator[Recording]:
    """Watch a directory while this process works in it. What is there already counts as safe."""
    made = Recording(root)
    made.look()
    made.operations += [Synced(node) for node in made._nodes.values()]
    made.n_before = len(made.operations)
    with watched(lambda name, *_: made.look(), made.after):
        yield made
    made.look()


@contextlib.contextmanager
def watched(before: Callable[..., None], after: Callable[..., None] = lambda name, *_: None) -> Iterator[None]:
    """Call `before` and `after` with the name and the arguments of every call of a `WATCHED` function meanwhile."""

    def around(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            before(name, *args)
            done = original(*args, **options)
            after(name, *args)
            return done

        return call

    with contextlib.ExitStack() as stack:
        for name in WATCHED:
            stack.enter_context(mock.patch.object(os, name, around(name)))
        yield


class Disk:
    """Names and contents as processes see them (`names`, `contents`) and as they are safe from a power failure."""

    def __init__(self, directories: set[int]) -> None:
        self.directories = directories
        self.names: dict[Name, int] = {}
        self.contents: dict[int, bytes] = {}
        self.safe_names: dict[Name, int] = {}
        self.safe_contents: dict[int, bytes] = {}
        self.pending: list[Named] = []
        """Changes of names that are not safe yet, in order."""

    def do(self, operation: Operation) -> None:
        """Go on by one operation."""
        match operation:
            case Named():
                operation.apply(self.names)
                self.pending.append(operation)
            case Written(node, content):
                self.contents[node] = content
            case Synced(node) if node in self.directories:
                for change in [c for c in self.pending if node in {name[0] for name in (c.old, c.new) if name}]:
                    self.pending.remove(change)
                    change.apply(self.safe_names)
            case Synced(node):
                self.safe_contents[node] = self.contents.get(node, b"")

    @property
    def unsafe(self) -> set[int]:
        """Files whose content a power failure may take."""
        return {node for node, content in self.contents.items() if self.safe_contents.get(node) != content}

    def after_a_crash(self) -> Iterator[tuple[str, Tree]]:
        """What may be found, each with a name that says what was lost."""
        yield "killed", self._tree(self.names, self.contents)
        yield "all that was not synced", self._tree(self.safe_names, self.safe_contents)
        losses = {"lost": _lost, "half lost": _half, "zeros": _zeros, "zeros before the rest": _hole}
        for kind, spoil in losses.items() if self.unsafe else ():
            spoiled = {n: spoil(self.safe_contents.get(n, b""), self.contents[n]) for n in self.unsafe}
            yield f"names before data, data {kind}", self._tree(self.names, self.contents | spoiled)
        for lost in self.pending if len(self.pending) > 1 else ():
            names = dict(self.safe_names)
            for change in self.pending:
                if change is not lost:
                    change.apply(names)
            yield "one name", self._tree(names, self.contents)

    def _tree(self, names: Mapping[Name, int], contents: Mapping[int, bytes]) -> dict[str, bytes | None]:
        inner: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), node in names.items():
            inner.setdefault(folder, []).append((name, node))
        tree: dict[str, bytes | None] = {}

        def walk(folder: int, path: str) -> None:
            for name, node in inner.get(folder, ()):
                place = path + name.replace(f".{os.getpid()}-", f".{DEAD}-")
                tree[place] = None if node in self.directories else contents.get(node, b"")
                walk(node, f"{place}/")

        walk(0, "")
        return tree


def _lost(safe: bytes, new: bytes) -> bytes:
    return safe


def _half(safe: bytes, new: bytes) -> bytes:
    kept = len(safe) if new.startswith(safe) else 0
    return new[: (kept + len(new)) // 2]


def _zeros(safe: bytes, new: bytes) -> bytes:
    kept = safe if new.startswith(safe) else b""
    return kept.ljust(len(new), b"\0")


def _hole(safe: bytes, new: bytes) -> bytes:
    kept = safe if new.startswith(safe) else b""
    half = (len(kept) + len(new)) // 2
    return kept.ljust(half, b"\0") + new[half:]


def states(made: Recording) -> Iterator[tuple[str, Tree]]:
    """Every different state that a crash during the recorded work may leave, with a name that says when and what.

    States that differ only in what is in temporary files count as one: these are known by their names, and never read.
    """
    disk, seen = Disk(made.directories), set()
    for number, operation in enumerate(made.operations):
        disk.do(operation)
        if number < made.n_before:
            continue
        for kind, tree in disk.after_a_crash():
            key = frozenset((name, b"" if content and ".tmp" in name else content) for name, content in tree.items())
            if key not in seen:
                seen.add(key)
                yield f"{number}: {kind}", tree


def write(tree: Tree, root: Path) -> None:
    """Put a state into an empty directory. Temporary files are those of a process that is dead."""
    for name, content in tree.items():
        place = root / name
        if content is None:
            place.mkdir()
        else:
            place.write_bytes(content)


def unsynced(made: Recording) -> list[str]:
    """What is wrong with the recorded order of operations: renames of content that was not safe, names never synced."""
    disk, found = Disk(made.directories), []
    for operation in made.operations:
        if isinstance(operation, Named) and operation.old and operation.new:
            inside = _below(operation.node, disk.names)
            if inside & disk.unsafe or any(c.new and c.new[0] in inside for c in disk.pending):
                found.append(f"{operation.new[1]} was given its name before its content was synced")
            found += [
                f"another rename came before that to {c.new[1]} was synced" for c in disk.pending if c.old and c.new
            ]
        disk.do(operation)
    here = _below(0, disk.names)
    found += [
        f"the name {c.new[1]} was never synced" for c in disk.pending if c.new and disk.names.get(c.new) == c.node
    ]
    lost = here & disk.unsafe
    return found + [f"the content of {name} was never synced" for (_, name), node in disk.names.items() if node in lost]


def _below(node: int, names: Mapping[Name, int]) -> set[int]:
    """A node with all that is in it."""
    found = {node}
    while more := {inner for (folder, _), inner in names.items() if folder in found} - found:
        found |= more
    return found
