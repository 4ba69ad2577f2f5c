"""Prompts that run once for several rows, which start from copies of the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..models.trial import trial_ids
from .hf_padding import ONE_TOKEN, tolerance_of
from .hf_states import KeptStates, changed_states, kept_states, select_rows, states_put_back

Generate = Callable[..., Any]  # (config, **inputs): as of the engine

# generate's name for the KV cache, an argument and a field of what it returns; "cache" since 5.24
CACHE = next(
    name for name in ("cache", "past_key_values")
    if name in {f.name for f in fields(GenerateDecoderOnlyOutput)}
)  # fmt: skip
PREFILL = GenerationConfig(
    max_new_tokens=1, do_sample=False, return_dict_in_generate=True, disable_compile=True
)


def copied_cache(
    model: nn.Module,
    generate: Generate,
    states: KeptStates,
    ids: Tensor,
    mask: Tensor,
    rows: Tensor,
    **given: Any,
) -> Any:
    """A KV cache whose row i holds the tokens `ids[rows[i]]`, ids (P, W), rows (B,); None: it
    cannot be copied. What the modules keep beside it until decoding, which before the first prefill
    were `states`, is given the same rows."""
    cache = getattr(generate(PREFILL, input_ids=ids, attention_mask=mask, **given), CACHE)
    kinds = {type(layer) for layer in getattr(cache, "layers", [None])}
    copied = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    copied = copied and cache.get_seq_length() == ids.shape[1]
    if copied and select_rows(changed_states(model, states), rows, len(ids)):
        cache.batch_select_indices(rows)
        return cache
    return None


def beginnings_can_be_shared(model: Any, generate: Generate) -> bool:
    """Whether two prompts that go on from copies of one beginning, one of them behind padding, are
    followed by what follows them alone; tried on the model. No for sliding windows, which count the
    padding."""
    device = next(model.parameters()).device
    prompt = trial_ids(model, 9).to(device)
    start = prompt[:, :5]
    ids = torch.cat([prompt, prompt])
    ids[1, 5:7] = prompt[0, 0]
    mask = torch.ones_like(ids)
    mask[1, 5:7] = 0  # and goes on with the last two tokens
    alone = [prompt, torch.cat([start, prompt[:, 7:]], dim=1)]
    zeros = torch.zeros(2, dtype=torch.long, device=device)
    try:
        with states_put_back(model):
            states = kept_states(model)
            cache = copied_cache(model, generate, states, start, torch.ones_like(start), zeros)
            if cache is None or {type(layer) for layer in cache.layers} != {DynamicLayer}:
                return False
            found = _logps(
                generate(ONE_TOKEN, input_ids=ids, attention_mask=mask, **{CACHE: cache})
            )
        expected = []
        for one in alone:
            with states_put_back(model):
                out = generate(ONE_TOKEN, input_ids=one, attention_mask=torch.ones_like(one))
                expected.append(_logps(out))
    except Exception:  # of a model that knows no such prompts
        return False
    return bool((found - torch.cat(expected)).abs().mean(-1).max() <= tolerance_of(model))


def num_common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all of them begin with."""
    rows = sorted(tuple(ids) for ids in prompts)
    first, last = rows[0], rows[-1]  # what these share, all share
    pairs = zip(first, last, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def _logps(out: Any) -> Tensor:
    return out.logits[0].float().log_softmax(-1)
