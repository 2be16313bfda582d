"""Programs that attack the machine: none hurts the caller, and none passes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spd_lens import sandbox
from spd_lens.sandbox import bubblewrap

TEST = ["assert f(2) == 4"]
HONEST = "def f(x):\n    return x * x\n"


def running(marker: str) -> list[str]:
    """Command lines on this machine that hold `marker`, sandboxes included."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has just ended
            continue
    return [line for line in lines if marker in line]


@pytest.mark.parametrize("place", ["{attack}\ndef f(x): return 4", "def f(x):\n    {attack}\n    return 4"])
@pytest.mark.parametrize(
    ("attack", "reasons"),
    [
        ("while True: pass", {"timeout"}),
        ("import time; time.sleep(60)", {"timeout"}),
        ("import os; [os.fork() for _ in iter(int, 1)]", {"error"}),
        ("import threading; [threading.Thread(target=iter(int, 1).__next__).start() for _ in range(9)]", {"error"}),
        ("x = bytearray(10 << 30)", {"memory"}),
        ("x = [bytearray(1 << 20) for _ in range(10_000)]", {"memory", "timeout"}),
        ("import sys; [print('x' * 10**6) for _ in range(1000)]", {"output"}),
        ("import os; [os.write(2, b'x' * 10**6) for _ in range(1000)]", {"output"}),
        ("for i in range(99): open(f'/scratch/{i}', 'wb').write(bytes(1 << 20))", {"error"}),
        ("import os; open('big', 'wb').close(); os.truncate('big', 1 << 40)", {"error"}),
        ("import os; [os.kill(p, 9) for p in (os.getppid(), 1, -1)]", {"error", "exited"}),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", {"error"}),
        ("import ctypes; ctypes.string_at(0)", {"exited"}),
        ("import sys; sys.setrecursionlimit(10**9); g = lambda n: g(n + 1) + 1; g(0)", {"exited", "memory", "timeout"}),
    ],
)
def test_harm_is_contained(shut_in, place, attack, reasons):
    began = time.monotonic()
    result = shut_in(place.format(attack=attack), TEST, timeout_s=1, wall_s=2 if "sleep" in attack else None)
    assert result.reason in reasons, result
    assert time.monotonic() - began < 15
    assert len(result.stdout) + len(result.stderr) <= 16_000


def test_limits_are_what_was_asked_for(shut_in):
    fork = "import os, time\ndef f():\n    n = 1\n    try:\n        while True:\n            if os.fork() == 0:\n"
    fork += "                time.sleep(60)\n            n += 1\n    except OSError:\n        return n\n"
    for processes in (1, 2, 5):
        assert shut_in(fork, [f"assert f() == {processes}"], processes=processes).ok
    allocate = "def f(mb):\n    return len(bytearray(mb << 20)) >> 20"
    assert shut_in(allocate, ["assert f(300) == 300"], memory_mb=400).ok
    assert shut_in(allocate, ["assert f(300) == 300"], memory_mb=200).reason == "memory"
    write = "def f(mb):\n    return open('x', 'wb').write(bytes(mb << 20)) >> 20"
    assert shut_in(write, ["assert f(7) == 7"], scratch_mb=8).ok
    assert shut_in(write, ["assert f(7) == 7"], scratch_mb=4).reason == "error"


def test_time_is_the_programs_own(shut_in):
    """What a program waits for its turn, or sleeps, does not count; what it works does, in whatever way it ends."""
    assert shut_in("import time\ndef f(x):\n    time.sleep(1.6)\n    return 4", TEST, timeout_s=1).ok
    busy = "def f(x):\n    while True: pass"
    assert shut_in(busy, TEST, timeout_s=1, wall_s=120).reason == "timeout"
    deaf = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    assert shut_in(deaf + busy, TEST, timeout_s=1, wall_s=120).reason == "exited"


def test_files_are_counted(shut_in):
    fill = """
def f(n):
    try:
        for i in range(n):
            open(f"{i:0200}", "w").close()
    except OSError:
        return i
    return n
"""
    result = shut_in(fill + "\nprint(f(5000))")
    if os.geteuid() and not bubblewrap._may_mount("/mnt"):
        pytest.skip("this system lets bubblewrap alone mount anything, and bubblewrap does not count files")
    assert 500 < int(result.stdout) < 1100


def test_no_system_call_takes_memory_past_the_limits(shut_in):
    calls = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def f():
    made = {"memfd": libc.memfd_create(b"x", 0)}
    made["shm"] = libc.shmget(0, 1 << 20, 0o1600)
    libc.shmctl(made["shm"], 0, 0)
    made["sem"] = libc.semget(0, 9, 0o1600)
    libc.semctl(made["sem"], 0, 0)
    made["msg"] = libc.msgget(0, 0o1600)
    libc.msgctl(made["msg"], 0, 0)
    ctypes.set_errno(0)
    libc.syscall(0x40000000 + 39)  # getpid in the numbering that x86_64 has beside its own
    if ctypes.get_errno() != errno.EPERM:
        made["x32"] = 1
    return sorted(name for name, number in made.items() if number >= 0)
"""
    outside = subprocess.run([sys.executable, "-c", calls + "print(f())"], capture_output=True, text=True, check=True)
    assert outside.stdout == "['memfd', 'msg', 'sem', 'shm', 'x32']\n"
    assert shut_in(calls, ["assert f() == []"]).ok


def test_doors_that_no_limit_guards_are_shut(shut_in, tmp_path):
    """Each call fails with EPERM inside, and outside works or fails for another reason."""
    calls = """
import ctypes, errno, os, platform, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
open("file", "w").close()
fd, (reader, writer), (reader2, writer2) = os.open("file", os.O_RDONLY), os.pipe(), os.pipe()
os.write(writer, b"x" * 9)
vector = struct.pack("QQ", ctypes.addressof(page := ctypes.create_string_buffer(4096)), 1)
new = 0 if platform.machine() == "x86_64" else 1
local = socket.socket(socket.AF_UNIX)
attempts = {
    "vmsplice": lambda: libc.vmsplice(writer, vector, 1, 0),
    "tee": lambda: libc.tee(reader, writer2, 1, 2),
    "splice": lambda: libc.splice(reader, None, writer2, None, 1, 2),
    "setxattr": lambda: libc.setxattr(b"file", b"user.a", b"x", 1, 0),
    "lsetxattr": lambda: libc.lsetxattr(b"file", b"user.a", b"x", 1, 0),
    "fsetxattr": lambda: libc.fsetxattr(fd, b"user.a", b"x", 1, 0),
    "setxattrat": lambda: libc.syscall(463, -100, b"file", 0, b"user.a", b"", 0),
    "larger pipe": lambda: libc.fcntl(writer, 1031, 1 << 20),
    "listen": lambda: libc.listen(local.fileno(), 4096),
    "landlock": lambda: libc.syscall(444, None, 0, 1),
    "pair of another family": lambda: libc.socketpair(30, 1, 0, ctypes.create_string_buffer(8)),
} | {f"family {n}": lambda n=n: libc.socket(n, 1, 0) for n in (9, 21, 30, 31, 38, 39, 40, 41, 42, 43)}
def refused(attempt):
    ctypes.set_errno(0)
    return attempt() < 0 and ctypes.get_errno() == errno.EPERM
def works():
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
    opened = [socket.socket(family, socket.SOCK_DGRAM) for family in families] + [*socket.socketpair()]
    return len(opened), libc.fcntl(writer, 1032)
def f():
    return [name for name, attempt in attempts.items() if not refused(attempt)]
"""
    report = calls + "print(len(f()), len(attempts))"
    outside = subprocess.run(
        [sys.executable, "-c", report], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert outside[0] == outside[1] == "21"
    assert shut_in(calls, ["assert f() == []", "assert works() == (6, 65536)"], setup="").ok


def test_nothing_outside_can_be_read_or_written(shut_in, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for path in (tmp_path, secret):
        path.chmod(0o777)
    monkeypatch.setenv("SPD_SECRET", "hunter2")
    home, source, new = str(Path.home()), str(Path(sandbox.__file__)), str(tmp_path / "new")
    snoop = f"""
import glob, os, sys
found = []
def attempt(what, *arguments, **keywords):
    try:
        found.append((what.__name__, arguments, what(*arguments, **keywords)))
    except OSError:
        pass
attempt(open, {str(secret)!r})
attempt(open, {source!r})
attempt(os.listdir, {home!r})
attempt(os.listdir, "/etc")
attempt(os.listdir, "/proc/self")
attempt(os.listdir, "/sys/kernel")
attempt(open, {new!r}, "w")
found += [(k, v) for k, v in os.environ.items() if "hunter2" in v] + glob.glob("/old/*")
def f():
    return str(found)
"""
    outside = subprocess.run([sys.executable, "-c", snoop + "print(f())"], capture_output=True, text=True, check=True)
    for seen in (str(secret), source, home, new, "SPD_SECRET"):
        assert seen in outside.stdout  # the snoop works where nothing stops it
    (tmp_path / "new").unlink()
    places = ("/new", "/usr/new", "/dev/new", "/var/new", "/old/new", "/proc/new")
    snoop += f"\nfor name in (*{places}, sys.base_prefix + '/new'):\n    attempt(open, name, 'w')\n"
    result = shut_in(snoop + "print(found)", ["assert f() == '[]'"])
    assert result.ok, result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["secret"] and secret.read_text() == "hunter2"


def test_nothing_is_gained(shut_in):
    """Each attempt fails; "own" shows that attempts can succeed."""
    attempts = (
        f"CALLER = {os.getpid()}"
        + """
import ctypes, fcntl, os, resource, signal, socket, struct, sys, termios
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
def prctl(*arguments):
    checked(libc.prctl(*(ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0)[:5])))
def fill(size):
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(8)]
    for end, _ in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, 33, size)  # SO_RCVBUFFORCE
def many(make, n):
    for _ in range(n):
        checked(make())
timer = ctypes.c_void_p()
attempts = {
    "own": lambda: os.kill(os.getpid(), 0),
    "root": lambda: os.setuid(0),
    "another group": lambda: os.setgroups([0]),
    "the caller": lambda: os.kill(CALLER, signal.SIGKILL),
    "privileges back": lambda: prctl(38, 0),
    "no filter": lambda: prctl(22, 0),
    "a capability": lambda: prctl(47, 2, 21),
    "realtime": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "before others": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
    "more processes": lambda: resource.setrlimit(resource.RLIMIT_NPROC, (99, 99)),
    "more open files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)),
    "more signals": lambda: resource.setrlimit(resource.RLIMIT_SIGPENDING, (999, 999)),
    "locked memory": lambda: checked(libc.mlock(ctypes.create_string_buffer(1 << 16), 1 << 16)),
    "another root": lambda: os.chroot("/scratch"),
    "a host name": lambda: checked(libc.sethostname(b"x", 1)),
    "a device": lambda: os.mknod("/scratch/device", 0o020666, os.makedev(1, 1)),
    "a mount": lambda: checked(libc.mount(b"none", b"/scratch", b"tmpfs", 0, None)),
    "an unmount": lambda: checked(libc.umount2(b"/scratch", 2)),
    "a name space": lambda: checked(libc.unshare(0x10000000)),
    "the clock": lambda: checked(libc.settimeofday(struct.pack("qq", 0, 0), None)),
    "memory of others": lambda: open("/proc/1/mem", "rb"),
    "the kernel's": lambda: open("/dev/mem", "rb"),
    "a terminal": lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x"),
    "raw packets": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "packets of others": lambda: socket.socket(17, socket.SOCK_RAW, 0),
    "large buffers": lambda: fill(1 << 30),
    "timers without end": lambda: many(lambda: libc.timer_create(0, None, ctypes.byref(timer)), 100),
    "a set-user-id file": lambda: os.chmod(sys.base_prefix + "/bin", 0o4777),
    "a listener": lambda: socket.create_server(("127.0.0.1", 0)),
}
def f():
    gained = []
    for name, attempt in attempts.items():
        try:
            attempt()
            gained.append(name)
        except OSError:
            pass
        except ValueError:  # setrlimit's
            pass
    return gained
"""
    )
    result = shut_in(attempts, ["assert f() == ['own']"])
    assert result.ok, (result.detail, shut_in(attempts + "print(f())").stdout)


def test_no_network(shut_in):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0spd-lens-test")
        local.listen()
        port = server.getsockname()[1]
        call = f"""
import socket
def f():
    reached = []
    for kind, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, "\\0spd-lens-test")):
        try:
            socket.socket(kind).connect(address)
            reached.append(address)
        except OSError:
            pass
    return len(reached)
"""
        outside = subprocess.run([sys.executable, "-c", call + "print(f())"], capture_output=True, check=True)
        assert outside.stdout == b"2\n"
        assert shut_in(call, ["assert f() == 0"]).ok


def test_nothing_stays_behind(shut_in):
    marker = f"86{os.getpid()}.{time.time_ns() % 10**6}"
    spawn = f"import subprocess\nsubprocess.Popen(['sleep', '{marker}'], start_new_session=True)\n"
    result = shut_in(spawn + "import time; time.sleep(0.3)\n" + HONEST, TEST, processes=4)
    assert result.ok, result
    assert running(marker) == []
    finished = shut_in(spawn, processes=4, timeout_s=5)
    assert finished.reason in ("finished", "timeout") and running(marker) == []


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("tests", [[], TEST], ids=["alone", "with a judge"])
@pytest.mark.usefixtures("shut_in")
def test_a_killed_caller_takes_the_program_along(tests, signal_):
    marker = f"87{os.getpid()}.{time.time_ns() % 10**6}"
    call = f"import os; os.execv('/usr/bin/sleep', ['sleep', '{marker}'])"
    code = f"from spd_lens.sandbox import run_python\nrun_python({call!r}, {tests!r})"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])

    def wait_for(there: bool, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if any(line.startswith("sleep") for line in running(marker)) == there:
                return True
            time.sleep(0.05)
        return False

    assert wait_for(there=True, seconds=60)
    caller.send_signal(signal_)
    caller.wait()
    assert wait_for(there=False, seconds=10)  # of the 120 s that it may sleep
