"""A filter of system calls, for what limits and name spaces leave open.

System V shared memory, semaphores and message queues take memory that no limit of a process counts, and so do extended
attributes, pages spliced into pipes, connections that wait to be accepted, watches on files, asynchronous I/O and
Landlock's rules; files in memory come on top of the scratch directory. bubblewrap's own process, which no limit binds,
is not to be read or written. The others are doors to parts of the kernel that no such program needs.

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
    "fanotify_init": (300, 262),
    "fsetxattr": (190, 7),
    "fsopen": (430, 430),
    "inotify_init": (253, 26),  # aarch64 has the newer one alone
    "inotify_init1": (294, 26),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "landlock_create_ruleset": (444, 444),
    "listen": (50, 201),
    "lsetxattr": (189, 6),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "setxattr": (188, 5),
    "setxattrat": (463, 463),
    "shmget": (29, 194),
    "splice": (275, 76),
    "syslog": (103, 116),
    "tee": (276, 77),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
}
_F_SETPIPE_SZ = 1031
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16  # Linux's; `socket` has those of the machine
_BLOCKED_IF = {
    # name: (x86_64, aarch64), which argument, its values that are blocked
    "fcntl": ((72, 25), 1, (_F_SETPIPE_SZ,)),
}
_BLOCKED_UNLESS = {
    # as above, with its values that are not blocked; network name spaces do not shut in every family of sockets
    "socket": ((41, 198), 0, (_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK)),
    "socketpair": ((53, 199), 0, (_AF_UNIX,)),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and what the kernel calls the architecture."""

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Where the kernel puts what a filter may look at. Of an argument of eight bytes the first four are read, as the calls
that are looked at take an `int`."""
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
_X32 = 0x40000000
"""x86_64 has a second numbering from here on, with which the table could be got round."""


def supported() -> bool:
    """Whether this machine's system calls are known here."""
    return platform.machine() in _ARCHITECTURES


def blocking_filter() -> bytes:
    """The filter as the kernel takes it: the blocked calls fail with `EPERM`, as if a privilege were missing."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for numbers in _BLOCKED.values():
        code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _REFUSE)]
    for rules, found, otherwise in ((_BLOCKED_IF, _REFUSE, _ALLOW), (_BLOCKED_UNLESS, _ALLOW, _REFUSE)):
        for numbers, argument, values in rules.values():
            verdict = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
            for value in values:
                verdict += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, found)]
            verdict.append((_RETURN, 0, 0, otherwise))
            code += [(_EQUAL, 0, len(verdict), numbers[column]), *verdict]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
