"""What people look at during a run: the progress line and the bar.

Metric names are those of `RLOOTrainer`'s log; evaluation's carry the prefix `eval_`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from numbers import Real
from typing import Any

import transformers.trainer
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback

BAR_DELAY_S = 2  # shorter rollouts have no bar of their own
MAX_OTHER_METRICS = 8  # of a log that has none of those that a line shows
# in every log, and of no interest alone
BESIDE = ("epoch", "step", "num_tokens", "num_input_tokens_seen", "total_flos")


def progress_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str | None:
    """The log as one line, absent values left out; None for a log without numbers.

    A log with none of the metrics that a line shows has its own, `MAX_OTHER_METRICS` at most.
    """
    runtimes = (k for k in logs if k.startswith(("eval_", "train_")) and k.endswith("_runtime"))
    is_eval = any(key.startswith("eval_") for key in logs)
    # "eval_<name>_" where there are several evaluation sets; metrics of ours still say "eval_"
    prefix = next(runtimes, "eval_runtime" if is_eval else "").removesuffix("runtime")

    def show(key: str, form: str | Callable[[float], str | None]) -> str | None:
        value = logs.get(prefix + key, logs.get(f"eval_{key}"))
        if not isinstance(value, int | float):
            return None
        return form.format(value) if isinstance(form, str) else form(value)

    parts = [
        show("accuracy", "accuracy {:.3f}"),
        show("reward", "reward {:.3f}" + (show("reward_std", " ± {:.3f}") or "")),
        show("kl", lambda number: f"kl {_rounded(number)}"),
        show("entropy", lambda number: f"entropy {_rounded(number)}"),
        show("completions/mean_length", "length {:.0f}"),
        show("completions/clipped_ratio", "clipped {:.0%}"),
        show("throughput/completion_tokens_per_s", lambda number: f"{_short(number)} tok/s"),
        show("step_time", lambda seconds: f"{_digits(seconds)} s/step"),
        show("step_time", lambda seconds: _left(seconds * (max_steps - step))),
        show("learning_rate", "lr {:.2g}"),
        show("loss", lambda number: f"loss {_rounded(number)}"),
        show("grad_norm", lambda number: f"grad {_digits(number)}"),
        show("runtime", lambda seconds: f"took {_duration(seconds)}"),
    ]
    shown = [part for part in parts if part] or _others(logs)
    if not shown:
        return None
    what = prefix.rstrip("_") or "step"
    # max_steps is 0 in an evaluation without training
    where = f"{step:>{len(str(max_steps))}}/{max_steps}" if max_steps > 0 else f"{step}"
    return "  ".join([f"{what} {where}", *shown])


def _others(logs: Mapping[str, Any]) -> list[str]:
    numbers = {k: v for k, v in logs.items() if isinstance(v, Real) and k not in BESIDE}
    shown = [f"{name} {_digits(float(v))}" for name, v in [*numbers.items()][:MAX_OTHER_METRICS]]
    more = len(numbers) - len(shown)
    return [*shown, f"and {more} more"] if more else shown


def _digits(number: float) -> str:
    """Three significant digits, zeros among them, so that lines stay in columns."""
    return f"{number:#.3g}".rstrip(".")


def _rounded(number: float) -> str:
    """Of a metric near 1: what is below 5e-7 is rounding (the loss of an on-policy step is 0)."""
    return "0" if abs(number) < 5e-7 else _digits(number)


def _short(number: float) -> str:
    """1234 -> 1.23k"""
    for unit in ("", "k", "M"):
        if abs(number) < 999.5:
            return f"{_digits(number)}{unit}"
        number /= 1000
    return f"{_digits(number)}G"


def _left(seconds: float) -> str | None:
    """Training steps alone: evaluations and checkpoints come on top."""
    return f"{_duration(seconds)} left" if seconds > 0 else None


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 59.95 else str(timedelta(seconds=round(seconds)))


@contextmanager
def bars_set_aside() -> Iterator[None]:
    """What is printed on stdout in here stands above the progress bars, whoever made them, and is
    there at once: stdout is a file or a pipe where a run is logged."""
    with tqdm.external_write_mode(file=sys.stdout):
        yield
        sys.stdout.flush()


@contextmanager
def rollout_bar(total: int, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over the `total` completions of a rollout, on a terminal and from its third second on;
    to be told the tokens of each that is finished."""
    disable = None if is_shown else True  # None: where stderr is no terminal
    form = "{desc} {n_fmt}/{total_fmt} completions |{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(
        total=total, desc="rollout", leave=False, delay=BAR_DELAY_S, dynamic_ncols=True,
        disable=disable, bar_format=form,
    ) as bar:  # fmt: skip
        num_tokens = 0

        def finished(tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            bar.set_postfix_str(f"{_short(num_tokens)} tokens", refresh=False)
            bar.update()

        yield finished


class CompactProgress(ProgressCallback):
    """A bar over optimizer steps that starts at the resumed step, and `progress_line` per log.

    Replaces transformers' ProgressCallback. Off a terminal, or with `bar=False`, there are only
    the lines.
    """

    def __init__(self, bar: bool = True):
        super().__init__()
        self.bar = bar

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=None if self.bar else True,  # None: where stderr is no terminal
            )
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.bar and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        line = progress_line(logs or {}, state.global_step, state.max_steps)
        if line is not None:
            with bars_set_aside():
                print(line)


def show_lines(trainer: transformers.trainer.Trainer) -> None:
    """`CompactProgress` in the place of what a Trainer shows by itself; callbacks that the user
    passed stay."""
    own = (PrinterCallback, ProgressCallback, transformers.trainer.DEFAULT_PROGRESS_CALLBACK)
    for callback in [*trainer.callback_handler.callbacks]:
        if type(callback) in own:
            trainer.remove_callback(callback)
    trainer.add_callback(CompactProgress(bar=not trainer.args.disable_tqdm))
