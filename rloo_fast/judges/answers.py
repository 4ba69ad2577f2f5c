"""answers.jsonl: a judge's answers, each written as soon as it comes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from ..config.json_text import parse_json
from ..reports.metrics_file import RunFile, write_atomically


def fingerprint(*values: Any) -> str:
    """SHA-256 of the values as JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Answers:
    """Answers by the fingerprint of their question; `add` appends each to the file at once.

    `take` gives the answers that the file held at the start, each once: a question that was asked
    twice has two. A last line cut by a kill is dropped; an earlier damaged line raises ValueError.
    Without a `path` nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.num_found = 0  # in the file when this was made
        self.num_used = 0  # of what was asked since: taken or added
        self._lock = threading.Lock()
        self._left: dict[str, deque[str]] = defaultdict(deque)
        if path is not None and path.exists():
            self._read(path)

    def take(self, question: str) -> str | None:
        """An answer to this question from the file, given out once; None: there is none left."""
        if not self._left[question]:
            return None
        self.num_used += 1
        return self._left[question].popleft()

    def add(self, question: str, answer: str) -> None:
        """Keep an answer; from any thread. OSError where the disk is full."""
        line = json.dumps({"question": question, "answer": answer}) + "\n"
        with self._lock:  # half a line of one thread could end in another's
            if self.path is not None:
                RunFile(self.path).append(line.encode())
            self.num_used += 1

    def _read(self, path: Path) -> None:
        *lines, cut = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line.decode())
                question, answer = row["question"], row["answer"]
                assert isinstance(answer, str)
                self._left[question].append(answer)
            except (ValueError, LookupError, TypeError, AssertionError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected an object with 'question' and 'answer', got "
                    f"{line[:80]!r}. Remove the line to go on."
                ) from error
        self.num_found = len(lines)
        if cut:  # the next line would stick to it
            write_atomically(path, b"".join(line + b"\n" for line in lines))
