"""What a step's completions say of themselves, token by token, as a table for `rloo-fast view`.

R rows of the generation batch, N tokens of the rows of this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor

from ..distributed.collectives import gather_objects
from ..masking import masked_known
from ..records import CompletionTexts, PreparedBatch
from .completions import message_text
from .view_format import OF_TOKENS, QUANTILES, prompt_id

BYTES_PER_TOKEN = 12  # on disk: four float16, and what texts come to
BROKEN = "\ufffd"  # what a part of a character decodes to
MOST_PARTS = 4  # tokens of one character: UTF-8 has at most four bytes

Tokens = dict[str, Any]  # column -> a list or an array, one entry per token


class KeptBatch(NamedTuple):
    """The rows of one generation batch, or of all of a step's, as sampled."""

    texts: CompletionTexts
    columns: Mapping[str, Tensor]  # (R,) each
    tokens: Mapping[int, Tokens]  # row -> of its completion, of the rows that are kept
    num_generations: int


def joined(batches: Sequence[KeptBatch]) -> KeptBatch:
    """Their rows one after another."""
    first = batches[0]
    starts = accumulate((len(one.texts.completions) for one in batches), initial=0)
    texts = CompletionTexts(
        [prompt for one in batches for prompt in one.texts.prompts],
        [completion for one in batches for completion in one.texts.completions],
        _joined_columns([one.texts.rewards for one in batches], batches),
        _joined_columns([one.texts.extra for one in batches], batches),
    )
    return KeptBatch(
        texts,
        {name: torch.cat([one.columns[name] for one in batches]) for name in first.columns},
        {
            start + row: tokens
            for start, one in zip(starts, batches, strict=False)
            for row, tokens in one.tokens.items()
        },
        first.num_generations,
    )


def _joined_columns(
    some: Sequence[Mapping[str, list[Any]]], batches: Sequence[KeptBatch]
) -> dict[str, list[Any]]:
    """None where a batch has no such column."""
    names = dict.fromkeys(name for columns in some for name in columns)
    return {
        name: [
            value
            for columns, one in zip(some, batches, strict=True)
            for value in columns.get(name, [None] * len(one.texts.completions))
        ]
        for name in names
    }


class TokenPieces:
    """Token ids -> the text of each; joined, they are the text of all.

    `decode`: the tokenizer's. A character that several tokens share is the last one's; the others
    have "".
    """

    def __init__(self, decode: Callable[[list[int]], str], anchor: int | None):
        self.decode, self.anchor = decode, anchor
        self._first: dict[int, str] = {}
        self._inner: dict[int, str] = {}
        self._start = decode([anchor]) if anchor is not None else ""

    @classmethod
    def of(cls, tokenizer: Any) -> TokenPieces:
        """Special tokens are shown; some tokenizers keep a word's space only behind another word,
        which is what the anchor is for."""
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        return cls(lambda ids: tokenizer.decode(ids), ids[-1] if ids else None)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        pieces: list[str] = []
        waiting: list[int] = []
        for place, token in enumerate(ids):
            piece = self._piece(token, place == 0) if not waiting else BROKEN
            if BROKEN not in piece:
                pieces.append(piece)
                continue
            waiting.append(token)
            text = self.decode(waiting)
            if BROKEN not in text or len(waiting) == MOST_PARTS or place == len(ids) - 1:
                pieces += ["" for _ in waiting[1:]] + [text]
                waiting.clear()
        return pieces

    def _piece(self, token: int, is_first: bool) -> str:
        known = self._first if is_first else self._inner
        if token not in known:
            known[token] = self._decoded(token, is_first)
        return known[token]

    def _decoded(self, token: int, is_first: bool) -> str:
        if not is_first and self.anchor is not None:
            both = self.decode([self.anchor, token])
            if both.startswith(self._start):
                return both[len(self._start) :]
        return self.decode([token])


def chosen_groups(lengths: Tensor, num_generations: int, most_bytes: int) -> list[int]:
    """Numbers of the groups that are kept of a step, evenly drawn, in about `most_bytes`; one at
    least. The same on all processes, as `lengths` (R,) are."""
    sizes = lengths.view(-1, num_generations).sum(1) * BYTES_PER_TOKEN
    total, number = float(sizes.sum()), len(sizes)
    kept = number if total <= most_bytes else max(1, int(number * most_bytes / total))
    return [place * number // kept for place in range(kept)]


def gather_tokens(
    batch: PreparedBatch, groups: Sequence[int], pieces: TokenPieces, accelerator: Accelerator
) -> dict[int, Tokens]:
    """Row as sampled -> text, log-prob, entropy, KL and sampler's difference of its tokens, of the
    rows of `groups`; NaN where a value is not known, as of what a tool said. Every process must
    call."""
    generation, wanted = batch.generation, {*groups}
    values = _of_tokens(batch)
    bounds = [0, *accumulate(generation.num_tokens)]
    mine: dict[int, Tokens] = {}
    for place, row in enumerate(generation.rows.row.tolist()):
        if generation.groups[place] not in wanted:
            continue
        counted = slice(bounds[place], bounds[place + 1])
        texts: list[str] = []
        shown: list[int] = []  # places of the counted tokens in the texts
        for ids, places in generation.strands(place):
            shown += [len(texts) + t for t in places]
            texts += pieces(ids)
        mine[row] = {"text": texts}
        for name, column in values.items():
            mine[row][name] = np.full(len(texts), np.nan, dtype=column.dtype)
            mine[row][name][shown] = column[counted]
    everyone = gather_objects(accelerator, mine)
    return {row: tokens for one in everyone for row, tokens in one.items()}


def _of_tokens(batch: PreparedBatch) -> dict[str, np.ndarray]:  # (N,) each
    """sampler_diff: the sampler's log-prob less the trainer's; logp: the trainer's, where a row
    was not run the sampler's."""
    size = sum(batch.generation.num_tokens)
    nothing = torch.full((size,), float("nan"), dtype=torch.float32)
    old = batch.old_logps if batch.old_logps is not None else nothing
    sampler = batch.generation.sampler_logps
    sampler = sampler if sampler is not None else nothing
    reference = batch.ref_logps if batch.ref_logps is not None else nothing
    entropy = batch.token_entropy if batch.token_entropy is not None else nothing
    columns = {
        "logp": torch.where(old.isnan(), sampler.to(old), old),
        "entropy": entropy,
        "kl": old - reference,
        "sampler_diff": sampler - old,
    }
    return {name: column.to(torch.float16).numpy() for name, column in columns.items()}


def view_table(batch: KeptBatch) -> pa.Table:
    """A row per completion that has tokens; see docs/looking.md for the columns."""
    texts, rows, tokens, num_generations = batch
    kept = sorted(tokens)
    prompts = _shown([message_text(texts.prompts[row]) for row in kept])

    def numbers(column: Sequence[Any]) -> pa.Array:
        values = np.array([np.nan if column[row] is None else column[row] for row in kept], float)
        return pa.array(values)

    extra = [{name: texts.extra[name][row] for name in texts.extra} or None for row in kept]
    pieces = [tokens[row]["text"] for row in kept]
    columns: dict[str, Any] = {
        "group": pa.array([row // num_generations for row in kept], pa.int32()),
        "sample": pa.array([row % num_generations for row in kept], pa.int32()),
        "prompt_id": [prompt_id(prompt) for prompt in prompts],
        "prompt": prompts,
        "completion": _shown([message_text(texts.completions[row]) for row in kept]),
        "messages": pa.array(_json([_messages(texts, row) for row in kept]), pa.string()),
        "reward": numbers(rows["reward"].tolist()),
        **{f"reward/{name}": numbers(values) for name, values in texts.rewards.items()},
        "score": numbers(rows["score"].tolist()),
        "advantage": numbers(rows["advantage"].tolist()),
        "kl": numbers(rows["kl"].tolist()),
        "length": numbers(rows["length"].tolist()).cast(pa.int32()),
        "end": ["length" if rows["truncated"][row] else "stop" for row in kept],
        "extra": pa.array(_json(extra), pa.string()),
        "token/text": [
            one if "".join(one) == whole else [whole, *("" for _ in one[1:])]  # a secret is whole
            for one, whole in zip(pieces, _shown(["".join(one) for one in pieces]), strict=True)
        ],
    }
    for name in OF_TOKENS:
        values = [tokens[row][name] for row in kept]
        if not all(np.isnan(one).all() for one in values):
            columns[f"token/{name}"] = pa.array(values, pa.list_(pa.float16()))
    return pa.table(columns)


def step_summary(batch: KeptBatch) -> dict[str, Any]:
    """What a step says of all its completions, kept or not. frac_repeated: of those whose text
    answers another prompt, too."""
    texts, rows, _, k = batch
    prompts_of: dict[str, set[int]] = {}
    said = [message_text(completion) for completion in texts.completions]
    for row, text in enumerate(said):
        prompts_of.setdefault(text, set()).add(row // k)
    repeated = sum(len(prompts_of[text]) > 1 for text in said)
    reward = rows["reward"].view(-1, k)
    flat = (reward - reward[:, :1]).abs().amax(1) < 1e-6
    return {
        "num_rows": len(said),
        "num_groups": len(reward),
        "num_generations": k,
        "reward": _quantiles(rows["reward"]),
        "length": _quantiles(rows["length"]),
        "frac_repeated": repeated / max(len(said), 1),
        "frac_zero_signal": flat.double().mean().item(),
    }


def _quantiles(values: Tensor) -> list[float] | None:
    known = values[values.isfinite()].double()
    if not len(known):
        return None
    return torch.quantile(known, torch.tensor(QUANTILES, dtype=torch.double)).tolist()


def _messages(texts: CompletionTexts, row: int) -> dict[str, Any] | None:
    """Prompt and completion where one is a conversation."""
    prompt, completion = texts.prompts[row], texts.completions[row]
    if isinstance(prompt, str) and isinstance(completion, str):
        return None
    return {"prompt": prompt, "completion": completion}


def _json(values: list[Any]) -> list[str | None]:
    shown = iter(_shown([json.dumps(value, default=str) for value in values if value is not None]))
    return [None if value is None else next(shown) for value in values]


def _shown(texts: list[str]) -> list[str]:
    """Without secrets, looked for in all at once, and without half a character, which no Parquet
    file may hold."""
    together = "\0".join(texts)
    if masked_known(together) != together:
        texts = [masked_known(text) for text in texts]
    return [text.encode(errors="backslashreplace").decode() for text in texts]
