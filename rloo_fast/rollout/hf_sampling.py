"""Draw each row's tokens with a seed of its own, inside transformers' `generate`.

Letters: B rows of a call, T new tokens, V vocabulary. transformers runs the caller's processors
before its own warpers (temperature, top-p, ...), and draws all rows from one random stream. So it
is told to search greedily, and `SeededDraw`, the last processor, warps, draws and records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..records import Sampling

# in transformers' order: (setting, values that change nothing, what it does to the scores)
WARPERS: list[tuple[str, tuple[float | None, ...], Callable[[Any, torch.device], Any]]] = [
    ("temperature", (None, 1), lambda value, _: TemperatureLogitsWarper(float(value))),
    ("top_h", (None,), lambda value, _: TopHLogitsWarper(value)),
    ("top_k", (None, 0), lambda value, _: TopKLogitsWarper(value)),
    ("top_p", (None, 1), lambda value, _: TopPLogitsWarper(float(value))),
    ("min_p", (None,), lambda value, _: MinPLogitsWarper(value)),
    ("typical_p", (None, 1), lambda value, _: TypicalLogitsWarper(value)),
    ("epsilon_cutoff", (None, 0), lambda value, _: EpsilonLogitsWarper(value)),
    ("eta_cutoff", (None, 0), lambda value, device: EtaLogitsWarper(value, device=str(device))),
]
# these change scores or tokens after our processor, or instead of it
DRAWN_BY_TRANSFORMERS = ("watermarking_config", "penalty_alpha")


class TransformersSampling:
    """A `Sampling` as the GenerationConfig and the warpers of one generate call.

    `seeded`: `SeededDraw` picks the tokens. Otherwise (beam search, assistants, watermarks)
    transformers does, and there are neither per-row seeds nor log-probs.
    """

    def __init__(self, sampling: Sampling, pad_token_id: int):
        rest: dict[str, Any] = {
            "do_sample": True,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": list(sampling.stop_token_ids),
            "pad_token_id": pad_token_id,
            "disable_compile": True,
            **sampling.extra,
        }
        warped = {name: rest.pop(name, None) for name, *_ in WARPERS}
        self.do_sample = bool(rest.pop("do_sample"))
        # a greedy search knows temperature alone, which its log-probs are of
        self.warpers = warped if self.do_sample else {"temperature": warped["temperature"]}
        # without the warpers' settings, of which transformers would say that they are not used
        greedy = GenerationConfig(**rest, do_sample=False)
        self.seeded = greedy.get_generation_mode() == GenerationMode.GREEDY_SEARCH and not any(
            rest.get(name) for name in DRAWN_BY_TRANSFORMERS
        )
        self.config = greedy
        if not self.seeded:
            drawing = {"do_sample": True, **warped} if self.do_sample else {"do_sample": False}
            self.config = GenerationConfig(**rest, **drawing)

    def draw(self, seeds: Sequence[int], device: torch.device) -> SeededDraw:
        warpers = LogitsProcessorList(
            make(self.warpers[name], device)
            for name, idle, make in WARPERS
            if self.warpers.get(name) not in idle
        )
        length = self.config.max_new_tokens
        assert length is not None
        return SeededDraw(warpers, uniforms(seeds, length).to(device) if self.do_sample else None)


class SeededDraw(LogitsProcessor):
    """Warps the scores, picks one token per row, and leaves it all the probability.

    `uniforms` (B, T): token t of row i is the one at which the cumulative probability passes
    uniforms[i, t]; None: the likeliest token.
    """

    def __init__(self, warpers: LogitsProcessorList, uniforms: Tensor | None):
        self.warpers, self.uniforms = warpers, uniforms
        self.steps: list[Tensor] = []  # per token so far: (B,) log-probs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, .), (B, V) -> (B, V)
        logps = self.warpers(input_ids, scores).log_softmax(-1)  # pyright: ignore
        if self.uniforms is None:
            tokens = logps.argmax(-1, keepdim=True)
        else:
            tokens = pick(logps.exp(), self.uniforms[:, len(self.steps), None])
        self.steps.append(logps.gather(-1, tokens).squeeze(-1))
        return logps.fill_(-torch.inf).scatter_(-1, tokens, 0.0)

    def logps(self) -> Tensor:  # -> (B, tokens so far), float32
        """Of the picked tokens, in the distribution that each was picked from."""
        return torch.stack(self.steps, dim=-1)


def uniforms(seeds: Sequence[int], length: int) -> Tensor:  # -> (B, length), float64 in [0, 1)
    """Row i: the first `length` numbers of a CPU generator seeded with seeds[i]."""
    rows = [
        torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows)


def pick(probs: Tensor, u: Tensor) -> Tensor:  # (B, V), (B, 1) -> (B, 1) int64
    """The token at which the cumulative probability passes u; never one of probability 0.

    Computed in integers, whose sums are exact on every device: a token of probability 0 adds
    nothing, and u < 1 times the total stays below the total.
    """
    mass = (probs * 2.0**52).long().cumsum_(-1)  # float32 holds the product exactly
    goal = (u * mass[:, -1:]).long()
    # NaN, which the caller reports, has no order to search in: the clamp keeps the index valid
    return torch.searchsorted(mass, goal, right=True).clamp_(max=probs.shape[-1] - 1)
