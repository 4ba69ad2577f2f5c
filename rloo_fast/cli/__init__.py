"""The command `rloo-fast`. Only the standard library is imported until a subcommand needs more."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

HELP = """\
usage: rloo-fast COMMAND [options]

RLOO (REINFORCE Leave-One-Out) training of language models.

  train        train a model on your prompts and rewards
  eval judge   how often a model's texts are preferred to reference texts
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

COMMANDS = ("train", "eval", "plot", "quickstart", "doctor", "plan", "recipe")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for a mistake in what was asked for.

    With RLOO_FAST_DEBUG=1 such mistakes come with a traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] in ("--version", "-V"):
        print(f"rloo-fast {version('rloo-fast')}")
        return 0

    from .options import UsageError

    try:
        return _run(argv[0], argv[1:])
    except UsageError as error:
        if os.environ.get("RLOO_FAST_DEBUG", "0") not in ("", "0"):
            raise
        rank = os.environ.get("RANK", "0")
        where = f" (process {rank})" if rank != "0" else ""
        print(f"rloo-fast: error{where}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rloo-fast: interrupted", file=sys.stderr)
        return 130


def _run(command: str, argv: list[str]) -> int:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # `--reward_funcs my_rewards:score` is a module beside you
    if command == "train":
        from .train import main as run
    elif command == "eval":
        from .eval import main as run
    elif command == "plot":
        from .plot import main as run
    elif command == "quickstart":
        from ..quickstart import main as run
    elif command == "doctor":
        from ..doctor import main as run
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
