"""More programs that attack the sandbox: lies about what they return, forged messages, notes for
others, secrets in memory, exhaustion. The table of sandbox_attacks.py takes them in."""

from __future__ import annotations

RETURN = "def f(): return {}\n"
CALL = (  # a system call by its number
    "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "def call(number, *arguments):\n    if libc.syscall(number, *arguments) < 0:\n"
    "        raise OSError(ctypes.get_errno(), 'refused')\n"
)
FORGE = (  # answers every question with `forged`, whatever it is
    "import fcntl, json, os\ndef mode(fd):\n"
    "    try: return fcntl.fcntl(fd, fcntl.F_GETFL) & 3\n    except OSError: return -1\n"
    "answers = next(fd for fd in range(3, 64) if mode(fd) == 1)\n"
    "def send(forged):\n    raw = json.dumps(forged).encode()\n"
    "    os.write(answers, len(raw).to_bytes(4, 'big') + raw)\n"
)
YES = (
    "class Yes:\n    def __eq__(self, other): return True\n    __ne__ = lambda *_: False\n"
    "    __hash__ = lambda self: 3\n    __sub__ = __rsub__ = lambda *_: 0\n"
)

# name -> a program, and why it does not pass
MORE: dict[str, tuple[str, str]] = {
    # what is returned
    "float that is 3": (
        "class F(float):\n    __eq__ = lambda *_: True\n    __float__ = lambda s: 3.0\n"
        + RETURN.format("F(4)"),
        "wrong answer",
    ),
    "int by its index": (
        "class I(int):\n    __index__ = __int__ = lambda s: 3\n" + RETURN.format("I(4)"),
        "wrong answer",
    ),
    "text that is all": (
        "class S(str):\n    __eq__ = lambda *_: True\n    __str__ = lambda s: '3'\n"
        "    __hash__ = str.__hash__\n" + RETURN.format("S('4')"),
        "wrong answer",
    ),
    "list that is all": (
        "class L(list):\n    __eq__ = lambda *_: True\n    __iter__ = lambda s: iter([3])\n"
        + RETURN.format("L([4])"),
        "wrong answer",
    ),
    "Decimal by its text": (
        "import decimal\nclass D(decimal.Decimal):\n    __str__ = lambda s: '3'\n"
        + RETURN.format("D(4)"),
        "wrong answer",
    ),
    "lie about the class": (
        YES + "class Lie(Yes):\n    __class__ = property(lambda s: int)\n"
        "    __index__ = __int__ = lambda s: 3\n" + RETURN.format("Lie()"),
        "raised TypeError",
    ),
    "lie of the type's": (
        "class M(type):\n    __instancecheck__ = __subclasscheck__ = __eq__ = lambda *_: True\n"
        "    __hash__ = type.__hash__\nclass T(metaclass=M): pass\n" + RETURN.format("T"),
        "wrong answer",
    ),
    "not a number": (RETURN.format("float('nan')"), "wrong answer"),
    "every number": ("import itertools\n" + RETURN.format("itertools.count()"), "wrong answer"),
    "answer while compared": (
        YES
        + "class Lazy(Yes):\n    def __getattribute__(self, name): return 3\n"
        + RETURN.format("Lazy()"),
        "wrong answer|raised .*",
    ),
    "generator": ("def f():\n    yield from range(9)", "wrong answer"),
    "Fraction by its parts": (
        "import fractions\nclass F(fractions.Fraction):\n    numerator = property(lambda s: 9)\n"
        "    denominator = property(lambda s: 4)\n" + RETURN.format("F(4)"),
        "wrong answer",
    ),
    "default for every key": (
        "import collections\n" + RETURN.format("collections.defaultdict(lambda: 3)"),
        "wrong answer",
    ),
    "a mock": ("from unittest import mock\n" + RETURN.format("mock.ANY"), "wrong answer"),
    "keys that are all": (YES + RETURN.format("{Yes(): Yes()}.keys()"), "wrong answer"),
    "big number": (RETURN.format("1 << 2**23"), "wrong answer"),
    "equal hashes": (
        RETURN.format("{n * (2**61 - 1) for n in range(20000)}"),
        "wrong answer|timeout|ended",
    ),
    "expensive decimal": (
        "import decimal\n" + RETURN.format("decimal.Decimal('1e999999')"),
        "wrong answer",
    ),
    # messages
    "handle of nothing": (
        FORGE + "def f():\n    send(['value', ['handle', -1]])\n    while True: pass",
        "wrong answer",
    ),
    "answers ahead of questions": (
        FORGE + "for _ in range(99): send(['value', True])\ndef f(): return 4",
        "raised TypeError",
    ),
    "function of the library": (
        FORGE + "def f():\n    send(['value', ['library', 'builtins', 'eval']])",
        "garbled answer",
    ),
    "copy of an object": (
        FORGE + "def f():\n    send(['value', ['copy', 'Yes', ['dict']]])",
        "garbled answer",
    ),
    "exception as an answer": (
        FORGE + "def f():\n    send(['raised', ['SystemExit', 'BaseException'], '0'])",
        "raised RuntimeError",
    ),
    "exception without names": (FORGE + "def f():\n    send(['raised', [], ''])", ".*"),
    "infinity of a message": (FORGE + "def f():\n    send(['value', [[[3]]]])", "garbled answer"),
    "SystemExit": ("def f(): raise SystemExit(0)", "raised RuntimeError"),
    "KeyboardInterrupt": ("def f(): raise KeyboardInterrupt", "raised RuntimeError"),
    "GeneratorExit": ("def f(): raise GeneratorExit", "raised RuntimeError"),
    "exception group": ("def f(): raise ExceptionGroup('x', [ValueError()])", "raised Exception"),
    "exception with escapes": (
        "E = type('\\x1b[2J\\x07', (Exception,), {'__str__': lambda s: '\\x1b]0;x\\x07'})\n"
        "def f(): raise E",
        "raised Exception",
    ),
    "exception that has no text": (
        "class E(Exception):\n    def __str__(self): raise self\ndef f(): raise E",
        "raised Exception",
    ),
    "exception of the tester's": ("def f(): raise type('Unaskable', (Exception,), {})", ".*"),
    # the tester's libraries, and files that Python reads by itself
    "libraries of the test": (
        "import builtins, json, operator, os, unittest\njson.loads = lambda *_: ['value', 3]\n"
        "operator.eq = lambda *_: True\nos._exit = lambda *_: None\n"
        "unittest.TestCase.assertEqual = lambda *_: None\nbuiltins.isinstance = lambda *_: True\n"
        + RETURN.format("4"),
        "wrong answer|raised .*|garbled answer|ended",
    ),
    "files that are imported": (
        "names = 'sitecustomize', 'usercustomize', 'conftest', 'json', 'unittest', 'pytest'\n"
        "for name in names:\n"
        "    open(name + '.py', 'w').write('raise SystemExit(0)')\n"
        "open('x.pth', 'w').write('import os; os._exit(0)')\n" + RETURN.format("4"),
        "wrong answer",
    ),
    "compiled file of the library": (
        "import json\nopen(json.__cached__, 'wb').write(b'')",
        "raised PermissionError",
    ),
    "hooks": (
        "import atexit, gc, os, sys\natexit.register(os._exit, 0)\nsys.excepthook = print\n"
        "sys.setprofile(lambda *_: None)\ngc.callbacks.append(lambda *_: None)\n"
        + RETURN.format("4"),
        "wrong answer",
    ),
    "end by a timer": (
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001)\ndef f():\n    while True: pass",
        "ended",
    ),
    "end by a signal": ("import signal\nsignal.alarm(1)\nsignal.pause()", "ended|timeout"),
    "almost too late": ("import time\ndef f():\n    time.sleep(0.7)\n    return 4", "wrong answer"),
    "names of the module": (
        "import sys, types\nclass M(types.ModuleType):\n    f = property(lambda s: 3)\n"
        "sys.modules['candidate'].__class__ = M\nsys.modules['tests'] = M('tests')\n"
        "sys.modules['__main__'].f = lambda: 3",
        "raised .*",
    ),
    # secrets
    "secret in the frames": (
        "import sys\ndef f():\n    frame, names = sys._getframe(), []\n    while frame:\n"
        "        names += [*frame.f_locals.values(), *frame.f_globals.values()]\n"
        "        frame = frame.f_back\n    secret = ''.join(['5up', '3r'])\n"
        "    return 3 if any(secret in repr(x) for x in names if x is not names) else 0",
        "wrong answer|timeout",
    ),
    "secret in a traceback": (
        "import gc, types\ndef f():\n    secret = ''.join(['5up', '3r'])\n"
        "    codes = [c for c in gc.get_objects() if isinstance(c, types.FunctionType)]\n"
        "    return 3 if any(secret in repr(c.__code__.co_consts) for c in codes) else 0",
        "wrong answer",
    ),
    "memory by its file": ("open('/proc/self/mem', 'rb')", "raised PermissionError"),
    "map of the memory": ("open('/proc/self/maps')", "raised PermissionError"),
    "another's open files": (
        "import os\nos.readlink(f'/proc/{os.getppid()}/fd/3')",
        "raised PermissionError",
    ),
    "root of another process": (
        "import os\nos.listdir(f'/proc/{os.getppid()}/root')",
        "raised PermissionError",
    ),
    "tokens and keys": (
        "import glob, os\nfor path in ('/root', '/home', '/etc/passwd', '/run/secrets', '/tmp'):\n"
        "    try: open(path).read() if os.path.isfile(path) else os.listdir(path)\n"
        "    except OSError: continue\n    raise SystemError(path)",
        "raised NameError",
    ),
    "sandbox's own command line": (
        "import sys\ndef f(): return 3 if len(sys.argv) > 1 or '/' in sys.argv[0] else 0",
        "wrong answer",
    ),
    # notes for others
    "note in shared memory": ("open('/dev/shm/note', 'w')", "raised PermissionError"),
    "note by a lock": (
        "import fcntl, os\nfcntl.flock(open(os.__file__), fcntl.LOCK_EX)",
        "raised PermissionError",
    ),
    "note by a lock of a region": (
        "import fcntl, os\nfcntl.lockf(open(os.__file__), fcntl.LOCK_SH)",
        "raised PermissionError",
    ),
    "note by a time of a file": (
        "import os\nopen('x', 'w').close()\nos.utime('x')",
        "raised PermissionError",
    ),
    "note by a name in the kernel": (
        "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0note')",
        "raised PermissionError",
    ),
    "segment of memory": (
        "from multiprocessing import shared_memory\n"
        "shared_memory.SharedMemory(create=True, size=9)",
        "raised PermissionError",
    ),
    "semaphore": ("import multiprocessing\nmultiprocessing.Semaphore()", "raised PermissionError"),
    "file without a name": ("import os\nos.memfd_create('x')", "raised PermissionError"),
    "folder": ("import os\nos.mkdir('x')", "raised PermissionError"),
    "removed file": (
        "import os\nopen('x', 'w').close()\nos.remove('x')",
        "raised PermissionError",
    ),
    "renamed file": (
        "import os\nopen('x', 'w').close()\nos.rename('x', 'y')",
        "raised PermissionError",
    ),
    "rights of the folder": ("import os\nos.chmod('.', 0o777)", "raised PermissionError"),
    # more than its share
    "descriptors without end": ("import os\nwhile True: os.dup(0)", "raised OSError"),
    "pipes without end": ("import os\nwhile True: os.pipe()", "raised OSError"),
    "higher limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))",
        "raised ValueError",
    ),
    "limits of the parent": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "raised PermissionError",
    ),
    "more priority": ("import os\nos.nice(-5)", "raised PermissionError"),
    "other cores": ("import os\nos.sched_setaffinity(0, {0})", "raised PermissionError"),
    "large hole in a file": (
        "import os\nos.ftruncate(os.open('x', os.O_CREAT | os.O_RDWR), 2**40)",
        "raised OSError",
    ),
    "stack without end": (
        "import functools, sys\nsys.setrecursionlimit(10**9)\n@functools.cache\n"
        "def g(n): return g(n + 1)\ndef f(): return g(0)",
        "crashed|memory|timeout|ended",
    ),
    "regular expression": (
        "import re\ndef f(): return re.match('(a+)+$', 'a' * 99 + 'b')",
        "timeout",
    ),
    "power": ("def f(): return 9**9**9", "timeout|memory"),
    "text of a number": (
        "import sys\nsys.set_int_max_str_digits(0)\ndef f(): return len(str(7**(10**7)))",
        "timeout|wrong answer",
    ),
    "pickle": (
        "import os, pickle\nclass P:\n    def __reduce__(self): return os.system, ('sleep 4321',)\n"
        "pickle.loads(pickle.dumps(P()))",
        "forbidden system call",
    ),
    "new namespaces": (CALL + "call(272, 0x10000000)", "forbidden system call"),
    "trace of the parent": (CALL + "import os\ncall(101, 16, os.getppid(), 0, 0)", "forbidden .*"),
    "kernel's keys": (CALL + "call(250, 0, -3, 1)", "raised PermissionError"),
    "shared segment": (CALL + "call(29, 77, 4096, 0o1666)", "raised PermissionError"),
    "page faults": (CALL + "call(323, 0)", "raised PermissionError"),
    "32-bit numbers": (CALL + "call(0x40000000 + 57)", "raised PermissionError"),
    "watch of files": (CALL + "call(253)", "raised PermissionError"),
    "performance counters": (
        CALL + "call(298, bytes(128), 0, -1, -1, 0)",
        "raised PermissionError",
    ),
    "its own filter": (CALL + "call(317, 1, 0, bytes(16))", "raised PermissionError"),
    "file by its number": (CALL + "call(303, -100, b'.', bytes(99), 0, 0)", "raised Permission.*"),
}
