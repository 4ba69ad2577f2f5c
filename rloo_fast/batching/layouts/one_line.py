"""What layouts of one line share: sequences one after another, told apart by attention segments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from ..compiled_sizes import CompiledSizes, power_of_two
from ..tree_segments import NONE
from .base import Layout, Lines, UnitIds

FILLER = 64  # tokens of a filler segment: attention within it is all that a filler token costs


class Line:
    """One line as it grows: token ids, positions, weights, and the segment each one continues."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.weights: list[int] = []
        self.logit_index: list[int] = []
        self.segment_lengths: list[int] = []
        self.parents: list[int] = []
        self.num_keys = 0  # that segments see, their own among them

    def add(self, ids: list[int], *, position: int, weights: list[int], parent: int = NONE) -> None:
        """A segment whose first token is at `position`, behind what it continues; nothing for no
        tokens."""
        if ids:
            self.ids += ids
            self.positions += range(position, position + len(ids))
            self.weights += weights
            self.segment_lengths.append(len(ids))
            self.parents.append(parent)
            self.num_keys += position + len(ids)


class OneLine(Layout):
    """A layout of one line; subclasses put a unit into it, or all of them."""

    @abstractmethod
    def put(self, line: Line, unit: UnitIds) -> None: ...

    def fill(self, line: Line, units: Sequence[UnitIds]) -> None:
        for unit in units:
            self.put(line, unit)

    def lines(
        self,
        units: Sequence[UnitIds],
        *,
        pad_token_id: int,
        multiple_of: int,
        sizes: CompiledSizes | None,
    ) -> Lines:
        line = Line()
        self.fill(line, units)
        total = max(-(-len(line.ids) // multiple_of) * multiple_of, 1)
        if sizes is not None:
            total = sizes.one_line(total)
        for start in range(len(line.ids), total, FILLER):
            num = min(FILLER, total - start)
            line.add([pad_token_id] * num, position=0, weights=[0] * num)
        padding = {} if sizes is None else {
            "pad_segments_to": max(total // 4, power_of_two(len(line.segment_lengths))),
            "pad_keys_to": max(2 * total, power_of_two(line.num_keys)),
        }  # fmt: skip
        return Lines(
            [line.ids],
            [line.weights],
            line.logit_index,
            line.positions,
            line.segment_lengths,
            line.parents,
            padding,
        )

    def refusal(self, model: Any) -> str | None:
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder:
            return "it is an encoder-decoder"
        if getattr(model, "_is_stateful", False):
            return "its layers carry a state from token to token"
        others = set(getattr(config, "layer_types", None) or ()) - {
            "full_attention",
            "sliding_attention",
        }
        if others:
            return f"its layers include {', '.join(sorted(others)).replace('_', ' ')}"
        if getattr(config, "attention_chunk_size", None):
            return "its attention is cut into chunks"
        if not getattr(model, "_supports_attention_backend", False):
            return "it does not take its attention from transformers' AttentionInterface"
        if not getattr(model, "_supports_flash_attn", False):
            return "its attention depends on a mask (it does not support FlashAttention)"
        two_way = getattr(config, "use_bidirectional_attention", None) in (True, "all")
        if two_way or not getattr(config, "is_causal", True):
            return "its attention is not causal"
        return _refused_modules(model.get_decoder())


def _refused_modules(decoder: Any) -> str | None:
    from torch import nn  # there is a model, so it is loaded

    if any(name.rpartition(".")[2] == "sinks" for name, _ in decoder.named_parameters()):
        return "its attention has sinks"
    if any(isinstance(module, nn.Conv1d) for module in decoder.modules()):
        return "its layers include a convolution over the tokens"
    return None
