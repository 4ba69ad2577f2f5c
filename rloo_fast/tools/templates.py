"""Whether a chat template shows a model its tools, its calls, and what they were answered."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from ..models.chat_templates import TemplateLimit, apply_template

logger = logging.getLogger(__name__)

# of no word that a template could have by itself
NAME, KEY, VALUE, ANSWER = "call_qx7", "key_qx7", "value_qx7", "answer_qx7"
OTHER_TEMPLATE = (
    " Take a template for tools, as tokenizer.chat_template or in chat_template_kwargs; those of "
    "Qwen2.5, Qwen3, Llama 3.1 and later, and SmolLM3 are some."
)


def check_shows_tools(
    tokenizer: Any, schemas: Sequence[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Raise ValueError unless the template renders a call with its arguments, which may be left out
    where the tokenizer's response_template says how calls are written, and the answer.

    One that does not show `schemas` is logged: a prompt may describe the tools by itself.
    `options`: chat_template_kwargs.
    """
    template = options.get("chat_template") or getattr(tokenizer, "chat_template", None)
    if template is None:
        raise ValueError("with tools, the tokenizer needs a chat template." + OTHER_TEMPLATE)
    text = _rendered(tokenizer, {KEY: VALUE}, options)
    shows = {"name of a call": NAME, "arguments": KEY, "argument's value": VALUE, "answer": ANSWER}
    if getattr(tokenizer, "response_template", None) is not None:
        # a turn whose calls the template leaves out is given to it as the text that was sampled
        shows = {"answer": ANSWER}
    if missing := [what for what, word in shows.items() if word not in text]:
        raise ValueError(
            f"the chat template does not show the {', '.join(missing)}, so that a model would not "
            "see what its tools did." + OTHER_TEMPLATE
        )
    user = [{"role": "user", "content": "x"}]
    shown = apply_template(tokenizer, user, tools=list(schemas) or None, tokenize=False, **options)
    if unseen := [s["function"]["name"] for s in schemas if s["function"]["name"] not in shown]:
        logger.warning(
            "The chat template does not show the tools %s: the model is not told of them, unless "
            "the prompts do.",
            ", ".join(unseen),
        )


def _rendered(tokenizer: Any, arguments: dict[str, str], options: dict[str, Any]) -> str:
    def conversation(arguments: Any) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": NAME, "arguments": arguments}}
        return [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": NAME, "content": ANSWER},
        ]

    try:
        try:
            return apply_template(tokenizer, conversation(arguments), tokenize=False, **options)
        except TypeError:  # some want the arguments as JSON
            text = json.dumps(arguments)
            return apply_template(tokenizer, conversation(text), tokenize=False, **options)
    except TemplateLimit:
        raise
    except Exception as error:  # whatever the template's code runs into
        raise ValueError(
            f"the chat template refuses a conversation with a tool call and its answer "
            f"({type(error).__name__}: {error})." + OTHER_TEMPLATE
        ) from error
