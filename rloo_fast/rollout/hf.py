"""Rollouts with transformers' `generate`, on the policy itself: its weights are always current."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ..models import base_causal_lm
from ..types import Rollout, Sampling


class HFEngine:
    """Left-pads the prompts, samples with a KV cache, cuts every completion at its stop token.

    `rows_per_call`: prompts per generate call, None for all at a time. The model is put into eval
    mode for the call (no dropout, no gradient checkpointing) and back afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        *,
        rows_per_call: int | None = None,
        pad_to_multiple_of: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ):
        self.model, self.pad_token_id = model, pad_token_id
        self.rows_per_call, self.pad_to_multiple_of = rows_per_call, pad_to_multiple_of
        self.autocast = autocast

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling, seed: int) -> Rollout:
        device = next(self.model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        training = self.model.training
        self.model.eval()
        rollout = Rollout([], [])
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad(), self.autocast():
                torch.manual_seed(seed)
                size = self.rows_per_call or max(len(prompt_ids), 1)
                for start in range(0, len(prompt_ids), size):
                    self._generate(prompt_ids[start : start + size], sampling, device, rollout)
        finally:
            self.model.train(training)
        return rollout

    def _generate(
        self, prompt_ids: list[list[int]], sampling: Sampling, device: torch.device, out: Rollout
    ) -> None:
        width = max(len(ids) for ids in prompt_ids)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        input_ids = torch.full((len(prompt_ids), width), self.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompt_ids):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        config = self._generation_config(sampling)
        base = base_causal_lm(self.model)
        saved = base.generation_config
        # generate() fills settings that are None from the model's own config, so a model saved
        # with min_p=0.1 would be sampled with that although none was asked for
        base.generation_config = config  # pyright: ignore
        try:
            sequences = self.model.generate(  # pyright: ignore
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
            )
        finally:
            base.generation_config = saved
        stops = set(sampling.stop_token_ids)
        for ids in sequences[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(ids) if token in stops), None)
            out.completion_ids.append(ids[:end])
            out.finish_reasons.append("length" if end is None else "stop")

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        settings: dict[str, Any] = {
            "do_sample": True,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": list(sampling.stop_token_ids),
            "pad_token_id": self.pad_token_id,
            "disable_compile": True,
        }
        return GenerationConfig(**{**settings, **sampling.extra})
