"""The loss that a run asks for, in terms of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..records import GenerationBatch, Piece
from .losses import Counts, LossRow


@dataclass(frozen=True)
class LossSettings:
    """A row of the table with the numbers of a run.

    Truncated importance sampling per token makes ratio and clip of "rloo" per token, too.
    """

    row: LossRow
    beta: float
    epsilon_low: float
    epsilon_high: float
    advantage: str
    normalize_advantages: bool
    whiten_rewards: bool
    bias_corrected_kl: bool
    truncated_importance_sampling: str | None  # "token", "sequence" or None
    importance_sampling_cap: float
    max_completion_length: int

    @property
    def kl_in_loss(self) -> bool:
        return self.beta != 0 and self.row.kl == "loss"

    @property
    def kl_in_reward(self) -> bool:
        """Advantages need the policy's log-probs first."""
        return self.beta != 0 and not self.kl_in_loss

    @property
    def advantages_per_token(self) -> bool:
        """Advantages hold the KL still to come after each token."""
        return self.row.kl == "reward_to_go"

    @property
    def weights_per_token(self) -> bool:
        return self.truncated_importance_sampling == "token"

    @property
    def level(self) -> str:
        """Of ratio and clip."""
        return "token" if self.weights_per_token else self.row.level

    def kernel_options(self, *, makes_advantages: bool) -> dict[str, Any]:
        """Of `rloo_kernels.LossOptions`, without denominator and num_generations.

        `makes_advantages`: the kernel is given rewards and makes the advantages of them.
        """
        options: dict[str, Any] = {
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "level": self.level,
            "token_mean": self.row.token_mean,
        }
        if self.kl_in_loss:
            kl = "corrected_loss" if self.bias_corrected_kl else "loss"
            options |= {"beta": self.beta, "kl": kl}
        elif makes_advantages:
            options |= {"beta": self.beta, "kl": self.row.kl, "advantage": self.advantage}
        return options

    def denominator(self, batch: GenerationBatch, rows: list[int], step_rows: int) -> float:
        """What the sum over `rows` of a generation batch is divided by in a step that takes
        `step_rows` in all, both on this process."""
        found = self.row.denominator.value(
            Counts(
                step_rows=step_rows,
                piece_rows=len(rows),
                piece_tokens=sum(batch.num_tokens[row] for row in rows),
                batch_rows=batch.num_rows,
                batch_tokens=batch.sizes.tokens_per_process,
                max_completion_length=self.max_completion_length,
            )
        )
        if not found > 0:
            raise ValueError(f"the denominator of loss {self.row.name!r} must be > 0, got {found}.")
        return found

    def pieces(self, pieces: list[Piece], rows_per_micro_step: int) -> list[Piece]:
        """Pieces of one denominator each; no micro-batch holds rows of two of them."""
        if not self.row.denominator.by_micro_step:
            return pieces
        size = rows_per_micro_step
        return [
            piece._replace(rows=piece.rows[i : i + size])
            for piece in pieces
            for i in range(0, len(piece.rows), size)
        ]
