"""Rows with images -> prompts with token ids and what else the model takes of them."""

from __future__ import annotations

from typing import Any

from ..models.vision import ImageReader
from ..records import ImageInputs, Prompt, RawPrompt
from .images import row_images, shown_images, with_images, without_images
from .messages import is_conversational, kind_error, shown, template_errors
from .row_errors import UnusableRow
from .row_functions import Row


def prompt_with_images(
    row: Row, reader: ImageReader, kwargs: dict[str, Any]
) -> tuple[Any, list[int], ImageInputs]:
    """(prompt, token ids, inputs) of a row: of a conversation the messages as the template had
    them, images among their parts, which is what TRL gives to reward functions."""
    text: Any = row["prompt"]
    is_chat = is_conversational(text)
    if not (is_chat or isinstance(text, str)):
        raise UnusableRow(kind_error(text))
    try:
        images = row_images(row)
        if isinstance(text, str):
            return text, *reader.text(text, images)
        messages = with_images(text, images)
    except ValueError as error:
        raise UnusableRow(f"{error} The prompt is {shown(text)}.") from error
    if not reader.has_template and "chat_template" not in kwargs:
        raise ValueError(
            "a prompt is a conversation, but the processor has no chat template: set "
            "processor.chat_template, or make the prompts strings."
        )
    with template_errors(without_images(messages)):
        return messages, *reader.chat(messages, kwargs)


def raw_prompt(text: Any, row: Row, reader: ImageReader, kwargs: dict[str, Any]) -> RawPrompt:
    """Of a prompt that `prompt_with_images` has made of the row."""
    images = [reader.in_colour(image) for image in shown_images(text, row)]
    return RawPrompt(reader.raw_ids(text, kwargs), images)


def trial_prompt(reader: ImageReader, kwargs: dict[str, Any]) -> Prompt:
    """The same each time. Raises ValueError for a processor that cannot make it."""
    try:
        ids, inputs = reader.trial(kwargs)
    except Exception as error:  # a processor's code, and a template's
        raise ValueError(
            f"{type(reader.processor).__name__} cannot read a question with an image "
            f"({type(error).__name__}: {error}): pass the processor that belongs to the model."
        ) from error
    return Prompt("", ids, {}, inputs)
