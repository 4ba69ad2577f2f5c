"""What the trainer writes down: metrics of each stage, logs, samples, curves, model card."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers.integrations.integration_utils import TensorBoardCallback

from .. import models
from ..prompts import is_conversational
from ..types import Samples
from . import completions
from .completions_file import CompletionsWriter
from .curves import plot_curves
from .metrics import gather_rows, rollout_metrics, update_metrics
from .metrics_file import MetricsWriter
from .model_card import example_prompt, write_model_card

logger = logging.getLogger(__name__)
CURVES = "curves.png"


class RunReportMixin:
    """Trainer methods; they read the trainer's stages and never change what is computed."""

    accelerator: Any
    args: Any
    buffer: Any
    callback_handler: Any
    collector: Any
    hub_model_id: str | None
    metrics: Any
    model: Any
    processing_class: Any
    rewards: Any
    rollouts: Any
    state: Any
    termination: Any
    train_dataset: Any
    truth: Any
    updater: Any

    command: str | None = None  # that started the run, where a command did
    dataset_name: str | None = None
    loss_total: float
    _run_start: float | None = None
    _step_start = 0.0
    _step_loss = 0.0
    _step_tokens = 0
    _writer: MetricsWriter | None = None
    _samples_writer: CompletionsWriter | None = None

    def _record_update(self, rows: dict[str, Tensor], counts: dict[str, float]) -> None:
        """Metrics of an optimizer step from its rows and counts on this process."""
        first = self.accelerator.process_index * counts["micro_batches"]  # all have as many
        rows["micro_batch"] = rows["micro_batch"] + first
        everyone = gather_rows(self.accelerator, rows)
        micro_batch = everyone.pop("micro_batch").long()
        aux = everyone.pop("aux_loss", None)
        values = update_metrics(everyone, micro_batch)
        if aux is not None:
            values["aux_loss"] = aux.nanmean().item()
        total = gather_rows(
            self.accelerator, {name: torch.tensor([float(n)]) for name, n in counts.items()}
        )
        sums = {name: column.sum().item() for name, column in total.items()}
        values["update/tokens_run"] = sums["tokens_run"]
        values["update/micro_batches"] = counts["micro_batches"]
        values["update/frac_groups_not_run"] = sums["groups_not_run"] / sums["groups"]
        self._step_tokens = int(everyone["tokens"].sum())
        self.metrics.add("train", values)

    def _record_rollout(self, samples: Samples, mode: str, num_real: int | None = None) -> None:
        """Metrics of a generation batch, once; `num_real`: rows that are not repeats.

        Raises SamplerMismatch if they were not drawn from the policy: ahead of the optimizer.
        """
        if "recorded" in samples.stats:
            return
        columns = dict(samples.stats)
        if samples.sampler_logps is not None:
            columns |= self.truth.columns(samples)
        entropy = columns.pop("entropy", None)
        if mode == "eval" and entropy is not None:
            columns["entropy_sum"] = entropy
        advantages = samples.advantages
        assert advantages is not None
        if self.args.loss == "reinforce_pp":  # of the first token: the sequence's own advantage
            starts = samples.cu_seqlens[:-1].clamp(max=max(len(advantages) - 1, 0))
            advantages = advantages[starts] if len(advantages) else torch.zeros(samples.num_rows)
        columns["advantage"] = advantages
        everyone = gather_rows(self.accelerator, columns)
        order = everyone.pop("row").argsort()[:num_real]  # as sampled, before rows were exchanged
        everyone = {name: column[order] for name, column in everyone.items()}
        self.collector.table.advantages = everyone["advantage"].tolist()
        entropy_sum = everyone.pop("entropy_sum", None)
        values = rollout_metrics(
            everyone, self.rewards.names, samples.num_generations, self.args.beta
        )
        if entropy_sum is not None:
            values["entropy"] = float(entropy_sum.sum() / everyone["tokens"].sum().clamp(min=1))
        self.metrics.add(mode, values)
        self.metrics.set_last(mode, "num_tokens", self.state.num_input_tokens_seen)
        samples.stats = {"recorded": torch.tensor(True)}
        if samples.sampler_logps is not None:
            step, version = self.state.global_step, self.rollouts.version()
            self.truth.judge(everyone, f"{mode}, after step {step}, weights version {version}")

    def finish_step(self, optimizer_s: float) -> None:
        """Clock and counters of a step, after the optimizer."""
        if math.isfinite(self._step_loss):
            self.loss_total += self._step_loss
        now = time.perf_counter()
        step_s = now - self._step_start
        stages = {**self.metrics.stages, "optimizer": optimizer_s}
        self.metrics.add("train", {f"time/{name}_s": seconds for name, seconds in stages.items()})
        episodes = self.buffer.num_added * self.args.generation_batch_size
        rate = self._step_tokens / step_s
        self.metrics.add("train", {"step_time": step_s, "throughput/completion_tokens_per_s": rate})
        self.metrics.set_last("train", "episode", episodes)
        if self._run_start is None:
            self._run_start, self._first_episode = self._step_start, episodes
        else:
            seconds = now - self._run_start
            self.metrics.set_last("train", "eps", int((episodes - self._first_episode) / seconds))

    def samples_due(self) -> bool:
        """After a step: num_sample_generations asks for that many tables, spread over the run."""
        n = self.args.num_sample_generations or 0
        done, total = self.state.global_step, self.state.max_steps
        return done * n // total > (done - 1) * n // total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # evaluation's own time carries its prefix: eval_, eval_<name>_, or the caller's
        timed = [n for n in logs if n.endswith("_runtime") and n != "train_runtime"]
        mode, prefix = ("eval", timed[0].removesuffix("runtime")) if timed else ("train", "")
        if "train_loss" in logs:  # transformers' covers this call of train() only
            logs["train_loss"] = self.loss_total / max(self.state.global_step, 1)
        logs.update({prefix + k: v for k, v in self.metrics.flush(mode).items()})
        if "learning_rate" in logs:
            logs["lr"] = logs["learning_rate"]
        super().log(logs, start_time)  # pyright: ignore
        if not self.accelerator.is_main_process:
            return
        interrupted = self.termination.agreed and "train_loss" in logs
        if self._writer is not None and not interrupted:
            self._writer.write(self.state.global_step, logs)
        if "train_loss" not in logs:
            if self.args.log_completions:
                self.print_completions()
            if self._samples_writer is not None and self.collector.table.prompts:
                self._samples_writer.write(self._samples_shown(self._samples()))

    def print_completions(self) -> None:
        """The newest samples with their rewards: to the terminal and the trackers in use."""
        if not self.accelerator.is_main_process or not self.collector.table.prompts:
            return
        samples = self._samples()
        shown = self._samples_shown(samples)
        completions.print_table(shown, total=len(samples))
        completions.log_completions_table(self.args.report_to, samples)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = completions.markdown_table(shown)
                callback.tb_writer.add_text("completions", text, self.state.global_step)

    def _samples(self) -> pd.DataFrame:
        table = self.collector.table
        return completions.completions_dataframe(
            table.prompts,
            table.completions,
            table.rewards,
            table.advantages,
            self.state.global_step,
            table.extra,
            self.args.log_unique_prompts,
        )

    def _samples_shown(self, samples: pd.DataFrame) -> pd.DataFrame:
        return completions.draw_rows(samples, self.args.num_completions_to_print)

    def open_run_files(self) -> None:
        """metrics.jsonl and completions.csv of this run, cut back to the step it resumes from; on
        the main process."""
        if not self.accelerator.is_main_process:
            return
        done = self.state.global_step or None
        self._writer = MetricsWriter(self.args.output_dir, resume_step=done)
        if self.args.log_completions_csv:
            self._samples_writer = CompletionsWriter(self.args.output_dir, resume_step=done)

    def draw_curves(self) -> None:
        """curves.png in output_dir, where there are two logs or more; a failure is a warning."""
        logs = [row for row in self.state.log_history if {"reward", "eval_reward"} & {*row}]
        if not self.accelerator.is_main_process or len(logs) < 2:
            return
        path = Path(self.args.output_dir) / CURVES
        try:
            plot_curves([path.parent], path)
        except Exception as error:  # of a drawing library that may not even be there
            logger.warning("%s was not drawn: %s", path, error)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        **_: Any,
    ) -> None:
        """README.md with base model, data, command, versions, curves and the newest metrics."""
        if not self.accelerator.is_main_process:
            return
        directory = Path(output_dir or self.args.output_dir)
        base = models.base_causal_lm(self.model)
        hub_id = self.hub_model_id or self.args.hub_model_id
        is_peft = models.is_peft_model(self.model)
        write_model_card(
            directory / "README.md",
            model_name=model_name or (hub_id or Path(self.args.output_dir).name).split("/")[-1],
            base_model=getattr(base.config, "_name_or_path", "") or None,
            dataset_name=dataset_name or self.dataset_name,
            tags=[tags] if isinstance(tags, str) else list(tags or []),
            is_peft=is_peft,
            merged_adapter=self.args.merge_adapter,
            prompt=example_prompt(self._has_chats()),
            loss=self.args.loss,
            advantage=self.args.advantage,
            hub_model_id=hub_id,
            local_path=str(self.args.output_dir),
            command=self.command,
            world_size=self.accelerator.num_processes,
            versions=_versions(is_peft),
            metrics=self.state.log_history,
            curves=CURVES if (directory / CURVES).is_file() else None,
            tracker_urls=_tracker_urls(),
        )

    def _has_chats(self) -> bool:
        """Whether the training prompts are conversations; without any, whether the model chats."""
        first = next(iter(self.train_dataset), None) if self.train_dataset is not None else None
        if first is None:
            return bool(getattr(self.processing_class, "chat_template", None))
        return is_conversational(first["prompt"])


def _versions(is_peft: bool) -> dict[str, str]:
    names = ["rloo-fast", "torch", "transformers", "accelerate", "datasets"]
    versions = {name: version(name) for name in [*names, *(["peft"] if is_peft else [])]}
    if "vllm" in sys.modules:  # its CPU build is a package of another name
        versions["vllm"] = sys.modules["vllm"].__version__
    return versions


def _tracker_urls() -> dict[str, str]:
    """Addresses of the trackers' pages of this run, where one is active."""
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    url = getattr(run, "url", None)
    return {"wandb": url} if url else {}
