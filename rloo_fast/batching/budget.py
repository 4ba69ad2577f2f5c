"""How many tokens a micro-batch may hold."""

from __future__ import annotations

from typing import Any

from ..records import GenerationBatch


class TokenBudget:
    """`max_tokens`, or the tokens of `rows` padded rows as long as the longest of the generation
    batch; halved whenever memory ran out."""

    def __init__(self, rows: int, max_tokens: int | None = None):
        self.rows, self.max_tokens = rows, max_tokens
        self.num_halvings = 0

    def of(self, batch: GenerationBatch, rows: int | None = None) -> int:
        """Tokens of a micro-batch; `rows` in place of the number this budget was given."""
        whole = self.max_tokens or (rows or self.rows) * batch.sizes.longest_row
        return max(whole >> self.num_halvings, 1)

    def halve(self) -> None:
        self.num_halvings += 1

    def described(self, batch: GenerationBatch) -> str:
        """Where the number comes from, in the words of the configuration."""
        given = f"max_tokens_per_micro_batch={self.max_tokens}" if self.max_tokens else (
            f"per_device_train_batch_size={self.rows} rows of {batch.sizes.longest_row}"
        )  # fmt: skip
        halved = f", halved {self.num_halvings} times" if self.num_halvings else ""
        return f"{self.of(batch)}: {given}{halved}"

    def state_dict(self) -> dict[str, Any]:
        return {"num_halvings": self.num_halvings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_halvings = state["num_halvings"]
