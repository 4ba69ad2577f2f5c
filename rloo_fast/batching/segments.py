"""Which tokens of a line see which: lengths and prefixes in, the tensors of attention out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rloo_kernels.transfer import to_device

from ..records import Segments, SharedRuns


def make_segments(
    lengths: Sequence[int],
    prefixes: Sequence[tuple[int, int]],
    device: torch.device | str,
    *,
    pad_segments_to: int | None = None,
    pad_keys_to: int | None = None,
) -> Segments:
    """Segments of these lengths, in order, that see these prefixes ((0, 0): none).

    For static shapes: `pad_segments_to` segments, the last ones empty, and `pad_keys_to` entries of
    key_index. Raises ValueError for a prefix that does not end before its segment begins, and for
    more segments or keys than are padded to.
    """
    if len(lengths) != len(prefixes):
        raise ValueError(f"{len(lengths)} lengths but {len(prefixes)} prefixes: give one for each.")
    bounds, cu_k = [0], [0]
    index: list[torch.Tensor] = []
    for length, (first, last) in zip(lengths, prefixes, strict=True):
        start = bounds[-1]
        if length < 0 or not 0 <= first <= last <= start:
            raise ValueError(
                f"segment {len(bounds) - 1} at token {start} has length {length} and prefix "
                f"({first}, {last}): the length must be >= 0 and the prefix end before the segment."
            )
        bounds.append(start + length)
        seen = [(first, last), (start, start + length)] if length else []  # no queries, no keys
        index += [torch.arange(*part) for part in seen]
        cu_k.append(cu_k[-1] + sum(b - a for a, b in seen))
    missing = (pad_segments_to or len(lengths)) - len(lengths)
    missing_keys = (pad_keys_to or cu_k[-1]) - cu_k[-1]
    if missing < 0 or missing_keys < 0:
        raise ValueError(
            f"{len(lengths)} segments with {cu_k[-1]} keys do not fit pad_segments_to="
            f"{pad_segments_to} and pad_keys_to={pad_keys_to}: raise them."
        )
    keys = None
    if pad_keys_to is not None or cu_k != bounds:
        keys = to_device(torch.cat([*index, torch.zeros(missing_keys, dtype=torch.long)]), device)
    rows = (bounds + bounds[-1:] * missing, cu_k + cu_k[-1:] * missing)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in rows)
    max_q, max_k = (_longest(x) for x in (cu_q, cu_k))
    pairs = torch.tensor([*prefixes, *[(0, 0)] * missing], dtype=torch.int32).view(-1, 2)
    shared = None
    if keys is not None:
        shared = _shared_runs(bounds, prefixes, device, static=pad_keys_to is not None)
    cu_q_there, cu_k_there = to_device(cu_q, device), to_device(cu_k, device)
    return Segments(cu_q, pairs, keys, cu_q_there, cu_k_there, max_q, max_k, shared)


def _shared_runs(
    bounds: Sequence[int],
    prefixes: Sequence[tuple[int, int]],
    device: torch.device | str,
    *,
    static: bool,
) -> SharedRuns | None:
    """Runs of neighbours with one prefix; None if their prefixes do not come one after the other.

    `static`: the next power of two of them, for few compiled sizes; kernels start blocks for
    every one of them that might be as long as the longest.
    """
    runs: list[tuple[int, int, int, int]] = []
    for start, stop, (first, last) in zip(bounds[:-1], bounds[1:], prefixes, strict=True):
        if start == stop or first == last:
            continue
        if runs and runs[-1][1:] == (start, first, last):
            start = runs.pop()[0]
        runs.append((start, stop, first, last))
    at, end = [(0, 0)], bounds[-1]
    for start, stop, first, last in runs:
        seen = at[-1][1]
        if first < seen:
            return None
        at += [(start, seen), (start, first), (stop, last)]
    at += [(end, at[-1][1]), (end, end)]
    if static:
        at += at[-1:] * 3 * (max(4, 1 << (len(runs) - 1).bit_length()) - len(runs))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in zip(*at, strict=True))
    bounds_of_lengths = _longest(cu_q), _longest(cu_k)
    return SharedRuns(to_device(cu_q, device), to_device(cu_k, device), *bounds_of_lengths)


def _longest(bounds: torch.Tensor) -> int:
    """Longest segment, rounded up to a power of two, at least 128."""
    return max(128, 1 << (int(bounds.diff().max()) - 1).bit_length())
