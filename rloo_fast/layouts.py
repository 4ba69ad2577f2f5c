"""Stage 5: units of rows -> the tensors of a micro-batch, in one of three layouts.

    padded         a line per row:    prompt completion padding
    packed         one line in all:   prompt completion | prompt completion | ...
    shared_prefix  one line in all:   prompt | completion | completion | ... | prompt | ...

A unit is a list of rows of one prompt. Completion tokens count their positions on from the prompt;
they see it, and what precedes them in their own completion. Not run are: padding in the one-line
layouts, the last counted token of a completion (nothing is predicted from it), and rows of which no
token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Segments, make_segments
from .packing import rounded_tokens
from .types import MicroBatch, Samples

FILLER = 64  # tokens of a filler segment: attention within it is all that a filler token costs


class Sizes(NamedTuple):
    """The shapes that a compiled model is run at: few, so that it is compiled few times."""

    budget: int  # tokens of a micro-batch
    longest: int  # tokens of the longest row

    def one_line(self, tokens: int) -> int:
        return rounded_tokens(tokens, self.budget)

    def padded(self, lines: int, width: int) -> tuple[int, int]:
        width = rounded_tokens(width, self.longest)
        return max(lines, self.budget // width), width


def run_lengths(samples: Samples, every_token: bool) -> list[int]:
    """Completion tokens of each row that are put through the model.

    `every_token`: also those from which nothing is predicted, as a load-balancing loss wants.
    """
    if every_token:
        return [len(ids) for ids in samples.completion_ids]
    return [max(n - 1, 0) for n in samples.num_tokens]


def make_batch(
    samples: Samples,
    units: Sequence[Sequence[int]],
    layout: str,
    *,
    device: torch.device,
    pad_token_id: int,
    every_token: bool = False,
    multiple_of: int = 1,
    sizes: Sizes | None = None,
) -> MicroBatch:
    """The micro-batch of `units`; without units a filler, which runs one token and weighs nothing.

    Lines are lengthened to a multiple of `multiple_of` tokens, or to one of `sizes`.
    """
    counted, run = samples.num_tokens, run_lengths(samples, every_token)
    lines = _Padded() if layout == "padded" else _OneLine(layout == "shared_prefix")
    targets: list[int] = []
    for unit in units:
        rows = [r for r in unit if counted[r] or every_token]
        for r in rows:
            targets += samples.completion_ids[r][: counted[r]]
        if rows:
            prompt = samples.prompt_ids[rows[0]]
            completions = [samples.completion_ids[r][: run[r]] for r in rows]
            lines.add(prompt, completions, [counted[r] for r in rows])
    rows = [r for unit in units for r in unit]
    lengths = torch.tensor([counted[r] for r in rows], dtype=torch.long)
    input_ids, weights, positions, segments = lines.finish(pad_token_id, multiple_of, sizes, device)
    return MicroBatch(
        rows=rows,
        input_ids=input_ids.to(device),
        logit_index=torch.tensor(lines.index, dtype=torch.long).to(device),
        targets=torch.tensor(targets, dtype=torch.long).to(device),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        token_weights=weights.to(device),
        position_ids=None if positions is None else positions.to(device),
        segments=segments,
    )


Finished = tuple[Tensor, Tensor, Tensor | None, Segments | None]


class _Padded:
    """A line per row, right-padded: no real token can see the padding in a causal model."""

    def __init__(self) -> None:
        self.lines: list[list[int]] = []
        self.places: list[tuple[int, int]] = []  # (line, position) that predicts each target
        self.index: list[int] = []

    def add(self, prompt: list[int], completions: list[list[int]], counted: list[int]) -> None:
        for completion, n in zip(completions, counted, strict=True):
            first = len(prompt) - 1
            self.places += [(len(self.lines), first + i) for i in range(n)]
            self.lines.append(prompt + completion)

    def finish(
        self, pad_token_id: int, multiple_of: int, sizes: Sizes | None, device: torch.device
    ) -> Finished:
        height, width = len(self.lines), max((len(ids) for ids in self.lines), default=1)
        height, width = max(height, 1), -(-width // multiple_of) * multiple_of
        if sizes is not None:
            height, width = sizes.padded(height, width)
        input_ids = torch.full((height, width), pad_token_id)
        weights = torch.zeros_like(input_ids)
        for i, ids in enumerate(self.lines):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            weights[i, : len(ids)] = 1
        self.index = [line * width + position for line, position in self.places]
        return input_ids, weights, None, None


class _OneLine:
    """Sequences one after another. `shared`: a prompt once, in front of its completions."""

    def __init__(self, shared: bool):
        self.shared = shared
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.weights: list[int] = []
        self.index: list[int] = []
        self.lengths: list[int] = []  # of the segments
        self.prefixes: list[tuple[int, int]] = []  # tokens each segment sees beside its own

    def add(self, prompt: list[int], completions: list[list[int]], counted: list[int]) -> None:
        if not self.shared:
            for completion, n in zip(completions, counted, strict=True):
                first = len(self.ids) + len(prompt) - 1
                self._segment(prompt + completion, 0, 1)
                self.index += range(first, first + n)
            return
        start = len(self.ids)
        self._segment(prompt, 0, len(completions))
        end = len(self.ids)
        for completion, n in zip(completions, counted, strict=True):
            own = len(self.ids)
            if n:
                self.index += [end - 1, *range(own, own + n - 1)]
            self._segment(completion, len(prompt), 1, (start, end))

    def _num_keys(self) -> int:
        return len(self.ids) + sum(end - start for start, end in self.prefixes)

    def _segment(
        self, ids: list[int], position: int, weight: int, prefix: tuple[int, int] = (0, 0)
    ) -> None:
        if ids:
            self.ids += ids
            self.positions += range(position, position + len(ids))
            self.weights += [weight] * len(ids)
            self.lengths.append(len(ids))
            self.prefixes.append(prefix)

    def finish(
        self, pad_token_id: int, multiple_of: int, sizes: Sizes | None, device: torch.device
    ) -> Finished:
        total = max(-(-len(self.ids) // multiple_of) * multiple_of, 1)
        if sizes is not None:
            total = sizes.one_line(total)
        for start in range(len(self.ids), total, FILLER):
            self._segment([pad_token_id] * min(FILLER, total - start), 0, 0)
        padding = {} if sizes is None else {
            "pad_segments_to": max(total // 4, _power_of_two(len(self.lengths))),
            "pad_keys_to": max(2 * total, _power_of_two(self._num_keys())),
        }  # fmt: skip
        segments = make_segments(self.lengths, self.prefixes, device, **padding)
        lines = (torch.tensor([x]) for x in (self.ids, self.weights, self.positions))
        return *lines, segments  # pyright: ignore[reportReturnType]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
