"""What a server behind `/chat/completions` says: an answer, an error, how long to wait."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

from ..masking import masked, masked_known


class Busy(Exception):
    """Worth asking again: too many requests, the server's own fault, or no answer in time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # as the server asked for


class Refused(Exception):
    """Any other error: asking again would end alike."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def read_completion(body: bytes) -> str:
    """The text of the first choice: its content, text parts joined; else its refusal; else "".

    Raises Busy or Refused for an error that came with status 200, Refused for anything else.
    """
    found = _parsed(body)
    if isinstance(found, dict) and "choices" not in found and isinstance(found.get("error"), dict):
        status = found["error"].get("code")
        known = isinstance(status, int) and 400 <= status < 600
        raise failure(status if known else 500, body, {})
    try:
        message = found["choices"][0]["message"]
        content = message["content"] if "content" in message else message["refusal"]
        text = _text(message.get("refusal") if content is None else content)
    except (LookupError, TypeError, AttributeError) as error:
        shown = masked(body[:2000].decode(errors="replace"))[:200]
        raise Refused(200, f"its answer is not a chat completion: {shown!r}") from error
    return masked_known(text)  # some servers repeat the key, and answers are written to files


def failure(status: int, body: bytes, headers: Mapping[str, str]) -> Busy | Refused:
    """What a status other than 200 means, with the server's words."""
    reason = " ".join(f"{status} {_message(body)}".split())
    if status in (408, 409, 425, 429) or status >= 500:
        return Busy(reason, seconds(headers.get("retry-after")))
    if 300 <= status < 400:
        reason += " (a redirect, which could take the key to another host: give the address itself)"
    return Refused(status, reason)


def seconds(text: str | None) -> float | None:
    """A Retry-After header, seconds or an HTTP date, as seconds from now; None: it says nothing."""
    if text is None:
        return None
    try:
        wait_s = float(text)
    except ValueError:
        try:
            at = parsedate_to_datetime(text)
            wait_s = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return max(0.0, wait_s) if math.isfinite(wait_s) else None


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # not JSON, or nested without end
        return None


def _text(content: Any) -> str:
    """Raises TypeError for what is neither a text, nor parts of one, nor None."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(type(content))
    parts = [part if isinstance(part, str) else part.get("text") for part in cast(Any, content)]
    return "".join(_text(part) for part in parts if not isinstance(part, list))


def _message(body: bytes) -> str:
    """The message in an error response, in any of the usual forms; masked before it is cut."""
    text = body.decode(errors="replace")
    found = _parsed(body)
    if isinstance(found, dict):
        error = found.get("error", found.get("detail", found.get("message")))
        text = error.get("message", error) if isinstance(error, dict) else error or text
    return masked(" ".join(str(text).split()))[:300]
