"""Prompts that are conversations, and how errors show any prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..models.chat_templates import TemplateLimit
from .row_errors import UnusableRow


def is_conversational(text: Any) -> bool:
    return isinstance(text, list) and bool(text) and isinstance(text[0], dict) and "role" in text[0]


def kind_error(text: Any) -> str:
    return (
        "a prompt must be a string or a list of {'role': ..., 'content': ...} messages, "
        f"got {shown(text)}."
    )


@contextmanager
def template_errors(messages: Any) -> Iterator[None]:
    """What a template runs into, as an error that shows the messages."""
    try:
        yield
    except TemplateLimit as error:
        raise ValueError(f"{error} The prompt is {shown(messages)}.") from error
    except Exception as error:  # whatever the template's code runs into
        raise UnusableRow(
            f"the chat template fails on a prompt ({type(error).__name__}: {error}). The prompt "
            f"is {shown(messages)}."
        ) from error


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
