"""Chat templates, which are programs of whoever published the model: applied within limits.

Jinja's sandbox keeps them from Python's objects, and not from loops, powers and long texts.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRIAL_CPU_S = 3  # a template takes about a millisecond
TRIAL_WALL_S = 120.0
TRIAL_MEMORY = 2**30  # bytes beyond what the process has
CPU_S = 20.0  # of this process, all threads

_tried: set[tuple[str, str]] = set()
_trying = threading.Lock()  # threads that sample ahead meet a template at the same time


class TemplateLimit(ValueError):
    """A chat template takes too long, or too much memory."""


def apply_template(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """`tokenizer.apply_chat_template`, for the first messages of each template and options after a
    trial in a process that can be killed.

    Raises TemplateLimit, and whatever the template's code runs into.
    """
    template = tokenizer.chat_template
    key = (template if isinstance(template, str) else repr(template), repr(options))
    if key not in _tried:
        with _trying:
            if key not in _tried and sys.platform == "linux":
                _try(tokenizer, messages, options)
            _tried.add(key)
    with _limited():
        return tokenizer.apply_chat_template(messages, **options)


def _try(tokenizer: Any, messages: Any, options: dict[str, Any]) -> None:
    pid = os.fork()
    if pid == 0:
        _render_and_exit(tokenizer, messages, {**options, "tokenize": False, "return_dict": False})
    status, wait = None, 1e-3
    deadline = time.monotonic() + TRIAL_WALL_S
    while status is None and time.monotonic() < deadline:
        ended, code = os.waitpid(pid, os.WNOHANG)
        status = code if ended else None
        if not ended:
            time.sleep(wait)
            wait = min(2 * wait, 0.1)
    if status is None:  # it waits for something without working: not the template's doing
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return
    exit_code = os.waitstatus_to_exitcode(status)
    if exit_code == 0:
        return
    if exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        did = f"takes more than {TRIAL_CPU_S} s for the first prompt"
    elif exit_code > 0:
        did = f"takes more than {TRIAL_MEMORY >> 30} GiB of memory for the first prompt"
    else:
        did = f"crashes Python ({signal.Signals(-exit_code).name}) on the first prompt"
    name = getattr(tokenizer, "name_or_path", "") or "built in memory"
    raise TemplateLimit(
        f"the chat template of the tokenizer {name!r} {did}: it loops, or multiplies numbers or "
        "texts. Take another one, as tokenizer.chat_template or in chat_template_kwargs."
    )


def _render_and_exit(tokenizer: Any, messages: Any, options: dict[str, Any]) -> None:
    """In the forked process: exit code 1 where memory is short, else 0."""
    code = 0
    try:
        gc.disable()  # what it would free belongs to the process that forked
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _bound(resource.RLIMIT_CORE, 0)
        _bound(resource.RLIMIT_AS, used + TRIAL_MEMORY)
        _bound(resource.RLIMIT_CPU, TRIAL_CPU_S)
        tokenizer.apply_chat_template(messages, **options)
    except MemoryError:
        code = 1
    except BaseException:  # the call itself will say so
        pass
    finally:
        os._exit(code)


def _bound(what: int, limit: int) -> None:
    _, hard = resource.getrlimit(what)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(what, (limit, hard))


@contextmanager
def _limited() -> Iterator[None]:
    """A template that loops on some later messages only, as far as Python can be interrupted."""
    free = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
    )
    if not free:
        yield
        return
    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _stop(*_: Any) -> None:
    raise TemplateLimit(f"the chat template takes more than {CPU_S:g} s")
