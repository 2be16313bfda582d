"""A filter of system calls, for what limits and name spaces leave open.

System V shared memory, semaphores and message queues take memory that no limit of a process counts; files in memory
come on top of the scratch directory; the others are doors to parts of the kernel that no such program needs.

Written for the kernel's classic BPF machine (`Documentation/userspace-api/seccomp_filter.rst`); numbers from its
tables of system calls.
"""

from __future__ import annotations

import errno
import platform
import struct

_BLOCKED = {
    # name: (x86_64, aarch64)
    "add_key": (248, 217),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "perf_event_open": (298, 241),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and what the kernel calls the architecture."""

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
_X32 = 0x40000000
"""x86_64 has a second numbering from here on, with which the table could be got round."""


def supported() -> bool:
    """Whether this machine's system calls are known here."""
    return platform.machine() in _ARCHITECTURES


def blocking_filter() -> bytes:
    """The filter as the kernel takes it: the blocked calls fail with `EPERM`, as if a privilege were missing."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    numbers = sorted(numbers[column] for numbers in _BLOCKED.values())
    refuse = len(numbers) + 1  # instructions from the first comparison of a number to the last but one
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, refuse, 0, _X32),
        *((_EQUAL, refuse - 1 - place, 0, number) for place, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
