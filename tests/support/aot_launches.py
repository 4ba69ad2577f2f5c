"""The launches that test_aot.py compiles, with tensors that take no memory.

Their functions import torch and the kernels where they run: in a worker of the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

ALIGNED, UNALIGNED, SMALL = 151936, 50257, 507  # vocabularies


def covering(options: dict[str, list[Any]], size: int) -> list[dict[str, Any]]:
    """Few choices among which all values of any `size` options occur together; greedy."""
    every = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]

    def subsets(choice: dict[str, Any]) -> set[tuple]:
        return set(itertools.combinations(choice.items(), size))

    missing, chosen = set().union(*map(subsets, every)), []
    while missing:
        best = max(every, key=lambda choice: len(subsets(choice) & missing))
        missing -= subsets(best)
        chosen.append(best)
    return chosen


def row_launches(vocab: int, strength: int) -> Iterator[Callable[[], Any]]:
    """The row kernels of the op on logits and of the "library" way of the lm_head."""
    import torch
    from rloo_kernels.logprob.rows_triton import backward_triton_, forward_triton
    from rloo_kernels.logprob.types import RowStatistics

    from tests.support.aot import untouched

    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    n = 4096
    ids, keep = untouched((n,), torch.int64), untouched((n,), torch.bool)
    statistics = RowStatistics(*(untouched((n,)) for _ in range(5)))
    transforms, flags = [(30.0, 1.0), (None, -1.0), (None, 1.0)], [True, False]

    def launch(dtype, out, mask, entropy, upstream, transform):
        def call():
            x, target = untouched((n, vocab), dtype), untouched((n, vocab), out)
            kwargs = dict(zip(("softcap", "logit_scale"), transform, strict=True))
            rows = (ids, keep if mask else None)
            forward_triton(x, *rows, 1.0, entropy, **kwargs)
            grads = (untouched((n,)) if name in upstream else None for name in ("grad", "H"))
            backward_triton_(target, x, *rows, statistics, *grads, 1.0, **kwargs)

        return call

    upstream = [("grad", "H"), ("H",), ("grad",)]
    by_op = {"dtype": dtypes[::-1], "mask": flags, "entropy": flags, "up": upstream}
    by_head = {"out": dtypes, "entropy": flags, "up": upstream[::2], "to": transforms}
    if vocab != ALIGNED or strength == 1:  # the others differ in how they are loaded, no more
        by_op, by_head = (
            {name: values[:1] for name, values in x.items()} for x in (by_op, by_head)
        )
    for c in covering(by_op, strength):
        yield launch(c["dtype"], c["dtype"], c["mask"], c["entropy"], c["up"], (None, 1.0))
    for c in covering(by_head, 1):
        yield launch(torch.float32, c["out"], False, c["entropy"], c["up"], c["to"])


def head_launches(vocab: int, depths: list[int], strength: int) -> Iterator[Callable[[], Any]]:
    import torch
    from rloo_kernels.lm_head.matrix_triton import matrix_piece
    from rloo_kernels.lm_head.types import LMHead

    from tests.support.aot import untouched

    def launch(store, entropy, bias, transform, depth, vocab, dtype, n=4096):
        def call():
            weight = untouched((vocab, depth), dtype)
            head = LMHead(weight, untouched((vocab,), dtype) if bias else None, 1.0, *transform)
            hidden, ids = untouched((n, depth), dtype), untouched((n,), torch.int64)
            matrix_piece(hidden, head, ids, entropy, store)  # its [n, V] is never touched

        return call

    if vocab != ALIGNED or depths[0] % 8:
        yield launch(True, True, False, (None, 1.0), depths[0], vocab, torch.bfloat16)
        return
    options = {
        "transform": [(30.0, 1.0), (None, 1.0), (None, -1.0)],
        "depth": depths,
        "store": [True, False],
    }
    if strength == 1:
        options["transform"] = options["transform"][:2]
    for c in covering(options, strength):
        bias = c["depth"] == depths[-1]
        yield launch(c["store"], True, bias, c["transform"], c["depth"], vocab, torch.bfloat16)
    if strength > 1:
        yield launch(False, False, False, (None, 1.0), depths[0], vocab, torch.float16)
        yield launch(True, False, True, (None, 1.0), depths[0], vocab, torch.bfloat16)
        # integers that are 1 become constants
        yield launch(True, False, False, (None, 1.0), 7, 1, torch.bfloat16, n=1)


def objective_launches(strength: int) -> Iterator[Callable[[], Any]]:
    import torch
    from rloo_kernels.loss.advantages import BY_GROUP
    from rloo_kernels.loss.objective_triton import objective_triton
    from rloo_kernels.loss.types import LossInputs, LossOptions

    from tests.support.aot import untouched

    def launch(objective, kind, old, ref, mask, entropy, k):
        def call():
            n, num_rows = 4096, k * (8 if k > 1 else 1)
            tokens = [untouched((n,)) for _ in range(5)]
            inputs = LossInputs(
                untouched((num_rows,)) if kind in BY_GROUP else None,
                untouched((num_rows,)) if kind == "rows" else None,
                tokens[0] if kind == "tokens" else None,
                tokens[1] if old else None,
                tokens[2] if ref else None,
                untouched((n,), torch.bool) if mask else None,
            )
            level, kl, mean = objective
            advantage = kind if kind in BY_GROUP else "rloo"
            options = LossOptions(k, 0.1, denominator=9.0, advantage=advantage, kl=kl,
                                  level=level, token_mean=mean)  # fmt: skip
            bounds = untouched((num_rows + 1,), torch.int64)
            given = tokens[4] if entropy else None
            objective_triton(tokens[3], bounds, inputs, given, options)

        return call

    flags = [True, False]
    objectives = [
        ("sequence", "reward", False),
        ("token", "reward", True),
        ("token", "reward_to_go", False),
        ("token", "loss", False),
        ("token", "corrected_loss", False),
    ]
    options = {
        "objective": objectives,
        "kind": ["rloo", "grpo", "rows", "tokens", "dr_grpo"],
        "old": flags,
        "ref": flags,
        "mask": flags,
        "entropy": flags,
        "k": [2, 16],
    }
    for c in covering(options, 1) if strength > 1 else []:
        if c["kind"] == "tokens" and c["objective"][0] == "sequence":
            continue
        if c["objective"][1] != "reward" and not c["ref"]:
            c = {**c, "ref": True}
        yield launch(*c.values())
    yield launch(objectives[0], "rows", True, True, True, True, 1)
    yield launch(objectives[4], "grpo", True, True, True, True, 16)
