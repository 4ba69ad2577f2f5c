"""What the tests of several kernels share: plain torch heads, the error bound, cost counters."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]
NAN = math.nan


@pytest.fixture
def nan_in_new_memory():
    """torch.empty holds NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def plain_logprobs(logits, ids, temperature=1.0):
    """(log-probs, entropies) as torch alone computes them, in the dtype of `logits`."""
    logq = (logits / temperature).log_softmax(-1)
    p = logq.exp()
    entropy = -torch.where(p > 0, p * logq, 0.0).sum(-1)
    return logq.gather(-1, ids[..., None]).squeeze(-1), entropy


def plain_head(hidden, weight, ids, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """(log-probs, entropies) with [N, V] logits made in the inputs' dtype, as models do."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return plain_logprobs(z if z.dtype == torch.double else z.float(), ids, temperature)


def assert_error_at_most_twice(got: dict, torch_s: dict, exact: dict, atol: float = 1e-6) -> None:
    """err(ours, fp64) <= 2 err(torch in the same dtype, fp64) + atol, for every entry."""
    for name, want in exact.items():
        assert got[name].isfinite().all(), name
        errors = [(x[name].double() - want).abs().amax(None) if want.numel() else 0.0
                  for x in (got, torch_s)]  # fmt: skip
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        assert errors[0] <= 2 * errors[1] + atol * scale, f"{name}: {errors}"


def bounds(row_lengths) -> Tensor:
    return torch.tensor([0, *row_lengths]).cumsum(0)


class Watch(TorchDispatchMode):
    """Counts inside the ops: FLOPs of products, the largest tensor, the peak of live bytes."""

    def __init__(self):
        super().__init__()
        self.flops = self.largest = self.live = self.peak = 0
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            if func.namespace == "rloo_kernels":  # opaque: its function is run under this mode
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
            if (parts := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                return parts  # linear -> mm
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                if x.untyped_storage()._cdata not in given:  # no view, nothing written in place
                    self._count(x.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def gone(_):
            self.live -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
