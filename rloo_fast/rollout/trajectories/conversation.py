"""One trajectory as it grows: a turn is sampled, its calls run, what they said is added, and so on.

Where the chat template writes earlier turns anew, another strand begins: it has the tokens of the
new history, and of them only those count that are sampled from then on. Each sampled token so
counts once, in the strand whose tokens it was drawn behind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from ...records import Message, Prompt, Strand, Trajectory
from .answers import Answers
from .history import split, write_anew
from .template import TurnTemplate


class ToolResult(Protocol):
    """What a call came to, see `tools.ToolResult`."""

    content: Any
    failed: bool
    ends: bool


class ToolSet(Protocol):
    """What one trajectory may call, see `tools.ToolSet`."""

    @property
    def schemas(self) -> list[Any]: ...

    def start(self, name: str, arguments: Any) -> Future[Any]: ...


@dataclass(frozen=True)
class Limits:
    """Of every trajectory."""

    max_tokens: int  # behind the prompt, what tools said among them; of each strand
    max_rounds: int | None = None  # of calls, one after another: max_tool_calling_iterations
    seconds: float | None = None  # from its beginning; a turn that is being sampled is not stopped


class Turn(NamedTuple):
    """A turn as it was sampled."""

    ids: list[int]
    finish_reason: str  # as Rollout's
    logps: list[float] | None
    versions: list[int] | None


class Language(NamedTuple):
    """How conversations are written and read, in a run."""

    template: TurnTemplate
    answers: Answers

    @classmethod
    def of(cls, tokenizer: Any, options: dict[str, Any], stop_ids: Sequence[int]) -> Language:
        """`options`: of apply_chat_template. Raises ValueError for a tokenizer without a form for
        tools."""
        template = TurnTemplate(tokenizer, options)
        return cls(template, Answers(template, stop_ids))


class Conversation:
    """A trajectory from its prompt, which is a list of messages and their ids, to its end.

    `ended`: why, as Trajectory.ended; None: it goes on.
    """

    def __init__(self, prompt: Prompt, tools: ToolSet, language: Language, limits: Limits):
        if isinstance(prompt.text, str):
            raise ValueError(
                "tools need prompts that are conversations, lists of messages, got the text "
                f"{prompt.text!r:.80}."
            )
        self.tools, self.limits = tools, limits
        self.template, self.answers = language
        self.prompt, self.schemas = prompt, tools.schemas
        self._question: list[Message] = prompt.text
        self.messages: list[Message] = []  # behind the prompt
        self.ended: str | None = None
        self.num_calls = self.num_failures = self.num_turns = self.num_rounds = 0
        self.logps: list[float] | None = []
        self.versions: list[int] | None = []
        self.waited_s = 0.0
        self._begun = time.monotonic()
        self._pending: list[tuple[str, Future[Any]]] = []
        self._asked = 0.0  # when the calls that are pending were made
        self._written: list[Message] = []  # `messages` as the template is given them
        opening = self.template.opening(prompt.text, self.schemas)
        text = self.template.render(prompt.text, self.schemas, opens_turn=True)
        self._parts = [*split(self.template, text, prompt.ids, opening)]
        self._strands = [Strand(prompt.ids, list[int]())]

    @property
    def prompt_ids(self) -> list[int]:
        """What the next turn continues."""
        return self._strands[-1].ids

    @property
    def room(self) -> int:
        """Tokens that the next turn may have."""
        return len(self.prompt.ids) + self.limits.max_tokens - len(self._strands[-1].ids)

    @property
    def pending(self) -> list[Future[Any]]:
        return [future for _, future in self._pending]

    @property
    def seconds_left(self) -> float | None:
        limit = self.limits.seconds
        return None if limit is None else self._begun + limit - time.monotonic()

    def add_turn(self, turn: Turn) -> None:
        """What was sampled behind `prompt_ids`; then its calls run, or it has ended."""
        strand, part = self._strands[-1], self._parts[-1]
        self.num_turns += 1
        places = range(len(strand.ids), len(strand.ids) + len(turn.ids))
        self._strands[-1] = Strand([*strand.ids, *turn.ids], [*strand.counted, *places])
        self.logps = _joined(self.logps, turn.logps)
        self.versions = _joined(self.versions, turn.versions)
        said = self.answers.text_of(turn.ids)
        self._parts[-1] = replace(
            part,
            text=part.text + self.template.decode(turn.ids),
            ids=[*part.ids, *turn.ids],
            said=said,
            ends=self.answers.ends(turn.ids),
        )
        if not turn.ids:
            self.ended = "length"
            return
        plain = self.template.tokenizer.decode(turn.ids, skip_special_tokens=True)
        is_cut = turn.finish_reason == "length"
        message = self.answers.read(said, part.opening, self.schemas, plain, is_cut=is_cut)
        self.messages.append(message)
        calls = message.get("tool_calls")
        self._written.append(self.answers.as_written(message, said))
        self.ended = self._why_no_call(turn.finish_reason, calls)
        if self.ended is None:
            self._call(calls or [])

    def _why_no_call(self, reason: str, calls: Any) -> str | None:
        if reason == "length":
            return "length"
        if not calls:
            return "answer"
        most = self.limits.max_rounds
        return "calls" if most is not None and self.num_rounds >= most else None

    def _call(self, calls: Sequence[dict[str, Any]]) -> None:
        self.num_rounds += 1
        self.num_calls += len(calls)
        self._asked = time.monotonic()
        for call in calls:
            function = call["function"]
            name = function["name"]
            self._pending.append((name, self.tools.start(name, function["arguments"])))

    def answered(self) -> bool:
        """Whether every call has its result."""
        return all(future.done() for _, future in self._pending)

    def go_on(self) -> None:
        """Add what the calls came to: the next turn may be sampled, or it has ended."""
        self.waited_s += time.monotonic() - self._asked
        pending, self._pending = self._pending, []
        left = self.seconds_left
        if left is not None and left <= 0:
            self.ended = "time"
            return
        results = [(name, future.result()) for name, future in pending]
        self.num_failures += sum(result.failed for _, result in results)
        said: list[Message] = [
            {"role": "tool", "name": name, "content": result.content} for name, result in results
        ]
        if any(result.ends for _, result in results):
            self.messages += said
            self.ended = "failure"
            return
        self._add(said)

    def give_up(self) -> None:
        """End it though calls are pending: its time is up."""
        self.waited_s += time.monotonic() - self._asked
        self._pending = []
        self.ended = "time"

    def _add(self, said: list[Message]) -> None:
        """Messages of tools behind the newest turn, unless there is no room for them and for a
        token of the next turn."""
        messages = [*self._question, *self._written, *said]
        written = self.template.render(messages, self.schemas, opens_turn=True)
        parts, new, text, rewritten = write_anew(self._parts, written, self.template, self.answers)
        ids = [token for part in parts for token in part.ids]
        if len(ids) + len(new) >= len(self.prompt.ids) + self.limits.max_tokens:
            self.ended = "length"
            return
        opening = self.template.opening(messages, self.schemas)
        self._parts = [*parts, *split(self.template, text, new, opening)]
        self.messages += said
        self._written += said
        if rewritten:
            self._strands.append(Strand([*ids, *new], list[int]()))
        else:
            strand = self._strands[-1]
            self._strands[-1] = Strand([*strand.ids, *new], strand.counted)

    def trajectory(self) -> Trajectory:
        assert self.ended is not None
        return Trajectory(
            strands=self._strands,
            messages=self.messages,
            num_calls=self.num_calls,
            num_failures=self.num_failures,
            num_turns=self.num_turns,
            seconds=self.waited_s,
            ended=self.ended,
        )


def _joined(before: list[Any] | None, more: Sequence[Any] | None) -> list[Any] | None:
    return None if before is None or more is None else [*before, *more]
