"""What has to leave the GPU while the engine is awake, from the numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.offload.memory_plan import GIB, Holdings, best_share, plan

sizes = st.integers(0, 12)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, sizes, sizes, sizes, sizes, sizes, st.integers(1, 40))
def test_as_few_bytes_are_moved_as_are_enough(
    weights, grads, state, ref, others, buffers, engine, spare, total
):
    held = Holdings(weights, grads, state, ref, others, buffers)
    movable = {"gradients": grads, "optimizer": state, "reference": ref}
    free = total - weights - others - buffers - engine - spare

    def left(moved):
        return free - sum(movable.values()) + sum(movable[name] for name in moved)

    # gradients first: they cost nothing, as a rule there are none
    first = {"gradients"}
    subsets = [first, first | {"optimizer"}, first | {"reference"}, set(movable)]
    enough = [subset for subset in subsets if left(subset) >= 0]
    if left(()) >= 0:
        assert plan(total, engine, held, spare).moved == ()
    elif not enough:
        with pytest.raises(ValueError, match="vllm_gpu_memory_utilization"):
            plan(total, engine, held, spare)
    else:
        got = plan(total, engine, held, spare)
        assert left(got.moved) >= 0
        assert got.bytes_moved == min(sum(movable[n] for n in s) for s in enough)


HELD = Holdings(weights=10 * GIB, gradients=0, optimizer=40 * GIB, reference=10 * GIB)


@pytest.mark.parametrize(
    ("total", "moved"),
    [
        (92, ()),
        (91, ("gradients", "reference")),
        (82, ("gradients", "reference")),
        (81, ("gradients", "optimizer")),
        (52, ("gradients", "optimizer")),
        (51, ("gradients", "optimizer", "reference")),
        (42, ("gradients", "optimizer", "reference")),
    ],
)
def test_the_smaller_of_those_that_are_enough_goes_alone(total, moved):
    assert plan(total * GIB, 30 * GIB, HELD, 2 * GIB).moved == moved


def test_the_share_that_an_error_advises_does_fit():
    total = 41 * GIB
    with pytest.raises(
        ValueError, match=r"41\.00 GiB\. .*=0\.73 asks for 30\.00 .* 10\.00"
    ) as error:
        plan(total, 30 * GIB, HELD, 2 * GIB)
    advised = float(str(error.value).split("utilization=")[-1].split()[0])
    assert advised == 0.7
    plan(total, int(advised * total), HELD, 2 * GIB)
    with pytest.raises(ValueError):
        plan(total, int((advised + 0.01) * total), HELD, 2 * GIB)


def test_where_no_share_fits_none_is_advised():
    with pytest.raises(ValueError, match="No engine fits beside them"):
        plan(12 * GIB, 3 * GIB, HELD, 2 * GIB)


def test_the_plan_prints_as_a_table():
    held = Holdings(10 * GIB, 0, 40 * GIB, 10 * GIB, GIB // 2, GIB // 4, estimated=True)
    assert str(plan(60 * GIB, 24 * GIB, held, 2 * GIB)).splitlines() == [
        "GPU memory while the rollout engine is awake, in GiB:",
        "  policy weights                 10.00  stays",
        "  reward models, not movable      0.50  stays",
        "  training engine's buffers       0.25  stays",
        "  gradients                       0.00  moved to the host",
        "  optimizer state, estimated     40.00  moved to the host",
        "  reference model                10.00  stays",
        "  rollout engine                 24.00  stays",
        "  reserve                         2.00  stays",
        "  in use                         46.75  of 60.00",
    ]


# The share of an engine that sleeps


@pytest.mark.parametrize(
    ("need", "share"),
    [
        (10, 0.3),  # never less than an engine that does not sleep gets
        (60, 0.6),
        (60.1, 0.61),
        (None, 0.78),  # all that fits beside weights, buffers and the reserve
        (500, 0.78),
    ],
)
def test_a_sleeping_engine_gets_what_it_needs_as_far_as_it_fits(need, share):
    held = Holdings(10 * GIB, 0, 40 * GIB, 10 * GIB, others=4 * GIB, buffers=6 * GIB)
    need = None if need is None else int(need * GIB)
    got = best_share(100 * GIB, held, 2 * GIB, need)
    assert got == share
    plan(100 * GIB, int(got * 100 * GIB), held, 2 * GIB)


def test_some_memory_is_left_beside_the_largest_share():
    assert best_share(100 * GIB, Holdings(0, 0, 0, 0), 0, None) == 0.85


def test_where_not_even_the_least_share_fits_the_plan_says_so():
    held = Holdings(80 * GIB, 0, 0, 0)
    share = best_share(100 * GIB, held, 2 * GIB, None)
    assert share == 0.3
    with pytest.raises(ValueError, match=r"utilization=0\.18"):
        plan(100 * GIB, int(share * 100 * GIB), held, 2 * GIB)
