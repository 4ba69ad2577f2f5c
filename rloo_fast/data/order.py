"""The order of a dataset's rows in an epoch, which follows from (seed, epoch)."""

from __future__ import annotations

import torch


def epoch_order(
    num_rows: int, epoch: int, *, shuffle: bool, seed: int, left_out: frozenset[int] = frozenset()
) -> list[int]:
    """Numbers of the rows as they come in this epoch; those `left_out` are taken out of the order
    of all."""
    order = list(range(num_rows))
    if shuffle:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(num_rows, generator=generator).tolist()
    return [row for row in order if row not in left_out]
