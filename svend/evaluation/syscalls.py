"""The system calls that a sandboxed program may make, as a seccomp filter.

Whatever is not listed here is refused with EPERM: new processes and threads, other programs,
sockets, signals, tracing, mounts, namespaces, raised limits, changes of modes and owners. The list
is what computing, memory, time and open files take, so a call that a later kernel adds is refused
too.
"""

from __future__ import annotations

import errno
import platform
import struct

from svend.errors import ResourceError

# The numbers of x86_64 and of aarch64; None where the machine lacks the call.
Numbers = tuple[int | None, int | None]

ALLOWED: dict[str, Numbers] = {
    # Open files.
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83),
    # Paths: which may be opened is another layer's concern. chmod, chown, utime, setxattr and
    # truncate are missing because Landlock does not know them, or not in all its versions.
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "umask": (95, 166), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    # Memory.
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "msync": (26, 227),
    # Locks and scheduling of the one thread.
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168), "restart_syscall": (219, 128),
    # Signals that it gets; none that it sends, but by its own timers.
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132), "pause": (34, None), "alarm": (37, None), "getitimer": (36, 102),
    "setitimer": (38, 103),
    # Time, randomness, and who and where it is.
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrandom": (318, 278), "getrusage": (98, 165), "getrlimit": (97, 163),
    "sysinfo": (99, 179), "uname": (63, 160), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getpgid": (121, 155), "getpgrp": (111, None), "getsid": (124, 156),
    "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150),
    "exit": (60, 93), "exit_group": (231, 94),
}
# Calls that are allowed for some values of one argument: (numbers, argument, values).
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX = 0x5401, 0x5413, 0x5450, 0x5451
ALLOWED_FOR: dict[str, tuple[Numbers, int, tuple[int, ...]]] = {
    # Not F_SETOWN, by which a file's owner is sent signals.
    "fcntl": ((72, 25), 1, (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC)),
    "ioctl": ((16, 29), 1, (TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX)),
}
# To ask for a limit, with no new one (a null pointer, both halves of it).
PRLIMIT64: Numbers = (302, 261)

# linux/audit.h, linux/seccomp.h, linux/filter.h.
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
KILL_PROCESS, REFUSE, ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16
# Calls of the 32-bit ABI on x86_64 have numbers from here on.
X32_NUMBERS = 0x40000000


def allowed_calls_filter() -> bytes:
    """Return this machine's filter as instructions of classic BPF (struct sock_filter[]).

    Raises ResourceError for a processor whose call numbers are not known here.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCHITECTURES:
        raise ResourceError(
            f"generated code cannot be run safely on {machine}: the sandbox knows the system calls "
            f"of {' and '.join(AUDIT_ARCHITECTURES)} only; leave out the benchmarks that run code"
        )
    column = list(AUDIT_ARCHITECTURES).index(machine)
    program = [
        _instruction(LOAD_WORD, ARCHITECTURE_OFFSET),
        _instruction(JUMP_IF_EQUAL, AUDIT_ARCHITECTURES[machine], if_true=1),
        _instruction(RETURN, KILL_PROCESS),
        _instruction(LOAD_WORD, NUMBER_OFFSET),
        _instruction(JUMP_IF_AT_LEAST, X32_NUMBERS, if_false=1),
        _instruction(RETURN, KILL_PROCESS),
    ]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            program += _if_equal(number, [_instruction(RETURN, ALLOW)])
    for numbers, argument, values in ALLOWED_FOR.values():
        number = numbers[column]
        assert number is not None
        program += _if_equal(number, [
            _instruction(LOAD_WORD, ARGUMENTS_OFFSET + 8 * argument),
            *(i for v in values for i in _if_equal(v, [_instruction(RETURN, ALLOW)])),
            _instruction(RETURN, REFUSE),
        ])
    asks_limit = PRLIMIT64[column]
    assert asks_limit is not None
    new_limit = ARGUMENTS_OFFSET + 8 * 2
    program += _if_equal(asks_limit, [
        _instruction(LOAD_WORD, new_limit),
        *_if_equal(0, [
            _instruction(LOAD_WORD, new_limit + 4),
            *_if_equal(0, [_instruction(RETURN, ALLOW)]),
        ]),
        _instruction(RETURN, REFUSE),
    ])
    program.append(_instruction(RETURN, REFUSE))
    return b"".join(program)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _if_equal(value: int, then: list[bytes]) -> list[bytes]:
    """Instructions that carry out `then` where the loaded word is `value`, else go past it."""
    return [_instruction(JUMP_IF_EQUAL, value, if_false=len(then)), *then]
