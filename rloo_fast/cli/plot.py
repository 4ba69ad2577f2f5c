"""`rloo-fast plot`: curves of one or more runs, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..reports.curves import X_AXES, plot_curves
from .options import UsageError
from .parser import Parser

EPILOG = """\
One run:              rloo-fast plot runs/first
Two, over each other: rloo-fast plot runs/first runs/second --output both.png
Three seeds of two methods, each a mean line in a band:
  rloo-fast plot runs/rloo-{0,1,2} runs/grpo-{0,1,2} \\
      --labels rloo,rloo,rloo,grpo,grpo,grpo --keys reward,eval_accuracy"""


def main(argv: Sequence[str]) -> int:
    """Draw what is asked for and print where it is. Raises UsageError where that cannot be done."""
    parser = Parser(
        "rloo-fast plot",
        "Curves of one or more runs, from the metrics.jsonl in their directories.",
        EPILOG,
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=run_dir_of, metavar="RUN_DIR", help="output_dir of a run"
    )
    parser.add_argument(
        "--output", help="the PNG [RUN_DIR/curves.png; ./curves.png for several runs]"
    )
    parser.add_argument(
        "--keys", type=names_of, help="metrics, one panel each: reward,kl,... [those that matter]"
    )
    parser.add_argument(
        "--labels",
        type=names_of,
        help="a name for each run, with commas; runs of equal name become one line [directories]",
    )
    parser.add_argument("--x", choices=list(X_AXES), default="step", help="the x axis [step]")
    options = parser.parse_args(argv)
    several = len(options.run_dirs) > 1
    output = options.output or (Path() if several else options.run_dirs[0]) / "curves.png"
    try:
        plot_curves(options.run_dirs, output, options.keys, options.labels, options.x)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"The curves are in {output}.")
    return 0


def run_dir_of(text: str) -> Path:
    """Its metrics.jsonl stands for the directory."""
    path = Path(text)
    return path.parent if path.name == "metrics.jsonl" and path.is_file() else path


def names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
