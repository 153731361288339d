"""Hostile programs in the sandbox: none escapes, none counts as passed, nothing is left of them."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svend.errors import ResourceError
from svend.evaluation import sandbox, syscalls
from svend.evaluation.sandbox import (
    OUTPUT_BYTES,
    FileConfinement,
    Program,
    SandboxLimits,
    run_program,
    run_programs,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

# CPU time is limited by whole seconds: what does not try that limit is ended by the clock before.
LIMITS = SandboxLimits(cpu_seconds=1, wall_seconds=0.5, memory_bytes=1 << 28)
PATIENT = SandboxLimits(cpu_seconds=1, wall_seconds=20.0, memory_bytes=1 << 28)
VICTIM_TEXT = "untouched"
# In this process's memory.
SECRET = ctypes.create_string_buffer(b"a secret")


@dataclass(frozen=True)
class Surroundings:
    """What a hostile program goes for: a file, servers, the processes around it."""

    folder: Path
    victim: Path
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket

    @property
    def prelude(self) -> str:
        """Source that tells the program where they are."""
        in_home = (path for path in Path.home().iterdir() if path.is_file())
        names = {
            "victim": str(self.victim), "folder": str(self.folder), "parent": os.getpid(),
            "tcp_port": self.tcp.getsockname()[1], "udp_port": self.udp.getsockname()[1],
            "unix_path": self.unix.getsockname(), "secret": ctypes.addressof(SECRET),
            "home_file": str(next(in_home, self.victim)),
        }
        return "import builtins, ctypes, os, signal, sys, time\n" + "".join(
            f"{name} = {value!r}\n" for name, value in names.items()
        )

    def processes(self) -> list[str]:
        """The command lines that name the folder: every sandboxed program's does."""
        found = []
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended since
                continue
            if str(self.folder) in line:
                found.append(line)
        return found

    def check_untouched(self) -> None:
        status = self.victim.stat()
        assert self.victim.read_text() == VICTIM_TEXT
        assert (status.st_mode & 0o777, status.st_mtime, status.st_nlink) == (0o644, 1e9, 1)
        assert sorted(p.name for p in self.folder.iterdir()) == [
            "server.sock", "temporary", "victim.txt",
        ]
        assert list((self.folder / "temporary").iterdir()) == []
        for server in (self.tcp, self.unix):
            with pytest.raises(BlockingIOError):
                server.accept()
        with pytest.raises(BlockingIOError):
            self.udp.recv(1)
        assert self.processes() == []


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    victim, temporary = tmp_path / "victim.txt", tmp_path / "temporary"
    victim.write_text(VICTIM_TEXT)
    victim.chmod(0o644)
    os.utime(victim, (1e9, 1e9))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        # A socket's path is short: tmp_path may be longer than its address holds.
        here = Path.cwd()
        os.chdir(tmp_path)
        unix.bind("server.sock")
        os.chdir(here)
        unix.listen()
        for server in (tcp, udp, unix):
            server.setblocking(False)
        children = psutil.Process().children()
        yield Surroundings(tmp_path, victim, tcp, udp, unix)
        assert psutil.Process().children() == children


# What each tries would work, and the program then pass, if nothing kept it from it.
FILE_ATTACKS = {
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read a file outside": "open(victim).read()",
    "read the home": "open(home_file).read(1)",
    "list a folder outside": "assert 'victim.txt' in os.listdir(folder)",
    "list the root": "assert 'proc' in os.listdir('/')",
    "climb out of the folder": "os.chdir('..'); os.chdir('..'); open('victim.txt').read()",
    "read by a symbolic link": "os.symlink(victim, 'link'); open('link').read()",
    "write by a hard link": "os.link(victim, 'link'); open('link', 'w').write('x')",
    "write": "open(victim, 'w').write('x')",
    "append": "open(victim, 'a').write('x')",
    "create": "open(folder + '/new', 'w')",
    "make a folder": "os.mkdir(folder + '/new')",
    "delete": "os.unlink(victim)",
    "delete a tree": "import shutil; shutil.rmtree(folder)",
    "truncate": "os.truncate(victim, 0)",
    "rename": "os.rename(victim, 'mine')",
    "replace": "open('mine', 'w').write('x'); os.rename('mine', victim)",
    "change the mode": "os.chmod(victim, 0o777)",
    "change the time": "os.utime(victim)",
    "change the owner": "os.chown(victim, 1234, 1234)",
    "overwrite the standard library": "open(os.__file__, 'a')",
    "read the parent's memory": "open(f'/proc/{parent}/mem', 'rb')",
    "read the parent's environment": "open(f'/proc/{parent}/environ', 'rb').read()",
    "write its own memory by /proc": "open('/proc/self/mem', 'r+b')",
    "open a device": "open('/dev/kmsg', 'rb')",
    "mount": "libc = ctypes.CDLL(None)\n"
             "assert libc.mount(b'tmpfs', b'.', b'tmpfs', 0, None) == 0",
    "leave for a root of its own": "libc = ctypes.CDLL(None)\nassert libc.unshare(0x10020000) == 0",
    "change its root": "os.chroot('.')",
    "fill the folder with files": "n = 0\nwhile True:\n    open(str(n), 'w').write('x'); n += 1",
    "fill the folder with one file": "with open('big', 'wb') as f:\n"
                                     "    while True: f.write(bytes(1 << 20))",
    "fill the folder with big files": "for n in range(60):\n"
                                      "    open(str(n), 'wb').write(bytes(1 << 22))\n"
                                      "time.sleep(60)",
}
LIBC = "libc = ctypes.CDLL(None, use_errno=True)\n"
PROCESS_ATTACKS = {
    "fork bomb": "while True: os.fork()",
    "fork": "os.fork()",
    "daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)",
    "raw clone": LIBC + "assert libc.syscall(56, 17, 0, 0, 0, 0) >= 0",
    "raw clone3": LIBC + "assert libc.syscall(435, bytes(88), 88) >= 0",
    "thread bomb": "import threading\n"
                   "while True: threading.Thread(target=time.sleep, args=(600,)).start()",
    "a shell": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "system": "assert os.system('true') == 0",
    "another program in its place": "os.execv('/bin/true', ['true'])",
    "another program from memory": "os.memfd_create('x')",
    "multiprocessing": "import multiprocessing\n"
                       "p = multiprocessing.get_context('fork').Process(target=print); p.start()",
}
NETWORK_ATTACKS = {
    "TCP": "import socket; socket.create_connection(('127.0.0.1', tcp_port))",
    "UDP": "import socket\n"
           "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp_port))",
    "DNS": "import socket; socket.getaddrinfo('localhost', 80, type=socket.SOCK_STREAM)",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect(unix_path)",
    "socket pair": "import socket; socket.socketpair()",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "raw socket": LIBC + "assert libc.syscall(41, 2, 1, 0) >= 0",
    "HTTP": "import urllib.request\n"
            "urllib.request.urlopen(f'http://127.0.0.1:{tcp_port}', timeout=5)",
    "io_uring": LIBC + "assert libc.syscall(425, 1, bytes(120)) >= 0",
}
SIGNAL_ATTACKS = {
    "kill everyone": "os.kill(-1, signal.SIGKILL)",
    "kill the parent": "os.kill(parent, signal.SIGKILL)",
    "kill the parent as it is seen": "os.kill(os.getppid(), signal.SIGTERM)",
    "kill the group": "os.killpg(0, signal.SIGKILL)",
    "kill by pidfd": "signal.pidfd_send_signal(os.pidfd_open(parent), signal.SIGKILL)",
    "kill by tgkill": LIBC + "assert libc.syscall(234, parent, parent, 9) == 0",
    "kill by queue": LIBC + "assert libc.syscall(129, parent, 9, bytes(8) + b'\\xff' * 4 + "
                              "bytes(116)) == 0",
    "signal as a file's owner": "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, parent)",
    "stop itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stop itself by raise": "signal.raise_signal(signal.SIGSTOP)",
    "outlive the parent": LIBC + "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "attach to the parent": LIBC + "assert libc.ptrace(16, parent, 0, 0) == 0",
    "be traced": LIBC + "assert libc.ptrace(0, 0, 0, 0) == 0",
    "read the parent's memory": LIBC + "b = ctypes.create_string_buffer(8)\n"
        "class V(ctypes.Structure): _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
        "v, w = V(ctypes.addressof(b), 8), V(secret, 8)\n"
        "assert libc.process_vm_readv(parent, ctypes.byref(v), 1, ctypes.byref(w), 1, 0) == 8",
    "raise its limits": "import resource\n"
                        "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    "raise its soft limit": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (2, 2))",
    "become another user": "os.setuid(1234)",
    "raise its priority": "os.nice(-5)",
    "make a BPF map": LIBC + "import struct\n"
                      "assert libc.syscall(321, 0, struct.pack('4I', 2, 4, 4, 1), 16) >= 0",
}
# Each defines a function that is wrong, and tries to have it taken for right.
FORGERIES = {
    "os._exit": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "SystemExit": "raise SystemExit",
    "exit when checked": "def double(x): os._exit(0)",
    "SystemExit when checked": "def double(x): sys.exit(0)",
    "print what passes": "print('R', 'passed', 'ok', flush=True); os._exit(0)",
    "write to every descriptor": "for fd in range(3, 32):\n"
        "    try: os.write(fd, b'R' * 33)\n    except OSError: pass\nos._exit(0)",
    "echo every descriptor": "def readable(fd):\n"
        "    try: return os.read(fd, 4096)\n    except OSError: return b''\n"
        "found = b''.join(readable(fd) for fd in range(3, 32))\n"
        "for fd in range(3, 32):\n"
        "    try: os.write(fd, found)\n    except OSError: pass\nos._exit(0)",
    "flood every descriptor": "while True:\n    for fd in range(1, 32):\n"
        "        try: os.write(fd, b'x' * 4096)\n        except OSError: pass",
    "close every descriptor": "os.closerange(0, 32); os._exit(0)",
    "close every descriptor and wait": "os.closerange(0, 32); time.sleep(600)",
    "patch builtins": "class Same(int):\n    __eq__ = lambda *_: True\n"
        "builtins.int = Same\nbuiltins.len = lambda x: 2\nbuiltins.isinstance = lambda *_: True\n"
        "builtins.AssertionError = KeyboardInterrupt\n"
        "builtins.exec = builtins.compile = lambda *_, **__: None\n"
        "def double(x): return 3",
    "builtins of its own": "__builtins__ = {'len': lambda x: 2}\ndef double(x): return 3",
    "patch os": "os.read = os.write = lambda *_: b''\nos._exit = lambda *_: None\n"
                "def double(x): return 3",
    "jump over the checks": "def trace(frame, event, _):\n"
        "    if frame.f_code.co_filename == '<checks>' and frame.f_lineno > 1:\n"
        "        os._exit(0)\n    return trace\nsys.settrace(trace)\ndef double(x): return 3",
    "swallow the checks by a string": "def double(x): return 3\n'''",
    "define the checks": "def double(x): return 3\ndef check(*_): pass\n",
    "exit at the end": "import atexit; atexit.register(os._exit, 0)\ndef double(x): return 3",
    "leave by execution hook": "sys.excepthook = lambda *_: os._exit(0)\ndef double(x): return 3",
    "say that setting up failed": "for fd in range(3, 32):\n"
        "    try: os.write(fd, b'the sandbox could not be set up')\n    except OSError: pass\n"
        "os._exit(1)",
}
CHECKS = "def check(f):\n    assert int(f(1)) == 2 and len('abc') == 3\n\ncheck(double)\n"
MACHINE_CODE = """
import mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write({code!r})
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
# What ends by a limit, and what is said of it.
EXHAUSTIONS = {
    "endless loop": ("while True: pass", PATIENT, r"CPU time over 1 s"),
    "endless loop that ignores signals": (
        "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        PATIENT, r"killed by SIGKILL",
    ),
    "loop that catches everything": (
        "def again(*_): raise KeyboardInterrupt\nsignal.signal(signal.SIGXCPU, again)\n"
        "def spin():\n    while True: len('')\n"
        "while True:\n    try: spin()\n    except BaseException: pass",
        PATIENT, r"killed by SIGKILL",
    ),
    "sleep": ("time.sleep(600)", LIMITS, r"wall-clock time over 0\.5 s"),
    "wait for input": ("assert sys.stdin.read() == ''\nsignal.pause()", LIMITS, r"wall-clock"),
    "memory hog": ("x = []\nwhile True: x.append(bytearray(b'x') * 10**6)", PATIENT,
                   r"MemoryError: memory over 256 MiB"),
    "one huge object": ("x = 'x' * 10**12", PATIENT, r"MemoryError: memory over 256 MiB"),
    "memory by mmap": ("import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))",
                       PATIENT, r"Cannot allocate memory"),
    "huge number": ("10 ** 10 ** 10", LIMITS, r"wall-clock|CPU time"),
    "endless output": ("while True: print('x' * 10**4)", LIMITS, r"wall-clock|CPU time"),
    "deep recursion": ("sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()", PATIENT,
                       r"killed by SIGSEGV|MemoryError|CPU time"),
    "crash": ("ctypes.string_at(0)", PATIENT, r"killed by SIGSEGV"),
    "abort": ("os.abort()", PATIENT, r"killed by SIG(ABRT|SEGV)"),
    "many open files": ("x = [open('f', 'w') for _ in range(100)]", PATIENT,
                        r"Too many open files"),
    "too many files": (FILE_ATTACKS["fill the folder with files"], PATIENT,
                       r"more than 64 files|No space left"),
    "too big a file": (FILE_ATTACKS["fill the folder with one file"], PATIENT,
                       r"File too large|No space left"),
    "a file of sockets": ("import select; select.epoll().register(0)", PATIENT,
                          r"PermissionError"),
}


def run_hostile(
    around: Surroundings, source: str, limits: SandboxLimits = LIMITS, checks: str = "",
    files: FileConfinement | None = None,
) -> sandbox.SandboxResult:
    """Run a program that must not pass, and check that it left no trace."""
    sandbox.sound_confinement()
    started = time.monotonic()
    result = run_program(Program(around.prelude + source, checks), limits, files)
    # The start of the process on a busy machine is not the program's time.
    assert time.monotonic() - started < limits.wall_seconds + 5
    assert not result.passed
    assert result.reason
    assert "\n" not in result.reason
    assert len(result.output) <= OUTPUT_BYTES
    around.check_untouched()
    return result


@pytest.mark.parametrize("files", FileConfinement)
@pytest.mark.parametrize("attack", FILE_ATTACKS)
def test_no_file_outside_the_folder_is_read_or_changed(
    surroundings: Surroundings, attack: str, files: FileConfinement
) -> None:
    run_hostile(surroundings, FILE_ATTACKS[attack], files=files)


@pytest.mark.parametrize("attack", PROCESS_ATTACKS)
def test_no_other_process_thread_or_program_is_started(
    surroundings: Surroundings, attack: str
) -> None:
    run_hostile(surroundings, PROCESS_ATTACKS[attack])


@pytest.mark.parametrize("attack", NETWORK_ATTACKS)
def test_nothing_is_reached_by_a_network(surroundings: Surroundings, attack: str) -> None:
    run_hostile(surroundings, NETWORK_ATTACKS[attack])


@pytest.mark.parametrize("attack", SIGNAL_ATTACKS)
def test_no_process_is_signalled_traced_or_given_more_rights(
    surroundings: Surroundings, attack: str
) -> None:
    run_hostile(surroundings, SIGNAL_ATTACKS[attack])


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_trick_makes_a_wrong_program_pass(surroundings: Surroundings, forgery: str) -> None:
    run_hostile(surroundings, FORGERIES[forgery], checks=CHECKS)


@pytest.mark.parametrize("exhaustion", EXHAUSTIONS)
def test_what_uses_too_much_is_ended_and_the_limit_named(
    surroundings: Surroundings, exhaustion: str
) -> None:
    source, limits, reason = EXHAUSTIONS[exhaustion]
    assert re.search(reason, run_hostile(surroundings, source, limits).reason)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
@pytest.mark.parametrize(
    "code",
    [b"\xb8\x14\x00\x00\x00\xcd\x80\xc3", b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"],
    ids=["32-bit", "x32"],
)
def test_system_calls_of_another_abi_are_fatal(surroundings: Surroundings, code: bytes) -> None:
    result = run_hostile(surroundings, MACHINE_CODE.format(code=code))
    assert re.search(r"killed by SIG(SYS|SEGV)", result.reason)


@pytest.mark.parametrize("files", FileConfinement)
def test_an_ordinary_program_has_the_standard_library_and_its_folder(
    surroundings: Surroundings, files: FileConfinement
) -> None:
    program = Program(
        "import dataclasses, decimal, hashlib, json, random, re, sqlite3, statistics, typing\n"
        "@dataclasses.dataclass\nclass Point:\n    x: typing.List[int]\n"
        "import os, pickle, tempfile\n"
        "with tempfile.NamedTemporaryFile() as stream: stream.write(b'text')\n"
        "with open('kept', 'w') as stream: stream.write('text')\n"
        "os.rename('kept', 'moved')\n"
        "print('said', sorted(os.environ), os.listdir())\n",
        "assert open('moved').read() == 'text'\n"
        "assert pickle.loads(pickle.dumps(Point([1]))) == Point([1])\n",
    )
    result = run_program(program, files=files)
    assert result.reason == ""
    assert result.passed
    assert result.output == "said ['HOME', 'LANG', 'PYTHONHASHSEED', 'TMPDIR'] ['moved']\n"
    surroundings.check_untouched()


def test_a_failed_check_is_reported_by_the_last_line_of_its_traceback() -> None:
    failed = run_program(Program("def double(x):\n    return x", "assert double(2) == 4, 'two'"))
    assert failed == sandbox.SandboxResult(
        False, "AssertionError: two",
        'Traceback (most recent call last):\n  File "<checks>", line 1, in <module>\n'
        "AssertionError: two\n",
    )
    assert run_program(Program("def f(:")).reason == "SyntaxError: invalid syntax"
    assert run_program(Program("raise ValueError('a\\nb')")).reason == "ValueError: a b"


def test_stricter_limits_of_the_process_around_it_stay() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
        "from svend.evaluation.sandbox import *\n"
        "print(run_program(Program('import resource', "
        "'assert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 20)')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith("SandboxResult(passed=True")


def test_the_same_program_sees_the_same_hashes() -> None:
    program = Program("print([hash('a'), list({'b', 'c', 'd', 'e'})])")
    assert run_program(program).output == run_program(program).output != ""


@settings(max_examples=10, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_text_reaches_the_program_unchanged(text: str) -> None:
    codes = [ord(character) for character in text]
    assert run_program(Program(f"x = {text!a}", f"assert [ord(c) for c in x] == {codes}")).passed


def test_programs_run_side_by_side_and_keep_their_order() -> None:
    programs = [Program("import time; time.sleep(0.5)", f"assert {n} % 3") for n in range(6)]
    started = time.monotonic()
    results = run_programs(programs, parallel=6)
    assert [result.passed for result in results] == [False, True, True] * 2
    assert time.monotonic() - started < 6 * 0.5


def test_an_interrupted_run_kills_its_program(surroundings: Surroundings) -> None:
    sandbox.sound_confinement()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_program(Program("import time; time.sleep(600)"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    surroundings.check_untouched()


@pytest.mark.parametrize("files", FileConfinement)
def test_a_program_dies_with_the_process_that_runs_it(
    surroundings: Surroundings, files: FileConfinement
) -> None:
    code = (
        "from svend.evaluation.sandbox import *\n"
        f"run_program(Program('import time; time.sleep(600)'), files={files})"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": tempfile.gettempdir(), "PYTHONPATH": str(ROOT)},
    )
    wait_until(lambda: len(surroundings.processes()) == 1)
    time.sleep(0.3)  # beyond its setting up, of which nothing can be seen from outside
    runner.kill()
    runner.wait()
    wait_until(lambda: surroundings.processes() == [])


def wait_until(condition: object, timeout_seconds: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


# As a container's seccomp profile may have it: a process that is refused some system calls.
REFUSING = """
import ctypes, struct, sys
from svend.errors import UserError
from svend.evaluation.sandbox import *
from svend.evaluation.syscalls import *
from svend.evaluation.syscalls import _if_equal, _instruction
refused = [int(number) for number in sys.argv[1:]]
program = b"".join([
    _instruction(LOAD_WORD, NUMBER_OFFSET),
    *(i for n in refused for i in _if_equal(n, [_instruction(RETURN, REFUSE)])),
    _instruction(RETURN, ALLOW),
])
code = ctypes.create_string_buffer(program, len(program))
filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(filter_)), 0, 0) == 0
try:
    print(sound_confinement().value, run_program(Program("1 + 1")).passed)
except UserError as error:
    print(error)
"""
LANDLOCK, UNSHARE, PRCTL = 444, 272, 157


@pytest.mark.skipif(platform.machine() != "x86_64", reason="call numbers of x86_64")
@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ((UNSHARE,), "landlock True"),
        ((LANDLOCK,), "namespaces True"),
        ((LANDLOCK, UNSHARE), r"generated code cannot be run safely on this machine; it takes "
         r"seccomp, and Landlock .*landlock: the sandbox could not be set up \(.*Operation not "
         r"permitted: 'Landlock'\); namespaces: .*'user namespace'.*leave out the benchmarks .*"),
    ],
    ids=["Landlock alone", "namespaces alone", "neither"],
)
def test_what_the_machine_permits_is_used_and_nothing_less(
    refused: tuple[int, ...], said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, *map(str, refused)], text=True, check=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert re.fullmatch(said, done.stdout.strip())


AS_ORDINARY_USER = """
from svend.evaluation.sandbox import *
from svend.evaluation.sandbox import _PROBE
for files in FileConfinement:
    probe = Program("outside = '/etc/hostname'", _PROBE)
    print(run_program(probe, files=files).reason or "sound")
"""
SYSTEM_PYTHON = Path("/usr/bin/python3.11")


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests are run by an ordinary user")
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="takes an interpreter that others can read")
def test_an_ordinary_user_gets_the_same_confinement() -> None:
    with tempfile.TemporaryDirectory() as place:
        package = Path(place, "svend")
        (package / "evaluation").mkdir(parents=True)
        for name in ("errors", "evaluation/sandbox", "evaluation/sandbox_launcher",
                     "evaluation/syscalls"):
            (package / f"{name}.py").write_bytes((ROOT / "svend" / f"{name}.py").read_bytes())
        for folder in (Path(place), package, package / "evaluation"):
            folder.chmod(0o755)
        done = subprocess.run(
            [SYSTEM_PYTHON, "-c", AS_ORDINARY_USER], user=65534, group=65534, extra_groups=[],
            text=True, check=True, capture_output=True, cwd=place, env={"PYTHONPATH": place},
        )
    assert done.stdout.split() == ["sound", "sound"]


def test_an_unknown_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ResourceError, match=r"on riscv64: .* x86_64 and aarch64 only"):
        syscalls.allowed_calls_filter()


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
     (1, "/usr/include/asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_call_numbers_are_the_kernels(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    numbers = {("newfstatat" if name == "fstatat" else name): int(n) for name, n in defined}
    listed = {
        **syscalls.ALLOWED, "prlimit64": syscalls.PRLIMIT64,
        **{name: call for name, (call, _, _) in syscalls.ALLOWED_FOR.items()},
    }
    assert {n: numbers.get(n) for n in listed} == {n: call[column] for n, call in listed.items()}
