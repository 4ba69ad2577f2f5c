"""The command `rloo-fast`: its arguments in, an exit status out.

Only the standard library is imported until a subcommand needs more.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

HELP = """\
usage: rloo-fast COMMAND [options]

RLOO (REINFORCE Leave-One-Out) training of language models.

  train        train a model on your prompts and rewards
  eval judge   how often a model's texts are preferred to reference texts
  eval reward  the mean of your rewards over a model's completions
  view         a page to look at runs: curves, completions, health; live, or as one file
  plot         curves of one or more runs, as a PNG
  quickstart   train a small model on a small task, to see it work
  doctor       what this machine has, and what rloo_fast will use of it
  plan         memory per GPU and traffic per step of a large run, before there is one
  recipe       ready-made runs, launch and engine settings: their names, or the path of one

  --version    print the version
  --help       this text; also after a command, as in `rloo-fast train --help`

A first run:
  rloo-fast train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
      --dataset_name prompts.jsonl --reward_funcs my_rewards.py:score --output_dir runs/first"""

COMMANDS = ("train", "eval", "view", "plot", "quickstart", "doctor", "plan", "recipe")


def run_and_exit() -> NoReturn:
    """The command `rloo-fast` as a process: `main`, then the end of the process.

    One process of several ends without C++ destructors once everything is written: gloo's (torch
    2.13) sometimes aborts in one, and the launcher would then stop the others while they write.
    """
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        atexit._run_exitfuncs()  # trackers and logging finish in these
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a mistake in what was asked for, 1 for
    what went wrong later.

    With RLOO_FAST_DEBUG=1 both come with a traceback.
    """
    from ..masking import masked_argv
    from .failures import Guarded, print_masked

    given = sys.argv[1:] if argv is None else list(argv)
    without_secrets = masked_argv(given)
    if argv is None:
        sys.argv[1:] = without_secrets  # trackers publish it
        sys.excepthook = print_masked
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Guarded, streams)
    try:
        return _run_and_report(given)
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def _run_and_report(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"rloo-fast {version('rloo-fast')}")
        return 0

    from ..masking import masked
    from .failures import is_told, keep_traceback, sentence
    from .options import UsageError

    try:
        _check_directory()
        return _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        print("rloo-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("RLOO_FAST_DEBUG", "0") not in ("", "0") or not is_told(error):
            raise
        rank = os.environ.get("RANK", "0")
        where = f" (process {rank})" if rank != "0" else ""
        if isinstance(error, UsageError):
            print(f"rloo-fast: error{where}: {masked(str(error))}", file=sys.stderr)
            return 2
        print(f"rloo-fast: error{where}: {sentence(error)}", file=sys.stderr)
        kept = keep_traceback(error)
        place = f"The whole traceback is in {kept}. " if kept else ""
        print(f"{place}RLOO_FAST_DEBUG=1 shows it here.", file=sys.stderr)
        return 1


def _check_directory() -> None:
    """Raise UsageError if the working directory was deleted: torch ends the process there, with a
    sentence about a library."""
    from .options import UsageError

    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError(
            "the directory that this was started in has been deleted: change to another (cd)."
        ) from None


def _run(command: str, argv: list[str]) -> int:
    if command == "train":
        from .train_command import main as run
    elif command == "eval":
        from .eval import main as run
    elif command == "view":
        from .view import main as run
    elif command == "plot":
        from .plot import main as run
    elif command == "quickstart":
        from .quickstart import main as run
    elif command == "doctor":
        from .doctor import main as run
    elif command == "plan":
        from .plan import main as run
    elif command == "recipe":
        from .recipe_files import main as run
    else:
        raise _unknown(command)
    return run(argv)


def _unknown(command: str) -> Exception:
    import difflib

    from .options import UsageError

    close = difflib.get_close_matches(command, COMMANDS, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return UsageError(f"unknown command {command!r}: it is one of {', '.join(COMMANDS)}.{meant}")
