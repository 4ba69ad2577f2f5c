"""The table of losses and advantages: a row for each, read by configuration, help, cards, docs.

    loss           ratio, clip   KL               of a row    divided by
    rloo           completion    in the reward    one term    completions of the step, B
    reinforce_pp   token         reward-to-go     sum         B
    grpo           token         k3 in the loss   mean        B
    dr_grpo        token         k3 in the loss   sum         B max_completion_length
    dapo           token         k3 in the loss   sum         tokens of the step
    bnpo           token         k3 in the loss   sum         tokens of the micro-step, times
                                                              the micro-steps of the step

B and the tokens are those of all processes. A masked completion counts in B and has no tokens. The
formulas are TRL 1.16's. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .papers import DAPO, DR_GRPO, GRPO, REINFORCE_PP, RLOO, Paper


class Counts(NamedTuple):
    """What a denominator can be made of, for one piece of a step (see `records.Piece`)."""

    step_rows: int  # rows that the step takes on this process
    piece_rows: int  # of those, the piece's
    piece_tokens: int  # counted tokens of the piece's rows
    batch_rows: int  # rows of the generation batch on this process
    batch_tokens: float  # counted tokens of the generation batch, mean over processes
    max_completion_length: int


@dataclass(frozen=True)
class Denominator:
    """What the sum over a piece's rows is divided by on each process: gradients are then averaged
    over the processes."""

    formula: str
    value: Callable[[Counts], float]
    by_micro_step: bool = False  # it is of a micro-step alone, so pieces are cut into micro-steps


COMPLETIONS = Denominator("completions of the step", lambda n: float(n.step_rows))
COMPLETIONS_TIMES_LENGTH = Denominator(
    "completions of the step, times max_completion_length",
    lambda n: float(n.step_rows * n.max_completion_length),
)
# the tokens of the generation batch, times the share of its completions that the step takes
TOKENS = Denominator(
    "tokens of the step", lambda n: max(n.batch_tokens, 1.0) * n.step_rows / n.batch_rows
)
# depends on how a step is cut into micro-steps of per_device_train_batch_size, and on their order
TOKENS_OF_MICRO_STEP = Denominator(
    "tokens of the micro-step, times the micro-steps of the step",
    lambda n: max(n.piece_tokens, 1) * n.step_rows / n.piece_rows,
    by_micro_step=True,
)


@dataclass(frozen=True)
class LossRow:
    """One loss. `level` and `kl` are those of `rloo_kernels.LossOptions`."""

    name: str
    help: str  # one line
    level: str  # of ratio and clip: "sequence" or "token"
    kl: str  # "reward", "reward_to_go" or "loss"
    denominator: Denominator
    paper: Paper
    token_mean: bool = False  # a row's token losses are averaged, not summed
    refused_advantages: Mapping[str, str] = field(default_factory=dict[str, str])  # name -> why


@dataclass(frozen=True)
class AdvantageRow:
    """One way to compare a completion with the others of its prompt; `rloo_kernels` has it."""

    name: str
    help: str
    paper: Paper


ADVANTAGES = {
    row.name: row
    for row in (
        AdvantageRow("rloo", "the mean of the others of its prompt", RLOO),
        AdvantageRow("grpo", "mean of all of them, over their standard deviation", GRPO),
        AdvantageRow("dr_grpo", "mean of all of them", DR_GRPO),
    )
}

LOSSES: dict[str, LossRow] = {}
LEVELS, KL_PLACES = ("sequence", "token"), ("reward", "reward_to_go", "loss")


def register_loss(row: LossRow) -> LossRow:
    """`loss=NAME` of a configuration means this row from now on.

    Raises ValueError for a name that is taken, and for a row that no kernel can compute.
    """
    if not _same(LOSSES.get(row.name, row), row):
        raise ValueError(f"the loss name {row.name!r} is taken: choose another one.")
    for field_name, known in (("level", LEVELS), ("kl", KL_PLACES)):
        if getattr(row, field_name) not in known:
            raise ValueError(
                f"loss {row.name!r}: {field_name} must be one of {known}, "
                f"got {getattr(row, field_name)!r}."
            )
    if unknown := set(row.refused_advantages) - set(ADVANTAGES):
        raise ValueError(
            f"loss {row.name!r}: refused_advantages names {sorted(unknown)}, but advantages are "
            f"{tuple(ADVANTAGES)}."
        )
    if row.level == "sequence" and (row.kl != "reward" or row.token_mean):
        raise ValueError(
            f"loss {row.name!r}: kl={row.kl!r} and token_mean={row.token_mean} are per token: they "
            'need level="token".'
        )
    LOSSES[row.name] = row
    return row


def _same(one: LossRow, other: LossRow) -> bool:
    """Whether two rows say the same; a file that is run twice makes its functions anew."""
    return _source(one.denominator) == _source(other.denominator) and one == replace(
        other, denominator=one.denominator
    )


def _source(denominator: Denominator) -> tuple[object, ...]:
    code = getattr(denominator.value, "__code__", None)
    where = (denominator.value,) if code is None else (code.co_filename, code.co_firstlineno)
    return (denominator.formula, denominator.by_micro_step, *where)


for _row in (
    LossRow(
        "rloo", "one ratio per completion, KL in the reward",
        "sequence", "reward", COMPLETIONS, RLOO,
    ),
    LossRow(
        "grpo", "a ratio per token, KL in the loss, mean over the tokens of each completion",
        "token", "loss", COMPLETIONS, GRPO, token_mean=True,
    ),
    LossRow(
        "dapo", "as grpo, but divided by the tokens of the step",
        "token", "loss", TOKENS, DAPO,
    ),
    LossRow(  # GRPO's with another denominator, without a paper that introduced it as a loss
        "bnpo", "as grpo, but divided by the tokens of the micro-step",
        "token", "loss", TOKENS_OF_MICRO_STEP, GRPO,
    ),
    LossRow(
        "dr_grpo", "as grpo, but divided by completions times max_completion_length",
        "token", "loss", COMPLETIONS_TIMES_LENGTH, DR_GRPO,
    ),
    LossRow(
        "reinforce_pp", "a ratio per token, KL per token as reward-to-go (its eq. 1)",
        "token", "reward_to_go", COMPLETIONS, REINFORCE_PP,
        refused_advantages={
            "grpo": "it divides rewards by the standard deviation of their group, but the KL to go "
            "is not divided: choose advantage='rloo' or 'dr_grpo', with "
            "normalize_advantages=True to scale both"
        },
    ),
):  # fmt: skip
    register_loss(_row)


def choices_help(rows: Mapping[str, LossRow] | Mapping[str, AdvantageRow]) -> str:
    """name (its line) | name (its line) ..., for the help of an option."""
    return " | ".join(f"{row.name} ({row.help})" for row in rows.values())
