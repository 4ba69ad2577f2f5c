"""A judge behind an OpenAI-compatible address: OpenAI, a vLLM server, llama.cpp, ..."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2
from tqdm.auto import tqdm

from ..masking import learn, masked
from ..records import PromptText
from .answers import Answers, fingerprint
from .compare import JudgeError, Pair, Verdict
from .http import BadResponse, NoResponse, make_client, post, run_apart
from .prompt import DEFAULT, fill, read_answer
from .responses import Busy, Refused, failure, read_completion

KEY = "OPENAI_API_KEY"
LONGEST_WAIT_S = 60.0


class _Unreachable(Exception):
    """Nobody listens at the address."""


class OpenAIJudge:
    """Asks `model` at `base_url`/chat/completions which of two texts is better.

    The key is what OPENAI_API_KEY holds when the judge is made, if anything. `request`: more fields
    of the request; one that is None is left out. The first question goes alone, so that a wrong
    address, key or name shows at once; then `concurrency` at a time. A busy or failing server, or
    one whose whole answer is not there within `timeout_s`, is asked `retries` more times, with
    growing pauses. Raises JudgeError when it stays so; an answer that cannot be read, or a question
    it will not take, is no verdict. Each answer is kept in `answers` as it comes, and what has one
    there already is not asked. ValueError for an address or a key that cannot be used.
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
        check_address(base_url)
        if marker == "":
            raise ValueError("judge_marker is empty: leave it out, or give a text.")
        if concurrency < 1:
            raise ValueError(f"judge_concurrency must be >= 1, got {concurrency}.")
        self.url, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        self.template, self.marker = template, marker
        self.concurrency, self.retries, self.timeout_s = concurrency, retries, timeout_s
        self.pause_s = pause_s
        self.request = {"temperature": 0.0, **(request or {})}
        self.answers = Answers() if answers is None else answers
        self._headers = {"Content-Type": "application/json"}
        if key := read_key():
            self._headers["Authorization"] = f"Bearer {key}"

    def __call__(self, prompts: Sequence[PromptText], pairs: Sequence[Pair]) -> list[Verdict]:
        bodies = [
            self._body(fill(self.template, *question))
            for question in zip(prompts, pairs, strict=True)
        ]
        kept = [self.answers.take(fingerprint(self.url, body)) for body in bodies]
        verdicts = {
            row: self._read_verdict(said) for row, said in enumerate(kept) if said is not None
        }
        rest = {row: bodies[row] for row, answer in enumerate(kept) if answer is None}
        bar = tqdm(
            total=len(bodies), initial=len(verdicts), desc="judging", unit="pair", disable=None
        )
        try:
            if rest:
                verdicts |= run_apart(lambda: self._ask_all(rest, bar))
        except (Refused, Busy, _Unreachable, ValueError) as error:
            raise JudgeError(self._sentence(error)) from error
        finally:
            bar.close()
        return [verdicts[row] for row in range(len(bodies))]

    def _sentence(self, error: Exception) -> str:
        said = masked(str(error))
        if isinstance(error, Refused):
            return f"the judge at {self.url} refused: {said}"
        if isinstance(error, Busy):
            return f"the judge at {self.url} gave no answer in {self.retries + 1} attempts: {said}"
        if isinstance(error, _Unreachable):
            return (
                f"the judge cannot be reached at {self.url}: {said}. Start its server, or give "
                "another judge_base_url."
            )
        return f"the judge at {self.url} cannot be asked: {said}"

    def _body(self, question: str) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            **self.request,
        }
        return {name: value for name, value in body.items() if value is not None}

    async def _ask_all(self, bodies: Mapping[int, dict[str, Any]], bar: Any) -> dict[int, Verdict]:
        verdicts: dict[int, Verdict] = {}
        rows = iter(bodies)

        async def work(rows: Iterator[int], first: bool = False) -> None:
            for row in rows:  # shared: each worker takes the next
                verdicts[row] = await self._verdict(client, bodies[row], first)
                bar.update()

        async with make_client(self._headers, self.concurrency) as client:
            await work(iter([next(rows)]), first=True)
            workers = [asyncio.ensure_future(work(rows)) for _ in range(self.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:  # one has failed for good
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return verdicts

    async def _verdict(
        self, client: httpx2.AsyncClient, body: dict[str, Any], first: bool
    ) -> Verdict:
        """`first`: raise where later questions would be asked again, or count as no verdict."""
        try:
            answer = await self._ask_with_retries(client, body, first)
        except Refused as refused:
            # these may be the question's fault, and are if the server has answered others
            if refused.status in (400, 413, 422) and (not first or self.answers.num_used):
                return Verdict(None, "refused", str(refused))
            raise
        self.answers.add(fingerprint(self.url, body), answer)
        return self._read_verdict(answer)

    def _read_verdict(self, answer: str) -> Verdict:
        index = read_answer(answer, self.marker)
        return Verdict(index, "" if index is not None else "unreadable", answer)

    async def _ask_with_retries(
        self, client: httpx2.AsyncClient, body: dict[str, Any], first: bool
    ) -> str:
        for attempt in range(self.retries + 1):
            try:
                return await self._ask(client, body, first)
            except Busy as busy:
                if attempt == self.retries:
                    raise
                # a random part of it, or all would ask again at the same moment
                pause = self.pause_s * 2**attempt * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(LONGEST_WAIT_S, max(pause, busy.wait_s or 0.0)))
        raise AssertionError("unreachable")

    async def _ask(self, client: httpx2.AsyncClient, body: dict[str, Any], first: bool) -> str:
        try:
            response = await post(client, self.url, json.dumps(body).encode(), self.timeout_s)
            if response.status != 200:
                raise failure(response.status, response.body, response.headers)
            return read_completion(response.body)
        except NoResponse as error:
            if first and error.unreachable:
                raise _Unreachable(str(error)) from error
            raise Busy(str(error)) from error
        except BadResponse as error:
            raise Refused(200, str(error)) from error


def check_address(base_url: str) -> None:
    """Raise ValueError for what is no address of a server, or has a secret in it."""
    if "@" in base_url or "?" in base_url:
        raise ValueError(f"judge_base_url takes no password or key: put it into {KEY}.")
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx2.URL(base_url)
    except (ValueError, httpx2.InvalidURL):  # a port that is no number, brackets left open
        usable = False
    if not usable:
        raise ValueError(f"judge_base_url is like http://localhost:8000/v1, got {base_url!r}.")


def read_key() -> str:
    """OPENAI_API_KEY, or "". ValueError, which does not show it, for what no header can carry."""
    key = os.environ.get(KEY, "").strip()
    if wrong := re.search(r"[^!-~]", key):
        kind = "a line break" if wrong[0] in "\r\n" else "a space or a character that is not ASCII"
        raise ValueError(
            f"{KEY} has {kind} at place {wrong.start() + 1} of {len(key)}, so it is no key: copy "
            "it again."
        )
    learn(key, KEY)
    return key
