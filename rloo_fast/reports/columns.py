"""Columns of a table of samples, whatever rewards were logged."""

from __future__ import annotations

TEXTS = ("prompt", "completion")
MARKS = ("step", "mode", "sampled_after_step", "row", "num_rows")  # what a row is a sample of
RESERVED_COLUMNS = (*MARKS, *TEXTS, "advantage")
