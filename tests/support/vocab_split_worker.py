"""Heads whose vocabulary is split over 2 and 3 gloo ranks, beside torch on one process.

As a script it prints errors and collectives of all cases as JSON; with the argument `kernels` those
of kernels in Triton's interpreter.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rloo_kernels import fused_linear_rloo_loss, linear_logprob, rloo_objective
from torch import Tensor

from tests.support.kernel_cases import DTYPES, Numbers, compared, plain_logprobs
from tests.support.kernel_helpers import plain_head
from tests.support.kernel_losses import LOSSES, TOKENS, make_loss

D, V, N = 24, 150, 26
SHARDS = {2: (61, 89), 3: (40, 97, 13)}  # rows of each rank
LENGTHS = [3, 0, 2, 0, 0, 0, 1, 4, 2]  # those of `make_loss`
HEAD_DEFAULTS = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
Case = dict[str, Any]

# beside options of the ops: `ids` and `bias` of `make_inputs`; which leaves are frozen; whether the
# loss is one of the entropy too; rows of a piece; rows of padding on the last rank; whether hidden
# states are rows of W themselves
LINEAR: dict[str, Case] = {
    **{dtype: {"dtype": dtype} for dtype in DTYPES},
    "entropy": {"entropy": True},
    "entropy bf16": {"dtype": "bf16", "entropy": True},
    "frozen head": {"frozen": "wb"},
    "frozen head, entropy": {"frozen": "wb", "entropy": True},
    "frozen hidden bf16": {"dtype": "bf16", "frozen": "h"},
    "no gradient bf16": {"dtype": "bf16", "frozen": "hwb"},
    "pieces": {"rows": 10},
    "pieces bf16": {"dtype": "bf16", "rows": 10, "entropy": True},
    "frozen head, pieces bf16": {"dtype": "bf16", "rows": 10, "frozen": "wb"},
    "mask": {"mask": True, "rows": 10},
    "soft-cap": {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3},
    "soft-cap bf16": {"dtype": "bf16", "softcap": 5.0, "temperature": 0.7, "logit_scale": -0.5},
    "negative scale": {"logit_scale": -1.3, "temperature": 2.0},
    "negative scale bf16": {"dtype": "bf16", "logit_scale": -1.3, "temperature": 2.0},
    "no bias": {"bias": None},
    "tied": {"bias": None, "tied": True},
    "no entropy": {"return_entropy": False},
    "ids of one rank": {"ids": "last rows", "entropy": True},
    "ids of one rank bf16": {"dtype": "bf16", "ids": "last rows"},
    "sure tokens": {"bias": "sure", "entropy": True},
    "unlikely tokens": {"bias": "unlikely", "entropy": True},
    "unlikely tokens bf16": {"dtype": "bf16", "bias": "unlikely"},
    "unlikely tokens fp16": {"dtype": "fp16", "bias": "unlikely"},
    "-inf logits": {"bias": "masked", "entropy": True},
    "-inf logits bf16": {"dtype": "bf16", "bias": "masked"},
    "-inf logits, no gradient bf16": {"dtype": "bf16", "bias": "masked", "frozen": "hwb"},
    "temperature 0.01": {"temperature": 0.01, "entropy": True},
    "padding": {"padding": 7},
    "padding of -inf": {"bias": "last rank masked"},
    "group by name": {"by_name": True},
    "hidden gradient not summed": {"sum_hidden_grad": False},
}
FUSED: dict[str, Case] = {
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    **{f"loss {name}, small pieces": {"loss": name, "rows": 4}
       for name in ("rloo-kl", "rloo-kl-normalized", "grpo", "reward-to-go", "ratio")},
    "loss rloo-kl, frozen head": {"loss": "rloo-kl", "frozen": "wb"},
    "loss rloo-kl, frozen head, small pieces": {"loss": "rloo-kl", "frozen": "wb", "rows": 4},
    "loss rloo-kl, no gradient": {"loss": "rloo-kl", "frozen": "hwb"},
    "loss rloo-kl, masked": {"loss": "rloo-kl", "mask": True},
    "loss rloo-kl bf16": {"loss": "rloo-kl", "dtype": "bf16"},
    "loss rloo-kl, small pieces bf16": {"loss": "rloo-kl", "dtype": "bf16", "rows": 4},
    "loss rloo-kl fp16": {"loss": "rloo-kl", "dtype": "fp16"},
    "loss rloo-kl, soft-cap": {
        "loss": "rloo-kl", "softcap": 2.0, "temperature": 0.7, "logit_scale": 1.3},
    "loss grpo, unlikely tokens": {"loss": "grpo-on-policy", "bias": "unlikely"},
}  # fmt: skip
CASES = LINEAR | FUSED
# both ways to the logits: bf16 goes the matrix kernel's, fp32 the library's, fp16 either
OF_KERNELS = [
    *DTYPES, "entropy", "frozen head, pieces bf16", "no gradient bf16", "soft-cap", "soft-cap bf16",
    "negative scale bf16", "ids of one rank bf16", "unlikely tokens", "unlikely tokens bf16",
    "-inf logits", "-inf logits bf16", "-inf logits, no gradient bf16", "sure tokens",
    "loss rloo-kl, small pieces bf16",
]  # fmt: skip


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """(hidden, weight, bias, ids, mask) of the whole head."""
    torch.manual_seed(3)
    dtype, n = DTYPES[case.get("dtype", "fp32")], TOKENS if "loss" in case else N
    hidden = torch.randn(n, D).to(dtype)
    weight = (3 * torch.randn(V, D) / D**0.5).to(dtype)
    ids, kind = torch.randint(V, (n,)), case.get("bias", "random")
    if case.get("ids") == "last rows":
        ids = torch.randint(V - 13, V, (n,))
    bias = torch.randn(V)
    if kind == "sure":
        bias[ids[:9]] += 40.0
    elif kind == "unlikely":
        bias[ids[:4]], bias[ids[4:8]], bias[ids[8]] = -60.0, -400.0, -9000.0
    elif kind == "masked":
        bias[:100] = -torch.inf  # all of the first rank's rows, and many of the next one's
        ids[:3] = torch.tensor([5, 70, 99])  # tokens of probability zero
    elif kind == "last rank masked":
        bias[-13:] = -torch.inf
        ids %= V - 13
    mask = torch.rand(n) < 0.6 if case.get("mask") else None
    return hidden, weight, None if kind is None else bias.to(dtype), ids, mask


def head_options(case: Case) -> dict[str, Any]:
    return {k: case[k] for k in ("temperature", "softcap", "logit_scale") if k in case}


def leaf(x: Tensor | None, letter: str, case: Case) -> Tensor | None:
    """A leaf of the graph, by the letter that `frozen` may hold."""
    return None if x is None else x.clone().requires_grad_(letter not in case.get("frozen", ""))


def gradients(loss: Tensor, **leaves: Tensor | None) -> Numbers:
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values())) if wanted else ()
    return dict(zip(wanted, found, strict=True))


def linear_loss(case: Case, logps: Tensor, entropy: Tensor | None = None) -> Tensor:
    """A sum with random coefficients, of the entropies too where the case says so."""
    random = torch.Generator().manual_seed(9)
    g, gh = (torch.randn(len(logps), generator=random).to(logps.dtype) for _ in range(2))
    loss = (g * logps).sum()
    return loss + (gh * entropy).sum() if case.get("entropy") else loss


def whole(case: Case, dtype: torch.dtype | None, ranks: int) -> Numbers:
    """Plain torch on one process with all [N, V] logits, in `dtype` or that of the inputs.

    dX is a sum over the ranks' columns in this dtype, as any split head has it.
    """
    hidden, weight, bias, ids, mask = make_inputs(case)
    hidden, weight, bias = (x if x is None or dtype is None else x.to(dtype)
                            for x in (hidden, weight, bias))  # fmt: skip
    weight, bias = leaf(weight, "w", case), leaf(bias, "b", case)
    copies = [leaf(hidden, "h", case) for _ in range(ranks)]
    if case.get("tied"):
        copies = [weight[ids.flip(0)]] * ranks
    biases = [None] * ranks if bias is None else bias.split(SHARDS[ranks])
    parts = zip(copies, weight.split(SHARDS[ranks]), biases, strict=True)
    raw = torch.cat([torch.nn.functional.linear(*part) for part in parts], -1)
    head = SimpleNamespace(**{**HEAD_DEFAULTS, **head_options(case)})
    found = plain_logprobs(raw, ids, head)
    logps, entropy = found["log-prob"], found["entropy"]
    if mask is not None and "loss" not in case:
        logps, entropy = (torch.where(mask, x, 0.0) for x in (logps, entropy))
    out = {"log-prob": logps, "entropy": entropy}
    if "loss" in case:
        given = make_loss(case["loss"], reference_logps(case), mask is not None)
        out["loss"] = loss = rloo_objective(logps, bounds(), entropy=entropy, **given).loss
        if mask is not None:
            out |= {name: torch.where(given["mask"], x, 0.0) for name, x in out.items() if x.ndim}
    else:
        loss = linear_loss(case, logps, entropy)
    if not case.get("return_entropy", True):
        del out["entropy"]
    names = {} if case.get("tied") else {f"dX {rank}": x for rank, x in enumerate(copies)}
    grads = gradients(loss, dW=weight, db=bias, **names)
    of_ranks = [grads.pop(name) for name in names if name in grads]
    if of_ranks:
        grads["dX"] = functools.reduce(torch.add, of_ranks)
    return {name: x.detach() for name, x in (out | grads).items()}


def reference_logps(case: Case) -> Tensor:
    hidden, weight, bias, ids, _ = make_inputs(case)
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    return plain_head(wide[0], wide[1], ids, wide[2], **head_options(case))[0]


def bounds() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0)


class SummedOverRanks(torch.autograd.Function):
    """What all ranks use alike: its gradient is the same on each."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def split_embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a split W as hidden states, from the ranks that have them."""
    here = (ids >= 0) & (ids < len(weight))
    return SummedOverRanks.apply(torch.where(here[:, None], weight[ids.where(here, 0)], 0.0))


def on_a_rank(case: Case, rank: int, ranks: int, group: Any) -> Numbers:
    """The op on this rank's rows of the head."""
    hidden, weight, bias, ids, mask = make_inputs(case)
    shards = SHARDS[ranks]
    offset, own = sum(shards[:rank]), shards[rank]
    padding = case.get("padding", 0) if rank == ranks - 1 else 0
    mine = [hidden, weight[offset : offset + own], bias]
    if bias is not None:
        mine[2] = bias[offset : offset + own]
    mine = [x if i == 0 or x is None else torch.cat([x, x.new_full((padding, *x.shape[1:]), 9.0)])
            for i, x in enumerate(mine)]  # fmt: skip
    options = head_options(case) | {
        "group": group.group_name if case.get("by_name") else group,
        "vocab_offset": offset,
        "vocab_size": V,
        "sum_hidden_grad": case.get("sum_hidden_grad", True),
        "return_entropy": case.get("return_entropy", True),
    }
    if "rows" in case:  # of a piece: all ranks plan by the average number of rows
        options["chunk_bytes"] = case["rows"] * -(-V // ranks) * bytes_per_logit(hidden)

    hidden, rows, more = (leaf(x, c, case) for x, c in zip(mine, "hwb", strict=True))
    weight, bias = rows[:own], None if more is None else more[:own]
    if case.get("tied"):
        hidden = split_embedding(rows, ids.flip(0) - offset)
    if "loss" in case:
        given = make_loss(case["loss"], reference_logps(case), mask is not None)
        made = fused_linear_rloo_loss(hidden, weight, ids, bounds(), bias=bias, **given, **options)
        out, loss = {"log-prob": made.logps, "entropy": made.entropy}, made.loss
        out["loss"] = loss
    else:
        made = linear_logprob(hidden, weight, ids, bias=bias, mask=mask, **options)
        names = ("log-prob", "entropy")
        out = dict(zip(names, made if isinstance(made, tuple) else (made,), strict=False))
        loss = linear_loss(case, *out.values())
    found = out | gradients(loss, dX=None if case.get("tied") else hidden, dW=rows, db=more)
    return {name: x.detach() for name, x in found.items()}


def bytes_per_logit(hidden: Tensor) -> int:
    from rloo_kernels.dispatch import use_triton

    if not use_triton(hidden):
        return hidden.element_size()
    from rloo_kernels.lm_head.piece_triton import bytes_per_logit as found

    return found(hidden)


# --- processes


def refused(rank: int, ranks: int) -> dict[str, str]:
    """What a rank says of arguments that do not fit together; each call ends on all ranks."""
    hidden, weight, _, ids, _ = make_inputs({})
    offset, own = sum(SHARDS[ranks][:rank]), SHARDS[ranks][rank]
    mine, group = weight[offset : offset + own], dist.group.WORLD
    wrong = {
        "gap": (mine[:-1], ids, {"vocab_offset": offset, "vocab_size": V}),
        "overlap": (mine, ids, {"vocab_offset": max(0, offset - 1), "vocab_size": V}),
        "id": (mine, ids + V, {"vocab_offset": offset, "vocab_size": V}),
        "beyond": (mine, ids, {"vocab_offset": offset + V, "vocab_size": V}),
        "uneven": (mine, ids, {"vocab_offset": offset + rank + 1}),
    }
    said = {}
    for name, (rows, tokens, options) in wrong.items():
        try:
            linear_logprob(hidden, rows, tokens, group=group, **options)
        except ValueError as error:
            said[name] = str(error)
    return said


def compiled(rank: int) -> list[list[float]]:
    """Loss and gradients of both ops, as they are and under torch.compile."""
    hidden, weight, _, ids, _ = make_inputs({"loss": "rloo"})
    half = slice(rank * V // 2, (rank + 1) * V // 2)
    where = {"group": dist.group.WORLD, "vocab_offset": half.start}
    given = make_loss("rloo", torch.zeros(len(ids)))

    def both(hidden, weight):
        made = fused_linear_rloo_loss(hidden, weight, ids, bounds(), **given, **where)
        return made.loss + linear_logprob(hidden, weight, ids, **where).sum()

    found = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[half])]
        loss = function(*leaves)
        sums = [x.sum().item() for x in torch.autograd.grad(loss, leaves)]
        found.append([loss.item(), *sums])
    return found


def rank_main(rank: int, ranks: int, folder: str, kernels: bool) -> None:
    from rloo_kernels import dispatch

    dispatch.INTERPRETED = kernels
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    calls: list[tuple[str, int]] = []
    for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor"):
        count(name, calls)
    found: dict[str, Any] = {"cases": {}}
    for name in OF_KERNELS if kernels else CASES:
        calls.clear()
        numbers = on_a_rank(CASES[name], rank, ranks, dist.group.WORLD)
        found["cases"][name] = numbers, list(calls)
    if not kernels:
        found["refused"] = refused(rank, ranks)
        if ranks == 2:
            found["compiled"] = compiled(rank)
        else:  # two of three
            group = dist.new_group([1, 2])
            found["group"] = on_a_rank({}, rank - 1, 2, group) if rank else None
    torch.save(found, Path(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()


def count(name: str, calls: list[tuple[str, int]]) -> None:
    """Each call of a collective of torch.distributed is noted: its name, and numbers sent."""
    original = getattr(dist, name)

    def counted(*args, **kwargs):
        sent = args[1] if name.startswith("all_gather") else args[0]
        calls.append((name, sent.numel()))
        return original(*args, **kwargs)

    setattr(dist, name, counted)


def on_all_ranks(ranks: int, kernels: bool) -> list[dict[str, Any]]:
    """What each rank found."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=rank_main, args=(rank, ranks, folder, kernels))
                   for rank in range(ranks)]  # fmt: skip
        for process in started:
            process.start()
        try:
            while any(process.is_alive() for process in started):
                for process in started:
                    process.join(0.1)
                    assert process.exitcode in (None, 0), "a rank failed"
            assert all(process.exitcode == 0 for process in started)
            return [torch.load(Path(folder, str(rank)), weights_only=False)
                    for rank in range(ranks)]  # fmt: skip
        finally:
            for process in started:
                process.kill()
                process.join()


def joined(case: Case, of_ranks: list[Numbers]) -> tuple[Numbers, bool]:
    """The numbers of the whole head, and whether ranks differ in what must be the same."""
    got, differ = dict(of_ranks[0]), False
    for name in got:
        parts = [x[name] for x in of_ranks]
        if name in ("dW", "db"):
            padding = case.get("padding", 0)
            if padding:
                assert not parts[-1][-padding:].any(), "padding has a gradient"
                parts[-1] = parts[-1][:-padding]
            got[name] = torch.cat(parts)
        elif name == "dX" and not case.get("sum_hidden_grad", True):
            got[name] = torch.stack(parts).sum(0)
        else:
            differ |= any(not torch.equal(x.nan_to_num(), parts[0].nan_to_num()) for x in parts)
    return got, differ


def measure(kernels: bool) -> dict[str, Any]:
    from rloo_kernels import dispatch

    dispatch.INTERPRETED = False
    found: dict[str, Any] = {"cases": {}, "refused": {}}
    for ranks in (3,) if kernels else SHARDS:
        made = on_all_ranks(ranks, kernels)
        for name in made[0]["cases"]:
            of_ranks, collectives = zip(*(x["cases"][name] for x in made), strict=True)
            got, differ = joined(CASES[name], list(of_ranks))
            beside = [whole(CASES[name], dtype, ranks) for dtype in (None, torch.double)]
            found["cases"][f"{name}, {ranks} ranks"] = {
                "errors": compared(got, *beside),
                "ranks differ": differ or any(x != collectives[0] for x in collectives),
                "collectives": collectives[0],
            }
        if not kernels:
            found["refused"][ranks] = [x["refused"] for x in made]
            found["compiled"] = made[0].get("compiled", found.get("compiled"))
    if not kernels:
        got, _ = joined({}, [x["group"] for x in made[1:]])
        found["group"] = compared(got, *(whole({}, dtype, 2) for dtype in (None, torch.double)))
    return found


if __name__ == "__main__":
    with_kernels = sys.argv[1:] == ["kernels"]
    if with_kernels:
        from tests.support.interpreter import fix_interpreter

        fix_interpreter()
    torch.use_deterministic_algorithms(True)  # torch.empty holds nan
    print(json.dumps(measure(with_kernels)))
