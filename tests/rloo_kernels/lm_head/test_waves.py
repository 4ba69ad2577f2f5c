"""How rows are cut into pieces, and groups into chunks: against every other way to cut them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from rloo_kernels.lm_head import piece
from rloo_kernels.lm_head.chunks import MOST_CUTS, plan_chunks
from rloo_kernels.lm_head.waves import (
    PARTS,
    TILE,
    TILE_WIDE,
    HeadShape,
    Pieces,
    best_parts,
    num_waves,
    rows_of_piece,
    steps_in_parts,
)

from tests.support.kernel_helpers import bounds
from tests.support.kernel_losses import LENGTHS

SHAPES = {
    "pythia-410m": (1024, 50304),
    "pythia-1b": (2048, 50304),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
}
PROCESSORS = [108, 132, 144, 148]
GIB = [0.75, 2, 4]
N = 16384
every_case = pytest.mark.parametrize(
    ("name", "processors", "gib"), [*itertools.product(SHAPES, PROCESSORS, GIB)]
)


def case(name: str, processors: int, gib: float) -> tuple[HeadShape, int]:
    """(the head, the most rows of a piece in bf16)"""
    depth, vocab = SHAPES[name]
    return HeadShape(depth, vocab, processors), int(gib * 2**30) // (2 * vocab)


def test_waves_of_the_example():
    """266 tiles of 132 processors are three waves, 252 are two."""
    assert [num_waves(n, 3584, 132) for n in (2341, 2304)] == [3, 2]
    full = [n * 3584 / (num_waves(n, 3584, 132) * 132 * TILE * TILE_WIDE) for n in (2341, 2304)]
    assert [round(share, 2) for share in full] == [0.65, 0.95]
    most = (768 << 20) // (2 * 152064)
    assert rows_of_piece(N, most, HeadShape(3584, 152063, 132)) == 2304  # no parts of a prime V
    assert rows_of_piece(N, most, HeadShape(3584, 152064, 132)) == 2560


def test_parts_of_the_vocabulary_fill_waves():
    """2,560 rows at D = 3584: 280 tiles are 2.1 waves, and take 3; in 4 parts 9 of a quarter."""
    whole = steps_in_parts(2560, 3584, 152064, 1, 132)
    steps, parts = best_parts(2560, 3584, 152064, 132)
    assert parts == 4
    assert steps / whole == pytest.approx(9 / 4 / 3, rel=0.05)
    assert best_parts(2560, 3584, 152063, 132)[1] == 1  # parts would not be aligned
    assert best_parts(2304, 3584, 152064, 132)[1] == 1  # 1.9 waves


@every_case
def test_the_number_of_parts_is_the_best(name, processors, gib):
    shape, most = case(name, processors, gib)
    n = min(most, N) // TILE * TILE
    args = (n, shape.hidden_size, shape.vocab_size)
    depth, vocab = SHAPES[name]
    parts_bytes, logits_bytes = 4 * n * depth, 2 * n * vocab
    allowed = [s for s in PARTS if vocab % (8 * s) == 0 and s * parts_bytes <= logits_bytes / 4]
    times = {s: steps_in_parts(*args, s, processors) for s in allowed}
    steps, parts = best_parts(*args, processors)
    assert steps == times[parts] == min(times.values())


@every_case
def test_the_rows_of_a_piece_are_the_best_of_all_equal_ones(name, processors, gib):
    shape, most = case(name, processors, gib)
    n = rows_of_piece(N, most, shape)
    assert n <= most
    assert n == N or n % TILE == 0
    if most >= N:
        assert n == N
        return
    best = min(shape.steps_of_all(N, m) for m in range(1, most + 1))
    assert shape.steps_of_all(N, n) <= 1.01 * best


@every_case
def test_pieces_of_different_sizes_would_gain_little(name, processors, gib):
    """Every way to cut N rows into pieces of whole tiles, each with any size."""
    shape, most = case(name, processors, gib)
    tiles, sizes = N // TILE, range(1, min(most, N) // TILE + 1)
    times = {k: shape.steps(k * TILE) for k in sizes}
    best = [0.0]
    for t in range(1, tiles + 1):
        best.append(min(times[k] + best[t - k] for k in sizes if k <= t))
    planned = shape.steps_of_all(N, rows_of_piece(N, most, shape))
    assert planned <= 1.03 * best[tiles]


@every_case
def test_pieces_by_waves_take_no_longer_than_equal_ones(name, processors, gib):
    shape, most = case(name, processors, gib)

    def time(pieces: Pieces) -> float:
        return sum(shape.steps(x.stop - x.start) for x in pieces.cut(0, N))

    assert time(Pieces(most, shape)) <= time(Pieces(most))


@pytest.mark.parametrize("shape", [None, HeadShape(896, 151936, 132)], ids=["equal", "waves"])
@pytest.mark.parametrize("most", [1, 7, 128, 200, 5000, 10**6])
def test_a_cut_holds_every_row_once(shape, most):
    for start, stop in ((0, 0), (0, 1), (5, 700), (100, 16484)):
        cut = Pieces(most, shape).cut(start, stop)
        assert [i for x in cut for i in range(x.start, x.stop)] == [*range(start, stop)]
        assert all(0 < x.stop - x.start <= most for x in cut)


# --- chunks of whole groups


@pytest.mark.parametrize("shape", [None, HeadShape(5, 11, 2)], ids=["full", "waves"])
def test_plan_of_chunks_holds_every_row_once(shape):
    for lengths in (LENGTHS, [0] * 9, [9, 0, 0] * 3, [1] * 9):
        for unit, size in itertools.product((1, 3, 9), (1, 3, 5, 100)):
            chunks = plan_chunks(bounds(lengths).tolist(), unit, Pieces(size, shape))
            assert [c.r0 for c in chunks] == [0, *(c.r1 for c in chunks[:-1])]
            assert chunks[-1].r1 == 9
            for c in chunks:
                assert (c.t0, c.t1) == (sum(lengths[: c.r0]), sum(lengths[: c.r1]))
                assert c.fits == (c.t1 - c.t0 <= size)
                assert c.fits or c.r1 - c.r0 == unit


def test_without_a_shape_chunks_are_few_and_nearly_equal():
    chunks = plan_chunks(bounds([3, 4, 2, 9, 1, 1, 1]).tolist(), 1, Pieces(7))
    assert [(c.t0, c.t1, c.fits) for c in chunks] == [
        (0, 3, True), (3, 9, True), (9, 18, False), (18, 21, True),
    ]  # fmt: skip
    chunks = plan_chunks(bounds([256] * 8).tolist(), 1, Pieces(2001))  # not 1,792 and 256
    assert [c.t1 - c.t0 for c in chunks] == [1024, 1024]


@pytest.mark.parametrize("seed", range(20))
def test_without_a_shape_chunks_are_the_fewest_and_then_the_smallest_of_all_ways(seed):
    rng = random.Random(seed)
    units, most = [rng.randint(0, 9) for _ in range(8)], rng.randint(9, 20)
    chunks = plan_chunks(bounds(units).tolist(), 1, Pieces(most))
    inner = range(1, len(units))
    ways = [(0, *c, len(units)) for r in range(8) for c in itertools.combinations(inner, r)]
    sizes = [(len(w) - 1, max(sum(units[i:j]) for i, j in itertools.pairwise(w))) for w in ways]
    best = min(x for x in sizes if x[1] <= most)
    assert (len(chunks), max(c.t1 - c.t0 for c in chunks)) == best


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_chunks_of_groups_take_the_least_time_of_all_ways_to_cut_them(name, seed):
    rng = random.Random(seed)
    shape, most = case(name, rng.choice(PROCESSORS), 0.75)
    groups = [rng.randint(100, most) for _ in range(9)]
    ends = [0, *itertools.accumulate(groups)]

    def time(cuts: tuple[int, ...]) -> float:
        sizes = [ends[j] - ends[i] for i, j in itertools.pairwise((0, *cuts, len(groups)))]
        return sum(map(shape.steps, sizes)) if max(sizes) <= most else float("inf")

    inner = range(1, len(groups))
    ways = [c for r in range(len(groups)) for c in itertools.combinations(inner, r)]
    chunks = plan_chunks(ends, 1, Pieces(most, shape))
    found = tuple(c.r1 for c in chunks[:-1])
    assert time(found) == pytest.approx(min(map(time, ways)), rel=1e-12)


def test_many_short_units_are_planned_by_few_cuts():
    """A completion a unit: chunks still are whole, within the bound, and about as fast."""
    shape, most = case("qwen2.5-0.5b", 132, 2)
    units = [4] * (N // 4)
    pieces = Pieces(most, shape)
    chunks = plan_chunks(bounds(units).tolist(), 1, pieces)
    assert all(c.fits for c in chunks)
    assert chunks[-1].t1 == N
    time = sum(shape.steps(c.t1 - c.t0) for c in chunks)
    assert time <= 1.02 * shape.steps_of_all(N, rows_of_piece(N, most, shape))
    assert len(units) > MOST_CUTS


# --- budgets


@pytest.mark.parametrize(
    ("gib_of_all", "free_gib", "spared_gib", "planned_gib"),
    [
        (5, 40, 0, 5),  # all in one piece of at most 8
        (9, 40, 0, 4),
        (9, 40, 2, 9),  # one piece takes no fp32 sum
        (5, 20, 0, 4),
        (5, 20, 1, 5),
        (5, 9, 0, 2),
        (1.5, 9, 0, 1.5),
        (5, 7, 9, None),  # memory is short: the fixed budget
    ],
)
def test_budget_by_free_memory(gib_of_all, free_gib, spared_gib, planned_gib):
    gib = [int(x * 2**30) for x in (gib_of_all, free_gib, spared_gib)]
    planned = piece.planned_bytes(*gib)
    assert planned == (None if planned_gib is None else int(planned_gib * 2**30))


def test_on_a_cpu_the_budget_is_fixed():
    weight = torch.empty(50304, 64, dtype=torch.bfloat16, device="meta")
    hidden = torch.empty(10**5, 64, dtype=torch.bfloat16)
    assert piece.planned_rows(hidden, weight, None, True) == (768 << 20) // (2 * 50304)
    assert piece.planned_rows(hidden, weight, 2 * 50304 * 5, True) == 5
    assert piece.pieces_of(hidden, weight.shape, (True, True, False), 7) == Pieces(7)


def test_free_memory_is_asked_without_waiting_and_not_where_bits_must_repeat(monkeypatch):
    """What the driver has, and what torch holds and does not use."""
    stats = {"reserved_bytes.all.current": 30, "allocated_bytes.all.current": 10}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    device, capturing = torch.device("cuda"), False
    assert piece.free_bytes(device) == 520
    capturing = True
    assert piece.free_bytes(device) is None
    capturing = False
    torch.use_deterministic_algorithms(True)
    try:
        assert piece.free_bytes(device) is None
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert piece.free_bytes(device) is None
