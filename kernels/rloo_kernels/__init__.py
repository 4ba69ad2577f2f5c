"""The RLOO loss as importable ops: needs torch alone."""

from .linear_logprob import linear_logprob
from .logprob import selective_log_softmax
from .rloo import leave_one_out, rloo_advantages, rloo_objective, token_level_advantages

__all__ = [
    "leave_one_out",
    "linear_logprob",
    "rloo_advantages",
    "rloo_objective",
    "selective_log_softmax",
    "token_level_advantages",
]
