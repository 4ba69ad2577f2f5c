"""Programs that attack the sandbox, and what they are after. `python -m tests.sandbox.test_sandbox`
prints what becomes of each."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rloo_fast.sandbox import Sandbox, Verdict
from tests.support.sandbox_more_attacks import MORE

RIGHT = "def f():\n    return 3\n"
ANSWERS = (  # the pipe by which the tests hear of the program
    "import fcntl, os\n"
    "def is_open_to_write(fd):\n"
    "    try: return fcntl.fcntl(fd, fcntl.F_GETFL) & 3 == 1\n"
    "    except OSError: return False\n"
    "answers = next(fd for fd in range(3, 64) if is_open_to_write(fd))\n"
)
TEST = "assert f() == 3  # 5up3r"

# name -> a program that passes TEST only if the attack works, and why it does not
ATTACKS: dict[str, tuple[str, str]] = {
    "infinite loop": ("while True: pass", "timeout"),
    "fork bomb": ("import os\nwhile True: os.fork()", "forbidden system call"),
    "threads without end": (
        "import threading\nwhile True: threading.Thread(target=print).start()",
        "forbidden system call",
    ),
    "memory bomb": ("x = [bytearray(2**20) for _ in range(2**14)]", "memory|timeout"),
    "memory bomb, mapped": ("import mmap\nx = mmap.mmap(-1, 2**33)", "memory|raised OSError"),
    "one big file": (
        "with open('big', 'wb') as file:\n    while True: file.write(bytes(2**20))",
        "disk|raised OSError",
    ),
    "many files": (
        "n = 0\nwhile True:\n    n += 1\n"
        "    with open(str(n), 'wb') as file: file.write(bytes(9**6))",
        "disk|raised OSError",
    ),
    "unseen file": (
        "import os\nfd = os.open('.', os.O_TMPFILE | os.O_RDWR)\n" + RIGHT,
        "raised PermissionError",
    ),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)", "forbidden system call"),
    "kill everything": ("import os\nos.kill(-1, 9)", "forbidden system call"),
    "signal by fcntl": (
        "import fcntl, os\nfcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())",
        "raised PermissionError",
    ),
    "write elsewhere": ("open(OUTSIDE, 'w').write('x')", "raised PermissionError"),
    "truncate by reading": (
        "import os\nos.open(SECRET_FILE, os.O_RDONLY | os.O_TRUNC)",
        "raised PermissionError",
    ),
    "link to elsewhere": (
        "import os\nos.symlink(OUTSIDE, 'x')\nopen('x', 'w').write('x')",
        "raised PermissionError",
    ),
    "read a file": (
        "def f():\n    return 3 if 'hunter2' in open(SECRET_FILE).read() else 0",
        "raised PermissionError",
    ),
    "read the environment": (
        "import os\ndef f():\n    return 3 if 'hunter2' in str(os.environ) else 0",
        "wrong answer",
    ),
    "environment of the parent": (
        "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
        "raised PermissionError",
    ),
    "memory of the tests": (
        "import os\nopen(f'/proc/{os.getpid() + 1}/mem', 'rb')",
        "raised (PermissionError|FileNotFoundError)",
    ),
    "tests in the heap": (
        "import gc\ndef f():\n    secret = ''.join(['5up', '3r'])\n"
        "    return 3 if any(secret in str(o) for o in gc.get_objects()) else 0",
        "wrong answer",
    ),
    "connect": (
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
        "raised PermissionError",
    ),
    "connect by a shell": (
        "import os\nos.system('echo > /dev/tcp/127.0.0.1/PORT')",
        "forbidden system call",
    ),
    "another program": (
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 4321'])",
        "forbidden system call",
    ),
    "daemon": (
        "import os, time\nif not os.fork():\n    os.setsid()\n    os.fork() or time.sleep(4321)\n"
        + RIGHT,
        "forbidden system call",
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n=0): return f(n + 1)",
        "memory|ended|crashed|timeout",
    ),
    "recursion in C": (
        "x = []\nfor _ in range(10**6): x = [x]\ndef f(): return x",
        "raised ValueError|timeout",
    ),
    "output flood": ("while True: print('x' * 10**6)", "timeout"),
    "forged output": (
        "import os\nfor fd in range(20):\n    try: os.write(fd, b'all tests passed')\n"
        "    except OSError: pass\nprint('passed 1/1')",
        "garbled answer|ended",
    ),
    "forged record": (
        "import os\nfor fd in range(64):\n"
        '    try: os.pwrite(fd, b\'{"loaded": true, "passed": true, "why": ""}\', 0)\n'
        "    except OSError: pass\ndef f(): return 0",
        "wrong answer",
    ),
    "sys.exit(0)": ("import sys\nsys.exit(0)", "raised NameError"),
    "os._exit(0)": ("import os\nos._exit(0)", "ended"),
    "os._exit(0) in the call": ("import os\ndef f(): os._exit(0)", "ended"),
    "always equal": (
        "class Yes:\n    def __eq__(self, other): return True\ndef f(): return Yes()",
        "wrong answer",
    ),
    "always equal int": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def f(): return Yes(4)",
        "wrong answer",
    ),
    "patched built-ins": (
        "import builtins\nclass AssertionError(Exception): pass\n"
        "builtins.AssertionError = Exception\nimport sys\nsys.settrace(lambda *_: None)\n"
        "def f(): return 4",
        "wrong answer",
    ),
    "patched answers": (
        "import json, sys\nfor name, module in list(sys.modules.items()):\n"
        "    if name.endswith('wire'):\n        module.json.dumps = "
        'lambda *_, **__: \'["value",["True"]]\'\ndef f(): return 4',
        "garbled answer",
    ),
    "all descriptors closed": ("import os\nos.closerange(0, 64)", "ended"),
    "signals ignored": (
        "import signal\nfor n in range(1, 64):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass",
        "timeout",
    ),
    "huge message": (
        ANSWERS + "os.write(answers, b'\\xff\\xff\\xff\\xff' + bytes(9999))",
        "garbled answer",
    ),
    "messages without end": (
        ANSWERS + "while True: os.write(answers, bytes(2**16))",
        "garbled answer|timeout",
    ),
    "nested message": (
        ANSWERS + "x = b'[' * 10**6\nx = len(x).to_bytes(4, 'big') + x\n"
        "while x: x = x[os.write(answers, x):]",
        "garbled answer",
    ),
    "ctypes": (
        "import ctypes\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nctypes.string_at(0)",
        "crashed",
    ),
    **MORE,
}


class World:
    """What the attacks are after, and a sandbox to attack it from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outside, self.secret_file = folder / "outside", folder / "secret"
        self.secret_file.write_text("hunter2")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        os.environ["SANDBOX_TEST_SECRET"] = "hunter2"
        tempfile.tempdir = str(folder)
        # patient: what is not to run into the limit must not on a busy machine either
        self.sandbox = Sandbox(timeout_s=30, memory_mib=256, workers=2)
        self.hasty = Sandbox(timeout_s=1, memory_mib=256, workers=1)

    def close(self) -> None:
        self.sandbox.close()
        self.hasty.close()
        self.listener.close()
        tempfile.tempdir = None
        del os.environ["SANDBOX_TEST_SECRET"]

    def attack(self, name: str) -> Verdict:
        program, why = ATTACKS[name]
        sandbox = self.hasty if "timeout" in why else self.sandbox
        program = program.replace("OUTSIDE", repr(str(self.outside)))
        program = program.replace("SECRET_FILE", repr(str(self.secret_file)))
        port = str(self.listener.getsockname()[1])
        return sandbox.check(program.replace("PORT", port), [TEST])

    def damage(self) -> list[str]:
        """What an attack has done outside the sandbox."""
        found = [f"process {pid} survives" for pid in survivors(str(self.folder))]
        if self.outside.exists() or self.secret_file.read_text() != "hunter2":
            found.append("files outside")
        with suppress(BlockingIOError):
            self.listener.accept()
            found.append("a connection")
        found += [f"left {path}" for path in self.folder.glob("rloo_fast-sandbox-*/*")]
        return found


def survivors(marker: str, parents: Sequence[int] = (os.getpid(),)) -> list[int]:
    """Processes forked in the sandbox, which share its command line, or started by an attack; but
    not the children of `parents`, which are the wardens."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes().decode(errors="replace")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if "4321" in command or (marker in command and parent not in parents):
                found.append(int(path.name))
    return found
