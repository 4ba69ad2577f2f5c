"""Sampler against trainer: whether they are the same policy, and what is done where they differ.

    d_t = sampler_logp_t - trainer_logp_t            both of the weights that sampled

Drawn from the whole distribution, d_t is 0 but for rounding. Drawn from a part of it that holds the
mass m_t (top-p, top-k, min-p, ...), d_t = -log m_t >= 0; with top-p alone m_t >= top_p. What lies
outside of [0, bound] is the violation, and only that is judged.

Rows that an older policy sampled have log-probs of that policy: what d_t is there says how far the
trainer has moved since. It is logged apart, and never judged.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from rloo_kernels.loss.packed import segment_ids, segment_sum
from torch import Tensor

from ..objective.importance import importance_ratios
from ..records import PreparedBatch, Sampling
from .sampler_limits import COARSE, EXACT, SamplerLimits
from .sampling_options import in_use

logger = logging.getLogger(__name__)

CAUSES = (
    "the engine samples from older weights; one parameter did not reach it; its temperature or "
    "another sampling setting differs; keys and values of older weights were used again (prefix "
    "cache); it computes in another dtype"
)


class SamplerMismatch(RuntimeError):
    """Completions were not drawn from the policy that is trained; the message says how far off."""


def computes_exactly(dtype: torch.dtype, mixed_precision: str) -> bool:
    """Whether model and engine, held in `dtype` or better, compute in float32 or better."""
    return dtype in (torch.float32, torch.float64) and mixed_precision == "no"


class SamplerCheck:
    """Compares the sampler's log-probs with the trainer's, and stops a run where they differ.

    `is_exact`: model and engine compute in float32 or better. `warn`, `stop`: mean violation in
    nats per token; None: measured by the run's own first steps (`SamplerLimits`); 0: never. `level`
    and `cap` are those of truncated importance sampling; without it `ratio_level` is that of the
    loss's ratio to the sampler, in rows of older weights. `structured_outputs`: what an engine
    restricts completions to. `has_dropout`: the trainer's log-probs may come out of a training
    forward with noise, so nothing is judged.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        is_exact: bool,
        warn: float | None = None,
        stop: float | None = None,
        level: str | None = None,
        cap: float = math.inf,
        ratio_level: str = "sequence",
        structured_outputs: str | None = None,
        has_dropout: bool = False,
        is_main_process: bool = True,
    ):
        self.limits = SamplerLimits(
            EXACT if is_exact else COARSE, warn, stop, is_main_process=is_main_process
        )
        self.weighted = level is not None
        self.level, self.cap = (level, cap) if level is not None else (ratio_level, math.inf)
        self.is_main_process = is_main_process
        self.num_warned = 0
        fields = {**vars(sampling), "structured_outputs": structured_outputs}
        self.cutting, self.reshaping = in_use(fields, sampling.extra)
        self.bound = math.inf if self.cutting else 0.0
        if self.cutting.keys() == {"top_p"}:
            self.bound = -math.log(self.cutting["top_p"])
        self.unjudged = _listed(self.reshaping)
        if has_dropout:
            self.unjudged = self.unjudged or "dropout (disable_dropout=False)"

    def announce(self) -> None:
        """At the start, once: what biases the gradient, and what keeps the check from judging."""
        if not self.is_main_process:
            return
        if biases := _listed({**self.cutting, **self.reshaping}):
            logger.warning(
                "%s: completions are drawn from another distribution than the one whose log-probs "
                "the loss differentiates, so the gradient is biased. Leave it out unless you mean "
                "that.",
                biases,
            )
        if self.unjudged:
            logger.warning(
                "sampling/logp_diff_* is logged but neither warned about nor stopped at: the "
                "sampler's log-probs need not be the trainer's with %s.",
                self.unjudged,
            )

    def columns(self, batch: PreparedBatch) -> dict[str, Tensor]:
        """Per row, for the step's gather: what `judge` and `metrics.sampling_metrics` need; nothing
        for an engine without log-probs.

        Rows that were not run have no log-prob of the trainer, and are left out.
        """
        generation = batch.generation
        sampler, trainer = generation.sampler_logps, batch.old_logps
        if sampler is None:
            return {}
        if trainer is None:  # no row was run
            trainer = torch.full_like(sampler, float("nan"))
        sampler, trainer = sampler.double(), trainer.double()
        owner = segment_ids(generation.cu_seqlens, len(sampler))
        finite, stale = sampler.isfinite(), generation.stale_rows[owner]
        known = finite & ~trainer.isnan()
        whole = torch.where(known, sampler - trainer, 0.0)
        diff = torch.where(stale, 0.0, whole)  # both of the same weights
        outside = torch.maximum(-diff, diff - self.bound).clamp(min=0)
        per_token = {
            "logp_diff_tokens": (known & ~stale).double(),
            "logp_diff_sum": diff.abs(),
            "logp_diff_outside": outside,
            "sampler_not_finite": (~finite).double(),
            "stale_diff_tokens": (known & stale).double(),
            "stale_diff_sum": torch.where(stale, whole, 0.0).abs(),
        }
        columns = {name: segment_sum(x, generation.cu_seqlens) for name, x in per_token.items()}
        columns["logp_diff_max"] = _largest(diff.abs(), owner, generation.num_rows)
        # unweighted, the ratio to the sampler is that of the loss in stale rows, and there alone
        taken = torch.ones_like(known) if self.weighted else known & stale
        return columns | _importance_columns(batch, trainer, taken, self.level, self.cap)

    def judge(self, rows: dict[str, Tensor], where: str, *, trains: bool = False) -> None:
        """Raises SamplerMismatch, or warns; `rows` are those of all processes, so that all agree.
        Rows without the columns of an engine's log-probs are not judged.

        To be called before the optimizer takes the gradients of these samples. `where`: which
        step and weights, for the message. `trains`: in a training step, the first of which are the
        measure for the rest.
        """
        if "sampler_not_finite" not in rows:
            return
        if broken := int(rows["sampler_not_finite"].sum()):
            raise SamplerMismatch(
                f"{where}: the rollout engine gave {broken} sampled tokens a log-prob that is NaN "
                "or infinite, and drew them from such numbers: look at the weights it holds and "
                "the dtype it computes in. No update was made with them."
            )
        num_tokens = int(rows["logp_diff_tokens"].sum())
        if self.unjudged or not num_tokens:
            return
        mean = float(rows["logp_diff_outside"].sum()) / num_tokens
        largest = float(rows["logp_diff_max"].max())
        allowed = f" beyond what {_listed(self.cutting)} explains" if self.cutting else ""
        found = (
            f"{where}: the log-probs of {num_tokens} sampled tokens differ between rollout engine "
            f"and trainer by {mean:.3g} on average{allowed}, {largest:.3g} at most. Usual causes: "
            f"{CAUSES}."
        )
        warn, stop = self.limits.warn, self.limits.stop
        if stop and mean >= stop:
            raise SamplerMismatch(
                f"{found} No update was made with them. If so much is to be expected, raise "
                f"logp_diff_stop (now {stop:.3g}; 0: never stop)."
            )
        if warn and mean >= warn:
            self._warn(found, warn)
        if trains:
            self.limits.add(mean)

    def _warn(self, found: str, limit: float) -> None:
        self.num_warned += 1
        power_of_ten = 10 ** (len(str(self.num_warned)) - 1)
        if self.num_warned != power_of_ten or not self.is_main_process:
            return
        logger.warning(
            "%s The weights are updated all the same. truncated_importance_sampling='token' "
            "corrects for rounding; logp_diff_warn (now %.3g) is where this is said, for the 1st, "
            "10th, 100th, ... time.",
            *(found, limit),
        )


def _importance_columns(
    batch: PreparedBatch, trainer: Tensor, taken: Tensor, level: str, cap: float
) -> dict[str, Tensor]:
    """Per row, sums over its ratios: one per token that is taken, or one for the sequence, if one
    of its tokens is."""
    sampler, cu_seqlens = batch.generation.sampler_logps, batch.generation.cu_seqlens
    assert sampler is not None
    ratio = importance_ratios(trainer, sampler, cu_seqlens, level)
    if level == "token":
        owner = segment_ids(cu_seqlens, len(ratio))[taken]
        ratio = ratio[taken]
    else:
        owner = segment_sum(taken.long(), cu_seqlens).nonzero().squeeze(1)
        ratio = ratio[owner]
    weight = ratio.clamp(max=min(cap, 1e150))  # the square of a larger one is inf
    per_ratio = {
        "importance_count": torch.ones_like(ratio),
        "importance_raw": ratio,
        "importance_clipped": weight,
        "importance_squared": weight.square(),
        "importance_at_cap": (ratio >= cap).double(),
    }
    zeros = ratio.new_zeros(batch.generation.num_rows)
    columns = {name: zeros.index_add(0, owner, x) for name, x in per_ratio.items()}
    columns["importance_raw_max"] = _largest(ratio, owner, batch.generation.num_rows)
    return columns


def _largest(values: Tensor, owner: Tensor, num_rows: int) -> Tensor:
    """(R,) largest of each row's values, which are >= 0; 0 for a row without."""
    return values.new_zeros(num_rows).scatter_reduce(0, owner, values, "amax")


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
