"""Hidden states x lm_head -> log-probability of one token per row and the row's entropy, never [N,
V].

    z = softcap(logit_scale (h W^T + bias)) / tau          softcap(x) = c tanh(x / c)
    log p(y) = z_y - log sum_v exp(z_v)                    H = - sum_v p_v log p_v

Letters: N rows, D hidden size, V vocabulary. The rows are worked through in pieces (`head.py`);
what lives at one time is one piece of logits. Matrix products run in the inputs' dtype (autocast
does not reach into the op), statistics and the sum of the weight gradient in fp32.

FLOPs, chosen by what requires a gradient:

    nothing                2NDV
    hidden only            4NDV in forward (dX is linear in the upstream gradient, so it is made
                           there and scaled in backward), nothing in backward
    weight, one piece      2NDV + 4NDV: the piece's weights are kept for backward
    weight, more pieces    2NDV + 6NDV: backward makes the logits again
    through the entropy    backward makes the logits again where it would not have to otherwise

`fused_linear_rloo_loss` knows the coefficients in forward and never needs the fourth product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import (
    Gradients,
    Head,
    Weights,
    forward_piece,
    piece_rows,
    pieces,
    weights_are_scaled,
    weights_width,
)
from .logprob import accumulation_dtype, check_temperature, check_token_ids, check_token_range


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    """Raise ValueError for hidden (..., D), weight (V, D), bias (V,) that do not fit together."""
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, D) and weight (V, D) with the same D, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}.")
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(f"hidden, weight and bias must have the same dtype, got {dtypes}.")
    check_temperature(temperature)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None for none, got {softcap}.")


def needed_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of them a gradient is wanted for, now."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and x is not None and x.requires_grad for x in tensors)


def forward_rows(
    hidden: Tensor, head: Head, token_ids: Tensor, size: int, want_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(log-probs (N,), entropies (N,) or empty) without a gradient, `size` rows at a time: 2NDV."""
    logps = hidden.new_zeros(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    entropy = torch.zeros_like(logps) if want_entropy else logps.new_empty(0)
    for rows in pieces(hidden.shape[0], size):
        found, _ = forward_piece(hidden[rows], head, token_ids[rows], want_entropy=want_entropy)
        logps[rows] = found.logps
        if want_entropy:
            entropy[rows] = found.entropy
    return logps, entropy


def _select(keep: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """(numbers of the rows kept, those rows of each tensor)."""
    if keep is None:
        return None, tensors
    index = keep.nonzero().squeeze(1)
    return index, tuple(x[index] for x in tensors)


def _spread(values: Tensor, index: Tensor | None, num_rows: int) -> Tensor:
    """Rows put back where they were taken from, 0 elsewhere."""
    if index is None:
        return values
    return values.new_zeros((num_rows, *values.shape[1:])).index_copy_(0, index, values)


def _saves(need: list[bool], num_rows: int, size: int) -> str:
    """What forward keeps so that backward need not make the logits again."""
    if not any(need) or num_rows == 0:
        return "nothing"
    if need == [True, False, False]:
        return "unit gradient"
    return "weights" if num_rows <= size else "nothing"


@torch.library.custom_op("rloo_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    want_entropy: bool,
    need: list[bool],
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropies, saved, row scale of what was saved)."""
    head = Head(weight, bias, temperature, softcap, logit_scale)
    num_rows = hidden.shape[0]
    saves = _saves(need, num_rows, size)
    index, (hidden, token_ids) = _select(keep, hidden, token_ids)
    check_token_range(token_ids, weight.shape[0])
    saved, row_scale = hidden.new_empty(0), hidden.new_empty(0, dtype=torch.float32)
    if saves == "weights":
        saved = hidden.new_empty(0, weights_width(hidden, weight))  # if the mask keeps no row
    if saves == "nothing":
        logps, entropy = forward_rows(hidden, head, token_ids, size, want_entropy)
    else:
        logps = hidden.new_zeros(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
        entropy = torch.zeros_like(logps) if want_entropy else logps.new_empty(0)
        unit = Gradients(hidden, head, (saves == "unit gradient", False, False), 1)
        for rows in pieces(hidden.shape[0], size):
            part = hidden[rows]
            found, weights = forward_piece(
                part, head, token_ids[rows], want_entropy=want_entropy, want_weights=True
            )
            assert weights is not None
            logps[rows] = found.logps
            if want_entropy:
                entropy[rows] = found.entropy
            if saves == "unit gradient":
                unit.add(rows, part, weights, None)
            else:
                saved = weights.whole()
                row_scale = row_scale if weights.row_scale is None else weights.row_scale
        if saves == "unit gradient":
            assert unit.hidden is not None
            saved = unit.hidden
    if want_entropy:
        entropy = _spread(entropy, index, num_rows)
    return _spread(logps, index, num_rows), entropy, saved, row_scale


@_linear_logprob.register_fake
def _(hidden, weight, bias, ids, keep, temperature, softcap, scale, want_entropy, need, size):
    num_rows = hidden.shape[0]
    logps = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden.dtype))
    entropy = torch.empty_like(logps) if want_entropy else logps.new_empty(0)
    saves = _saves(need, num_rows, size)
    saved = hidden.new_empty(0)
    if saves != "nothing":
        kept = num_rows if keep is None else torch.library.get_ctx().new_dynamic_size()
        unit = saves == "unit gradient"
        width = hidden.shape[1] if unit else weights_width(hidden, weight)
        saved = hidden.new_empty(kept, width)
    scaled = saves == "weights" and weights_are_scaled(hidden, weight)
    row_scale = hidden.new_empty(saved.shape[0] if scaled else 0, dtype=torch.float32)
    return logps, entropy, saved, row_scale


@torch.library.custom_op("rloo_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    keep: Tensor | None,
    saved: Tensor,
    row_scale: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    need: list[bool],
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(hidden, weight, bias), empty where not asked for."""
    head = Head(weight, bias, temperature, softcap, logit_scale)
    num_rows = hidden.shape[0]
    saves = _saves(need, num_rows, size)
    index, (hidden, token_ids) = _select(keep, hidden, token_ids)
    if index is not None:
        grad, grad_entropy = (None if g is None else g[index] for g in (grad, grad_entropy))
    if grad_entropy is None and saves == "unit gradient":
        assert grad is not None
        found = ((saved * grad[:, None]).to(hidden.dtype), None, None)
    else:
        flags = (need[0], need[1], need[2])
        sums = Gradients(hidden, head, flags, -(-hidden.shape[0] // size))
        if grad_entropy is None and saves == "weights":
            matrix = saved[:, : weight.shape[0]]
            weights = Weights(matrix, row_scale if row_scale.numel() else None)
            sums.add(slice(None), hidden, weights, grad)
        else:
            _recompute(sums, hidden, head, token_ids, grad, grad_entropy, size)
        found = sums.finish()
    grads = [hidden.new_empty(0) if g is None else g for g in found]
    if need[0]:
        grads[0] = _spread(grads[0], index, num_rows)
    return grads[0], grads[1], grads[2]


def _recompute(
    sums: Gradients,
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    size: int,
) -> None:
    for rows in pieces(hidden.shape[0], size):
        upstream = None
        if grad_entropy is not None:
            g = torch.zeros_like(grad_entropy) if grad is None else grad
            upstream = (g[rows], grad_entropy[rows])
        part = hidden[rows]
        _, weights = forward_piece(
            part, head, token_ids[rows], want_weights=True, upstream=upstream
        )
        assert weights is not None
        coefficients = grad[rows] if upstream is None and grad is not None else None
        sums.add(rows, part, weights, coefficients)


@_linear_logprob_backward.register_fake
def _(hidden, weight, bias, ids, keep, saved, row_scale, grad, gh, t, cap, scale, need, size):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, need, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, temperature, softcap, logit_scale, _, need, size = inputs
    ctx.options = (temperature, softcap, logit_scale, need, size)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.has_entropy = output[1].shape[0] == output[0].shape[0]


def _differentiate(ctx, grad, grad_entropy, _saved, _row_scale):
    if not ctx.has_entropy:
        grad_entropy = None
    need = ctx.options[3]
    found: tuple[Tensor | None, ...] = (None, None, None)
    given = grad if grad is not None else grad_entropy
    if given is not None:
        with torch.autocast(given.device.type, enabled=False):
            grads = _linear_logprob_backward(*ctx.saved_tensors, grad, grad_entropy, *ctx.options)
        found = tuple(g if wanted else None for g, wanted in zip(grads, need, strict=True))
    return (*found, *(None,) * 8)


_linear_logprob.register_autograd(_differentiate, setup_context=_setup_context)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(logit_scale (h W^T + bias)) / temperature) at one token per row, never
    [N, V].

    Shapes: hidden (N, D), weight (V, D), bias (V,), token_ids and mask (N,); returns log-probs
    (N,) in fp32, with `return_entropy` also the entropies (N,) in nats; both are differentiable.
    N = 0 is fine. Rows where `mask` is False are not run: they give 0 and get no gradient (on a
    GPU, finding them waits for the device). `chunk_bytes` bounds the logits alive at one time;
    the result does not depend on it, beyond rounding. FLOPs: see the head of this file.

    Raises ValueError for shapes and dtypes that do not fit, a temperature or softcap that is not
    positive, and token ids outside [0, V); on a GPU, where looking at the ids would wait for the
    device, such a row's log-prob is nan.
    """
    check_head(hidden, weight, bias, temperature, softcap)
    shape = hidden.shape[:1]
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be (N, D), got {tuple(hidden.shape)}.")
    check_token_ids(token_ids, shape)
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must be {tuple(shape)}, got {tuple(mask.shape)}.")
    with torch.autocast(hidden.device.type, enabled=False):
        logps, entropy, *_ = _linear_logprob(
            hidden,
            weight,
            bias,
            token_ids.long(),
            None if mask is None else mask.bool(),
            float(temperature),
            softcap,
            float(logit_scale),
            return_entropy,
            list(needed_gradients(hidden, weight, bias)),
            piece_rows(hidden, weight.shape[0], chunk_bytes),
        )
    return (logps, entropy) if return_entropy else logps
