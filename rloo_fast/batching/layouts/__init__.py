"""Units of rows in, the lines of a micro-batch out: one class per layout, found by its name.

    padded         a line per row:    prompt completion padding
    packed         one line in all:   prompt completion | prompt completion | ...
    shared_prefix  one line in all:   prompt | completion | completion | ... | prompt | ...
                   and, where groups or completions begin alike, a tree of such segments

Completion tokens count their positions on from the prompt; they see it, and what precedes them in
their own completion. No module here imports torch: configuration reads the names.
"""

from . import packed, padded, shared_prefix  # each registers its layout
from .base import (
    LAYOUTS,
    Layout,
    Lines,
    RowTokens,
    Sharing,
    UnitIds,
    best_first,
    layouts_help,
    register_layout,
)

__all__ = [
    "LAYOUTS",
    "Layout",
    "Lines",
    "RowTokens",
    "Sharing",
    "UnitIds",
    "best_first",
    "layouts_help",
    "packed",
    "padded",
    "register_layout",
    "shared_prefix",
]
