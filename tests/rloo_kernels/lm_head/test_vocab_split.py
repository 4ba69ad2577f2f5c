"""A head whose vocabulary is split over 2 and 3 gloo ranks, against float64 on one process.

As a script, it prints the errors: python -m tests.rloo_kernels.lm_head.test_vocab_split
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from rloo_kernels import linear_logprob

from tests.rloo_kernels.test_interpreted import assert_within_bounds, print_table
from tests.support import vocab_split_worker as worker
from tests.support.kernel_losses import TOKENS
from tests.support.paths import SUPPORT
from tests.support.triton_process import run_worker
from tests.support.vocab_split_worker import CASES, OF_KERNELS, SHARDS, D, N

SCRIPT = SUPPORT / "vocab_split_worker.py"


@functools.cache
def measured(kernels: bool = False) -> dict[str, Any]:
    arguments = ["kernels"] if kernels else []
    return run_worker(SCRIPT, *arguments, interpret=kernels, timeout_s=600)


@pytest.fixture
def seen():
    return measured()


@pytest.fixture
def seen_kernels():
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    return measured(kernels=True)


on_ranks = pytest.mark.parametrize("ranks", SHARDS)


@on_ranks
@pytest.mark.parametrize("name", CASES)
def test_errs_at_most_twice_as_much_as_torch_on_one_process(seen, name, ranks):
    found = seen["cases"][f"{name}, {ranks} ranks"]
    assert {"log-prob", "dX", "dW", "db"} & found["errors"].keys()
    assert_within_bounds(found["errors"])


@pytest.mark.parametrize("name", OF_KERNELS)
def test_kernels_err_at_most_twice_as_much_as_torch_on_one_process(seen_kernels, name):
    assert_within_bounds(seen_kernels["cases"][f"{name}, 3 ranks"]["errors"])


@on_ranks
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_same_bits_and_call_the_same_collectives(seen, name, ranks):
    assert not seen["cases"][f"{name}, {ranks} ranks"]["ranks differ"]


def labels(n):
    return ["all_reduce", 2 * n + 1]


def gather(n, numbers=3):
    return ["all_gather", numbers * n]


def sum_of(n):
    return ["all_reduce", n * D]


PIECES = [gather(9), gather(9), gather(8)]
COLLECTIVES = {
    "fp32": [labels(N), gather(N), sum_of(N)],
    "bf16": [labels(N), gather(N), sum_of(N)],
    "no entropy": [labels(N), gather(N, 2), sum_of(N)],
    "no gradient bf16": [labels(N), gather(N)],
    "frozen hidden bf16": [labels(N), gather(N)],
    "hidden gradient not summed": [labels(N), gather(N)],
    "frozen head": [labels(N), gather(N), sum_of(N)],
    "frozen head, pieces bf16": [labels(N), *PIECES, sum_of(N)],
    "pieces": [  # backward makes the logits again
        labels(N), *PIECES, labels(N), *(gather(n, 2) for n in (9, 9, 8)), sum_of(N)],
    "unlikely tokens": [labels(N), gather(N), labels(N), gather(N), sum_of(N)],  # as by an entropy
    "loss rloo": [labels(TOKENS), gather(4), gather(8), sum_of(TOKENS)],  # four have c = 0
    "loss rloo-kl": [labels(TOKENS), gather(TOKENS), sum_of(TOKENS)],
    "loss rloo-kl, frozen head": [labels(TOKENS), gather(TOKENS), sum_of(TOKENS)],
    # groups of 5, 0 and 7 tokens in pieces of 4: log-probs, then the logits once more
    "loss rloo-kl, small pieces": [
        labels(TOKENS), *(gather(n) for n in (3, 2, 3, 2, 4, 3, 4, 3)), sum_of(TOKENS)],
    "loss rloo-kl, frozen head, small pieces": [
        labels(TOKENS), *(gather(n) for n in (3, 2, 4, 3)), sum_of(TOKENS)],
}  # fmt: skip


@on_ranks
@pytest.mark.parametrize("name", COLLECTIVES)
def test_one_all_reduce_for_labels_one_all_gather_a_piece_and_one_sum_of_dx(seen, name, ranks):
    assert seen["cases"][f"{name}, {ranks} ranks"]["collectives"] == COLLECTIVES[name]


def test_a_group_of_some_of_the_processes(seen):
    assert_within_bounds(seen["group"])


def test_torch_compile_keeps_the_ops_whole(seen):
    plain, compiled = seen["compiled"]
    assert compiled == pytest.approx(plain, rel=1e-5)


@on_ranks
@pytest.mark.parametrize(
    ("wrong", "says"),
    {
        "gap": "each one once; this one holds those from",
        "overlap": "each one once; this one holds those from",
        "id": "token_ids must lie in [0, 150)",
        "beyond": "it needs at least one, and none beyond",
        "uneven": "with unequal numbers of rows, say vocab_size",
    }.items(),
)
def test_rows_and_ids_that_do_not_fit_are_refused_on_every_rank(seen, wrong, says, ranks):
    for said in seen["refused"][str(ranks)]:
        assert says in said[wrong]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab_size": 12}, "weight has 9 of 12 rows of the vocabulary"),
        ({"vocab_offset": 3, "vocab_size": 12}, "pass group="),
        ({"vocab_offset": -1, "vocab_size": 12}, "none beyond"),
        ({"vocab_offset": 9}, "rank 0 has those from 0 on"),
    ],
)
def test_a_part_of_the_vocabulary_needs_a_group(options, says):
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        linear_logprob(torch.randn(2, 4), torch.randn(9, 4), ids, **options)


def test_the_cases_hold_rows_far_beyond_the_range_of_an_exponential():
    case = CASES["unlikely tokens bf16"]
    logps = worker.whole(case, torch.double, 3)["log-prob"]
    assert (logps < -350).sum() >= 5  # fp32's exponential ends at 88
    assert ((logps > -100) & (logps < -40)).any()


if __name__ == "__main__":
    for kernels in (False, True):
        print("kernels in the interpreter" if kernels else "torch")
        cases = measured(kernels)["cases"]
        print_table({name: found["errors"] for name, found in cases.items()})
