"""Random segments, and masked attention over them in plain torch."""

from __future__ import annotations

import random

import pytest
import torch

from rloo_fast.policy.attention import op as attention_ops
from rloo_fast.policy.attention.interface import segment_attention_forward
from tests.support.kernel_helpers import (  # noqa: F401
    Watch,
    assert_error_at_most_twice,
    bounds,
    nan_in_new_memory,
)

SCALE = 0.3
NO_MODULE = torch.nn.Identity()


def some_segments(seed, layout="shared_prefix", lengths=(0, 1, 3, 5, 9, 18, 26, 40)):
    """(lengths, parents) of random groups: prompts of different lengths, completions that are
    empty, short and long; or of a tree, in which any segment may continue any on the path."""
    rng, found, parents = random.Random(seed), [], []
    if layout == "tree":
        path = []
        for s in range(18):
            del path[rng.randint(max(0, len(path) - 3), len(path)) :]
            found.append(rng.choice(lengths))
            parents.append(path[-1] if path else -1)
            path.append(s)
        return found, parents
    for _ in range(3):
        prompt = rng.choice(lengths[1:])
        completions = rng.choices(lengths, k=rng.choice([1, 4, 6]))
        if layout == "packed":
            found += [prompt + c for c in completions]
            parents += [-1] * len(completions)
        else:
            parents += [-1, *[len(found)] * len(completions)]
            found += [prompt, *completions]
    return found, parents


def visible(lengths, parents, window=None):  # (T, T) bool
    total = sum(lengths)
    mask, start, paths = torch.zeros(total, total, dtype=torch.bool), 0, []
    for length, parent in zip(lengths, parents, strict=True):
        before = paths[parent] if parent >= 0 else torch.arange(0)
        keys = torch.cat([before, torch.arange(start, start + length)])
        behind = torch.arange(len(before), len(keys))[:, None] - torch.arange(len(keys))
        mask[start : start + length, keys] = (behind >= 0) & (behind < (window or total))
        start += length
        paths.append(keys)
    return mask


def naive(q, k, v, mask, softcap=None):  # -> (1, T, H, d), in the dtype given
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (p @ v.repeat_interleave(group, 1)).transpose(1, 2)


def tensors(total, heads, kv_heads, dim=16, seed=0):
    """q, k, v and the output's gradient in float64, token-major in memory as models make them."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, total, h, dim, generator=g, dtype=torch.double)
            for h in (heads, kv_heads, kv_heads, heads)]  # fmt: skip
    return [*(x.transpose(1, 2) for x in made[:3]), made[3]]


def results(function, q, k, v, grad, dtype=torch.double):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, grad.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def assert_close(got, want, tolerance):
    for name, x in want.items():
        scale = max(1.0, x.abs().max().item())
        torch.testing.assert_close(
            got[name].double(), x, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def through_op(segments, window=None, softcap=None):
    return lambda q, k, v: attention_ops.segment_attention_op(
        q, k, v, segments.bounds, segments.parents, SCALE, window, softcap
    )[0]


def through_interface(segments, **options):
    return lambda q, k, v: segment_attention_forward(
        NO_MODULE, q, k, v, None, scaling=SCALE, segments=segments, **options
    )[0]


KINDS = [(None, None), (7, None), (50, None), (None, 4.0), (9, 4.0)]
kinds = pytest.mark.parametrize(("window", "softcap"), KINDS, ids=lambda x: str(x))
heads = pytest.mark.parametrize("kv_heads", [4, 2, 1])
