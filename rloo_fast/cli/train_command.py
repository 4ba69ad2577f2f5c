"""`rloo-fast train` as far as it needs no torch: its help, and mistakes in its options."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import check_given, gather, train_options
from .help import full_help, short_help


def main(argv: Sequence[str]) -> int:
    """Run `rloo-fast train` with these arguments. Raises UsageError before anything is trained."""
    options = train_options()
    if {"-h", "--help"} & {*argv}:
        print(full_help(options) if "all" in argv else short_help(options))
        return 0
    values = gather(argv, options)
    check_given(values)

    from .train import run

    return run(argv, values)
