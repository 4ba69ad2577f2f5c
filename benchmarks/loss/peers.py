"""The peers of the job `linear`, called as their users call them: Batch -> loss.

Those that yield log-probs, or their negatives, per token get the plain torch loss of the job. Their
calls are held against their sources by `tests/benchmarks/test_loss_peers.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss.batches import TOKENS_PER_COMPLETION, Batch, rloo_loss_torch


def trl(batch: Batch) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size

    hidden, weight = batch.leaves
    logps, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, batch.token_ids, 1.0, chunk_size, None, 1.0, ()
    )
    return rloo_loss_torch(logps, batch)


def torch_linear_cross_entropy(batch: Batch) -> Tensor:
    hidden, weight = batch.leaves
    options = torch.nn.LinearCrossEntropyOptions()  # without: [N, V] logits, the code of eager
    nll = F.linear_cross_entropy(hidden, weight, batch.token_ids, reduction="none", options=options)
    return rloo_loss_torch(-nll.float(), batch)


def verl(batch: Batch) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden, weight = batch.leaves
    logps, _ = linear_cross_entropy(hidden, weight, batch.token_ids, 1.0, "none")
    return rloo_loss_torch(logps, batch)


def liger(batch: Batch) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    hidden, weight = batch.leaves
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, batch.token_ids)
    return rloo_loss_torch(-nll, batch)


def liger_sm90(batch: Batch) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
        LigerFusedScaledCrossEntropySM90Function,
    )

    hidden, weight = batch.leaves
    nll = LigerFusedScaledCrossEntropySM90Function.apply(hidden, weight, batch.token_ids)
    return rloo_loss_torch(-nll, batch)


def liger_cutile(batch: Batch) -> Tensor:
    from liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    hidden, weight = batch.leaves
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, batch.token_ids)
    return rloo_loss_torch(-nll, batch)


def advantages(logps: Tensor, batch: Batch) -> Tensor:
    """A_i (R,) for ops that want them from outside, by the gradient of the plain torch loss."""
    with torch.enable_grad():
        logps = logps.detach().requires_grad_()
        (grad,) = torch.autograd.grad(rloo_loss_torch(logps, batch), logps)
    return -grad.view(-1, TOKENS_PER_COMPLETION)[:, 0] * len(batch.rewards)


def liger_grpo(batch: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    hidden, weight = batch.leaves
    completions = (len(batch.rewards), TOKENS_PER_COMPLETION)
    with torch.no_grad():
        nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, batch.token_ids)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=completions[0],
        loss_type="dr_grpo",
        max_completion_length=TOKENS_PER_COMPLETION,
    )
    ones = torch.ones(completions, device=hidden.device)
    out, _ = loss(
        hidden.view(*completions, -1),
        weight,
        batch.token_ids.view(completions),
        ones,
        advantages(-nll, batch),
    )
    return out * TOKENS_PER_COMPLETION


def _cce(batch: Batch, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = batch.leaves
    impl = "cce" if hidden.is_cuda else "torch_compile"
    nll = linear_cross_entropy(
        hidden, weight, batch.token_ids, reduction="none", impl=impl, **options
    )
    return rloo_loss_torch(-nll.float(), batch)


def cce(batch: Batch) -> Tensor:
    return _cce(batch)


def cce_exact(batch: Batch) -> Tensor:
    return _cce(batch, filter_eps=None)


def quack(batch: Batch) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    hidden, weight = batch.leaves
    nll = linear_cross_entropy_func(hidden, weight, None, batch.token_ids, reduction="none")
    return rloo_loss_torch(-nll.float(), batch)


def nll_sum(logps: Tensor, batch: Batch) -> Tensor:
    """What an op with one number for a loss can express: sum over tokens of -log p."""
    return -logps.sum()


def quack_fused(batch: Batch) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight = batch.leaves
    return chunked_linear_cross_entropy(hidden, weight, batch.token_ids, reduction="sum")
