"""What the page asks, and what it is told: a path with its query -> an object for JSON.

A report holds the same answers under the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .run import Run
from .steps import HEAVY, Row

FIRST_CHARS = 400  # of a text where many are listed


class Unknown(LookupError):
    """There is nothing at this path."""


def answer(runs: Sequence[Run], path: str, query: Mapping[str, str]) -> Any:
    """Raises Unknown for another path, ValueError for a query that means nothing."""
    if path == "runs":
        return {"runs": [run.overview() for run in runs]}
    if path not in OF_A_RUN:
        raise Unknown(path)
    return OF_A_RUN[path](runs[_number(query, "run", len(runs))], query)


def question(path: str, **query: Any) -> str:
    """As the page spells it."""
    return path + "".join(f"{'?&'[n > 0]}{k}={v}" for n, (k, v) in enumerate(query.items()))


def _curves(run: Run, query: Mapping[str, str]) -> Any:
    return run.curves()


def _steps(run: Run, query: Mapping[str, str]) -> Any:
    return {"steps": run.summaries()}


def _health(run: Run, query: Mapping[str, str]) -> Any:
    return {"checks": run.health()}


def _completions(run: Run, query: Mapping[str, str]) -> Any:
    return packed(run.require_steps().rows(_number(query, "step")))


def _messages(run: Run, query: Mapping[str, str]) -> Any:
    rows = run.require_steps().rows(_number(query, "step"))
    row = rows[_number(query, "row", len(rows))]
    return {name: row.get(name) for name in HEAVY}


def _tokens(run: Run, query: Mapping[str, str]) -> Any:
    return run.require_steps().tokens(_number(query, "step"), _number(query, "row"))


def _prompt(run: Run, query: Mapping[str, str]) -> Any:
    found = run.require_steps().with_prompt(_text(query, "id"))
    return {"steps": [{"step": step, **packed(rows)} for step, rows in found]}


def _search(run: Run, query: Mapping[str, str]) -> Any:
    hits, is_all = run.require_steps().search(_text(query, "q"))
    for hit in hits:
        hit["completion"] = _around(hit["completion"], query["q"])
    return {"hits": hits, "is_all": is_all}


OF_A_RUN: dict[str, Callable[[Run, Mapping[str, str]], Any]] = {
    "curves": _curves,
    "steps": _steps,
    "health": _health,
    "completions": _completions,
    "messages": _messages,
    "tokens": _tokens,
    "prompt": _prompt,
    "search": _search,
}


def packed(rows: Sequence[Row]) -> dict[str, Any]:
    """Each prompt once, and the rows without it."""
    prompts = {row["prompt_id"]: row["prompt"] for row in rows}
    light = [
        {k: v for k, v in row.items() if k not in ("prompt", *HEAVY)}
        | {"has_messages": row.get("messages") is not None}
        for row in rows
    ]
    return {"prompts": prompts, "rows": light}


def _around(text: str, found: str) -> str:
    place = max(text.lower().find(found.lower()) - FIRST_CHARS // 4, 0)
    return ("…" if place else "") + text[place : place + FIRST_CHARS]


def _text(query: Mapping[str, str], name: str) -> str:
    if not query.get(name):
        raise ValueError(f"{name} is missing from the query.")
    return query[name]


def _number(query: Mapping[str, str], name: str, end: int | None = None) -> int:
    """ValueError for what is no number from 0 to `end`."""
    text = query.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError(f"{name} must be a number, got {text[:40]!r}.")
    if end is not None and int(text) >= end:
        raise ValueError(f"{name} must be below {end}, got {text}.")
    return int(text)
