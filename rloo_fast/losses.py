"""What `loss` means: what carries a ratio and a clip, where the KL goes, what a sum is divided by.

    loss           ratio, clip   KL               of a row    divided by
    rloo           completion    in the reward    one term    completions of the step, B
    reinforce_pp   token         reward-to-go     sum         B
    grpo           token         k3 in the loss   mean        B
    dr_grpo        token         k3 in the loss   sum         B max_completion_length
    dapo           token         k3 in the loss   sum         tokens of the step
    bnpo           token         k3 in the loss   sum         tokens of the micro-step, times
                                                              the micro-steps of the step

B and the tokens are those of all processes. A masked completion counts in B and has no tokens. The
formulas are TRL 1.16's; GRPO: arXiv:2402.03300, Dr. GRPO: 2503.20783, DAPO: 2503.14476,
REINFORCE++: 2501.03262.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .types import Samples

if TYPE_CHECKING:
    from .config import RLOOConfig


class Kind(NamedTuple):
    level: str  # of ratio and clip
    kl: str  # as in rloo_kernels.LossOptions
    token_mean: bool = False


LOSSES = {
    "rloo": Kind("sequence", "reward"),
    "grpo": Kind("token", "loss", token_mean=True),
    "dapo": Kind("token", "loss"),
    "bnpo": Kind("token", "loss"),
    "dr_grpo": Kind("token", "loss"),
    "reinforce_pp": Kind("token", "reward_to_go"),
}


class Loss:
    """The loss that a configuration asks for, in terms of the kernels.

    Truncated importance sampling per token makes ratio and clip of "rloo" per token, too.
    """

    def __init__(self, args: RLOOConfig):
        self.args, self.kind = args, LOSSES[args.loss]
        weights_per_token = args.truncated_importance_sampling == "token"
        self.kl_in_loss = args.beta != 0 and self.kind.kl == "loss"
        # advantages need the policy's log-probs first
        self.kl_in_reward = args.beta != 0 and not self.kl_in_loss
        self.level = "token" if weights_per_token else self.kind.level
        self.advantages_per_token = self.kind.kl == "reward_to_go"
        self.credit_per_token = self.advantages_per_token or weights_per_token
        # what a denominator counts: only bnpo's is of a micro-step alone
        self.by_micro_step = args.loss == "bnpo"

    def options(self, *, with_rewards: bool) -> dict[str, Any]:
        """Of `rloo_kernels.LossOptions`, without the denominator.

        `with_rewards`: the kernel is given rewards and makes the advantages, not the advantages.
        """
        args = self.args
        options: dict[str, Any] = {
            "epsilon_low": args.epsilon,
            "epsilon_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
            "level": self.level,
            "token_mean": self.kind.token_mean,
        }
        if self.kl_in_loss:
            kl = "corrected_loss" if args.use_bias_correction_kl else "loss"
            options |= {"beta": args.beta, "kl": kl}
        elif with_rewards:
            options |= {"beta": args.beta, "kl": self.kind.kl, "advantage": args.advantage}
        return options

    def denominator(self, samples: Samples, rows: list[int], num_rows: int) -> float:
        """What the sum over `rows` of a generation batch is divided by in a step that takes
        `num_rows` in all, both on this process: gradients are then averaged over processes.

        dapo: the tokens of the generation batch, times the share of its completions that the step
        takes. bnpo: `rows` are a micro-step, so this loss depends on how a step is cut into
        micro-steps of per_device_train_batch_size completions, and on their order.
        """
        if self.args.loss == "dapo":
            return max(samples.tokens_per_process, 1.0) * num_rows / samples.num_rows
        if self.args.loss == "bnpo":
            tokens = int(samples.cu_seqlens.diff()[rows].sum())
            return max(tokens, 1) * num_rows / len(rows)
        if self.args.loss == "dr_grpo":
            return float(num_rows * self.args.max_completion_length)
        return float(num_rows)
