"""Kills and full disks, done to a job; `ends` says how the same job ends when it is started again."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import spd_lens as spd
from tests.reliability.crash_states import watched
from tests.reliability.jobs import JOBS

_SCRATCH = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")
_TAKES_ROOM = ("fsync", "replace", "rename", "mkdir")


def seconds_of(job: str, pair: spd.ModelPair, place: Path) -> float:
    """The processor time of an undisturbed job."""
    start = time.process_time()
    JOBS[job](pair, place)
    return time.process_time() - start


def kill(job: str, pair: spd.ModelPair, place: Path, after: float) -> bool:
    """Do a job in a process of its own that is killed after so many seconds of processor time. Returns whether it was.

    The clock is the process's own, so that the load of the machine has no part in where it ends. No handler runs, as
    with SIGKILL.
    """
    child = os.fork()
    if not child:
        try:
            tqdm.set_lock(threading.RLock())  # else the one of all processes, which nobody would ever open again
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, after)
            JOBS[job](pair, place)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def n_writes(job: str, pair: spd.ModelPair, place: Path) -> int:
    """How many operations of a job need room on the disk."""
    found = []
    with watched(lambda *call: found.append(call) if _needs_room(place, *call) else None):
        JOBS[job](pair, place)
    return len(found)


def fill_disk(job: str, pair: spd.ModelPair, place: Path, n: int) -> str | None:
    """Do a job on a disk that has no room left from the n-th write on, counted from 0.

    Returns:
        What is wrong with how it ended: not with one sentence, or with one that does not name what did not fit. None
        where all is well.
    """
    written, first = 0, None

    def before(*call: Any) -> None:
        nonlocal written, first
        if path := _needs_room(place, *call):
            written += 1
            if written > n:
                first = first or path
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    try:
        with watched(before):
            JOBS[job](pair, place)
    except spd.SPDError as error:
        return _wrong(str(error), place, first)
    except Exception as error:  # a traceback, on the command line
        return f"{first} did not fit: {error!r}"
    return f"{first} did not fit, and nothing was said" if first else None


def _needs_room(place: Path, name: str, *args: Any) -> Path | None:
    """The file or directory below `place` for which a call takes room on the disk; None if it takes none there."""
    if name not in _TAKES_ROOM and not (name == "open" and len(args) > 1 and args[1] & os.O_CREAT):
        return None
    path = Path(os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else os.fspath(args[0]))
    return path if place in path.parents and path.suffix != ".lock" and path.name != "lock" else None


def _wrong(said: str, place: Path, first: Path | None) -> str | None:
    """What is wrong with a sentence about a full disk, or with what lies there after it."""
    if first is None:
        return f"the disk was not full, and that was said: {said}"
    parts = [_SCRATCH.sub(r"\1", part) for part in first.relative_to(place).parts]
    # a training names its directory, which holds many files
    name = next((part for part in parts if part.endswith(".training")), parts[-1])
    if os.strerror(errno.ENOSPC) not in said or name not in said:
        return f"{'/'.join(parts)} did not fit, and that was said: {said}"
    return next((f"{path} was left" for path in place.rglob("*.tmp")), None)
