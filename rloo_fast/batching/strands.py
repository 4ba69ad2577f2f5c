"""How far a row's tokens are run, and how many these are: of a completion, or of the strands of a
trajectory.

Nothing is predicted from the last counted token of a strand, nor from those behind it: they are not
run, and no strand is of which no token counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records import GenerationBatch, Strand, Unit
from .layouts import Layout, RowTokens, Sharing


def run_strands(batch: GenerationBatch, row: int, every_token: bool = False) -> list[Strand]:
    """The row's strands as far as they are put through the model.

    `every_token`: also tokens from which nothing is predicted, as a load-balancing loss wants.
    """
    strands = batch.strands(row)
    if every_token:
        return strands
    return [Strand(ids[: counted[-1]], counted) for ids, counted in strands if counted]


def row_tokens(
    batch: GenerationBatch, layout: Layout, every_token: bool = False
) -> list[RowTokens]:
    """Tokens behind the prompt that are run for each row, as `layout` counts them."""
    found: list[RowTokens] = []
    for row in range(batch.num_rows):
        strands = [ids for ids, _ in run_strands(batch, row, every_token)] or [[]]
        found.append(len(strands[0]) if len(strands) == 1 else layout.row_tokens(strands))
    return found


def sharing_of(
    batch: GenerationBatch, groups: Sequence[Unit], layout: Layout, every_token: bool = False
) -> Sharing | None:
    """What `groups` share: of a trajectory by its first strand, as `Layout.row_tokens` counts what
    the others have beside it."""
    if batch.inputs is not None:  # its units are alone, see UnitIds
        return None

    def first(row: int) -> list[int]:
        strands = run_strands(batch, row, every_token)
        return strands[0].ids if strands else []

    return layout.sharing(
        [batch.prompt_ids[rows[0]] for rows in groups],
        [[first(row) for row in rows] for rows in groups],
    )
