"""Whether transformers' `generate` samples from what the model's forward computes, and whether it
still does so behind padding: both found out by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..models.trial import trial_ids
from .engine import EngineError
from .hf_states import states_put_back

ONE_TOKEN = GenerationConfig(
    max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True,
    disable_compile=True,
)  # fmt: skip
# largest mean difference of a log-prob
TOLERANCE = 1e-4
TOLERANCE_HALF = 0.1


def tolerance_of(model: Any) -> float:
    """Of a mean difference of log-probs, in the dtype that the model computes in."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    half = half or torch.is_autocast_enabled(next(model.parameters()).device.type)
    return TOLERANCE_HALF if half else TOLERANCE


def padding_changes_logits(model: Any, generate: Callable[..., Any]) -> bool:
    """Whether padding on the left of a prompt changes what follows it, as in models that carry a
    state through it or count its positions. `generate(config, **inputs)`: as of the engine.

    Raises EngineError if generate's logits are not those of the model's forward.
    """
    device = next(model.parameters()).device
    prompt = trial_ids(model, 8).to(device)
    padded = torch.cat([prompt[:, :1].expand(1, 3), prompt], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0

    def logps(ids: Tensor, mask: Tensor) -> Tensor:
        with states_put_back(model):
            out = generate(ONE_TOKEN, input_ids=ids, attention_mask=mask)
        return out.logits[0].float().log_softmax(-1)

    right = logps(prompt, torch.ones_like(prompt))
    own = model(input_ids=prompt, use_cache=False).logits[:, -1].float().log_softmax(-1)
    tolerance = tolerance_of(model)
    if not (off := (right - own).abs().mean()) <= tolerance and own.isfinite().all():
        raise EngineError(
            f"transformers' generate does not sample from what {type(model).__name__}'s forward "
            f"computes: the log-probs of the same prompt differ by {off:.2g} on average (it gives "
            "the model other positions, for one). Such a model cannot be trained on its samples."
        )
    return bool((logps(padded, mask) - right).abs().mean() > tolerance)


def gaps_change_logits(model: Any, generate: Callable[..., Any]) -> bool:
    """Whether padding between two parts of a prompt changes what follows it, as in models that
    count the distance in their cache. Arguments as of `padding_changes_logits`."""
    prompt = trial_ids(model, 8).to(next(model.parameters()).device)
    gap = prompt[:, :1].expand(1, 3)
    ids = torch.cat([prompt[:, :5], gap, prompt[:, 5:]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, 5:8] = 0
    found: list[Tensor] = []
    for given, its_mask in ((prompt, torch.ones_like(prompt)), (ids, mask)):
        with states_put_back(model):
            out = generate(ONE_TOKEN, input_ids=given, attention_mask=its_mask)
        found.append(out.logits[0].float().log_softmax(-1))
    return not (found[1] - found[0]).abs().mean() <= tolerance_of(model)
