"""`rloo-fast view`: a page to look at one or more runs, live, or as one file."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from ..reports.curves import run_names
from ..reports.metrics_file import write_atomically
from ..viewer.report import report
from ..viewer.run import Run, open_runs
from ..viewer.server import Server
from .options import UsageError
from .parser import Parser
from .plot import names_of, run_dir_of

EPILOG = """\
While it trains, or later:  rloo-fast view runs/first
Two runs beside each other: rloo-fast view runs/first runs/second
Seeds, each method a band:  rloo-fast view runs/rloo-{0,1,2} runs/grpo-{0,1,2} \\
                              --labels rloo,rloo,rloo,grpo,grpo,grpo
One file, to be mailed:     rloo-fast view runs/first --out report.html

The page is on this machine only (127.0.0.1), and loads nothing from elsewhere. From another one:
ssh -L 8321:127.0.0.1:8321 THIS_MACHINE"""
PORT = 8321


def main(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C, or write the file. Raises UsageError where that cannot be."""
    parser = Parser(
        "rloo-fast view",
        "A page to look at runs: curves, completions token by token, health, time.",
        EPILOG,
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=run_dir_of, metavar="RUN_DIR", help="output_dir of a run"
    )
    parser.add_argument(
        "--labels",
        type=names_of,
        help="a name for each run, with commas; runs of equal name become one band [directories]",
    )
    parser.add_argument("--out", type=Path, help="write this one .html file, and serve nothing")
    parser.add_argument(
        "--max_mib", type=float, default=8.0, help="of completions in that file, about [8]"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any free one [{PORT}]")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args(argv)
    runs = _runs(options.run_dirs, options.labels)
    if options.out is not None:
        return _write(runs, options.out, options.max_mib)
    return _serve(runs, options.port, options.open)


def _runs(run_dirs: list[Path], labels: list[str] | None) -> list[Run]:
    if labels is not None and len(labels) != len(run_dirs):
        raise UsageError(
            f"{len(labels)} labels for {len(run_dirs)} directories: expected one for each."
        )
    twice = [d for d in run_dirs if [e.resolve() for e in run_dirs].count(d.resolve()) > 1]
    if twice:
        raise UsageError(f"one run is given more than once: {twice[0]}; give each once.")
    names = run_names(run_dirs)
    try:
        return open_runs(run_dirs, names, labels or names)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _write(runs: list[Run], out: Path, max_mib: float) -> int:
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a report is a web page, so end its name in .html.")
    if not 0 <= max_mib < 2**20:
        raise UsageError(f"--max_mib must be from 0 to {2**20}, got {max_mib}.")
    try:
        data = report(runs, max_mib).encode()
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"The report is in {out} ({len(data) / 2**20:.1f} MiB).")
    return 0


def _serve(runs: list[Run], port: int, opens: bool) -> int:
    if not 0 <= port < 2**16:
        raise UsageError(f"--port must be from 0 to {2**16 - 1}, got {port}.")
    try:
        server = Server(runs, port)
    except OSError as error:
        raise UsageError(
            f"port {port} cannot be listened on ({error.strerror}): choose another with --port, or "
            "any free one with --port 0."
        ) from error
    with server:
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        if opens:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
