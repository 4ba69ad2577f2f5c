"""Who does the job of `benchmarks.attention`, its inputs, and their float64 reference.

T tokens when every prompt is there once, the row of the layout `shared_prefix`: prompt, its
completions, next prompt, ... A provider lays them out as n places, may repeat them and pad; results
come back per token, with its copies summed. H query heads and Hkv key heads of size d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common.models import SHAPES, Shape
from benchmarks.loss import batches
from benchmarks.loss.run import DTYPES, poison
from rloo_fast.batching.segments import make_segments
from rloo_fast.policy.attention.flash import choose_backend, flex_segments, varlen_attention
from rloo_fast.policy.attention.interface import segment_attention_forward
from rloo_fast.policy.attention.op import segment_attention_op
from rloo_fast.records import Segments

SCORE_BYTES = 64 << 20  # of one piece of the reference
NO_MODULE = nn.Identity()


@dataclass(frozen=True)
class Case:
    """One layer, and the completions of a shape of `step_models`.

    As in training, the last token of a completion is not run: nothing is predicted from it.
    """

    shape_name: str
    num_prompts: int
    num_generations: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        options = {"window": self.window, "soft-cap": self.softcap}
        told = "".join(f" {name}={value:g}" for name, value in options.items() if value is not None)
        return (
            f"{self.shape_name} P={self.num_prompts} K={self.num_generations} "
            f"prompt={self.shape.prompt} H={self.heads}/{self.kv_heads} d={self.head_dim}{told}"
        )

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name].with_sizes(self.num_generations, self.num_prompts)

    @cached_property
    def rows(self) -> list[tuple[range, range]]:
        """(tokens of its prompt, its own tokens) of every completion, prompt-major."""
        found, prompt, end = [], range(0), 0
        for i, length in enumerate(self.shape.lengths()):
            if i % self.num_generations == 0:
                prompt = range(end, end + self.shape.prompt)
                end = prompt.stop
            found.append((prompt, range(end, end + length - 1)))
            end += length - 1
        return found

    @property
    def prompts(self) -> list[range]:
        return [prompt for prompt, _ in self.rows[:: self.num_generations]]

    @property
    def num_tokens(self) -> int:
        return self.rows[-1][1].stop

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (T, H, d), k and v (T, Hkv, d), gradient of the output (T, H, d)."""
        generator = torch.Generator().manual_seed(0)
        many, few = self.heads, self.kv_heads
        sizes = [(self.num_tokens, h, self.head_dim) for h in (many, few, few, many)]
        made = [torch.randn(size, generator=generator) for size in sizes]
        q, k, v, grad = (x.to(self.device, DTYPES[self.dtype]) for x in made)
        return q, k, v, grad

    def visible(self, first: int, num_queries: int, num_keys: int) -> Tensor:  # (n, m) bool
        """Whether queries first, first + 1, ... of a sequence see its keys 0, 1, ..."""
        queries = torch.arange(first, first + num_queries, device=self.device)
        behind = queries[:, None] - torch.arange(num_keys, device=self.device)
        return (behind >= 0) & (behind < (self.window or first + num_queries))

    def flops(self) -> int:
        """What forward and backward need; see `benchmarks.attention`."""

        def pairs(n: int) -> int:  # of n causal tokens
            w = min(n, self.window or n)
            return w * (w + 1) // 2 + (n - w) * w

        prompt = self.shape.prompt
        total = self.num_prompts * pairs(prompt)
        total += sum(pairs(prompt + len(own)) - pairs(prompt) for _, own in self.rows)
        return 14 * self.heads * self.head_dim * total


def formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """q (..., H, n, d), k and v (..., Hkv, m, d) -> (..., H, n, d), statistics in fp32 or fp64."""
    k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    statistics = torch.promote_types(q.dtype, torch.float32)
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=statistics)
    return p.to(q.dtype) @ v


def reference(case: Case) -> batches.Reference:
    """Float64 output and gradients, in pieces of queries whose scores fill SCORE_BYTES."""
    q, k, v, grad = (x.double() for x in case.tensors)
    out, *sums = (torch.zeros_like(x) for x in (q, q, k, v))
    for queries, keys in _pieces(case):
        leaves = [
            x[i].transpose(0, 1).requires_grad_() for x, i in ((q, queries), (k, keys), (v, keys))
        ]
        visible = case.visible(len(keys) - len(queries), len(queries), len(keys))
        found = formula(*leaves, visible, case.softcap)
        out[queries] = found.detach().transpose(0, 1)
        grads = torch.autograd.grad(found, leaves, grad[queries].transpose(0, 1))
        for total, places, share in zip(sums, (queries, keys, keys), grads, strict=True):
            total.index_add_(0, places, share.transpose(0, 1))
    return batches.Reference(_named(case, out, sums))


def _pieces(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries, and the keys of their sequence from its start up to the last query."""
    sequences = [(range(0), prompt) for prompt in case.prompts] + case.rows
    for seen, own in sequences:
        step = max(1, SCORE_BYTES // (8 * case.heads * (len(seen) + len(own))))
        for start in range(0, len(own), step):
            rows = own[start : start + step]
            keys = [*seen, *own[: start + len(rows)]]
            yield torch.tensor(rows, device=case.device), torch.tensor(keys, device=case.device)


def _named(case: Case, out: Tensor, grads: list[Tensor]) -> dict[str, Tensor]:
    completions = torch.tensor([i for _, own in case.rows for i in own], device=out.device)
    names = ("grad_q", "grad_k", "grad_v")
    return {"out": out[completions], **dict(zip(names, grads, strict=True))}


class Plan(NamedTuple):
    """How a provider runs a case: n places, and attention over them."""

    index: Tensor  # (n,) the token of every place, -1: padding
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]  # (n, H, d), (n, Hkv, d) x 2 -> (n, H, d)


def chosen(q, k, v, segments: Segments, scale, window, softcap) -> Tensor:
    return segment_attention_forward(
        NO_MODULE, q, k, v, None, scale, 0.0, window, softcap, segments
    )[0]


def by_op(q, k, v, segments: Segments, scale, window, softcap) -> Tensor:
    return segment_attention_op(
        q, k, v, segments.bounds, segments.parents, scale, window, softcap
    )[0]  # fmt: skip


def ours(case: Case, attend: Callable[..., Tensor] = chosen, shared: bool = True) -> Plan:
    """One line. `attend`: (1, H, T, d), (1, Hkv, T, d) twice, ... -> (1, T, H, d)."""
    parts: list[tuple[list[int], int]] = []  # tokens of every segment, and the one it continues
    number = -1
    for i, (prompt, own) in enumerate(case.rows):
        if not shared:
            parts.append(([*prompt, *own], -1))
            continue
        if i % case.num_generations == 0:
            number = len(parts)
            parts.append(([*prompt], -1))
        parts.append(([*own], number))
    tokens, parents = zip(*parts, strict=True)
    segments = make_segments([len(x) for x in tokens], parents, case.device)
    options = (segments, case.head_dim**-0.5, case.window, case.softcap)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), *options)[0]

    return Plan(torch.tensor([i for x in tokens for i in x], device=case.device), forward)


def padded(case: Case) -> Plan:
    grid = _grid(case, [[*prompt, *own] for prompt, own in case.rows])
    plain = case.window is None and case.softcap is None
    mask = None if plain else case.visible(0, grid.shape[1], grid.shape[1])

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, grid.shape).transpose(1, 2) for x in (q, k, v))
        out = sdpa(q, k, v, mask) if case.softcap is None else formula(q, k, v, mask, case.softcap)
        return out.transpose(1, 2).flatten(0, 1)

    return Plan(grid.flatten(), forward)


def concatenated(case: Case) -> Plan:
    grids = [_grid(case, case.prompts), _grid(case, [own for _, own in case.rows])]
    (_, length), (_, width) = (grid.shape for grid in grids)
    prompt_mask = None if case.window is None else case.visible(0, length, length)
    mask = case.visible(length, width, length + width)
    sizes = [grid.numel() for grid in grids]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        halves = (x.split(sizes) for x in (q, k, v))
        prompts, own = (
            [x.unflatten(0, grid.shape).transpose(1, 2) for x in half]  # (rows, H, width, d)
            for grid, half in zip(grids, zip(*halves, strict=True), strict=True)
        )
        for i in (1, 2):
            copies = prompts[i].repeat_interleave(case.num_generations, 0)
            own[i] = torch.cat([copies, own[i]], 2)
        found = (sdpa(*prompts, prompt_mask), sdpa(*own, mask))
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in found])

    return Plan(torch.cat([grid.flatten() for grid in grids]), forward)


def _grid(case: Case, lines: list) -> Tensor:  # (lines, longest), -1: padding
    tensors = [torch.tensor(line, dtype=torch.long, device=case.device) for line in lines]
    return pad_sequence(tensors, batch_first=True, padding_value=-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal without a mask. (rows, H, n, d), (rows, Hkv, m, d) twice -> (rows, H, n, d)."""
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # the kernel for these does not share key heads; torch would fall back to the formula
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
    )


PROVIDERS: dict[str, Callable[[Case], Plan]] = {
    "shared_prefix": ours,
    "packed": partial(ours, shared=False),
    "shared_varlen": partial(ours, attend=varlen_attention),
    "shared_flex": partial(ours, attend=flex_segments),
    "shared_sdpa": partial(ours, attend=by_op),
    "padded": padded,
    "concatenated": concatenated,
}


def unavailable(name: str, case: Case) -> str | None:
    """Why a provider does not run the case."""
    if name == "concatenated" and case.softcap is not None:
        return "SDPA has no soft-cap"
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    picked, reason = choose_backend(device, dtype, case.head_dim, softcap=case.softcap)
    if name == f"shared_{picked}":
        return "it is what shared_prefix runs"
    if name == "shared_flex":  # float32 goes to it wherever it runs
        picked, reason = choose_backend(device, torch.float32, case.head_dim)
        return None if picked == "flex" else reason
    return reason if name == "shared_varlen" else None


class Call:
    """A provider's inputs, and one forward and backward of it."""

    def __init__(self, name: str, case: Case):
        self.case, (index, self.forward) = case, PROVIDERS[name](case)
        self.real = index >= 0
        self.tokens = index[self.real]
        places = index.clamp(min=0)  # padding holds some token, and no gradient comes from it
        self.leaves = [x[places].requires_grad_() for x in case.tensors[:3]]
        # a token's gradient is shared out to its copies: exact where K is a power of two
        share = self.real / self.tokens.bincount(minlength=case.num_tokens)[places]
        grad = case.tensors[3]
        self.grad = (grad[places] * share[:, None, None]).to(grad.dtype)

    def __call__(self) -> list[Tensor]:
        out = self.forward(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)]

    def results(self) -> dict[str, Tensor]:
        """One call on poisoned memory, as the reference has it: per token, its copies summed."""
        device = torch.device(self.case.device)
        poison(device, True, sum(x.nbytes for x in self.leaves))
        try:
            found = self()
        finally:
            poison(device, False)
        out, *grads = (self._per_token(x) for x in found)
        return _named(self.case, out, grads)

    def _per_token(self, x: Tensor) -> Tensor:  # (n, ...) -> (T, ...)
        total = x.new_zeros(self.case.num_tokens, *x.shape[1:], dtype=torch.float64)
        return total.index_add_(0, self.tokens, x[self.real].double())


def memory_step(name: str, case: dict) -> Call:
    """The step of one provider, for the memory process."""
    return Call(name, Case(**case))
