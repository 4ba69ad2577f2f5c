"""The table of losses: denominators by hand, what the kernels accept, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from rloo_kernels import LossOptions

from rloo_fast import RLOOConfig
from rloo_fast.objective import losses
from rloo_fast.objective.losses import ADVANTAGES, LOSSES, Counts, choices_help, register_loss
from rloo_fast.records import BatchSizes, Piece
from rloo_fast.step.build import loss_settings
from tests.support.batches import generation_batch, prepared_batch

rows = pytest.mark.parametrize("row", LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(LOSSES))


def settings_of(loss, **fields):
    return loss_settings(
        RLOOConfig("unused", loss=loss, max_completion_length=20, use_cpu=True, **fields)
    )


# a step of 8 of a generation batch's 16 rows; of the 8, a piece with 2 rows of 10 tokens
COUNTS = Counts(
    step_rows=8, piece_rows=2, piece_tokens=10, batch_rows=16, batch_tokens=100.0,
    max_completion_length=20,
)  # fmt: skip
BY_HAND = {
    "rloo": 8, "reinforce_pp": 8, "grpo": 8, "dr_grpo": 8 * 20,
    "dapo": 100 * 8 / 16,  # tokens of the batch, as far as the step takes its rows
    "bnpo": 10 * 8 / 2,  # tokens of the micro-step, times the 4 micro-steps
}  # fmt: skip


@rows
def test_a_denominator_is_the_one_computed_by_hand(row):
    assert row.denominator.value(COUNTS) == BY_HAND[row.name]


@rows
def test_without_a_counted_token_nothing_is_divided_by_zero(row):
    empty = COUNTS._replace(piece_tokens=0, batch_tokens=0.0)
    assert row.denominator.value(empty) > 0


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("rloo", [4.0]),
        ("grpo", [4.0]),
        ("dr_grpo", [80.0]),
        ("dapo", [12.0 * 4 / 6]),  # 12 tokens per process in the batch of 6 rows, of which 4
        ("bnpo", [(2 + 4) * 2.0, (1 + 3) * 2.0]),  # two micro-steps of two rows
    ],
)
def test_the_denominators_of_a_step_are_those_of_its_rows(loss, expected):
    completions = [[7] * n for n in (2, 9, 1, 4, 3, 5)]
    batch = generation_batch([[1]] * 6, completions, sizes=BatchSizes(tokens_per_process=12.0))
    settings = settings_of(loss)
    piece = Piece(replace(prepared_batch([[1]], [[1]]), generation=batch), [0, 3, 2, 4], 0)
    pieces = settings.pieces([piece], rows_per_micro_step=2)
    assert [row for piece in pieces for row in piece.rows] == [0, 3, 2, 4]
    assert [settings.denominator(batch, piece.rows, 4) for piece in pieces] == expected


@rows
@pytest.mark.parametrize("makes_advantages", [True, False])
def test_the_kernels_take_what_a_row_asks_for(row, makes_advantages):
    settings = settings_of(row.name, beta=0.1)
    options = settings.kernel_options(makes_advantages=makes_advantages)
    taken = LossOptions(**options)
    assert (taken.level, taken.token_mean) == (row.level, row.token_mean)
    if row.kl == "loss":
        assert (taken.kl, taken.beta) == ("corrected_loss", 0.1)
    else:  # in the reward, which the kernel sees only where it makes the advantages
        assert (taken.kl, taken.beta) == ((row.kl, 0.1) if makes_advantages else ("reward", 0.0))


@rows
def test_refused_advantages_are_in_the_table_of_advantages(row):
    assert {*row.refused_advantages} <= {*ADVANTAGES}
    for name in ADVANTAGES:
        given = {"loss": row.name, "advantage": name, "use_cpu": True}
        if name in row.refused_advantages:
            with pytest.raises(ValueError, match=f"advantage='{name}' cannot be used with loss="):
                RLOOConfig("unused", **given)
        else:
            assert RLOOConfig("unused", **given).advantage == name


def test_a_row_may_be_registered_twice_but_no_other_by_its_name():
    mine = replace(LOSSES["rloo"], name="mine")
    assert register_loss(mine) is mine
    assert register_loss(mine) is losses.LOSSES["mine"]
    rows = [
        replace(mine, name="from a file", denominator=losses.Denominator("rows", lambda n: 1.0))
        for _ in range(2)  # a file that is run twice makes its function anew
    ]
    assert [register_loss(row) for row in rows] == rows
    changed = losses.Denominator(mine.denominator.formula, lambda n: 1.0)
    for other in (replace(mine, level="token"), replace(mine, denominator=changed)):
        with pytest.raises(ValueError, match="the loss name 'mine' is taken"):
            register_loss(other)
    with pytest.raises(ValueError, match="the loss name 'rloo' is taken"):
        register_loss(replace(mine, name="rloo", help="another"))


@pytest.mark.parametrize(
    "change", [{"kl": "loss"}, {"kl": "reward_to_go"}, {"token_mean": True}], ids=str
)
def test_what_is_per_token_is_refused_beside_a_ratio_per_completion(change):
    row = replace(LOSSES["rloo"], name="mine", **change)
    with pytest.raises(ValueError, match=r"loss 'mine': .* are per token: they need level="):
        register_loss(row)
    assert "mine" not in losses.LOSSES
    register_loss(replace(row, level="token"))


def test_the_help_has_every_name_with_its_line():
    assert choices_help(ADVANTAGES).split(" | ")[1:] == [
        "grpo (mean of all of them, over their standard deviation)",
        "dr_grpo (mean of all of them)",
    ]
    assert [part.split(" (")[0] for part in choices_help(LOSSES).split(" | ")] == [*LOSSES]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"level": "tokens"}, "loss 'odd': level must be one of"),
        ({"kl": "lossy"}, "loss 'odd': kl must be one of"),
        ({"refused_advantages": {"rlo": "a slip"}}, "refused_advantages names ['rlo']"),
    ],
    ids=str,
)
def test_a_row_that_no_kernel_computes_is_refused_when_it_is_registered(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        register_loss(replace(LOSSES["grpo"], name="odd", **change))
    assert "odd" not in LOSSES
