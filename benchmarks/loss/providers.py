"""Who does the job of `benchmarks.loss.batches`: ours, plain torch, and the peers.

A provider is a function from a Batch to the loss (or, in the job `logits_forward`, to log-probs and
entropies), a function that says why it cannot run on a device, and a note on what it computes where
that is not quite the job. Peers that only yield log-probs get the same plain torch loss.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rloo_kernels import fused_linear_rloo_loss, linear_logprob, rloo_loss, selective_log_softmax
from torch import Tensor

from benchmarks.loss import peers
from benchmarks.loss.batches import (
    BETA,
    NUM_GENERATIONS,
    TOKENS_PER_COMPLETION,
    Batch,
    Objective,
    rloo_loss_torch,
)

Available = Callable[[torch.device], str | None]


def anywhere(device: torch.device) -> str | None:
    return None


def needs(
    *modules: str,
    cuda: bool = False,
    capability: tuple[int, int] = (0, 0),
    only: tuple[int, int] | None = None,
) -> Available:
    """Available where all `modules` are installed, and there is a GPU if asked: of that capability
    or newer, or of the capability `only`."""

    def available(device: torch.device) -> str | None:
        if cuda and device.type != "cuda":
            return f"its kernels need a GPU, not {device.type}"
        for module in modules:
            if not _installed(module):
                return f"{module} is not installed"
        found = torch.cuda.get_device_capability(device) if cuda else capability
        if found < capability:
            return f"needs compute capability {capability[0]}.{capability[1]} or newer"
        if only is not None and found != only:
            return f"needs compute capability {only[0]}.{only[1]}"
        return None

    return available


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


@dataclass(frozen=True)
class Provider:
    """`run` is what is timed, with the backward of the loss: Batch -> loss, (loss, entropies), or
    in `logits_forward` (log-probs, entropies). `prepare` rearranges the leaves outside the clock,
    `crop` undoes that on their gradients."""

    run: Callable[[Batch], Tensor | tuple[Tensor, Tensor]]
    available: Available = anywhere
    note: str = ""
    loss_is_rloo: bool = True  # False: only the gradient is RLOO's, so only it is gated
    objective: Objective = rloo_loss_torch  # of log-probs; what it is gated against
    prepare: Callable[[Batch], Batch] | None = None
    crop: Callable[[Tensor], Tensor] | None = None


# --- job `linear`: (hidden, weight) -> loss ----------------------------------------------------


def ours(batch: Batch) -> Tensor:
    hidden, weight = batch.leaves
    return fused_linear_rloo_loss(
        hidden,
        weight,
        batch.token_ids,
        batch.cu_seqlens,
        rewards=batch.rewards,
        num_generations=NUM_GENERATIONS,
        ref_logps=batch.ref_logps,
        beta=BETA,
    ).loss


def ours_library(batch: Batch) -> Tensor:
    from rloo_kernels.lm_head.piece_triton import library_products

    with library_products():
        return ours(batch)


def ours_logprob(batch: Batch) -> Tensor:
    hidden, weight = batch.leaves
    logps = linear_logprob(hidden, weight, batch.token_ids)
    assert isinstance(logps, Tensor)
    return rloo_loss_torch(logps, batch)


def eager(batch: Batch, objective: Objective = rloo_loss_torch) -> Tensor:
    logits = F.linear(*batch.leaves)
    logps = F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, batch.token_ids[:, None])
    return objective(logps.squeeze(-1), batch)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def compiled(batch: Batch) -> Tensor:
    return _compiled(eager)(batch)


def _torch_has_it(device: torch.device) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy; 2.13 has"


LINEAR = {
    "ours": Provider(ours),
    "ours_library": Provider(
        ours_library,
        needs("triton", cuda=True),
        note="the library's matrix products and row kernels in place of the matrix kernel",
    ),
    "ours_logprob": Provider(ours_logprob, note="linear_logprob + torch loss"),
    "eager": Provider(eager),
    "compile": Provider(compiled),
    "trl": Provider(
        peers.trl,
        needs("trl"),
        note="chunked log-prob + torch loss; its trainer's old-log-prob pass is not counted",
    ),
    "torch": Provider(
        peers.torch_linear_cross_entropy,
        _torch_has_it,
        note="F.linear_cross_entropy in chunks, nll per token: its backward makes the logits again",
    ),
    "liger": Provider(
        peers.liger,
        needs("liger_kernel"),
        note="scaled cross-entropy per token + torch loss; it has no RLOO loss. On sm_90 it picks "
        "the kernel of liger_sm90, else its fallback",
    ),
    "liger_sm90": Provider(
        peers.liger_sm90,
        needs("liger_kernel", "cutlass", cuda=True, only=(9, 0)),
        note="liger-kernel[cutedsl]: nll per token + torch loss; bf16 only",
    ),
    "liger_cutile": Provider(
        peers.liger_cutile,
        needs("liger_kernel", "cuda.tile", cuda=True, capability=(8, 0)),
        note="liger-kernel[cutile]: nll per token + torch loss",
    ),
    "liger_grpo": Provider(
        peers.liger_grpo,
        needs("liger_kernel"),
        note="chunked GRPO, which cannot express RLOO: advantages from a log-prob pass of its own, "
        "beta 0; the gradient is RLOO's on-policy, the loss value is not",
        loss_is_rloo=False,
    ),
    "cce": Provider(
        peers.cce,
        needs("cut_cross_entropy"),
        note="nll per token + torch loss; torch_compile on a CPU",
    ),
    "cce_exact": Provider(
        peers.cce_exact,
        needs("cut_cross_entropy", cuda=True),
        note="filter_eps=None: no entry skipped",
    ),
    "verl": Provider(
        peers.verl,
        needs("verl", "triton", cuda=True),
        note="its Triton kernels: log-prob and entropy per token + torch loss; hidden size % 128",
    ),
    "quack": Provider(
        peers.quack,
        needs("quack", cuda=True, capability=(9, 0)),
        note="linear + cross_entropy per token, holds [N, V]: what it has for coefficients that "
        "come late",
    ),
    "quack_fused": Provider(
        peers.quack_fused,
        needs("quack", cuda=True, capability=(9, 0)),
        note="another job: the sum over tokens of -log p, the products of ours. Its chunked op "
        "takes one number's gradient and cannot express RLOO",
        objective=peers.nll_sum,
    ),
}


# --- job `logits`: logits -> (log-probs, entropies), and logits -> loss -------------------------


def ours_forward(batch: Batch) -> tuple[Tensor, Tensor]:
    out = selective_log_softmax(batch.leaves[0], batch.token_ids, return_entropy=True)
    assert isinstance(out, tuple)
    return out


def eager_forward(batch: Batch) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(batch.leaves[0], -1, dtype=torch.float32)
    logps = log_p.gather(-1, batch.token_ids[:, None]).squeeze(-1)
    log_p = log_p.detach()  # the entropy is a metric here
    return logps, -(log_p.exp() * log_p).sum(-1)


def compiled_forward(batch: Batch) -> tuple[Tensor, Tensor]:
    return _compiled(eager_forward)(batch)


def trl_forward(batch: Batch) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    # it walks over the first dimension: completions, as in its trainer, not single rows
    logits = batch.leaves[0].unflatten(0, (-1, TOKENS_PER_COMPLETION))
    logps = selective_log_softmax(logits, batch.token_ids.view(logits.shape[:2]))
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return logps.flatten(), entropy.flatten()


def trl_fused_forward(batch: Batch) -> tuple[Tensor, Tensor]:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logps, entropy = selective_log_softmax_and_entropy(batch.leaves[0], batch.token_ids)
    return logps, entropy.detach()


Forward = Callable[[Batch], tuple[Tensor, Tensor]]


def with_torch_loss(forward: Forward) -> Forward:
    """Batch -> (loss, entropies), which trainers log, from a forward to log-probs and entropies."""

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        logps, entropy = forward(batch)
        return rloo_loss_torch(logps.float(), batch), entropy

    return run


eager_logits_loss = with_torch_loss(eager_forward)


def compiled_logits_loss(batch: Batch) -> tuple[Tensor, Tensor]:
    return _compiled(eager_logits_loss)(batch)


def ours_rloo_loss(batch: Batch) -> tuple[Tensor, Tensor]:
    out = rloo_loss(
        batch.leaves[0],
        batch.token_ids,
        batch.cu_seqlens,
        rewards=batch.rewards,
        num_generations=NUM_GENERATIONS,
        ref_logps=batch.ref_logps,
        beta=BETA,
        return_entropy=True,
    )
    assert out.entropy is not None
    return out.loss, out.entropy


def _pad_rows(batch: Batch) -> Batch:
    """Logits (R, T + 1, V): Liger's kernel wants one row more per completion."""
    logits = batch.leaves[0].detach().unflatten(0, (-1, TOKENS_PER_COMPLETION))
    return replace(batch, leaves=(F.pad(logits, (0, 0, 0, 1)).requires_grad_(),))


def _crop_rows(grad: Tensor) -> Tensor:
    return grad[:, :-1].flatten(0, 1)


def liger_triton_grpo(batch: Batch) -> Tensor:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    (logits,) = batch.leaves
    ids = batch.token_ids.view(len(logits), -1)
    logps = fused_selective_log_softmax(logits, ids, temperature=1.0)
    loss, *_ = triton_grpo_loss(
        logits,
        None,
        None,
        ids,
        peers.advantages(logps.flatten(), batch),
        temperature=1.0,
        beta=0.0,
        eps_low=0.2,
        eps_high=0.2,
        inplace=False,
        loss_type="dr_grpo",
        max_completion_length=TOKENS_PER_COMPLETION,
        reduce=True,
    )
    return loss * TOKENS_PER_COMPLETION


TRL_FUSED_ON_CPU = "its fused kernel needs a GPU; on a CPU it is the same code as trl"


def _trl_fused(device: torch.device) -> str | None:
    return TRL_FUSED_ON_CPU if device.type != "cuda" else needs("trl")(device)


def no_logits_entropy_op(device: torch.device) -> str | None:
    return "Liger 0.8.5 has no op from logits to log-probs and entropies"


LOGITS_FORWARD = {
    "ours": Provider(ours_forward),
    "eager": Provider(eager_forward),
    "compile": Provider(compiled_forward),
    "trl": Provider(trl_forward, needs("trl"), note="two calls, as its trainers made"),
    "trl_fused": Provider(trl_fused_forward, _trl_fused),
    "liger": Provider(peers.liger, no_logits_entropy_op),
}

LOGITS_LOSS = {
    "ours": Provider(ours_rloo_loss),
    "ours_logprob": Provider(with_torch_loss(ours_forward), note="selective_log_softmax"),
    "eager": Provider(eager_logits_loss),
    "compile": Provider(compiled_logits_loss),
    "trl": Provider(with_torch_loss(trl_forward), needs("trl"), note="two calls"),
    "trl_fused": Provider(with_torch_loss(trl_fused_forward), _trl_fused),
    "liger": Provider(
        liger_triton_grpo,
        needs("liger_kernel", cuda=True),
        note="Triton GRPO, which cannot express RLOO: advantages from a log-prob pass of its own, "
        "beta 0, no entropy; the gradient is RLOO's on-policy, the loss value is not",
        loss_is_rloo=False,
        prepare=_pad_rows,
        crop=_crop_rows,
    ),
}
