"""Checks of what the loss is given."""

# pyright: strict

from __future__ import annotations

from itertools import pairwise

import torch

from .types import LossInputs, LossOptions


def check_inputs(
    inputs: LossInputs, shape: torch.Size, num_rows: int, options: LossOptions
) -> None:
    """Raise ValueError unless the inputs fit `num_rows` rows and token_ids of `shape`."""
    given = [name for name in LossInputs._fields[:3] if getattr(inputs, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of rewards, advantages and token_advantages, got {given or 'none'}."
        )
    for name in ("advantages", "rewards"):
        x = getattr(inputs, name)
        if x is not None and x.shape != (num_rows,):
            raise ValueError(f"{name} must be ({num_rows},), one per row, got {tuple(x.shape)}.")
    for name in ("token_advantages", "old_logps", "ref_logps", "mask"):
        x = getattr(inputs, name)
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} as token_ids, got {tuple(x.shape)}.")
    k = options.num_generations
    if inputs.rewards is not None and (k < 2 or num_rows % k):
        raise ValueError(
            "rewards must hold whole groups of num_generations >= 2 samples, "
            f"got {num_rows} rows and num_generations={k}."
        )
    if inputs.rewards is None and options.normalize:
        raise ValueError("normalize=True scales advantages that are made here: give rewards.")
    if inputs.token_advantages is not None and options.level == "sequence":
        raise ValueError('token_advantages need level="token".')
    if options.beta != 0 and inputs.rewards is None and not options.kl_in_loss:
        raise ValueError(
            f"beta={options.beta} takes the KL off rewards, and advantages were given: leave beta "
            'out, or add the KL to the loss with kl="loss".'
        )
    if options.beta != 0 and inputs.ref_logps is None:
        raise ValueError(f"beta={options.beta} needs ref_logps, the reference's log-probs.")


def check_bounds(bounds: list[int], num_tokens: int) -> None:
    """Raise ValueError unless cu_seqlens run from 0 to the number of tokens without falling."""
    falls = any(a > b for a, b in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != num_tokens or falls:
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of tokens, {num_tokens}, without falling; "
            f"got {bounds[:8]}{' ...' if len(bounds) > 8 else ''}, ending at {bounds[-1:]}."
        )
