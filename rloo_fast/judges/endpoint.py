"""A judge behind an OpenAI-compatible address: OpenAI, a vLLM server, llama.cpp, ..."""

from __future__ import annotations

import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from ..types import PromptText
from .answers import Answers, fingerprint
from .compare import JudgeError, Pair, Verdict
from .prompt import DEFAULT, fill, read_answer

KEY = "OPENAI_API_KEY"
LONGEST_WAIT_S = 60.0


class _Busy(Exception):
    """Worth asking again: too many requests, the server's own fault, or no answer in time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # as the server asked for


class _Refused(Exception):
    """Any other error status: asking again would end alike."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class OpenAIJudge:
    """Asks `model` at `base_url`/chat/completions which of two texts is better.

    The key is what OPENAI_API_KEY holds when the judge is made, if anything. `request`: more fields
    of the request; one that is None is left out. The first question goes alone, so that a wrong
    address, key or name shows at once; then `concurrency` at a time. A busy or failing server is
    asked `retries` more times, with growing pauses. Raises JudgeError when it stays so; an answer
    that cannot be read, or a question it will not take, is no verdict. Each answer is kept in
    `answers` as it comes, and what has one there already is not asked.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        template: str = DEFAULT,
        marker: str | None = None,
        concurrency: int = 8,
        retries: int = 6,
        timeout_s: float = 120.0,
        pause_s: float = 1.0,
        request: Mapping[str, Any] | None = None,
        answers: Answers | None = None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"judge_base_url is like http://localhost:8000/v1, got {parts.path or base_url!r}."
            )
        if parts.username or parts.query:
            raise ValueError(f"judge_base_url takes no password or key: put it into {KEY}.")
        self.url, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        self.template, self.marker = template, marker
        self.concurrency, self.retries, self.timeout_s = concurrency, retries, timeout_s
        self.pause_s = pause_s
        self.request = {"temperature": 0.0, **(request or {})}
        self.answers = Answers() if answers is None else answers
        self._key = os.environ.get(KEY, "").strip()
        self._stop = threading.Event()  # another question has failed for good
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, prompts: Sequence[PromptText], pairs: Sequence[Pair]) -> list[Verdict]:
        bodies = [
            self._body(fill(self.template, *question))
            for question in zip(prompts, pairs, strict=True)
        ]
        kept = [self.answers.take(fingerprint(self.url, body)) for body in bodies]
        verdicts = {
            row: self._read_verdict(said) for row, said in enumerate(kept) if said is not None
        }
        rest = [row for row, answer in enumerate(kept) if answer is None]
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        bar = tqdm(
            total=len(bodies), initial=len(verdicts), desc="judging", unit="pair", disable=None
        )
        try:
            for row in rest[:1]:
                verdicts[row] = self._first(bodies[row])
                bar.update()
            others = pool.map(self._verdict, (bodies[row] for row in rest[1:]))
            for row, verdict in zip(rest[1:], others, strict=True):
                verdicts[row] = verdict
                bar.update()
        except _Refused as refused:
            raise JudgeError(f"the judge at {self.url} refused: {refused}") from refused
        except _Busy as busy:
            raise JudgeError(
                f"the judge at {self.url} gave no answer in {self.retries + 1} attempts: {busy}"
            ) from busy
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()
        return [verdicts[row] for row in range(len(bodies))]

    def _body(self, question: str) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            **self.request,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _first(self, body: dict[str, Any]) -> Verdict:
        """Like `_verdict`, but nobody at the address is an error at once."""
        try:
            return self._verdict(body, strict=True)
        except urllib.error.URLError as error:
            raise JudgeError(
                f"the judge cannot be reached at {self.url}: {error.reason}. Start its server, or "
                "give another judge_base_url."
            ) from error

    def _verdict(self, body: dict[str, Any], strict: bool = False) -> Verdict:
        """`strict`: raise where a single question would pass as not understood."""
        try:
            answer = self._ask_patiently(body, strict)
        except _Refused as refused:
            # what may lie in this question; it does if others of the kind were answered
            if refused.status in (400, 413, 422) and (not strict or self.answers.num_used):
                return Verdict(None, "refused", str(refused))
            raise
        self.answers.add(fingerprint(self.url, body), answer)
        return self._read_verdict(answer)

    def _read_verdict(self, answer: str) -> Verdict:
        index = read_answer(answer, self.marker)
        return Verdict(index, "" if index is not None else "unreadable", answer)

    def _ask_patiently(self, body: dict[str, Any], strict: bool) -> str:
        for attempt in range(self.retries + 1):
            try:
                return self._ask(body, strict)
            except _Busy as busy:
                # not all threads after the same time: they would come back as one
                pause = self.pause_s * 2**attempt * random.uniform(0.5, 1.0)
                pause = min(LONGEST_WAIT_S, max(pause, busy.wait_s or 0.0))
                if attempt == self.retries or self._stop.wait(pause):
                    raise
        raise AssertionError("unreachable")

    def _ask(self, body: dict[str, Any], strict: bool) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                return self._read(response.read())
        except urllib.error.HTTPError as error:
            reason = self._masked(f"{error.code} {_message(error)}")
            if error.code in (408, 409, 429) or error.code >= 500:
                raise _Busy(reason, _seconds(error.headers.get("Retry-After"))) from error
            raise _Refused(error.code, reason) from error
        except urllib.error.URLError as error:
            if strict and not isinstance(error.reason, TimeoutError):
                raise
            raise _Busy(str(error.reason)) from error
        except (OSError, HTTPException) as error:  # it hung up, or the time is up
            raise _Busy(f"{type(error).__name__}: {error}") from error

    def _read(self, body: bytes) -> str:
        try:
            return self._masked(json.loads(body)["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError) as error:
            shown = self._masked(body[:200].decode(errors="replace"))
            raise _Refused(200, f"its answer is not a chat completion: {shown!r}") from error

    def _masked(self, text: str) -> str:
        """Without the key, which some servers repeat; what is returned is written to files."""
        return text.replace(self._key, "<key>") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _message(error: urllib.error.HTTPError) -> str:
    """The sentence in an error answer, in whichever of the usual forms."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        text = found["error"]["message"] if "error" in found else found["detail"]
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(str(text).split())[:300] or str(error.reason)


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.replace(".", "", 1).isdigit() else None
