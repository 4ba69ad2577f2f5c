"""Sampler against trainer: whether they are the same policy, and what is done where they differ.

    d_t = sampler_logp_t - trainer_logp_t            both of the weights that sampled

Drawn from the whole distribution, d_t is 0 but for rounding. Drawn from a part of it that holds the
mass m_t (top-p, top-k, min-p, ...), d_t = -log m_t >= 0; with top-p alone m_t >= top_p. What lies
outside of [0, bound] is the violation, and only that is judged.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from accelerate import Accelerator
from rloo_kernels.advantages import segment_ids, segment_sum
from torch import Tensor

from .config import RLOOConfig
from .types import Samples, Sampling

logger = logging.getLogger(__name__)

# sampling options, with the values that switch them off (as None does): these only take tokens
# away, so that the rest become likelier, ...
CUTTING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words": (),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "do_sample": (True,),
}
# ... and these change logits, so that a log-prob may be off in either direction
RESHAPING: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "logit_bias": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
}
CAUSES = (
    "the engine samples from older weights; one parameter did not reach it; its temperature or "
    "another sampling setting differs; keys and values of older weights were used again (prefix "
    "cache); it computes in another dtype"
)


class SamplerMismatch(RuntimeError):
    """Completions were not drawn from the policy that is trained; the message says how far off."""


class TruthCheck:
    """Compares the sampler's log-probs with the trainer's, and stops a run where they differ.

    `dtype`: the lower of those that the model and the engine are held in. `has_dropout`: the
    trainer's log-probs may come out of a training forward with noise, so nothing is judged.
    """

    def __init__(
        self,
        args: RLOOConfig,
        sampling: Sampling,
        accelerator: Accelerator,
        dtype: torch.dtype,
        *,
        has_dropout: bool = False,
    ):
        exact = dtype in (torch.float32, torch.float64) and accelerator.mixed_precision == "no"
        warn, stop = (1e-3, 1e-2) if exact else (0.05, 0.5)
        self.warn = warn if args.logp_diff_warn is None else args.logp_diff_warn
        self.stop = stop if args.logp_diff_stop is None else args.logp_diff_stop
        self.level, self.cap = args.truncated_importance_sampling, args.importance_sampling_cap
        self.is_main_process = accelerator.is_main_process
        self.num_warned = 0
        settings = {**vars(sampling), **sampling.extra}
        if args.vllm_structured_outputs_regex is not None:
            settings["structured_outputs"] = args.vllm_structured_outputs_regex
        self.cutting, self.reshaping = _in_use(CUTTING, settings), _in_use(RESHAPING, settings)
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

    def columns(self, samples: Samples) -> dict[str, Tensor]:
        """Per row, for the step's gather: what `judge` and `metrics.sampling_metrics` need.

        Rows that were not run have no log-prob of the trainer, and are left out.
        """
        sampler, trainer = samples.sampler_logps, samples.old_logps
        assert sampler is not None
        if trainer is None:  # no row was run
            trainer = torch.full_like(sampler, float("nan"))
        sampler, trainer = sampler.double(), trainer.double()
        finite, known = sampler.isfinite(), ~trainer.isnan()
        diff = torch.where(finite & known, sampler - trainer, 0.0)
        outside = torch.maximum(-diff, diff - self.bound).clamp(min=0)
        per_token = {
            "logp_diff_tokens": (finite & known).double(),
            "logp_diff_sum": diff.abs(),
            "logp_diff_outside": outside,
            "sampler_not_finite": (~finite).double(),
        }
        columns = {name: segment_sum(x, samples.cu_seqlens) for name, x in per_token.items()}
        owner = segment_ids(samples.cu_seqlens, len(diff))
        columns["logp_diff_max"] = _largest(diff.abs(), owner, samples.num_rows)
        if self.level is not None:
            columns |= _importance_columns(samples, self.level, self.cap)
        return columns

    def judge(self, rows: dict[str, Tensor], where: str) -> None:
        """Raises SamplerMismatch, or warns; `rows` are those of all processes, so that all agree.

        To be called before the optimizer takes the gradients of these samples. `where`: which
        step and weights, for the message.
        """
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
        if self.stop and mean >= self.stop:
            raise SamplerMismatch(
                f"{found} No update was made with them. If so much is to be expected, raise "
                f"logp_diff_stop (now {self.stop:g}; 0: never stop)."
            )
        if self.warn and mean >= self.warn:
            self._warn(found)

    def _warn(self, found: str) -> None:
        self.num_warned += 1
        power_of_ten = 10 ** (len(str(self.num_warned)) - 1)
        if self.num_warned != power_of_ten or not self.is_main_process:
            return
        logger.warning(
            "%s The weights are updated all the same. truncated_importance_sampling='token' "
            "corrects for rounding; logp_diff_warn (now %g) is where this is said, for the 1st, "
            "10th, 100th, ... time.",
            *(found, self.warn),
        )


def importance_ratios(
    trainer: Tensor, sampler: Tensor, cu_seqlens: Tensor, level: str
) -> Tensor:  # (N,), (N,), (R + 1,) -> (N,) or (R,), fp64
    """exp(trainer_logp_t - sampler_logp_t) per "token"; per "sequence", exp of the sum over t.

    Before the cap: truncated importance sampling weights with min(ratio, cap) (Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training").
    """
    log_ratio = trainer.double() - sampler.double()
    return (log_ratio if level == "token" else segment_sum(log_ratio, cu_seqlens)).exp()


def _importance_columns(samples: Samples, level: str, cap: float) -> dict[str, Tensor]:
    """Per row, sums over its ratios: one per token, or one for the sequence, if it has tokens."""
    assert samples.old_logps is not None
    assert samples.sampler_logps is not None
    cu_seqlens = samples.cu_seqlens
    ratio = importance_ratios(samples.old_logps, samples.sampler_logps, cu_seqlens, level)
    if level == "token":
        owner = segment_ids(cu_seqlens, len(ratio))
    else:
        owner = cu_seqlens.diff().nonzero().squeeze(1)
        ratio = ratio[owner]
    per_ratio = {
        "importance_count": torch.ones_like(ratio),
        "importance_raw": ratio,
        "importance_clipped": ratio.clamp(max=cap),
        "importance_at_cap": (ratio >= cap).double(),
    }
    zeros = ratio.new_zeros(samples.num_rows)
    columns = {name: zeros.index_add(0, owner, x) for name, x in per_ratio.items()}
    columns["importance_raw_max"] = _largest(ratio, owner, samples.num_rows)
    return columns


def _largest(values: Tensor, owner: Tensor, num_rows: int) -> Tensor:
    """(R,) largest of each row's values, which are >= 0; 0 for a row without."""
    return values.new_zeros(num_rows).scatter_reduce(0, owner, values, "amax")


def _in_use(table: dict[str, tuple[Any, ...]], settings: dict[str, Any]) -> dict[str, Any]:
    values = {name: settings.get(name) for name in table}
    return {name: value for name, value in values.items() if value not in (None, *table[name])}


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
