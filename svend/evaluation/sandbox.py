"""Run programs that nobody trusts, such as a model wrote, where they can do no harm.

Each program gets a process of its own: a fresh interpreter with the standard library alone, an
almost empty environment and no terminal. What confines it is enforced by the kernel, not by Python
(the launcher sets it up, in `sandbox_launcher.py`):

- seccomp (an allowlist, `syscalls.py`): no other process or thread, hence no fork bomb, daemon or
  grandchild, and killing the one process leaves nothing; no other program; no socket of any kind;
  no signal to anyone, itself included; no tracing; no change of modes, owners, limits or mounts.
- Landlock (Linux 5.13 and newer): only the interpreter's own files can be read, and files made in
  one temporary folder, which is removed. Where Landlock is missing, a user and a mount namespace
  give it a root that holds nothing else.
- Limits: CPU time, memory (address space), size of files and number of open ones by setrlimit;
  wall-clock time, and what the folder holds, by this process, which kills it.
- No capability is left to it, though this process be root's; it dies with this process.

Whether that holds is tried out once, and where it does not nothing is run: ResourceError.

A program passes if its checks ran to their end. They are compiled apart from it, and run after it
in its namespace; only then the launcher reads a random token from a pipe, and what it reports is
the token's hash. So no exit code, early exit, output, or byte written to every open descriptor
counts. Checks share the interpreter with what they check, so two things are not prevented: a
program that is written against this very harness, and finds the token's descriptor, and one that
makes the checks lie, by objects that equal everything or patched modules (builtins are put back).
What the program may still learn: names, sizes and times of files (Landlock does not hide them), and
facts about the machine, such as its name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from svend.errors import ResourceError
from svend.evaluation.sandbox_launcher import READY, TOKEN_BYTES
from svend.evaluation.syscalls import allowed_calls_filter

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
# No site-packages, no user site, no script's folder on the path; output as it is written.
INTERPRETER_FLAGS = ("-S", "-s", "-P", "-B", "-u", "-X", "utf8")
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
# For the start of the interpreter and its confinement, on a busy machine too.
START_SECONDS = 60.0
# How often the folder is looked at, and how much is read at a time.
POLL_SECONDS = 0.02
READ_BYTES = 1 << 16
OUTPUT_BYTES = 1 << 14
REPORT_BYTES = 1 << 12


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What a program may use. CPU time counts its interpreter's start too, some 0.1 seconds."""

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    folder_bytes: int = 1 << 24
    folder_files: int = 64
    open_files: int = 32


@dataclass(frozen=True)
class Program:
    """Python source, and the source that checks it: it runs after it, in the same namespace."""

    source: str
    checks: str = ""


@dataclass(frozen=True)
class SandboxResult:
    """Whether a program and its checks ran to their end, else why not, and the end of its output.

    reason: the last line of the traceback, the limit that it ran into, or how it ended. output:
    what it wrote on standard output and error, the last 16 KiB.
    """

    passed: bool
    reason: str = ""
    output: str = ""


class FileConfinement(Enum):
    """What keeps a program from files."""

    LANDLOCK = "landlock"
    NAMESPACES = "namespaces"


def run_program(
    program: Program,
    limits: SandboxLimits = SandboxLimits(),
    files: FileConfinement | None = None,
) -> SandboxResult:
    """Run one program in the sandbox, and wait for its end.

    files: None takes what this machine permits. Raises ResourceError where nothing can be run
    safely.
    """
    if files is None:
        files = sound_confinement()
    with tempfile.TemporaryDirectory(prefix="svend-sandbox-") as folder:
        return _run_in_folder(program, limits, files, folder)


def run_programs(
    programs: Sequence[Program], limits: SandboxLimits = SandboxLimits(), parallel: int = 2
) -> list[SandboxResult]:
    """Run programs, `parallel` at a time; return their results in the same order."""
    files = sound_confinement()
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda program: run_program(program, limits, files), programs))


@functools.cache
def sound_confinement() -> FileConfinement:
    """Return the first way to keep programs from files that proves to hold on this machine.

    Raises ResourceError, with what is missing, where none does.
    """
    if sys.platform != "linux":
        raise ResourceError(
            f"generated code cannot be run safely on {sys.platform}: the sandbox needs Linux; "
            "leave out the benchmarks that run code"
        )
    missing = []
    for files in FileConfinement:
        with tempfile.NamedTemporaryFile(prefix="svend-outside-") as outside:
            probe = Program(f"outside = {outside.name!r}", _PROBE)
            try:
                result = run_program(probe, files=files)
            except ResourceError as error:
                missing.append(f"{files.value}: {error}")
                continue
        if result.passed:
            return files
        missing.append(f"{files.value}: {result.reason}")
    raise ResourceError(
        "generated code cannot be run safely on this machine; it takes seccomp, and Landlock "
        "(Linux 5.13 or newer, enabled by lsm=landlock) or unprivileged user namespaces "
        f"({'; '.join(missing)}); enable one, or leave out the benchmarks that run code"
    )


# What an ordinary program needs works, and what must not work does not.
_PROBE = """
import ctypes, datetime, decimal, hashlib, os, random, re, signal, socket, typing, zlib
with open("inside", "w") as stream:
    stream.write("inside")
for what, action in {
    "read a file": lambda: open(outside),
    "write a file": lambda: open(outside, "w"),
    "open a socket": socket.socket,
    "fork": os.fork,
    "start a program": lambda: os.execv("/bin/true", ["true"]),
    "send a signal": lambda: os.kill(os.getppid(), 0),
}.items():
    try:
        action()
    except OSError:
        continue
    raise AssertionError(f"a program could {what}")
"""


@functools.cache
def _readable_paths() -> tuple[str, ...]:
    """The interpreter's own files: its standard library, and the libraries that it is linked to."""
    candidates = {
        sysconfig.get_path("stdlib"), f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib",
        *SYSTEM_LIBRARIES,
    }
    paths = sorted(path for path in candidates if Path(path).exists())
    return tuple(
        path for path in paths if not any(path.startswith(f"{other}/") for other in paths)
    )


def _run_in_folder(
    program: Program, limits: SandboxLimits, files: FileConfinement, folder: str
) -> SandboxResult:
    token = secrets.token_bytes(TOKEN_BYTES)
    token_reader, token_writer = os.pipe()
    report_reader, report_writer = os.pipe()
    try:
        os.write(token_writer, token)
        os.close(token_writer)
        with tempfile.TemporaryFile() as request:
            request.write(json.dumps({
                "source": program.source, "checks": program.checks, "files": files.value,
                "limits": asdict(limits), "readable": _readable_paths(), "parent": os.getpid(),
                "calls": allowed_calls_filter().hex(),
            }).encode())
            request.seek(0)
            process = subprocess.Popen(
                [sys.executable, *INTERPRETER_FLAGS, LAUNCHER, folder, str(token_reader),
                 str(report_writer)],
                stdin=request, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
                env={"PYTHONHASHSEED": "0", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
                pass_fds=(token_reader, report_writer), start_new_session=True,
            )
    except BaseException:
        os.close(report_reader)
        raise
    finally:
        os.close(token_reader)
        os.close(report_writer)
    try:
        watched = _watch(process, report_reader, Path(folder), limits)
    finally:
        process.kill()
        process.wait()
        os.close(report_reader)
        assert process.stdout is not None
        process.stdout.close()
    return _result(process.returncode, watched, hashlib.sha256(token).digest(), limits)


@dataclass
class _Watched:
    """What came out of a process, and the limit for which it had to be killed."""

    report: bytearray
    output: bytearray
    over: str = ""


def _watch(
    process: subprocess.Popen[bytes], report_fd: int, folder: Path, limits: SandboxLimits
) -> _Watched:
    """Read what a process writes until it ends or is over a limit of time or of its folder."""
    watched = _Watched(bytearray(), bytearray())
    deadline = time.monotonic() + START_SECONDS
    ready = False
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout.fileno(), selectors.EVENT_READ)
        selector.register(report_fd, selectors.EVENT_READ)
        while process.poll() is None:
            if not ready and watched.report.startswith(READY):
                ready, deadline = True, time.monotonic() + limits.wall_seconds
            if time.monotonic() > deadline:
                seconds = limits.wall_seconds if ready else START_SECONDS
                watched.over = f"wall-clock time over {seconds:g} s"
                return watched
            if _over_folder_limits(folder, limits):
                watched.over = (
                    f"more than {limits.folder_files} files or {limits.folder_bytes} bytes in its "
                    "folder"
                )
                return watched
            if selector.get_map():
                _read_ready(selector, report_fd, watched, POLL_SECONDS)
            else:  # it has closed its ends, and may go on
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        while selector.get_map():
            _read_ready(selector, report_fd, watched, POLL_SECONDS)
    return watched


def _read_ready(
    selector: selectors.BaseSelector, report_fd: int, watched: _Watched, timeout_seconds: float
) -> None:
    """Read once from each descriptor that has something: keep the report's start, output's end."""
    for key, _ in selector.select(timeout_seconds):
        chunk = os.read(key.fd, READ_BYTES)
        if not chunk:
            selector.unregister(key.fd)
        elif key.fd == report_fd:
            watched.report += chunk[:REPORT_BYTES - len(watched.report)]
        else:
            watched.output += chunk
            del watched.output[:-OUTPUT_BYTES]


def _over_folder_limits(folder: Path, limits: SandboxLimits) -> bool:
    size = 0
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries, start=1):
            if number > limits.folder_files:
                return True
            try:
                size += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # the program has removed it since
                continue
    return size > limits.folder_bytes


def _result(
    exit_code: int, watched: _Watched, expected: bytes, limits: SandboxLimits
) -> SandboxResult:
    output = watched.output.decode(errors="replace")
    if not watched.report.startswith(READY):
        lines = output.strip().splitlines() or [watched.over or _ending(exit_code)]
        raise ResourceError(f"the sandbox could not be set up ({lines[-1]})")
    report = bytes(watched.report[len(READY):])
    if watched.over:
        return SandboxResult(False, watched.over, output)
    if report == expected and exit_code == 0:
        return SandboxResult(True, "", output)
    if exit_code == -signal.SIGXCPU:
        reason = f"CPU time over {limits.cpu_seconds} s"
    elif exit_code < 0:
        reason = _ending(exit_code)
    elif report == b"MemoryError":
        reason = f"MemoryError: memory over {limits.memory_bytes >> 20} MiB"
    else:
        said = " ".join(report.decode(errors="replace").split())
        reason = said or f"{_ending(exit_code)} before the checks ended"
    return SandboxResult(False, reason, output)


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    if exit_code == -signal.SIGKILL:
        return f"killed by {name}: CPU time over its limit, or the machine was out of memory"
    return f"killed by {name}"
