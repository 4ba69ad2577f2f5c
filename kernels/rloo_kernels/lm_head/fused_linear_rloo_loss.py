"""Hidden states x lm_head -> the RLOO loss and its gradients: three matrix products, never [N, V].

    log p(y) of every token -> KL, reward, leave-one-out, ratio, clip -> c = dloss / dlogp
    dX = c (M W)        dW = M^T (c X)        db = M^T c           M = d log p(y) / d raw

`piece_torch.py` has M, `loss/objective_torch.py` the coefficients c. The coefficient of a token
needs its group's log-probs (with a KL in the reward), its sequence's (with a ratio), or none, and
nothing else of the batch. So *the group is the chunk*: while M of a group's tokens is alive, its
coefficients are made and its gradients summed. Backward only multiplies by a number.

FLOPs of one call, N tokens, D hidden size, V vocabulary, n tokens with c != 0:

    nothing requires a gradient                           2NDV
    coefficients known beforehand (on-policy, no KL in    2NDV + 4nDV (2nDV with a frozen head)
      the reward, or advantages given)
    groups, or sequences with a ratio, that fit a piece   2NDV + 4nDV (2nDV with a frozen head)
    those that do not, and normalize=True                 2NDV + 6nDV (2NDV + 2NDV, frozen head)

Rows that `mask` leaves out are not run. On a GPU rows with c = 0 are found only where that needs no
wait: when the coefficients are known beforehand and the inputs were given on the CPU; and they are
run apart only from some hundred of them on, since that reads the weight once more. Elsewhere n
counts them. Held at a time: one piece of logits (`chunk_bytes`), and with more than one piece an
fp32 sum of dW, on a GPU until backward, which rounds it together with the upstream gradient.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dispatch import without_autocast
from ..forward_mode import refuse_tangents
from ..logprob.checks import check_token_ids, check_token_range
from ..logprob.types import accumulation_dtype
from ..loss.checks import check_inputs
from ..loss.packed import pack_rows
from ..loss.rloo_objective import scaled_gradient, with_advantages, with_known_kl
from ..loss.types import (
    TABLE_FIELDS,
    LossInputs,
    LossOptions,
    Objective,
    common_device,
    flat_inputs,
    option_values,
)
from ..transfer import to_device
from .checks import check_head
from .chunked_loss import ChunkedLoss
from .gradients import needed_gradients, weight_sum_dtype
from .piece import pieces_of, planned_rows
from .types import LMHead
from .vocab_split import open_split, split_arguments, split_labels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.library.custom_op("rloo_kernels::linear_rloo", mutates_args=())
def _fused_linear_rloo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor | None,
    advantages: Tensor | None,
    token_advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    group: str | None,
    shard: list[int],
    num_generations: int,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    denominator: float,
    advantage: str,
    kl: str,
    level: str,
    token_mean: bool,
    normalize: bool,
    want_entropy: bool,
    need: list[bool],
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, coefficients, table, log-probs, entropies, dX, dW, db); the unwanted ones empty.

    `need`: whether hidden, weight and bias get a gradient; `size`: rows of a piece; group, shard:
    `SplitArguments`. The inputs (rewards ... mask) lie on one device, that of `hidden` or the CPU.
    """
    num_tokens, index = len(token_ids), None
    flags, weight_dtype = (need[0], need[1], need[2]), weight_sum_dtype(hidden, num_tokens, size)
    inputs = LossInputs(rewards, advantages, token_advantages, old_logps, ref_logps, None)
    if mask is not None:  # rows left out are not run: what follows sees only those kept
        kept = mask.nonzero().squeeze(1)
        before = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.cumsum(0)])
        cu_seqlens = before[cu_seqlens.to(mask.device)]
        inputs = LossInputs(*inputs[:2], *(None if x is None else x[kept] for x in inputs[2:]))
        index = to_device(kept, hidden.device)
        hidden, token_ids = hidden[index], token_ids[index]
    head = LMHead(weight, bias, temperature, softcap, logit_scale)
    split = open_split(group, shard)
    check_token_range(token_ids, weight.shape[0] if split is None else split.vocab_size)
    labels = token_ids if split is None else split_labels(hidden, head, token_ids, split)
    options = LossOptions(
        num_generations, beta, epsilon_low, epsilon_high, denominator, advantage, kl, level,
        token_mean, normalize,
    )  # fmt: skip
    per_rank = weight.shape if split is None else (split.rows_per_rank, weight.shape[1])
    made = ChunkedLoss(
        hidden, head, labels, cu_seqlens, inputs, options, want_entropy,
        flags, pieces_of(hidden, per_rank, flags, size), weight_dtype,
    ).run()  # fmt: skip
    if split is not None and made.grad_hidden is not None:
        split.sum_hidden(made.grad_hidden)

    def in_place(x: Tensor | None) -> Tensor:  # (kept, ...) -> (N, ...)
        if x is None:
            return hidden.new_empty(0)
        if index is None:
            return x
        return x.new_zeros(num_tokens, *x.shape[1:]).index_copy_(0, index, x)

    return (
        made.table[0].sum() / denominator,
        in_place(made.coefficients),
        made.table,
        in_place(made.logps),
        in_place(made.entropy) if want_entropy else made.logps.new_empty(0),
        in_place(made.grad_hidden),
        hidden.new_empty(0) if made.grad_weight is None else made.grad_weight,
        hidden.new_empty(0) if made.grad_bias is None else made.grad_bias,
    )


@_fused_linear_rloo_loss.register_fake
def _fused_linear_rloo_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    want_entropy, need, size = args[-3:]
    logps = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    table = logps.new_empty(len(TABLE_FIELDS), cu_seqlens.shape[0] - 1)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, weight_sum_dtype(hidden, hidden.shape[0], size), hidden.dtype)
    grads = (
        hidden.new_empty(shape, dtype=dtype) if wanted else hidden.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, need, strict=True)
    )
    entropy = torch.empty_like(logps) if want_entropy else logps.new_empty(0)
    return (
        logps.new_empty(()), torch.empty_like(logps), table, torch.empty_like(logps), entropy,
        *grads,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.need = inputs[-2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:], *inputs[:3])


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    if grad is None:
        return (None,) * 29
    # looking at the number is free on a CPU, and saves a copy of the weight gradient
    plain = type(grad) is Tensor and not torch.is_grad_enabled() and grad.device.type == "cpu"
    is_one = plain and float(grad) == 1.0
    found = (
        (g if is_one else scaled_gradient(g, grad, x)) if wanted else None
        for g, x, wanted in zip(grads, inputs, ctx.need, strict=True)
    )
    return (*found, *(None,) * 26)


_fused_linear_rloo_loss.register_autograd(_differentiate, setup_context=_setup_context)


def fused_linear_rloo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    token_advantages: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    group: ProcessGroup | str | None = None,
    vocab_offset: int = 0,
    vocab_size: int | None = None,
    sum_hidden_grad: bool = True,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    **options: Any,
) -> Objective:
    """The RLOO loss from the last hidden states, with the gradients made in forward.

    Shapes: packed hidden (N, D), token_ids (N,), cu_seqlens (R + 1,) (on the CPU, to spare a GPU a
    wait), or padded hidden (R, T, D), token_ids (R, T) with mask (R, T); hidden states are those
    that predict the tokens. weight (V, D), bias (V,). The inputs (rewards ... mask) and the
    `LossOptions` are those of `rloo_objective`, the head's options those of `linear_logprob`. The
    loss is differentiable in hidden, weight and bias; the gradients are made when they are asked
    for (requires_grad, and gradients enabled) and backward scales them. The result does not depend
    on `chunk_bytes`, the bound on the logits alive at one time, beyond rounding. None: 384 MiB in
    fp32, 768 MiB in bf16 and fp16; on a GPU all in one piece of at most 8 GiB, or pieces of 4 or 2
    GiB, while four times that is free.

    With old_logps, beta and rewards, the KL in the reward is that of the present policy, or with
    kl_policy="sampling" that of old_logps, as in RLOOTrainer and TRL: see `rloo_objective`.

    With `group`, weight and bias are this rank's rows of a split vocabulary, as in
    `linear_logprob`; everything else is the same on all ranks.

    On a GPU, inputs that lie on the CPU are copied without a wait, and only in them are rows with
    coefficient 0 looked for, which are then skipped. A mask on the GPU waits for the device.

    Raises ValueError for shapes, dtypes and options that do not fit together and for token ids
    outside [0, V); on a GPU, where checking the ids would wait for the device, the loss is nan.
    """
    checked = LossOptions(**options)
    check_head(hidden, weight, bias, temperature, softcap)
    shape = hidden.shape[:-1]
    check_token_ids(token_ids, shape)
    num_rows, bounds = pack_rows(token_ids, cu_seqlens)
    if cu_seqlens is None:
        bounds = torch.arange(num_rows + 1) * token_ids.shape[1]
    inputs = LossInputs(rewards, advantages, token_advantages, old_logps, ref_logps, mask)
    refuse_tangents("fused_linear_rloo_loss", hidden, weight, bias, *inputs)
    check_inputs(inputs, shape, num_rows, checked)
    # the op moves what lies on the CPU itself: it looks at it first
    inputs = flat_inputs(inputs, hidden, common_device(inputs, hidden))
    inputs, checked, made = with_known_kl(inputs, bounds, checked)
    flat = hidden.reshape(-1, hidden.shape[-1])
    split = split_arguments(weight, group, vocab_offset, vocab_size, sum_hidden_grad)
    need = list(needed_gradients(hidden, weight, bias))
    with without_autocast(hidden):
        loss, coefficients, table, logps, entropy, *_ = _fused_linear_rloo_loss(
            flat,
            weight,
            bias,
            token_ids.reshape(-1).long(),
            bounds,
            *inputs,
            float(temperature),
            softcap,
            float(logit_scale),
            split.group,
            split.shard,
            *option_values(checked, num_rows),
            return_entropy,
            need,
            planned_rows(flat, weight, chunk_bytes, need[1], split),
        )
    objective = Objective(
        loss,
        coefficients.view(shape),
        *table.unbind(0),
        logps=logps.view(shape),
        entropy=entropy.view(shape) if return_entropy else None,
    )
    return with_advantages(objective, made)
