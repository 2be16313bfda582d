"""The filter of system calls, run by an interpreter of its own, and the calls that it is there for."""

import errno
import struct

import pytest

from spd_lens.sandbox import seccomp

KILL, REFUSE, ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(program: bytes, number: int, architecture: int, arguments=(0, 0)) -> int:
    """What the kernel's machine for classic BPF makes of one call, for the instructions that the filter has."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *(0,) * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("HBBI", program))
    place = value = 0
    while True:
        code, yes, no, k = instructions[place]
        place += 1
        match code:
            case 0x20:
                (value,) = struct.unpack_from("=I", data, k)
            case 0x15:
                place += yes if value == k else no
            case 0x35:
                place += yes if value >= k else no
            case 0x06:
                return k


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_refuses_what_it_names_and_nothing_else(monkeypatch, machine, column):
    monkeypatch.setattr("platform.machine", lambda: machine)
    program, here = seccomp.blocking_filter(), MACHINES[machine]
    by_argument = {
        numbers[column] for rules in (seccomp._BLOCKED_IF, seccomp._BLOCKED_UNLESS) for numbers, *_ in rules.values()
    }
    blocked = {numbers[column] for numbers in seccomp._BLOCKED.values()}
    for number in set(range(600)) - by_argument:
        assert verdict(program, number, here) == (REFUSE if number in blocked else ALLOW), number
        assert verdict(program, number, 0x40000003) == KILL  # the calls of 32 bits have other numbers
        assert verdict(program, number | 0x40000000, here) == REFUSE
    fcntl, socket, pair = ((72, 25), (41, 198), (53, 199))
    for command in range(1100):
        assert verdict(program, fcntl[column], here, (3, command)) == (REFUSE if command == 1031 else ALLOW)
    for family in range(64):
        assert verdict(program, socket[column], here, (family,)) == (ALLOW if family in (1, 2, 10, 16) else REFUSE)
        assert verdict(program, pair[column], here, (family,)) == (ALLOW if family == 1 else REFUSE)


CALLS = {
    # of x86_64's table
"ptrace": 101, "syslog": 103, "io_setup": 206, "add_key": 248, "request_key": 249, "keyctl": 250,
    "inotify_init": 253, "unshare": 272, "inotify_init1": 294, "perf_event_open": 298, "fanotify_init": 300,
    "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "memfd_create": 319, "bpf": 321,
    "userfaultfd": 323, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "pidfd_getfd": 438,
    "memfd_secret": 447, "mount": 165,
}  # fmt: skip


def test_each_is_refused_inside(shut_in):
    """By number, so that a wrong one in the table shows."""
    calls = f"""
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def f():
    allowed = []
    for name, number in {CALLS}.items() if platform.machine() == "x86_64" else ():
        ctypes.set_errno(0)
        if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.EPERM:
            allowed.append(name)
    return allowed
"""
    assert shut_in(calls, ["assert f() == []"]).ok
