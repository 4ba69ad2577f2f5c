"""What fused_linear_rloo_loss costs: the FLOPs of its docstring's table, never [N, V]."""

import pytest
import torch
from rloo_kernels import fused_linear_rloo_loss
from rloo_kernels.dispatch import log_once
from rloo_kernels.lm_head.piece_torch import LogitsBuffer
from rloo_kernels.lm_head.types import LMHead

from tests.support.kernel_helpers import Watch, bounds, nan_in_new_memory, plain_head  # noqa: F401
from tests.support.kernel_losses import (
    LENGTHS,
    LOSSES,
    NEEDS,
    TOKENS,
    D,
    V,
    fused,
    leaves_of,
    make_head,
    make_loss,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
losses = pytest.mark.parametrize("name", list(LOSSES))
needs = pytest.mark.parametrize("need", list(NEEDS))


def flops(name, need, rows, change=None, lengths=LENGTHS):
    """(products over all N rows, FLOPs in units of D V): forward and backward together."""
    inputs = make_head(torch.double, bias=False)
    loss = make_loss(name, plain_head(*inputs[:3])[0]) | (change or {})
    leaves = leaves_of(inputs, need)
    with Watch() as watch:
        found = fused(leaves[0], leaves[1], inputs[2], bounds(lengths), rows=rows, **loss)
        if any(NEEDS[need][:2]):
            found.loss.backward()
    active = int((found.coefficients != 0).sum())
    return watch.flops / (D * V), active


def claimed(name, need, fits, active, num_rows=TOKENS):
    """FLOPs / (D V) of the docstring's table."""
    give, options = LOSSES[name]
    per_product = {"all": 2, "frozen-head": 1, "frozen-hidden": 1, "none": 0}[need]
    known = "old_logps" not in give and not options.get("kl", "").endswith("loss")
    known = known and ("rewards" not in give or not options.get("beta"))
    if need == "none":
        return 2 * num_rows
    if known or fits:
        return 2 * num_rows + 2 * per_product * active
    if need == "frozen-head":
        return 4 * num_rows
    return 2 * num_rows + (2 + 2 * per_product) * active


@needs
@losses
def test_flops_are_those_of_the_docstring(name, need):
    """With pieces that hold everything: no product is made twice, none for rows without signal."""
    count, active = flops(name, need, rows=64)
    assert 0 < active < TOKENS or "kl" in LOSSES[name][1]
    assert count == claimed(name, need, True, active)


@needs
@losses
def test_flops_of_groups_that_do_not_fit(name, need):
    """One row to a piece: every group with more than one token is made in two passes."""
    lengths = [0, 0, 0, 5, 2, 0, 1, 2, 2]  # all rows of more than one token, but one
    if "rewards" not in LOSSES[name][0]:
        lengths = [3, 2, 0, 0, 3, 0, 4, 0, 0]  # a unit is a row
    count, active = flops(name, need, 1, lengths=lengths)
    assert count == claimed(name, need, False, active)


def test_three_products_for_rloo_with_a_kl_and_two_with_a_frozen_head():
    change = {"rewards": torch.arange(9.0)}
    assert flops("rloo-kl", "all", 7, change) == (6 * TOKENS, TOKENS)
    assert flops("rloo-kl", "frozen-head", 7, change) == (4 * TOKENS, TOKENS)
    assert flops("rloo-kl", "all", 6, change)[0] == 6 * 5 + 8 * 7  # the third group has 7 tokens


def test_rows_without_signal_are_not_run_backward():
    """A group whose rewards are equal."""
    change = {"rewards": torch.tensor([1.0, 1, 1, 0, 0, 0, 1, 2, 3])}
    count, active = flops("rloo", "all", 64, change)
    assert active == 3  # the group's middle row has advantage 0 as well: rows of 1 and 2 tokens
    assert count == 2 * TOKENS + 4 * 3


def test_masked_rows_are_not_run():
    mask = torch.arange(TOKENS) % 3 != 0
    count, active = flops("rloo", "all", 64, {"mask": mask, "rewards": torch.arange(9.0) ** 2})
    assert active == mask.sum()
    assert count == 6 * active


@pytest.mark.parametrize("need", ["all", "frozen-head", "none"])
@pytest.mark.parametrize("name", ["reinforce", "ratio", "rloo-kl", "rloo-kl-normalized", "grpo"])
def test_the_logits_of_all_rows_never_exist(name, need):
    """Neither in one tensor nor in several alive together; a group may be larger than a piece."""
    hidden, weight, ids, _ = make_head(torch.float32, 18 * 12, 4, 500, bias=False)
    tile = lambda x: x.repeat(18) if x.ndim and len(x) == TOKENS else x  # noqa: E731
    loss = {key: tile(x) if isinstance(x, torch.Tensor) else x
            for key, x in make_loss(name, -torch.ones(TOKENS)).items()}  # fmt: skip
    leaves = leaves_of((hidden, weight, ids, None), need)
    cu = bounds([18 * n for n in LENGTHS])
    with Watch() as watch:
        found = fused(leaves[0], leaves[1], ids, cu, rows=12, **loss)
        if found.loss.requires_grad:
            found.loss.backward()
    assert watch.largest == 12 * 500
    assert watch.peak < 4 * len(ids) * 500 / 2


@pytest.mark.parametrize(
    ("beta", "chunk_bytes", "level", "sentence"),
    [
        (0.0, None, "INFO", "three products; coefficients are known before the log-probs"),
        (0.1, None, "INFO", "three products; coefficients of a group come out of its own chunk"),
        (0.1, 1, "WARNING", "do not fit into one piece"),
    ],
    ids=["known", "a group per chunk", "too large"],
)
def test_what_costs_how_much_is_said_once(caplog, beta, chunk_bytes, level, sentence):
    hidden, weight = torch.randn(8, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    log_once.cache_clear()
    with caplog.at_level("INFO", "rloo_kernels"):
        for _ in range(2):
            fused_linear_rloo_loss(
                hidden,
                weight,
                torch.randint(5, (8,)),
                torch.tensor([0, 3, 8]),
                rewards=torch.tensor([1.0, 0.0]),
                num_generations=2,
                ref_logps=torch.zeros(8),
                beta=beta,
                chunk_bytes=chunk_bytes,
            )
    said = [r.getMessage() for r in caplog.records if r.levelname == level]
    assert len(said) == 1
    assert sentence in said[0]


@pytest.mark.parametrize("rows", [2, 3])
def test_the_logits_of_all_pieces_lie_in_the_same_memory(rows, monkeypatch):
    product, made = LogitsBuffer.product, []

    def noted(self, *args):
        made.append(product(self, *args))
        return made[-1]

    monkeypatch.setattr(LogitsBuffer, "product", noted)
    hidden, weight, ids, _ = make_head(torch.float32, bias=False)
    loss = make_loss("reinforce", plain_head(hidden, weight, ids)[0])
    fused(hidden.requires_grad_(), weight, ids, bounds(LENGTHS), rows=rows, **loss)
    assert len(made) > 1
    assert all(len(logits) <= rows for logits in made)
    assert len({logits.data_ptr() for logits in made}) == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_grows_for_a_larger_piece_and_serves_a_smaller_one(dtype, bias):
    hidden, weight = torch.randn(5, 16, dtype=dtype), torch.randn(7, 16, dtype=dtype)
    head = LMHead(weight, torch.randn(7, dtype=dtype) if bias else None, 1.0, None, 1.0)
    buffer = LogitsBuffer()
    for n in (2, 5, 3):
        expected = torch.nn.functional.linear(hidden[:n], weight, head.bias)
        torch.testing.assert_close(buffer.product(hidden[:n], head), expected)
