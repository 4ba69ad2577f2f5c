"""What a run writes down: metrics of each stage, logs, samples, curves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from ..config.rloo_config import RLOOConfig
from ..distributed.collectives import gather_rows
from ..records import CompletionTexts, PreparedBatch, StepResult
from ..weight_sync.sampler_limits import SamplerLimits
from . import completions
from .completions_file import CompletionsWriter
from .curves import plot_curves
from .metrics import Metrics, rollout_metrics, update_metrics
from .metrics_file import MetricsWriter
from .peak_memory import peak_memory
from .samples import Samples, heading
from .view import View

logger = logging.getLogger(__name__)
CURVES = "curves.png"


class Recorder:
    """Turns what the stages give it into metrics, logs and files; training reads none of it.

    callbacks: the trainer's, some of which show tables. beta: what metrics of rollouts depend on.
    report_to: the trackers in use.
    log_completions, write_completions: print them with every log, write them to a file.
    num_shown, unique_prompts: how many rows a table shows, one per prompt. view: keeps completions
    for `rloo-fast view`, None where nobody asked for that.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: Metrics,
        callbacks: Sequence[TrainerCallback],
        *,
        output_dir: str,
        reward_names: list[str],
        beta: float,
        report_to: Sequence[str],
        log_completions: bool,
        write_completions: bool,
        num_shown: int | None,
        unique_prompts: bool,
        view: View | None,
    ):
        self.accelerator, self.metrics = accelerator, metrics
        self.callbacks = callbacks
        self.output_dir, self.reward_names = output_dir, reward_names
        self.beta = beta
        self.report_to, self.log_completions = report_to, log_completions
        self.write_completions = write_completions
        self.num_shown = num_shown
        self.view = view
        self.loss_total = 0.0  # of every step so far, for the mean that is logged at the end
        self.samples = Samples(unique_prompts)
        self._step_loss = 0.0
        self._step_tokens = 0
        self._first_episodes: int | None = None
        self._writer: MetricsWriter | None = None
        self._samples_writer: CompletionsWriter | None = None

    @classmethod
    def from_config(
        cls,
        args: RLOOConfig,
        accelerator: Accelerator,
        metrics: Metrics,
        callbacks: Sequence[TrainerCallback],
        *,
        reward_names: list[str],
        tokenizer: Any,
        limits: SamplerLimits,
    ) -> Recorder:
        return cls(
            accelerator,
            metrics,
            callbacks,
            output_dir=str(args.output_dir),
            reward_names=reward_names,
            beta=args.beta,
            report_to=list(args.report_to or ()),
            log_completions=args.log_completions,
            write_completions=args.log_completions_csv,
            num_shown=args.num_completions_to_print,
            unique_prompts=args.log_unique_prompts,
            view=View.from_config(args, accelerator, tokenizer, limits),
        )

    # Metrics of the stages

    def record_collected(
        self, mode: str, logged: dict[str, float], texts: CompletionTexts | None, step: int
    ) -> None:
        """What reward functions logged, and the texts of the newest generation batch; `step`:
        optimizer steps done."""
        self.metrics.add(mode, logged)
        if texts is not None and self.accelerator.is_main_process:
            self.samples.add(mode, texts, step)
            if self.view is not None and mode == "train":
                self.view.add_texts(texts, step)

    def record_update(self, result: StepResult) -> None:
        """Metrics of an optimizer step."""
        self._step_loss = _all(self.accelerator, result.loss).mean().item()
        columns = dict(vars(result.rows))
        # all processes have as many micro-batches
        first = self.accelerator.process_index * result.num_micro_batches
        columns["micro_batch"] = columns["micro_batch"] + first
        everyone = gather_rows(self.accelerator, columns)
        micro_batch = everyone.pop("micro_batch").long()
        aux = everyone.pop("aux_loss")
        values = update_metrics(everyone, micro_batch)
        if not aux.isnan().all():
            values["aux_loss"] = aux.nanmean().item()
        counts = {
            "run": torch.tensor([result.num_tokens_run]),
            "groups": torch.tensor([result.num_groups]),
            "not_run": torch.tensor([result.num_groups_not_run]),
        }
        total = {n: x.sum().item() for n, x in gather_rows(self.accelerator, counts).items()}
        values["update/tokens_run"] = total["run"]
        values["update/micro_batches"] = float(result.num_micro_batches)
        values["update/frac_groups_not_run"] = total["not_run"] / total["groups"]
        self._step_tokens = int(everyone["tokens"].sum())
        self.metrics.add("train", values)

    def record_rollout(
        self, rows: dict[str, Tensor], mode: str, batch: PreparedBatch, num_tokens_seen: int
    ) -> None:
        """Metrics of a generation batch, of its rows of all processes (see `step.rows`)."""
        num_generations = batch.generation.num_generations
        self.samples.add_advantages(mode, rows["advantage"].tolist())
        if self.view is not None and mode == "train":
            self.view.add_rollout(rows, batch, num_generations)
        values = rollout_metrics(rows, self.reward_names, num_generations, self.beta)
        if mode == "eval":
            entropy = rows["old_entropy"].sum() / rows["tokens"].sum().clamp(min=1)
            values["entropy"] = float(entropy)
        self.metrics.add(mode, values)
        self.metrics.set_last(mode, "num_tokens", num_tokens_seen)

    def record_step(
        self, stages: Mapping[str, float], step_s: float, run_s: float | None, episodes: int
    ) -> None:
        """Times and counts of a step, after the optimizer; `episodes`: completions sampled so far,
        `run_s`: since the start of the first step, None after that one."""
        if math.isfinite(self._step_loss):
            self.loss_total += self._step_loss
        if self.view is not None:
            self.view.end_step()
        self.metrics.add("train", {f"time/{name}_s": seconds for name, seconds in stages.items()})
        rate = self._step_tokens / step_s
        self.metrics.add("train", {"step_time": step_s, "throughput/completion_tokens_per_s": rate})
        self.metrics.set_last("train", "episode", episodes)
        for name, gib in peak_memory(self.accelerator).items():
            self.metrics.set_last("train", name, gib)
        if self._first_episodes is None:
            self._first_episodes = episodes
        if run_s is not None:
            self.metrics.set_last("train", "eps", int((episodes - self._first_episodes) / run_s))

    def state_dict(self) -> dict[str, Any]:
        return {"loss_total": self.loss_total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss_total = state["loss_total"]

    # Logs

    def complete(self, logs: dict[str, float], step: int) -> None:
        """Add to a log of transformers what was recorded since the one before."""
        prefix = _prefix(logs)
        mode = "eval" if prefix else "train"
        if "train_loss" in logs:  # transformers' covers this call of train() only
            logs["train_loss"] = self.loss_total / max(step, 1)
        logs.update({prefix + k: v for k, v in self.metrics.flush(mode).items()})
        if "learning_rate" in logs:
            logs["lr"] = logs["learning_rate"]

    def write(self, logs: dict[str, float], step: int, interrupted: bool) -> None:
        """A complete log and its samples, to the files of the run; the summary of an `interrupted`
        run is left out, as the resumed run writes one."""
        if not self.accelerator.is_main_process:
            return
        is_summary = "train_loss" in logs
        if self._writer is not None and not (interrupted and is_summary):
            self._writer.write(step, logs)
        if is_summary:
            return
        label = _prefix(logs).removesuffix("_") or "train"
        if (samples := self.samples.take(label, step)) is None:
            return  # they stand in an earlier log, or nobody looks at them
        if self.log_completions:
            self._print(samples, label)
        if self._samples_writer is not None:
            texts = completions.without_images(samples)
            self._samples_writer.write(completions.draw_rows(texts, self.num_shown))

    def print_completions(self, step: int) -> None:
        """The newest samples of training with their rewards: to the terminal and the trackers."""
        samples = self.samples.table("train", step) if self.accelerator.is_main_process else None
        if samples is not None:
            self._print(samples, "train")

    def _print(self, samples: pd.DataFrame, label: str) -> None:
        texts = completions.without_images(samples)
        shown = completions.draw_rows(texts, self.num_shown)
        completions.print_table(shown, *heading(samples))
        name = "completions" if label == "train" else f"{label}_completions"
        completions.log_completions_table(self.report_to, samples, name)
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = completions.markdown_table(shown)
                callback.tb_writer.add_text(name, text, samples["step"].iloc[0])

    # Files of the run

    def open_run_files(self, step: int, max_steps: int) -> None:
        """metrics.jsonl, completions.csv and _view/ of this run of `max_steps`, cut back to the
        `step` that it resumes from; on the main process."""
        if not self.accelerator.is_main_process:
            return
        done = step or None
        self._writer = MetricsWriter(self.output_dir, resume_step=done)
        if self.write_completions:
            self._samples_writer = CompletionsWriter(self.output_dir, resume_step=done)
        if self.view is not None:
            self.view.open(step, max_steps)

    def draw_curves(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """curves.png in output_dir, where there are two logs or more; a failure is a warning."""
        logs = [row for row in log_history if {"reward", "eval_reward"} & {*row}]
        if not self.accelerator.is_main_process or len(logs) < 2:
            return
        path = Path(self.output_dir) / CURVES
        try:
            plot_curves([path.parent], path)
        except Exception as error:  # of a drawing library that may not even be there
            logger.warning("%s was not drawn: %s", path, error)


def _prefix(logs: Mapping[str, Any]) -> str:
    """Of an evaluation's log, whose own time carries it: eval_, eval_<name>_, or the caller's; ""
    for another log."""
    timed = (n for n in logs if n.endswith("_runtime") and n != "train_runtime")
    return next(timed, "").removesuffix("runtime")


def table_is_due(step: int, max_steps: int, num_tables: int) -> bool:
    """After `step`: whether one of `num_tables` tables, spread evenly over the run, comes now."""
    return step * num_tables // max_steps > (step - 1) * num_tables // max_steps


def _all(accelerator: Accelerator, value: Tensor) -> Tensor:
    """`value` of all processes."""
    gathered = accelerator.gather(value)
    assert isinstance(gathered, Tensor)
    return gathered
