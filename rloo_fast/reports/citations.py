"""What a model card says of the method, and which papers it cites."""

from __future__ import annotations

from ..objective.losses import ADVANTAGES, LOSSES
from ..objective.papers import RLOO, Paper


def method(loss: str, advantage: str) -> str:
    """What was done, for "trained by …", with links."""
    if (loss, advantage) == ("rloo", "rloo"):
        return f"REINFORCE Leave-One-Out ({RLOO.link})"
    row = LOSSES[loss]
    style = "GRPO-style " if row.kl == "loss" else ""
    return (
        f"the {style}loss `{loss}` ({row.paper.link}) on the advantage `{advantage}` "
        f"({ADVANTAGES[advantage].paper.link})"
    )


def papers(loss: str, advantage: str) -> list[Paper]:
    """The papers to cite, each once."""
    return list(dict.fromkeys([LOSSES[loss].paper, ADVANTAGES[advantage].paper]))
