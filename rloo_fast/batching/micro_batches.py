"""Units of rows -> the tensors of a micro-batch, in a layout.

Not run are: padding in the layouts of one line, the last counted token of a completion (nothing is
predicted from it), and rows of which no token counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rloo_kernels.transfer import to_device

from ..records import GenerationBatch, ImageInputs, MicroBatch, Prompt, Strand, Unit
from .compiled_sizes import CompiledSizes
from .images import inputs_of_lines, lines_of
from .layouts import Layout, UnitIds
from .segments import make_segments
from .strands import run_strands


def make_micro_batch(
    batch: GenerationBatch,
    units: Sequence[Unit],
    layout: Layout,
    *,
    device: torch.device,
    pad_token_id: int,
    every_token: bool = False,
    multiple_of: int = 1,
    sizes: CompiledSizes | None = None,
    seen: Prompt | None = None,
    images_once: bool = False,
) -> MicroBatch:
    """The micro-batch of `units`; without units a filler, which runs one token and weighs nothing.

    Made on the host and queued for the device, so that it can be built while the one before runs.
    `seen`: a prompt with an image that goes along, weighing nothing, where no other prompt has one.
    `images_once`: also where several lines have an image; `copies` then says which.
    Lines are lengthened to a multiple of `multiple_of` tokens, or to one of `sizes`.
    """
    targets: list[int] = []
    parts: list[UnitIds] = []
    prompts: list[ImageInputs] = []
    for unit in units:
        strands: list[Strand] = []
        for row in unit:
            strands += run_strands(batch, row, every_token)
            for ids, counted in batch.strands(row):
                targets += [ids[place] for place in counted]
        if strands:
            completions, places = [ids for ids, _ in strands], [counted for _, counted in strands]
            alone = batch.inputs is not None
            parts.append(UnitIds(batch.prompt_ids[unit[0]], completions, places, alone))
            if batch.inputs is not None:
                prompts.append(batch.inputs[unit[0]])
    if seen is not None and not any("pixel_values" in inputs for inputs in prompts):
        parts.append(UnitIds(seen.ids, [[]], [()], alone=True))
        prompts.append(seen.inputs or {})
    lines = layout.lines(parts, pad_token_id=pad_token_id, multiple_of=multiple_of, sizes=sizes)
    segments = None
    if lines.segment_lengths is not None:
        segments = make_segments(
            lines.segment_lengths, lines.parents or [], device, **(lines.padded_segments or {})
        )
    rows = [r for unit in units for r in unit]
    lengths = torch.tensor([batch.num_tokens[r] for r in rows], dtype=torch.long)
    positions = None if lines.positions is None else torch.tensor([lines.positions])
    inputs, copies = None, None
    if batch.inputs is not None:
        inputs = inputs_of_lines(
            parts, prompts, layout, multiple_of=multiple_of, sizes=sizes, once=images_once
        )
        times = lines_of(parts, layout)
        if images_once and any(n > 1 for n in times):
            shown = zip(parts, prompts, times, strict=True)
            copies = [(part.prompt, n) for part, more, n in shown if "pixel_values" in more]
        positions = inputs.pop("position_ids", positions)
        inputs = {name: to_device(value, device) for name, value in inputs.items()}
    return MicroBatch(
        rows=rows,
        input_ids=to_device(torch.tensor(lines.input_ids), device),
        logit_index=to_device(torch.tensor(lines.logit_index, dtype=torch.long), device),
        targets=to_device(torch.tensor(targets, dtype=torch.long), device),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        token_weights=to_device(torch.tensor(lines.weights), device),
        position_ids=None if positions is None else to_device(positions, device),
        segments=segments,
        inputs=inputs,
        copies=copies,
    )
