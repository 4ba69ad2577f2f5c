"""What ends a completion, decided once: a declared token, or a stop string.

The text that stop strings are looked for in is vLLM's: that of the completion's tokens behind their
prompt, special tokens left out, a character once all of its bytes are there. The token that
completes a stop string is the last one sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import StoppingCriteria

from ..records import Rollout, Sampling


class StopReader:
    """The text of one completion, token by token, and the stop string that its newest completes.

    `ends[n]`: characters of the first n tokens' text.
    """

    def __init__(self, stops: Stops, prompt_ids: Sequence[int]):
        self.stops = stops
        self.ids: list[int] = []
        self.text, self.ends = "", [0]
        # a tokenizer in plain Python has no such stream: it decodes all that there is
        self._core: Any = getattr(stops.tokenizer, "_tokenizer", None)
        self._stream = DecodeStream(list(prompt_ids), skip_special_tokens=True)

    def add(self, token: int) -> tuple[int, int] | None:
        """Where in `text` the stop string stands that this token completes; None: it does not.

        Of several, the one that ends first; of those, the first of the list.
        """
        self.ids.append(token)
        self.text += self._decoded(token)
        self.ends.append(len(self.text))
        if len(self.ids) <= self.stops.min_tokens:
            return None
        before = self.ends[-2]
        spans: list[tuple[int, int]] = []
        for string in self.stops.strings:
            start = self.text.find(string, max(before - len(string) + 1, 0))
            if start >= 0:
                spans.append((start, start + len(string)))
        return min(spans, key=lambda span: span[1], default=None)

    def _decoded(self, token: int) -> str:
        """What this token adds to the text."""
        if self._core is None:
            whole = self.stops.tokenizer.decode(self.ids, skip_special_tokens=True)
            return "" if whole.endswith("\ufffd") else whole[len(self.text) :]
        try:
            return self._stream.step(self._core, token) or ""
        except Exception:  # bytes that are no text, which confuse the stream: it starts anew
            self._stream = DecodeStream([], skip_special_tokens=True)
            return self._stream.step(self._core, token) or ""


class Kept(NamedTuple):
    """What is left of a sampled completion."""

    num_tokens: int
    finish_reason: str  # as Rollout's
    text: str | None = None  # where it is not that of the tokens; None: it is


class Stops:
    """What ends the completions of a run, and what is kept of those that it ended.

    A stop token is part of its completion, and so is a stop string unless `include` is False: then
    the tokens with text before it are kept. The text ends exactly where the stop string ends, or
    begins, though the last token may reach beyond. No stop string ends within the first
    `min_tokens` tokens.
    """

    def __init__(self, sampling: Sampling, tokenizer: Any):
        self.token_ids, self.strings = set(sampling.stop_token_ids), sampling.stop_strings
        self.include, self.tokenizer = sampling.include_stop_strings, tokenizer
        extra = sampling.extra
        self.min_tokens = int(extra.get("min_tokens") or extra.get("min_new_tokens") or 0)
        if self.strings and tokenizer is None:
            raise ValueError("stop strings need the tokenizer, which says what tokens' text is.")

    def end(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> int | None:
        """Tokens up to and including the one that ends the completion; None: none does."""
        return self._end(prompt_ids, ids)[0]

    def keep(self, prompt_ids: Sequence[int], ids: Sequence[int], reason: str) -> Kept:
        """What to keep of `ids` that an engine sampled and that, by its word, ended with `reason`.

        An engine that went on behind what ends a completion is cut there.
        """
        end, reader, span = self._end(prompt_ids, ids)
        if end is None:
            return Kept(len(ids), reason)
        if reader is None or span is None:
            return Kept(end, "stop")
        at = span[1] if self.include else span[0]
        text = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        # counted from the end: decoded without its prompt, a text may lack a space at its beginning
        text = text[: max(len(text) - (len(reader.text) - at), 0)]
        return Kept(end if self.include else _tokens_before(at, reader), "stop", text)

    def _end(
        self, prompt_ids: Sequence[int], ids: Sequence[int]
    ) -> tuple[int | None, StopReader | None, tuple[int, int] | None]:
        reader = StopReader(self, prompt_ids) if self.strings else None
        for count, token in enumerate(ids, 1):
            if token in self.token_ids:
                return count, None, None
            if reader is not None and (span := reader.add(token)) is not None:
                return count, reader, span
        return None, None, None


def _tokens_before(at: int, reader: StopReader) -> int:
    """Tokens with text before character `at`; one that has but white space there is not counted."""
    count = next(n for n, chars in enumerate(reader.ends) if chars >= at)
    if reader.ends[count] > at and not reader.text[reader.ends[count - 1] : at].strip():
        count -= 1
    return count


class KeptRows:
    """The rows of one rollout as they are kept: `row` for those that are finished early."""

    def __init__(self, stops: Stops, prompt_ids: list[list[int]]):
        self.stops, self.prompt_ids = stops, prompt_ids
        self.texts: dict[int, str] = {}  # of rows whose text is not that of their tokens

    def row(self, row: int, ids: list[int], reason: str = "length") -> Kept:
        kept = self.stops.keep(self.prompt_ids[row], ids, reason)
        if kept.text is not None:
            self.texts[row] = kept.text
        return kept

    def rollout(self, sampled: Rollout) -> Rollout:
        """The rollout with ids and log-probs cut alike, and the reasons that everything goes by."""
        ids, reasons = sampled.completion_ids, sampled.finish_reasons
        kept = [self.row(i, *row) for i, row in enumerate(zip(ids, reasons, strict=True))]

        def cut(rows: list[list[Any]]) -> list[list[Any]]:
            return [row[: one.num_tokens] for row, one in zip(rows, kept, strict=True)]

        return replace(
            sampled,
            completion_ids=cut(ids),
            finish_reasons=[one.finish_reason for one in kept],
            logps=sampled.logps and cut(sampled.logps),
            token_versions=sampled.token_versions and cut(sampled.token_versions),
        )


class StopStringCriterion(StoppingCriteria):
    """Ends the rows of a `generate` call at stop strings.

    `width`: tokens of the padded prompts. `reorders`: rows change places between calls (beams), or
    several belong to one prompt, so that their text is read anew each time.
    """

    def __init__(
        self, stops: Stops, prompts: Sequence[Sequence[int]], width: int, *, reorders: bool
    ):
        self.stops, self.prompts = stops, prompts
        self.width, self.reorders = width, reorders
        self.readers = [StopReader(stops, ids) for ids in prompts]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # (B, .) -> (B,)
        rows = input_ids[:, self.width :].tolist()
        if self.reorders:
            copies = len(rows) // len(self.prompts)
            ended = [
                self.stops.end(self.prompts[i // copies], ids) is not None
                for i, ids in enumerate(rows)
            ]
        else:
            ended = [self._reads(*row) for row in zip(self.readers, rows, strict=True)]
        return torch.tensor(ended, device=input_ids.device)

    def _reads(self, reader: StopReader, ids: list[int]) -> bool:
        found = [reader.add(token) is not None for token in ids[len(reader.ids) :]]
        return any(found)
