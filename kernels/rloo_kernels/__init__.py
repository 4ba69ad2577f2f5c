"""The RLOO loss as importable ops: needs torch alone, and Triton on a GPU."""

from .advantages import leave_one_out, rloo_advantages, token_level_advantages
from .linear_logprob import linear_logprob
from .linear_rloo import fused_linear_rloo_loss
from .logprob import selective_log_softmax
from .rloo import Objective, rloo_loss, rloo_objective
from .segments import LossOptions

__all__ = [
    "LossOptions",
    "Objective",
    "fused_linear_rloo_loss",
    "leave_one_out",
    "linear_logprob",
    "rloo_advantages",
    "rloo_loss",
    "rloo_objective",
    "selective_log_softmax",
    "token_level_advantages",
]
