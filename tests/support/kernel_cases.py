"""The cases on which the Triton kernels are checked, and what plain torch makes of them.

Each case is measured three times: by a kernel in the interpreter, by torch in the same dtype, and
by torch in float64, which is taken for exact. Triton is imported by the functions that need it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class RowCase:
    """Logits (..., V) of the row kernels."""

    name: str
    dtype: str = "fp32"
    shape: tuple[int, ...] = (11, 507)
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    mask: str = "none"  # none, some, all
    logits: str = "random"  # random, huge (+-1e4), sure (p_y -> 1), impossible (-inf)
    layout: str = "plain"  # plain, slice, unaligned, transposed, in place

    @property
    def id(self) -> str:
        return f"{self.name} {self.dtype}"


def _row_cases() -> list[RowCase]:
    shapes = [(1, 1), (1, 7), (5, 507), (2, 50257), (1, 151936)]
    cases = [RowCase("127x507", "bf16", (127, 507))]
    cases += [
        RowCase("x".join(map(str, shape)), dtype, shape)
        for shape, dtype in itertools.product(shapes, DTYPES)
    ]
    for dtype in DTYPES:
        cases += [
            RowCase("some masked", dtype, mask="some"),
            RowCase("slice, masked", dtype, (3, 5, 4100), mask="some", layout="slice"),
            RowCase("in place, masked", dtype, (3, 5, 300), mask="some", layout="in place"),
        ]
    for dtype in ("fp32", "bf16"):
        cases += [
            RowCase("all masked", dtype, mask="all"),
            RowCase("no rows", dtype, (0, 507)),
            RowCase("temperature 0.01", dtype, temperature=0.01),
            RowCase("temperature 10", dtype, temperature=10.0),
            RowCase("logits +-1e4", dtype, logits="huge"),
            RowCase("p_y -> 1", dtype, logits="sure"),
            RowCase("-inf logits", dtype, (11, 9000), logits="impossible"),
            RowCase("unaligned rows", dtype, layout="unaligned"),
            RowCase("transposed", dtype, layout="transposed"),
        ]
    cases += [
        RowCase("soft-cap", softcap=5.0, temperature=0.7),
        RowCase("soft-cap, large logits", softcap=30.0, logits="huge"),
        RowCase("soft-cap, small logits", softcap=1e3, logit_scale=1e-2, shape=(5, 5000)),
        RowCase("negative scale", logit_scale=-1.3, shape=(5, 5000)),
        RowCase("soft-cap, negative scale", softcap=5.0, logit_scale=-0.5, shape=(5, 5000)),
    ]
    return cases


ROW_CASES = _row_cases()


@dataclass(frozen=True)
class HeadCase:
    """Hidden states (n, D) and lm_head (V, D) of a piece."""

    name: str
    dtype: str = "bf16"
    sizes: tuple[int, int, int] = (37, 48, 150)  # n, D, V: all off the tile of 32, 32, 64
    bias: bool = False
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ids: str = "random"  # unlikely, all unlikely: the least likely of every third row, of each;
    # likely: the likeliest, almost sure; last: of the last 22, a part of a tile
    spread: float = 3.0  # standard deviation of the logits

    @property
    def id(self) -> str:
        return f"{self.name} {self.dtype}"


def _head_cases() -> list[HeadCase]:
    cases = []
    for dtype in DTYPES:
        cases += [
            HeadCase("plain", dtype),
            HeadCase("on the tile", dtype, (32, 64, 128)),
            HeadCase("bias, negative scale", dtype, bias=True, temperature=0.7, logit_scale=-1.3),
            HeadCase("soft-cap", dtype, (33, 40, 130), True, 2.0, 3.0, 0.5),
            HeadCase("temperature 0.01", dtype, temperature=1e-2),
            HeadCase("unlikely tokens", dtype, (40, 32, 100), ids="unlikely", spread=12.0),
        ]
    cases += [
        HeadCase("one row", sizes=(1, 7, 65)),
        HeadCase("no rows", sizes=(0, 32, 64)),
        HeadCase("temperature 10", temperature=10.0),
        HeadCase("unlikely, soft-cap", sizes=(40, 32, 70), softcap=50.0, ids="unlikely", spread=60),
        HeadCase("-inf bias", bias=True, ids="unlikely"),
        HeadCase("wide", sizes=(3, 16, 700)),
        HeadCase("all unlikely", sizes=(70, 32, 100), ids="all unlikely", spread=20.0),
        HeadCase("all unlikely, wide", "fp16", (9, 32, 1200), ids="all unlikely", spread=20.0),
        HeadCase("p_y -> 1", sizes=(40, 32, 100), ids="likely", spread=6.0),
        HeadCase("last tile", ids="last"),
        HeadCase("last tile, bias", sizes=(37, 48, 1100), bias=True, ids="last"),
        HeadCase("very negative logits", bias=True, temperature=0.7),
        HeadCase("soft-cap, large logits", sizes=(40, 32, 70), softcap=30.0, spread=1e3),
    ]
    return cases


HEAD_CASES = _head_cases()


# --- what torch alone makes of them


def plain_logprobs(leaf: Tensor, ids: Tensor, case: RowCase | HeadCase) -> Numbers:
    """log-prob, 1 - p(y) and entropy of each row, statistics in fp32, in fp64 for fp64."""
    z = (leaf if leaf.dtype == torch.double else leaf.float()) * case.logit_scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    logq = (z / case.temperature).log_softmax(-1)
    p = logq.exp()
    logp = logq.gather(-1, ids[..., None]).squeeze(-1)
    entropy = -(p * torch.where(p > 0, logq, 0.0)).sum(-1)
    return {"log-prob": logp, "1 - p": -torch.expm1(logp), "entropy": entropy}


def plain_rows(
    leaf: Tensor, ids: Tensor, case: RowCase | HeadCase, upstream: tuple[Tensor, Tensor]
) -> Numbers:
    """plain_logprobs, and by autograd the gradients through the log-prob, the entropy and both."""
    leaf = leaf.detach().clone().requires_grad_()
    found = plain_logprobs(leaf, ids, case)
    g, gh = (x.to(found["entropy"].dtype).view(ids.shape) for x in upstream)
    by_logp, by_entropy = (
        torch.autograd.grad(found[name], leaf, x, retain_graph=True)[0]
        for name, x in (("log-prob", g), ("entropy", gh))
    )
    both = (found["log-prob"], found["entropy"])
    (by_both,) = torch.autograd.grad(both, leaf, (g, gh))
    gradients = {"gradient": by_logp, "gradient of H": by_entropy, "gradient of both": by_both}
    return {name: x.detach() for name, x in (found | gradients).items()}


# --- inputs


def make_rows(case: RowCase) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logits in the layout asked for, ids (N,), keep (N,) or None)."""
    torch.manual_seed(len(case.id))
    *lead, vocab = case.shape
    ids = torch.randint(vocab, (math.prod(lead),))
    x = 3 * torch.randn(case.shape)
    flat = x.view(-1, vocab)
    if case.logits == "huge":
        flat *= 3000
        flat[:, 0], flat[:, -1] = 1e4, -1e4
    elif case.logits == "sure":
        flat[torch.arange(len(ids)), ids] += torch.linspace(10, 25, len(ids))
    elif case.logits == "impossible":
        flat[torch.rand(flat.shape) < 0.3] = -torch.inf
        flat[1, :4096] = flat[2, 4096:8192] = flat[3, -808:] = -torch.inf
        flat[1, -1] = flat[2, 0] = flat[3, 0] = 1.0
        flat[4, 1:] = -torch.inf  # one token left
        flat[4, 0] = 2.0
        ids[4] = 0
    x = x.to(DTYPES[case.dtype])
    keep = None if case.mask == "none" else torch.rand(len(ids)) < (case.mask == "some") * 0.6
    if keep is not None:
        x.view(-1, vocab)[~keep] = torch.nan  # nobody looks
        ids[~keep] = 0
    return laid_out(x, case.layout), ids, keep


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x with other strides; what lies between its rows is nan."""
    if layout == "transposed":
        return x.T.contiguous().T
    wider = {"slice": (0, 1, 0), "in place": (0, 1, 0), "unaligned": (0, 1)}.get(layout)
    if wider is None:
        return x
    around = x.new_full([n + more for n, more in zip(x.shape, wider, strict=True)], torch.nan)
    view = around[:, :-1] if x.ndim == 3 else around[..., :-1]
    view.copy_(x)
    return view


def make_head(case: HeadCase) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(hidden, weight, bias, ids)."""
    torch.manual_seed(len(case.id))
    n, depth, vocab = case.sizes
    dtype = DTYPES[case.dtype]
    hidden = torch.randn(n, depth).to(dtype)
    weight = (case.spread * torch.randn(vocab, depth) / depth**0.5).to(dtype)
    bias = torch.randn(vocab).to(dtype) if case.bias else None
    ids = torch.randint(vocab, (n,))
    step = {"unlikely": 3, "all unlikely": 1}.get(case.ids)
    if step is not None:
        ids[::step] = (hidden.float() @ weight.float().T)[::step].argmin(-1)
    if case.ids == "likely":
        hidden[:, :2] = 6.0  # one direction that all rows share
        weight[::9, :2] += 1.0
        ids = (hidden.float() @ weight.float().T).argmax(-1)
    if case.ids == "last":
        ids = vocab - 1 - ids % 22
    if case.name == "very negative logits":
        assert bias is not None
        bias[:] = -3000.0
    if case.name == "-inf bias":
        assert bias is not None
        bias[:70] = -torch.inf  # a whole tile, the first, and a part of the next
        ids[:] = 70 + ids % 80
        ids[1], ids[2] = 3, 69  # tokens of probability zero among others
    return hidden, weight, bias, ids


# --- errors


def error(got: Tensor, want: Tensor) -> float:
    """The largest |got - want|; inf where one of them is nan, or infinite, and the other not."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    distance = torch.where(same, 0.0, (got - want).abs()).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    return distance.max().item() if distance.numel() else 0.0


def compared(got: Numbers, plain: Numbers, exact: Numbers, atol: float = 1e-6) -> dict[str, Any]:
    """{quantity: (error, torch's error, bound)}: twice torch's and atol of the largest number."""
    rows = {}
    for name, x in got.items():
        want = exact[name].double()
        finite = want[want.isfinite()]
        size = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        theirs = error(plain[name], want)
        rows[name] = (error(x, want), theirs, 2 * theirs + atol * size)
    return rows


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, of all numbers together."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


def worst(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each quantity the case that comes closest to its bound."""
    found: dict[str, Any] = {}
    for case in cases:
        for name, row in case.items():
            if name not in found or row[0] - row[2] > found[name][0] - found[name][2]:
                found[name] = row
    return found
