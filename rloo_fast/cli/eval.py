"""`rloo-fast eval`: how often a model's texts are preferred, or what reward functions give them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .arguments import as_usage_errors, check_given, gather, modules_here, train_options
from .help import option_line
from .input import read_command_line
from .options import Option, UsageError, options_named

USAGE = """\
usage: rloo-fast eval judge --model_name_or_path M --dataset_name D --judge J [--option value ...]
       rloo-fast eval judge --completions FILE.jsonl --dataset_name D --judge J [...]
       rloo-fast eval judge --table DIR ...
       rloo-fast eval reward --model_name_or_path M --dataset_name D --reward_funcs F ... [...]

judge: win rate of a model's texts against reference texts, each pair shown to the judge in random
order, by the options below. reward: the mean of reward functions (file.py:name and all that `train`
takes) over the rows of the dataset's test split, or of a single file; by the options of `train`.
"""


def main(argv: Sequence[str]) -> int:
    """Run `rloo-fast eval ...`; the exit status does not depend on the win rate or reward."""
    options = options_named("rloo_fast.judges.arguments:JudgeArguments")
    if {"-h", "--help"} & {*argv} or not argv:
        print(_help(options))
        return 0
    if argv[0] == "reward":
        values = gather(argv[1:], train_options())
        check_given(values)

        from .eval_reward import run

        return run(values)
    if argv[0] != "judge":
        raise UsageError(f"eval has two kinds, judge and reward; got {argv[0]!r}.")
    given = read_command_line(argv[1:], options, "rloo-fast eval judge --help")
    if given.get("table"):
        _only_table(given)
        return 0

    from transformers.utils.logging import disable_progress_bar

    from ..judges import JudgeError
    from ..judges.arguments import JudgeArguments, check
    from ..judges.evaluate import evaluate
    from ..judges.results import as_table
    from ..rollout.engine import EngineError

    modules_here()
    arguments = JudgeArguments(**given)
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, of reading weights
    # ImportError: vLLM, where it is asked for
    with as_usage_errors(ValueError, ImportError, OSError, JudgeError, EngineError):
        check(arguments)
        result = evaluate(arguments, say=print)
    print(as_table([result]))
    print(f"\nEvery pair with its verdict: {arguments.output_dir}/samples.jsonl")
    return 0


def _help(options: Mapping[str, Option]) -> str:
    lines = [option_line(option, None) for option in options.values()]
    return "\n".join([USAGE, *lines])


def _only_table(given: Mapping[str, Any]) -> None:
    if len(given) > 1:
        raise UsageError("--table prints results that are there: it goes with no other option.")

    from ..judges.results import as_table, read_result

    with as_usage_errors(ValueError):
        print(as_table([read_result(folder) for folder in given["table"]]))
