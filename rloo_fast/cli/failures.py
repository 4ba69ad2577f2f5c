"""How a command ends that fails after it began: a sentence, the user's lines, a traceback kept."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path
from typing import Any

from ..masking import masked, masked_known

# errors that tell the user what to change; any other one is a fault of ours, with its traceback
TOLD = (ValueError, OSError, ImportError, MemoryError)


def is_told(error: BaseException) -> bool:
    """Whether its message is for the user: of our own kinds of error, or of TOLD."""
    ours = type(error).__module__.partition(".")[0] == "rloo_fast"
    out_of_memory = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, TOLD) or ours or out_of_memory


def sentence(error: BaseException) -> str:
    """Message and notes of an error, and the lines of the user's own files that led to it."""
    text = str(error).strip() or type(error).__name__
    lines = [text, *getattr(error, "__notes__", ())]
    for frame in user_frames(error):
        lines.append(f"  {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}")
    return masked("\n".join(lines))


def user_frames(error: BaseException | None) -> list[traceback.FrameSummary]:
    """Frames of the error and of its causes, outside rloo_fast, Python and installed packages."""
    ours = str(Path(__file__).parents[1])
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    seen: set[int] = set()
    frames = []
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame in traceback.extract_tb(error.__traceback__):
            path = os.path.realpath(frame.filename)
            outside = not any(path.startswith(os.path.realpath(f)) for f in (ours, *installed))
            if outside and os.path.isfile(path) and path != os.path.realpath(sys.argv[0]):
                frames.append(frame)
        error = error.__cause__ or error.__context__
    return frames


def keep_traceback(error: BaseException) -> str | None:
    """The file that it is written to; None where nothing can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="rloo-fast-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(masked("".join(traceback.format_exception(error))))
    except OSError:
        return None
    return file.name


def print_masked(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As Python prints an error that nobody catches (sys.excepthook), without secrets."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class Guarded:
    """A standard stream that masks the secrets which the run has met.

    Its reader may go away, as in `| head`: what follows is written nowhere.
    """

    def __init__(self, stream) -> None:
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(masked_known(text))
        except BrokenPipeError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
