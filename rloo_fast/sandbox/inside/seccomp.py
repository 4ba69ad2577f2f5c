"""The system calls that code in the sandbox may make; the kernel refuses or kills at all others.

Allowed: to compute, to allocate, and to use files that Landlock lets it open. Fatal: calls that
serve only to escape, to start programs or to signal other processes. All others return EPERM, also
those that make a socket: a C library may try one by itself, to look up a user's name.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

# name -> its number on x86_64 and on aarch64 (None: that one does not have it)
ALLOWED: dict[str, tuple[int, int | None]] = {
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66)},
    **{"pread64": (17, 67), "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57)},
    **{"fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None)},
    **{"lstat": (6, None), "faccessat": (269, 48), "faccessat2": (439, 439), "access": (21, None)},
    **{"readlinkat": (267, 78), "readlink": (89, None), "getdents64": (217, 61)},
    **{"getcwd": (79, 17), "ftruncate": (77, 46), "dup": (32, 23), "dup2": (33, None)},
    **{"dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59)},
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214)},
    **{"mremap": (25, 216), "madvise": (28, 233), "futex": (202, 98), "membarrier": (324, 283)},
    **{"set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293)},
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},
    **{"sigaltstack": (131, 132), "restart_syscall": (219, 128), "pause": (34, None)},
    **{"setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None)},
    **{"clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115)},
    **{"nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None)},
    **{"times": (100, 153), "getrusage": (98, 165), "sched_yield": (24, 124)},
    **{"getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174)},
    **{"geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getpgid": (121, 155)},
    **{"getsid": (124, 156), "uname": (63, 160), "sysinfo": (99, 179), "getrlimit": (97, 163)},
    **{"sched_getaffinity": (204, 123), "getrandom": (318, 278)},
    **{"poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72)},
    **{"exit": (60, 93), "exit_group": (231, 94)},
}
FATAL: dict[str, tuple[int, int | None]] = {
    **{"clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None)},
    **{"execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "bpf": (321, 280)},
    **{"io_uring_setup": (425, 425)},
}
OPEN, OPENAT, FCNTL, PRLIMIT64 = (2, None), (257, 56), (72, 25), (302, 261)
# To duplicate a descriptor, and to read and set its flags; not F_SETOWN, which sends signals.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
O_TMPFILE, O_TRUNC, O_ACCMODE = 0o20000000, 0o1000, 0o3

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, kernel's name

ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
LOAD, AND, EQUAL, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x45, 0x06
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2

libc = ctypes.CDLL(None, use_errno=True)


def enter() -> None:
    """This process, for the rest of its life. Raises OSError where the kernel has no seccomp."""
    program = build_filter()
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.c_char_p(header))


def prctl(option: int, *values: object) -> None:
    zeros = [ctypes.c_ulong(0)] * (4 - len(values))
    wide = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in values]
    if libc.prctl(option, *wide, *zeros):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}) failed: {errno.errorcode.get(code, code)}")


def build_filter() -> bytes:
    """The BPF program: the architecture, then call after call, EPERM for those not named."""
    column, architecture = ARCHITECTURES[platform.machine()]
    rules = [_op(LOAD, ARCHITECTURE_AT), _op(EQUAL, architecture, 1, 0), _op(RETURN, KILL)]
    rules.append(_op(LOAD, NUMBER_AT))
    verdicts = {ALLOW: ALLOWED, KILL: FATAL}
    for verdict, calls in verdicts.items():
        numbers = (numbers[column] for numbers in calls.values())
        rules += [_when(number, [_op(RETURN, verdict)]) for number in numbers if number is not None]
    for numbers, argument in ((OPEN, 1), (OPENAT, 2)):
        if (number := numbers[column]) is not None:
            rules.append(_when(number, _flags_allowed(argument)))
    commands = [_when(command, [_op(RETURN, ALLOW)]) for command in FCNTL_COMMANDS]
    number = FCNTL[column]
    assert number is not None
    rules.append(_when(number, [_argument(1), *commands, _op(RETURN, REFUSE)]))
    own = _when(0, [_op(RETURN, ALLOW)])  # this process's limits, which can be lowered
    rules.append(_when(PRLIMIT64[column], [_argument(0), own, _op(RETURN, REFUSE)]))
    return b"".join([*rules, _op(RETURN, REFUSE)])


def _flags_allowed(argument: int) -> list[bytes]:
    """No file without a name, whose size nobody sees; no truncation by opening for reading,
    which Landlock before Linux 6.2 lets through."""
    return [
        _argument(argument),
        _op(ANY_BIT, O_TMPFILE, 0, 1),
        _op(RETURN, REFUSE),
        _op(AND, O_TRUNC | O_ACCMODE),
        _op(EQUAL, O_TRUNC, 0, 1),
        _op(RETURN, REFUSE),
        _op(RETURN, ALLOW),
    ]


def _when(value: int, then: list[bytes]) -> bytes:
    """If the loaded word is `value`: `then`, which must return."""
    body = b"".join(then)
    return _op(EQUAL, value, 0, len(body) // 8) + body


def _argument(index: int) -> bytes:
    return _op(LOAD, ARGUMENTS_AT + 8 * index)  # its lower 32 bits: both machines are little-endian


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
