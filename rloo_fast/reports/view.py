"""What a run keeps for `rloo-fast view`: the completions of its steps, and what the run is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.rloo_config import RLOOConfig
from ..records import CompletionTexts, PreparedBatch
from ..weight_sync.sampler_limits import SamplerLimits
from .machine import cpu_cores, cpu_model
from .view_files import MIB, SHARE_OF_STEP, ViewWriter
from .view_rows import (
    KeptBatch,
    TokenPieces,
    chosen_groups,
    gather_tokens,
    joined,
    step_summary,
    view_table,
)

PACKAGES = (
    "rloo-fast", "torch", "transformers", "accelerate", "datasets", "peft", "vllm", "triton",
)  # fmt: skip


class View:
    """Gathers a step's completions and their tokens from all processes, and writes them.

    max_mib: most that they take on disk, see `ViewWriter`. limits: of the sampler check, as they
    are at each step. about: the settings that run.json has.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pieces: TokenPieces,
        limits: SamplerLimits,
        *,
        output_dir: str,
        max_mib: int,
        about: Callable[[], dict[str, Any]],
    ):
        self.accelerator, self.pieces, self.limits = accelerator, pieces, limits
        self.output_dir, self.max_mib, self.about = output_dir, max_mib, about
        self._waiting: list[tuple[int, CompletionTexts]] = []  # (steps done, texts), as sampled
        self._batches: list[KeptBatch] = []  # of the step under way
        self._about_step: dict[str, Any] = {}  # the newest of them
        self._writer: ViewWriter | None = None

    @classmethod
    def from_config(
        cls, args: RLOOConfig, accelerator: Accelerator, tokenizer: Any, limits: SamplerLimits
    ) -> View | None:
        """None where nothing is to be kept."""
        if not args.view_mib:
            return None
        return cls(
            accelerator,
            TokenPieces.of(tokenizer),
            limits,
            output_dir=str(args.output_dir),
            max_mib=args.view_mib,
            about=lambda: _about(args, accelerator),
        )

    def add_texts(self, texts: CompletionTexts, step: int) -> None:
        """Texts of a generation batch that was sampled after `step` optimizer steps; on the main
        process. What an attempt that failed has left goes."""
        self._waiting = [*(one for one in self._waiting if one[0] == step), (step, texts)]

    def add_rollout(
        self, rows: dict[str, Tensor], batch: PreparedBatch, num_generations: int
    ) -> None:
        """The batch that the oldest waiting texts belong to; `rows`: of all processes, as
        sampled. Every process must call."""
        most = self.max_mib * MIB // SHARE_OF_STEP
        groups = chosen_groups(rows["length"], num_generations, most)
        tokens = gather_tokens(batch, groups, self.pieces, self.accelerator)
        if not self._waiting:
            return  # another process', or of a batch that a resumed run has left
        step, texts = self._waiting.pop(0)
        self._batches.append(KeptBatch(texts, rows, tokens, num_generations))
        self._about_step = {
            "sampled_after": step,
            "weights_version": batch.generation.weights_version,
            "logp_diff_warn": self.limits.warn,
            "logp_diff_stop": self.limits.stop,
        }

    def end_step(self) -> None:
        """After the optimizer: the step's completions are written, if it sampled any; the groups
        of several generation batches are numbered on."""
        if self._batches and self._writer is not None:
            whole, about = joined(self._batches), self._about_step
            summary = step_summary(whole) | about
            self._writer.write(about["sampled_after"] + 1, view_table(whole), summary)
        self._batches.clear()

    def open(self, step: int, max_steps: int) -> None:
        """The files of this run, cut back to the `step` that it resumes from; main process."""
        self._writer = ViewWriter(self.output_dir, self.max_mib, resume_step=step or None)
        self._writer.write_run({"max_steps": max_steps, "resumed_from": step, **self.about()})


def _about(args: RLOOConfig, accelerator: Accelerator) -> dict[str, Any]:
    return {
        "started": time.time(),
        "config": args.to_dict(),
        "num_processes": accelerator.num_processes,
        "environment": {
            "python": platform.python_version(),
            "device": _device(accelerator),
            "cpu": f"{cpu_model()}, {cpu_cores()} cores",
            **{name: number for name in PACKAGES if (number := _version(name))},
        },
    }


def _device(accelerator: Accelerator) -> str:
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
