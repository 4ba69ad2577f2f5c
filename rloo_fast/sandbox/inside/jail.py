"""Confine this process for the rest of its life; there is no call that undoes it.

In order: a session of its own, no descriptors but the given ones, resource limits, Landlock (which
files it may open), no capabilities, and the filter of system calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from . import seccomp
from .seccomp import libc

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # on every architecture
PATH_BENEATH, GET_VERSION = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # from ABI

# Python's library and the shared libraries that its modules load
READABLE = (
    os.path.dirname(os.__file__),
    f"{sys.base_prefix}/lib",
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"),
    *("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"),
)
CAPABILITIES_VERSION_3 = 0x20080522
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
CLONE_NEWNS, CLONE_NEWUTS = 0x00020000, 0x04000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MNT_DETACH = 2, 4, 8, 2
PR_SET_PDEATHSIG = 1
HOST_NAME = b"sandbox"
OOM_SCORE_ADJ = "1000"  # the first to end when the machine has no memory left


@dataclass(frozen=True)
class Limits:
    """Of one process, but for the disk: all its files together."""

    time_s: float = 5.0
    memory_mib: int = 512
    disk_mib: int = 8
    num_files: int = 64


def landlock_version() -> int:
    """The kernel's Landlock ABI, 0: it has none, or it is turned off."""
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), GET_VERSION))


def leave_namespaces() -> bool:
    """Put this process and its children into user, network, IPC, mount and host name namespaces.

    A second wall: the filter refuses sockets by itself. False where the machine does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    kinds = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS | CLONE_NEWUTS
    if libc.unshare(kinds):
        return False
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with suppress(OSError), open(f"/proc/self/{file}", "w") as stream:
            stream.write(text)
    libc.sethostname(HOST_NAME, len(HOST_NAME))
    return True


def bound_disk(folder: str, limits: Limits) -> bool:
    """Mount a file system of `disk_mib` and `num_files` at the folder; this process's alone.

    False where the machine does not allow it, or without a mount namespace of its own.
    """
    size = f"size={limits.disk_mib}m,nr_inodes={limits.num_files + 1},mode=0700"  # 1: the folder
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    return not libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, size.encode())


def unbound_disk(folder: str) -> None:
    _checked(libc.umount2(folder.encode(), MNT_DETACH), "umount")


def enter(
    limits: Limits,
    descriptors: Iterable[int],
    folder: str | None,
    parent: int,
    readable: Iterable[str] = (),
) -> None:
    """This process, for the rest of its life. Only `folder` is writable, nothing without one;
    `readable` is beside READABLE.

    It dies with `parent`, the process that forked it. Raises OSError if a wall is missing.
    """
    seccomp.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the parent has ended")
    os.setsid()
    _keep_only(descriptors)
    os.chdir(folder or "/")
    os.environ.clear()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(OOM_SCORE_ADJ)
    _limit(limits)
    seccomp.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1)  # which Landlock asks for
    _restrict_files(folder, readable)
    _drop_capabilities()
    seccomp.enter()


def _keep_only(descriptors: Iterable[int]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    low = 3
    for keep in sorted(descriptors):
        os.closerange(low, keep)
        low = keep + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _limit(limits: Limits) -> None:
    memory, seconds = limits.memory_mib * 2**20, int(limits.time_s) + 1
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # the wall clock ends it before
        (resource.RLIMIT_FSIZE, limits.disk_mib * 2**20, limits.disk_mib * 2**20),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, 1, 1),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    # Recursion through C (a cached function) takes more than the usual 8 MiB.
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (most if most >= 0 else memory // 2, most))


def _restrict_files(folder: str | None, readable: Iterable[str]) -> None:
    version = landlock_version()
    handled = next((rights for abi, rights in reversed(ALL_RIGHTS.items()) if version >= abi), 0)
    attribute = struct.pack("Q", handled)
    ruleset = _checked(libc.syscall(CREATE_RULESET, attribute, ctypes.c_size_t(8), 0), "Landlock")
    for path in (*READABLE, *readable):
        if os.path.exists(path):
            rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
            _allow(ruleset, path, rights | (WRITE_FILE if path == os.devnull else 0))
    if folder is not None:  # files can be made there, but neither folders nor links
        rights = READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | TRUNCATE
        _allow(ruleset, folder, rights & handled)
    _checked(libc.syscall(RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, beneath)
    _checked(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), f"Landlock's rule for {path}")
    os.close(beneath)


def _drop_capabilities() -> None:
    header = struct.pack("Ii", CAPABILITIES_VERSION_3, 0)
    _checked(libc.capset(header, bytes(24)), "capset")


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what} failed: {errno.errorcode.get(code, code)}")
    return result
