"""What goes into the loss and what comes out: options, inputs beside the log-probs, result.

Letters: R rows (completions), N tokens of all rows together, those of padding included.
"""

# pyright: strict

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..logprob.types import accumulation_dtype
from ..transfer import to_device
from .advantages import BY_GROUP

KL_IN_LOSS = ("loss", "corrected_loss")

# The lines of the (len(TABLE_FIELDS), R) table of numbers per row: fields of `Objective`, in order.
TABLE_FIELDS = (
    "loss_per_row",
    "advantages",
    "kl",
    "shaped_rewards",
    "logp_sum",
    "log_ratio",
    "token_ratio_sum",
    "clipped_low",
    "clipped_high",
    "entropy_sum",
    "num_tokens",
)


@dataclass(frozen=True)
class LossOptions:
    """What the loss is; checked when it is made.

    num_generations: K samples of each prompt, a group. beta: factor of the KL. epsilon_low and
    epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]. denominator: what the
    sum over rows is divided by. advantage: of a group, "rloo", "grpo" or "dr_grpo". kl:
    "reward" (a sequence's KL is subtracted from its reward), "reward_to_go" (per token,
    REINFORCE++, arXiv:2501.03262 eq. 1), "loss" (k3 = exp(ref - logp) - (ref - logp) - 1, added to
    the loss of every token and differentiated, as in GRPO) or "corrected_loss" (k3 times the
    token's ratio, differentiated through both: beta rho (logp - ref) in the slope, the unbiased
    gradient of the reverse KL, arXiv:2512.02556). level: one ratio per "sequence" (RLOO) or per
    "token" (GRPO, PPO). token_mean: a row's token losses are averaged, not summed. normalize:
    advantages are scaled over all rows, see `rloo_advantages`. kl_policy: where old_logps are
    given, whose KL is subtracted from the reward: the "present" policy's, sum_t (logp_t - ref_t),
    or the "sampling" one's, sum_t (old_t - ref_t), which RLOOTrainer and TRL subtract: the reward
    of a sample is then the same in every update.

    Raises ValueError for an unknown name, a denominator that is not positive, and options that
    contradict each other.
    """

    num_generations: int = 0  # 0: the advantages are given
    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float | None = None  # None: epsilon_low
    denominator: float | None = None  # None: the number of rows
    advantage: str = "rloo"
    kl: str = "reward"
    level: str = "sequence"
    token_mean: bool = False
    normalize: bool = False
    kl_policy: str = "present"

    def __post_init__(self) -> None:
        for name, choices in (
            ("advantage", tuple(BY_GROUP)),
            ("kl", ("reward", "reward_to_go", *KL_IN_LOSS)),
            ("level", ("sequence", "token")),
            ("kl_policy", ("present", "sampling")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.kl != "reward" and self.level == "sequence":
            raise ValueError(f'kl="{self.kl}" is per token: it needs level="token".')
        if self.token_mean and self.level == "sequence":
            raise ValueError('token_mean=True averages token losses: it needs level="token".')
        if self.denominator is not None and not self.denominator > 0:
            raise ValueError(f"denominator must be > 0, got {self.denominator}.")

    @property
    def high(self) -> float:
        """epsilon_high, its default filled in."""
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high

    @property
    def kl_in_loss(self) -> bool:
        """Whether a KL is added to the loss of every token."""
        return self.beta != 0 and self.kl in KL_IN_LOSS


class LossInputs(NamedTuple):
    """What the loss takes beside the log-probs; exactly one of the first three is given."""

    rewards: Tensor | None = None  # (R,) prompt-major; NaN: unscorable
    advantages: Tensor | None = None  # (R,) NaN counts as 0
    token_advantages: Tensor | None = None  # (N,)
    # (N,) None: on-policy, the ratio is exactly 1; NaN: of this token
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None  # (N,)
    mask: Tensor | None = None  # (N,) bool


class Objective(NamedTuple):
    """The loss and what it is made of; only `loss` is differentiable. R rows, N tokens."""

    loss: Tensor  # () minus the clipped objective, summed over rows, / denominator
    coefficients: Tensor  # (N,) dloss / dlogp, in the layout of token_ids
    loss_per_row: Tensor  # (R,) before the division
    advantages: Tensor  # (R,) A_i; per-token advantages: their sum over the row's tokens
    kl: Tensor  # (R,) sum_t (logp_it - ref_it), 0 without a reference
    shaped_rewards: Tensor  # (R,) reward - beta KL of kl_policy; NaN where advantages were given
    logp_sum: Tensor  # (R,) sum_t logp_it
    log_ratio: Tensor  # (R,) sum_t (logp_it - old_it)
    token_ratio_sum: Tensor  # (R,) sum_t exp(logp_it - old_it)
    clipped_low: Tensor  # (R,) share of the row's ratios below 1 - eps_low with A < 0
    clipped_high: Tensor  # (R,) share of the row's ratios above 1 + eps_high with A > 0
    entropy_sum: Tensor  # (R,) sum_t H_it, 0 where no entropies were given
    num_tokens: Tensor  # (R,) tokens counted
    logps: Tensor | None = None  # the ops that make them: log-probs in the layout of token_ids
    entropy: Tensor | None = None  # likewise, if asked for


def flat_inputs(inputs: LossInputs, like: Tensor, device: torch.device) -> LossInputs:
    """Every tensor detached, flat, on `device`; numbers in the accumulation dtype of `like`."""
    dtype = accumulation_dtype(like.dtype)
    dtypes = (*(dtype for _ in inputs[:5]), torch.bool)
    moved = (
        None if x is None else to_device(x.detach(), device, to).reshape(-1)
        for x, to in zip(inputs, dtypes, strict=True)
    )
    return LossInputs(*moved)


def common_device(inputs: LossInputs, like: Tensor) -> torch.device:
    """The CPU where all inputs lie there, otherwise the device of `like`."""
    on_host = all(x is None or x.device.type == "cpu" for x in inputs)
    return torch.device("cpu") if on_host else like.device


OptionValues = tuple[int, float, float, float, float, str, str, str, bool, bool]


def option_values(options: LossOptions, num_rows: int) -> OptionValues:
    """The options in the order of their fields and of the ops' schemas, defaults filled in; without
    kl_policy, which `with_known_kl` has settled."""
    denominator = options.denominator if options.denominator is not None else max(num_rows, 1)
    return (
        options.num_generations,
        float(options.beta),
        float(options.epsilon_low),
        float(options.high),
        float(denominator),
        options.advantage,
        options.kl,
        options.level,
        options.token_mean,
        options.normalize,
    )
