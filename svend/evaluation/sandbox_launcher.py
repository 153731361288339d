"""Confine this process for good, then run a program that nobody trusts, and the checks on it.

`sandbox.py` starts this file as a script of its own, with the standard library alone:
`python sandbox_launcher.py FOLDER TOKEN_FD REPORT_FD`, a JSON request on standard input. Nothing
here is undone before the process ends. What confines it is described in `sandbox.py`.
"""

from __future__ import annotations

import builtins
import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import struct
import sys
import traceback
import types
from pathlib import Path
from typing import Any

READY = b"R"
TOKEN_BYTES = 32

# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
# linux/capability.h
LINUX_CAPABILITY_VERSION_3 = 0x20080522
# linux/sched.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE = 1024, 2048, 4096, 16384, 1 << 18
MNT_DETACH = 2
KEPT_FLAGS = {"noexec": MS_NOEXEC, "noatime": MS_NOATIME, "nodiratime": MS_NODIRATIME}
# linux/landlock.h; the numbers of its calls are the same on every machine.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
)
# How many rights each version of Landlock knows; version 1 has the first 13.
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
NEWEST_RIGHTS = 16

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Confine the process, say so, run what was asked for, and report."""
    # Linux alone has these; other systems import this module for what the two sides agree on.
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
    folder, token_fd, report_fd = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    request = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    end_with_parent(request["parent"])
    if request["files"] == "landlock":
        allow_paths(request["readable"], folder)
    else:
        enter_own_root(request["readable"], folder, request["limits"])
    drop_privileges()
    set_limits(request["limits"])
    allow_calls(bytes.fromhex(request["calls"]))
    os.write(report_fd, READY)
    run(request["source"], request["checks"], token_fd, report_fd)


def run(source: str, checks: str, token_fd: int, report_fd: int) -> None:
    """Run a program, then its checks in the same namespace; report, and end the process.

    The token is read only after the checks have ended, and its hash is the report. What is used
    then is bound before the program can replace it.
    """
    program = types.ModuleType("__main__")
    namespace = vars(program)
    sys.modules["__main__"] = program
    read, write, exit_now, sha256 = os.read, os.write, os._exit, hashlib.sha256
    set_trace, set_profile = sys.settrace, sys.setprofile
    print_exception, last_line = traceback.print_exception, traceback.format_exception_only
    known_builtins, originals = vars(builtins), dict(vars(builtins))
    try:
        exec(compile(source, "<program>", "exec"), namespace)
        set_trace(None)
        set_profile(None)
        known_builtins.clear()
        known_builtins.update(originals)
        namespace["__builtins__"] = builtins
        exec(compile(checks, "<checks>", "exec"), namespace)
    except MemoryError:
        # There may be no memory left to say more.
        write(report_fd, b"MemoryError")
        exit_now(1)
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its failure
        own_frame = error.__traceback__
        print_exception(error.with_traceback(own_frame.tb_next if own_frame else None))
        write(report_fd, last_line(error)[-1].strip().encode(errors="replace")[-2000:])
        exit_now(1)
    write(report_fd, sha256(read(token_fd, TOKEN_BYTES)).digest())
    exit_now(0)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it dies."""
    _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        sys.exit("the process that started the sandbox has ended")


def set_limits(limits: dict[str, int]) -> None:
    """Set the limits of this process, or keep its present ones where those are stricter.

    Soft and hard ones are alike, so that it cannot raise them, but for CPU time: at the soft one
    comes SIGXCPU, which ends the process; should it ignore that, it is killed a second later.
    """
    for name, soft, hard in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["folder_bytes"], limits["folder_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        _, present = resource.getrlimit(name)
        ceiling = sys.maxsize if present == resource.RLIM_INFINITY else present
        resource.setrlimit(name, (min(soft, ceiling), min(hard, ceiling)))


def drop_privileges() -> None:
    """Give up every capability (capset(2)), which root has, and whoever made a user namespace.

    Nor may the process be traced or dumped from here on, and its /proc entries become root's.
    """
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, bytes(24)), "capset")
    _check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def allow_calls(instructions: bytes) -> None:
    """Install a seccomp filter; system calls that it does not allow fail from here on."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog: the number of instructions, of 8 bytes each, and where they are.
    program = ctypes.create_string_buffer(
        struct.pack("@HP", len(instructions) // 8, ctypes.addressof(code))
    )
    _forbid_new_privileges()
    _check(
        libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0),
        "seccomp filter",
    )


def allow_paths(readable: list[str], folder: str) -> None:
    """Allow, by Landlock, reading of some paths, and files in one folder; nothing else."""
    version = libc.syscall(
        ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0),
        ctypes.c_uint(LANDLOCK_CREATE_RULESET_VERSION),
    )
    _check(version, "Landlock")
    handled = (1 << RIGHTS_BY_VERSION.get(version, NEWEST_RIGHTS)) - 1
    attributes = struct.pack("=Q", handled)
    ruleset = libc.syscall(
        ctypes.c_long(LANDLOCK_CREATE_RULESET), attributes, ctypes.c_size_t(len(attributes)),
        ctypes.c_uint(0),
    )
    _check(ruleset, "Landlock")
    for path in readable:
        _add_rule(ruleset, path, READ_FILE | (READ_DIR if Path(path).is_dir() else 0))
    in_folder = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    _add_rule(ruleset, folder, in_folder & handled)
    _forbid_new_privileges()
    _check(
        libc.syscall(ctypes.c_long(LANDLOCK_RESTRICT_SELF), ctypes.c_int(ruleset),
                     ctypes.c_uint(0)),
        "Landlock",
    )
    os.close(ruleset)


def _add_rule(ruleset: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, place)
    _check(
        libc.syscall(ctypes.c_long(LANDLOCK_ADD_RULE), ctypes.c_int(ruleset),
                     ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH), rule, ctypes.c_uint(0)),
        f"Landlock rule for {path}",
    )
    os.close(place)


def enter_own_root(readable: list[str], folder: str, limits: dict[str, int]) -> None:
    """Make namespaces of this process's own, with some paths, read-only, and a folder as its root.

    They keep the places that they have outside. The folder is a file system in memory.
    """
    uid, gid = os.geteuid(), os.getegid()
    _check(
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS),
        "user namespace",
    )
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(line)
    _mount(None, "/", MS_REC | MS_PRIVATE)
    _mount("tmpfs", folder, MS_NOSUID | MS_NODEV, "tmpfs", "mode=755,size=1m")
    for path in readable:
        target = Path(folder + path)
        if Path(path).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        _mount(path, str(target), MS_BIND | MS_REC)
    _make_read_only(folder)
    Path(folder + folder).mkdir(parents=True, exist_ok=True)
    size, files = limits["folder_bytes"], limits["folder_files"] + 1
    _mount("tmpfs", folder + folder, MS_NOSUID | MS_NODEV, "tmpfs",
           f"mode=700,size={size},nr_inodes={files}")
    os.chdir(folder)
    # The old root comes to lie on the new one (pivot_root(2)), and is taken off.
    _check(libc.pivot_root(b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount2")
    _mount(None, "/", MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(folder)


def _make_read_only(root: str) -> None:
    """Make what is mounted below a path read-only, with what was mounted on those in turn."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        escaped, options = line.split()[4:6]
        place = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), escaped)
        if place.startswith(f"{root}/"):
            kept = sum(KEPT_FLAGS.get(option, 0) for option in options.split(","))
            _mount(None, place,
                   MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def _mount(
    source: str | None, target: str, flags: int, kind: str | None = None, options: str | None = None
) -> None:
    encoded = [os.fsencode(text) if text is not None else None
               for text in (source, target, kind, options)]
    source_, target_, kind_, options_ = encoded
    _check(libc.mount(source_, target_, kind_, flags, options_), f"mount on {target}")


def _forbid_new_privileges() -> None:
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _check(result: Any, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()
