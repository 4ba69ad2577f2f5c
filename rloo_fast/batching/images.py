"""What the prompts of a micro-batch or of a generate call bring beside their ids, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..records import PER_TOKEN_INPUTS, ImageInputs
from .compiled_sizes import CompiledSizes
from .layouts import Layout, UnitIds


def join_images(prompts: Sequence[ImageInputs]) -> ImageInputs:
    """The images of all prompts, in order, without what is per token; {}: there are none.

    Processors lay out one prompt's as (images, ...), or (1, images, ...) where they make a mask of
    pixels too. Smaller ones are filled with zeros, as in a processor's own batches.
    """
    seen = [inputs for inputs in prompts if "pixel_values" in inputs]
    names = [n for n in (seen[0] if seen else {}) if n not in (*PER_TOKEN_INPUTS, "position_ids")]
    by_prompt = bool(seen) and "pixel_attention_mask" in seen[0]
    along = {name: int(by_prompt and seen[0][name].ndim > 3) for name in names}
    return {name: _joined([inputs[name] for inputs in seen], along[name]) for name in names}


def _joined(parts: list[Tensor], along: int) -> Tensor:
    """The tensors one after another along a dimension, each as large in the others as the
    largest."""
    largest = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    filled: list[Tensor] = []
    for part in parts:
        missing = [
            (0, 0 if dim == along else size - part.shape[dim]) for dim, size in enumerate(largest)
        ]
        pads = [n for pair in reversed(missing) for n in pair]
        filled.append(functional.pad(part, pads) if any(pads) else part)
    return torch.cat(filled, dim=along)


def lines_of(units: Sequence[UnitIds], layout: Layout) -> list[int]:
    """How often each unit's prompt is run."""
    return [1 if layout.shares_prompts else len(unit.completions) for unit in units]


def _numbers(tensor: Any) -> list[int]:
    return tensor.tolist()


def inputs_of_lines(
    units: Sequence[UnitIds],
    prompts: Sequence[ImageInputs],
    layout: Layout,
    *,
    multiple_of: int,
    sizes: CompiledSizes | None,
    once: bool,
) -> ImageInputs:
    """The inputs of a micro-batch, `prompts` being those of its units: images as often as the
    layout has their prompt, or `once`, and per token (R, T), position_ids (3, R, T), as the ids lie
    in it."""
    times = [1 if once else lines for lines in lines_of(units, layout)]
    inputs = join_images([p for p, n in zip(prompts, times, strict=True) for _ in range(n)])

    def lay(of_prompts: list[list[int]], of_completions: list[list[list[int]]]) -> Tensor:
        """Numbers of tokens, laid out as the ids of these tokens are."""
        numbers = [
            UnitIds(prompt, completions, unit.targets, unit.alone)
            for prompt, completions, unit in zip(of_prompts, of_completions, units, strict=True)
        ]
        lines = layout.lines(numbers, pad_token_id=0, multiple_of=multiple_of, sizes=sizes)
        return torch.tensor(lines.input_ids)

    for name in PER_TOKEN_INPUTS:
        if any(name in p for p in prompts):
            types = [_numbers(p[name]) for p in prompts]
            inputs[name] = lay(types, [[[0] * len(c) for c in unit.completions] for unit in units])
    if any("position_ids" in p for p in prompts):
        firsts = [int(p["position_ids"].max()) + 1 for p in prompts]
        later = [
            [list(range(first, first + len(c))) for c in unit.completions]
            for first, unit in zip(firsts, units, strict=True)
        ]
        inputs["position_ids"] = torch.stack(
            [lay([_numbers(p["position_ids"][d]) for p in prompts], later) for d in range(3)]
        )
    return inputs
