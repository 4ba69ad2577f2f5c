"""What people look at during a run: the progress line and the bar.

Metric names are those of `RLOOTrainer`'s log; evaluation's carry the prefix `eval_`.
"""

import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback


def progress_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str | None:
    """The log as one line, absent values left out; None if it has no metric that a line shows."""
    runtimes = (k for k in logs if k.startswith(("eval_", "train_")) and k.endswith("_runtime"))
    is_eval = any(key.startswith("eval_") for key in logs)
    # "eval_<name>_" where there are several evaluation sets; metrics of ours still say "eval_"
    prefix = next(runtimes, "eval_runtime" if is_eval else "").removesuffix("runtime")

    def show(key: str, form: str | Callable[[float], str]) -> str | None:
        value = logs.get(prefix + key, logs.get(f"eval_{key}"))
        if not isinstance(value, int | float):
            return None
        return form.format(value) if isinstance(form, str) else form(value)

    parts = [
        show("accuracy", "accuracy {:.3f}"),
        show("reward", "reward {:.3f}" + (show("reward_std", " ± {:.3f}") or "")),
        show("kl", "kl {:.3g}"),
        show("entropy", "entropy {:.3g}"),
        show("completions/mean_length", "length {:.0f}"),
        show("completions/clipped_ratio", "clipped {:.0%}"),
        show("throughput/completion_tokens_per_s", lambda number: f"{_short(number)} tok/s"),
        show("step_time", "{:.3g} s/step"),
        show("learning_rate", "lr {:.2g}"),
        show("loss", "loss {:.3g}"),
        show("grad_norm", "grad {:.3g}"),
        show("runtime", lambda seconds: f"took {timedelta(seconds=round(seconds))}"),
    ]
    shown = [part for part in parts if part]
    if not shown:
        return None
    what = prefix.rstrip("_") or "step"
    # max_steps is 0 in an evaluation without training
    where = f"{step:>{len(str(max_steps))}}/{max_steps}" if max_steps > 0 else f"{step}"
    return "  ".join([f"{what} {where}", *shown])


def _short(number: float) -> str:
    """1234 -> 1.23k"""
    for unit in ("", "k", "M"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


class CompactProgress(ProgressCallback):
    """A bar over optimizer steps that starts at the resumed step, and `progress_line` per log.

    Replaces transformers' ProgressCallback. Off a terminal there is no bar, only the lines. A log
    with none of the line's metrics is printed as transformers does.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=None,  # where stderr is no terminal
            )
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        line = progress_line(logs or {}, state.global_step, state.max_steps)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        else:
            tqdm.write(line)
