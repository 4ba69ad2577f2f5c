"""The tokens of a conversation so far, and what becomes of them when the chat template writes it
anew with more messages.

    written before   prompt | turn | what a tool said | turn
    written now      prompt | turn | what a tool said | turn | what is new

Where both agree, tokens stay as they are, those of turns as they were sampled. A template may leave
something out of earlier turns, such as their reasoning: from there on it is another history, whose
turns keep the tokens that they still have in common with what was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .answers import Answers
from .template import TurnTemplate


class RewrittenContext(ValueError):
    """A chat template writes something else anew than turns of the policy."""


@dataclass(frozen=True)
class Part:
    """A turn with what opens it, or what stands between two turns.

    Part("<|im_start|>assistant\\nfour<|im_end|>", [3, 17, 4], is_turn=True, said="four")
    """

    text: str
    ids: list[int]
    is_turn: bool
    opening: str = ""  # of a turn: what is not the policy's own
    said: str = ""  # of a turn: what is, without the token that ended it
    ends: bool = True  # of a turn: it has such a token


class Written(NamedTuple):
    """A conversation written anew."""

    parts: list[Part]
    new: list[int]  # ids behind them
    text: str  # of these
    rewritten: bool  # other ids than before, in an earlier turn


def split(template: TurnTemplate, text: str, ids: list[int], opening: str) -> tuple[Part, Part]:
    """What stands before a turn, and the part that its `opening` begins; between two tokens."""
    body = text[: len(text) - len(opening)] if opening and text.endswith(opening) else text
    count = template.num_tokens_within(ids, body)
    cut = len(template.decode(ids[:count]))
    if text[:cut] != template.decode(ids[:count]) or cut < len(body):
        count, cut = len(ids), len(text)  # no token ends there: the opening stays with the rest
    return (
        Part(text[:cut], ids[:count], is_turn=False),
        Part(text[cut:], ids[count:], is_turn=True, opening=text[cut:]),
    )


def write_anew(
    parts: Sequence[Part], written: str, template: TurnTemplate, answers: Answers
) -> Written:
    """The parts as they are in `written`, the text of the conversation with new messages.

    Raises RewrittenContext where something else than a turn differs.
    """
    kept: list[Part] = []
    at, rewritten = 0, False
    for part in parts:
        if not part.is_turn:
            if not written.startswith(part.text, at):
                raise RewrittenContext(_difference(part.text, written[at:]))
            at += len(part.text)
            kept.append(part)
            continue
        end = _end_of_turn(part, written, at, template.end)
        if not answers.same(part.opening + part.said, written[at:end]):
            part, rewritten = _spliced(part, written[at:end], template), True
        at = end + len(template.end) if part.ends else end
        kept.append(part)
    new = written[at:]
    ids = template.encode_behind_end(new) if parts[-1].ends else template.encode(new)
    return Written(kept, ids, new, rewritten)


def _end_of_turn(part: Part, written: str, at: int, end: str) -> int:
    """Where in `written` the text of a turn ends that begins `at`."""
    before = part.opening + part.said
    if end:
        found = written.find(end, at)
    else:  # nothing marks it but its text
        found = at + len(before) if written.startswith(before, at) else -1
    if found < 0:
        raise RewrittenContext(_difference(before, written[at:]))
    return found


def _spliced(part: Part, now: str, template: TurnTemplate) -> Part:
    """A turn of which the template now writes `now`: the first and the last tokens that say the
    same, and between them the ids of what does not."""
    ids = part.ids[:-1] if part.ends else part.ids
    count = template.num_tokens_within(ids, now)
    rest = now[len(template.decode(ids[:count])) :]
    low, high = count, len(ids)
    while low < high:  # the first from which on they say what `rest` ends with
        middle = (low + high) // 2
        if rest.endswith(template.decode(ids[middle:])):
            high = middle
        else:
            low = middle + 1
    new = template.encode_behind_end(rest[: len(rest) - len(template.decode(ids[low:]))])
    last = part.ids[len(ids) :]
    return Part(
        text=now + template.decode(last),
        ids=[*ids[:count], *new, *ids[low:], *last],
        is_turn=True,
        said=now,
        ends=part.ends,
    )


def _difference(before: str, now: str) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b),
        min(len(before), len(now)),
    )
    was, is_ = before[max(place - 20, 0) : place + 40], now[max(place - 20, 0) : place + 40]
    return (
        "the chat template writes a part of the conversation anew that is no turn of the policy: "
        f"{was!r} became {is_!r}. Tools need a template that changes at most earlier turns of the "
        "assistant: set tokenizer.chat_template."
    )
