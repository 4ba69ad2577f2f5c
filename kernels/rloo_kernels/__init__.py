"""The RLOO loss as importable ops: needs torch alone, and Triton on a GPU."""

from .lm_head.fused_linear_rloo_loss import fused_linear_rloo_loss
from .lm_head.linear_logprob import linear_logprob
from .lm_head.reference_logprob_fp8 import reference_logprob_fp8
from .logprob.selective_log_softmax import selective_log_softmax
from .loss.advantages import leave_one_out, rloo_advantages, token_level_advantages
from .loss.rloo_loss import rloo_loss
from .loss.rloo_objective import rloo_objective
from .loss.types import LossOptions, Objective

__all__ = [
    "LossOptions",
    "Objective",
    "fused_linear_rloo_loss",
    "leave_one_out",
    "linear_logprob",
    "reference_logprob_fp8",
    "rloo_advantages",
    "rloo_loss",
    "rloo_objective",
    "selective_log_softmax",
    "token_level_advantages",
]
