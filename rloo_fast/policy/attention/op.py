"""Attention over segments as one torch op: what serves a CPU, and what no GPU kernel serves.

T tokens in one row; segment s owns bounds[s]:bounds[s + 1] and sees its path, from the first of its
parents on, then itself, causally. Segments come depth first. Shapes: q (1, H, T, d), k and v
(1, Hkv, T, d); out (1, T, H, d), lse (1, T, H).

    out_i = sum_j softmax_j(softcap(scale q_i.k_j)) v_j     j in path(s), or j in s and j <= i
    position(i) - position(j) < window, positions counted along the path

On a CPU without a soft-cap torch's flash kernel runs every part: segments against themselves,
causally, and all that continues a segment, directly or not, against it in one unmasked call, with
no copy of its keys: such segments are neighbours. The parts (o1, lse1) and (o2, lse2) of a query
merge as

    lse = log(e^lse1 + e^lse2)      out = e^(lse1 - lse) o1 + e^(lse2 - lse) o2

and the backward of a part, given the merged out and lse, is its exact share of the gradient.
Segments that a window cuts, a soft-cap, and other devices take the formula (`formula.py`,
which bounds the scores and masks it holds); the flash kernel holds some 100 KiB per thread. Nothing
here is of size [T, T].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...batching.segments import joined, seen_ranges
from .formula import AttentionScore, Path, formula_backward, formula_forward, statistics_dtype

SHORT = 16  # tokens; up to here segments share padded calls, whose padding costs less than calls

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Batch(NamedTuple):
    """Short segments as the rows of one padded causal call; padding repeats a row's last token."""

    shape: tuple[int, int]  # rows, width
    index: Tensor  # (rows * width,) the token of every place
    places: Tensor  # (n,) the places that are no padding
    tokens: Tensor  # (n,) and their tokens


class Part(NamedTuple):
    """Queries start:stop against keys first:last."""

    start: int
    stop: int
    first: int
    last: int


class Plan(NamedTuple):
    """The calls of one forward or backward: `own` and `batches` cover what `formula` does not."""

    own: list[Part]  # segments against themselves, causally: first:last is start:stop
    batches: list[Batch]
    shared: list[Part]  # runs of segments start:stop against the one they continue, first:last
    formula: list[Path]


@functools.lru_cache(maxsize=16)  # the layers of a model ask for the same one
def plan_calls(
    bounds: tuple[int, ...], parents: tuple[int, ...], window: int | None, flash: bool
) -> Plan:
    """`flash`: whether the flash kernel may run what no window cuts."""
    plan = Plan([], [], [], [])
    short: dict[int, list[tuple[int, int]]] = {}
    runs: dict[tuple[int, int], Part] = {}  # keys: the newest run that sees them
    for s, path in enumerate(seen_ranges(bounds, parents)):
        start, stop = bounds[s], bounds[s + 1]
        if start == stop:
            continue
        whole = Path(start, stop, tuple(joined(path)))
        if not flash or (window is not None and whole.length + stop - start > window):
            plan.formula.append(whole)
            continue
        if stop - start > SHORT:
            plan.own.append(Part(start, stop, start, stop))
        else:  # widths up to 4, 8, ...
            short.setdefault((stop - start - 1) // 4, []).append((start, stop))
        for first, last in path:
            if first < last:
                run = runs.get((first, last))
                if run is None or run.stop != start:
                    if run is not None:
                        plan.shared.append(run)
                    run = Part(start, stop, first, last)
                runs[first, last] = run._replace(stop=stop)
    plan.shared.extend(runs.values())
    plan.shared.sort()
    for rows in short.values():
        plan.batches.append(_pad(rows))
    return plan


def _pad(rows: list[tuple[int, int]]) -> Batch:
    starts, stops = torch.tensor(rows).split(1, dim=1)  # (rows, 1)
    index = starts + torch.arange(int((stops - starts).max()))  # (rows, width)
    places = (index < stops).flatten().nonzero().squeeze(-1)
    tokens = index.flatten()[places]
    rows_width = (index.shape[0], index.shape[1])
    return Batch(rows_width, index.minimum(stops - 1).flatten(), places, tokens)


def forward_segments(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, parents: Tensor, score: AttentionScore
) -> tuple[Tensor, Tensor]:
    """(out, lse): attention outputs and log-sums of exponentials, see the module's docstring."""
    plan = _plan(q, bounds, parents, score)
    q, k, v = (_token_major(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))
    for part in plan.own:
        i = slice(part.start, part.stop)
        found = _flash(*_swap(q[:, i], k[:, i], v[:, i]), 0.0, True, scale=score.scale)
        out[:, i], lse[:, i] = _swap(*found)
    for batch in plan.batches:
        found = _flash(*(_gather(x, batch) for x in (q, k, v)), 0.0, True, scale=score.scale)
        for whole, rows in zip((out, lse), found, strict=True):
            whole[0].index_copy_(0, batch.tokens, _ungather(rows, batch))
    for part in plan.shared:
        i, j = slice(part.start, part.stop), slice(part.first, part.last)
        found = _flash(*_swap(q[:, i], k[:, j], v[:, j]), 0.0, False, scale=score.scale)
        shared_out, shared_lse = _swap(*found)
        share = torch.sigmoid(shared_lse - lse[:, i]).unsqueeze(-1)  # e^(lse2 - lse)
        out[:, i] = torch.lerp(out[:, i].to(share.dtype), shared_out.to(share.dtype), share)
        lse[:, i] = torch.logaddexp(lse[:, i], shared_lse)
    for path in plan.formula:
        formula_forward(q, k, v, path, score, out, lse)
    return out, lse


def backward_segments(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    parents: Tensor,
    score: AttentionScore,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), token-major like out. What several parts add to is summed in fp32."""
    plan = _plan(q, bounds, parents, score)
    q, k, v = (_token_major(x) for x in (q, k, v))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    # every token is in one part of its own, which writes; what sees another segment adds
    make = torch.zeros if plan.formula else torch.empty
    dq, dk, dv = sums = [make(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v)]
    for batch in plan.batches:
        args = [_gather(x, batch) for x in (q, k, v, out, lse)]
        rows = grad.new_zeros(*batch.shape, *grad.shape[2:])  # no gradient comes from padding
        rows.flatten(0, 1).index_copy_(0, batch.places, grad[0].index_select(0, batch.tokens))
        found = _flash_backward(*_swap(rows), *args, 0.0, True, scale=score.scale)
        for whole, share in zip(sums, found, strict=True):
            whole[0].index_copy_(0, batch.tokens, _ungather(share, batch).to(whole.dtype))
    for parts, write in ((plan.own, Tensor.copy_), (plan.shared, Tensor.add_)):
        for part in parts:
            i, j = slice(part.start, part.stop), slice(part.first, part.last)
            args = _swap(grad[:, i], q[:, i], k[:, j], v[:, j], out[:, i], lse[:, i])
            found = _flash_backward(*args, 0.0, parts is plan.own, scale=score.scale)
            for whole, share, place in zip(sums, _swap(*found), (i, j, j), strict=True):
                write(whole[:, place], share)
    for path in plan.formula:
        formula_backward(q, k, v, path, score, grad, out, lse, (dq, dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _plan(q: Tensor, bounds: Tensor, parents: Tensor, score: AttentionScore) -> Plan:
    numbers = tuple(bounds.tolist())
    assert (numbers[0], numbers[-1]) == (0, q.shape[2]), (numbers[0], numbers[-1], q.shape)
    flash = q.device.type == "cpu" and score.softcap is None
    return plan_calls(numbers, tuple(parents.tolist()), score.window, flash)


def _token_major(x: Tensor) -> Tensor:  # (1, H, T, d) -> (1, T, H, d), d dense for the kernels
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _swap(*tensors: Tensor) -> list[Tensor]:  # (1, n, H, ...) <-> (1, H, n, ...)
    return [x.transpose(1, 2) for x in tensors]


def _gather(x: Tensor, batch: Batch) -> Tensor:  # (1, T, H, ...) -> (rows, H, width, ...)
    return x[0].index_select(0, batch.index).view(*batch.shape, *x.shape[2:]).transpose(1, 2)


def _ungather(x: Tensor, batch: Batch) -> Tensor:  # (rows, H, width, ...) -> (n, H, ...)
    return x.transpose(1, 2).flatten(0, 1).index_select(0, batch.places)


@torch.library.custom_op("rloo_fast::segment_attention", mutates_args=())
def segment_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    parents: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return forward_segments(q, k, v, bounds, parents, AttentionScore(scale, window, softcap))


@torch.library.custom_op("rloo_fast::segment_attention_backward", mutates_args=())
def segment_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    parents: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    score = AttentionScore(scale, window, softcap)
    with torch.autocast(q.device.type, enabled=False):
        return backward_segments(grad, q, k, v, out, lse, bounds, parents, score)


@segment_attention_op.register_fake
def _(q, k, v, *_):
    out = q.new_empty(q.transpose(1, 2).shape)
    return out, q.new_empty(out.shape[:3], dtype=statistics_dtype(q.dtype))


@segment_attention_backward_op.register_fake
def _(grad, q, k, v, *_):
    return tuple(x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    grads = segment_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*_swap(*grads), *(None,) * 5)


segment_attention_op.register_autograd(_differentiate, setup_context=_setup_context)
