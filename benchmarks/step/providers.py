"""The trainers that `benchmarks.step` compares, each advanced by one optimizer step at a time.

A step is one call of `train()` with max_steps=1, always in the main thread, so that threads, grad
mode and allocator are those of a normal run and the same for all. The clock runs from the Trainer's
on_step_begin to its on_step_end: setting up `train()` is not in it, everything of the step is.

The ladder, from TRL to ours, each rung one thing apart from the one above:

    trl                     TRL's RLOOTrainer as it is
    trl_gpu_head            its head on completion positions only; on a CPU TRL also projects the
                            prompts, which its GPU path does not do: that part is no merit of ours
    ours_padded_two_passes  our trainer, padded rows, with the old-log-prob pass that TRL makes; TRL
                            folds its tiles of logits with a chain of torch operations on a CPU and
                            with one kernel on a GPU: this factor too must be measured on each
    ours_padded             without that pass
    ours_packed             without padding
    ours_groups             every prompt once, for the completions of its group
    ours                    layout "auto": every shared token once, of groups that begin alike too

--rows-per-micro-batch is per_device_train_batch_size in both; ours makes a budget of tokens of it,
so that it may take fewer forwards: the notes count them.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from benchmarks.common import models as step_models
from benchmarks.common.models import SHAPES, Shape
from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.batching.layouts.shared_prefix import SharedPrefix


@dataclass(frozen=True)
class Provider:
    library: str  # "trl" | "ours"
    saves: str = ""  # the one thing that differs from the rung above
    layout: str = "auto"
    two_passes: bool = False
    gpu_head: bool = False
    alone: bool = False  # groups share nothing with others, completions nothing but their prompt


LADDER = {
    "trl": Provider("trl"),
    "trl_gpu_head": Provider("trl", "no prompt positions in the head, as on a GPU", gpu_head=True),
    "ours_padded_two_passes": Provider("ours", "our head and loss", "padded", two_passes=True),
    "ours_padded": Provider("ours", "no old-log-prob pass", "padded"),
    "ours_packed": Provider("ours", "no padding", "packed"),
    "ours_groups": Provider("ours", "every prompt once", "shared_prefix", alone=True),
    "ours": Provider("ours", "every shared token once"),
}


class Unavailable(Exception):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Settings:
    """What all trainers of a run share; plain values, so that a memory process can be told them."""

    model_folder: str
    output_folder: str
    shape_name: str
    num_generations: int
    num_prompts: int
    device: str
    dtype: str  # "float32", or "bfloat16": autocast over fp32 weights
    rows_per_micro_batch: int
    beta: float
    gradient_checkpointing: bool

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name].with_sizes(self.num_generations, self.num_prompts)

    def trainer_arguments(self) -> dict[str, Any]:
        """Fields that TRL's RLOOConfig and ours both have, with the same meaning."""
        shape = self.shape
        return {
            "output_dir": self.output_folder,
            "per_device_train_batch_size": self.rows_per_micro_batch,
            "gradient_accumulation_steps": shape.num_rows // self.rows_per_micro_batch,
            "num_generations": shape.num_generations,
            "max_completion_length": shape.limit,
            "generation_kwargs": {"min_new_tokens": shape.limit},
            "beta": self.beta,
            "max_steps": 1,
            "optim": "adamw_torch",
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": self.gradient_checkpointing,
            "bf16": self.dtype == "bfloat16",
            "use_cpu": self.device == "cpu",
            "model_init_kwargs": {"dtype": "float32"},
            "shuffle_dataset": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


@dataclass
class Passes:
    """Tokens and calls of one model in its trainer's newest step, padding included."""

    tokens: int = 0
    forwards: int = 0

    def reset(self) -> None:
        self.tokens = self.forwards = 0

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.tokens += inputs[0].numel()
        self.forwards += 1

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.forwards} forward{'s'[: self.forwards != 1]}"


class Watch(TrainerCallback):
    """The clock, and what the gate compares: logs, and the gradients the optimizer is given."""

    def __init__(self, device: str):
        self.device = device
        self.seconds, self.start, self.threads = 0.0, 0.0, 0
        self.keep_gradients = False
        self.gradients: dict[str, Tensor] = {}
        self.logs: dict[str, float] = {}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep_gradients:
            parameters = kwargs["model"].named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in parameters if p.grad is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self.now() - self.start
        self.threads = torch.get_num_threads()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs = dict(logs)


@dataclass
class FirstUpdate:
    """What a provider made of the common weights and completions."""

    loss: float
    grad_norm: float  # before clipping
    reward_std: float
    gradients: dict[str, Tensor]  # after clipping


class Steps:
    """One provider's trainer.

    Raises Unavailable where its library is missing or its config is refused.
    """

    def __init__(self, name: str, settings: Settings, reference: nn.Module | None = None):
        """`reference`: a model with the reference's weights, whose memory is then shared."""
        self.name, self.provider, self.settings = name, LADDER[name], settings
        self.watch = Watch(settings.device)
        self.trainer = _make_trainer(self.provider, settings, self.watch)
        self.trainer.remove_callback(PrinterCallback)
        if reference is not None and self.reference is not None:
            for mine, theirs in zip(
                self.reference.parameters(), reference.parameters(), strict=True
            ):
                mine.data = theirs.data
        step_models.perturb(self.trainer.model)  # so that the KL is not 0
        if self.provider.library != "trl":
            self.trainer.update.reference_check.is_over = True
        if self.provider.two_passes:
            self.trainer.update.preparer.first_pass_reason = lambda *a: "ablation"
        self._real = None if self.provider.library == "trl" else self.trainer.rollouts.engine
        self.policy_passes, self.reference_passes = Passes(), Passes()
        self.trainer.model.get_input_embeddings().register_forward_hook(self.policy_passes.hook)
        if self.reference is not None:
            embeddings: Any = self.reference.get_input_embeddings()
            embeddings.register_forward_hook(self.reference_passes.hook)
        self._injected = step_models.Injected(settings.shape, self.trainer.model.config.vocab_size)

    @property
    def reference(self) -> nn.Module | None:
        """The reference model, None at beta = 0."""
        if self.provider.library == "trl":
            return self.trainer.ref_model
        return None if self.trainer.reference is None else self.trainer.reference.model

    def update(self) -> float:
        """Seconds of one optimizer step whose completions are there at once."""
        if self.provider.library == "trl":
            self.trainer._generate_single_turn = self._injected.for_trl
        else:
            self.trainer.rollouts.engine = self._injected
        return self._train()

    def whole(self) -> float:
        """Seconds of one optimizer step with completions sampled by transformers' generate."""
        if self.provider.library == "trl":
            vars(self.trainer).pop("_generate_single_turn", None)
        else:
            self.trainer.rollouts.engine = self._real
        return self._train()

    def first_update(self) -> FirstUpdate:
        """One update, with what the gate compares."""
        self.watch.keep_gradients = True
        try:
            self.update()
        finally:
            self.watch.keep_gradients = False
        gradients, self.watch.gradients = self.watch.gradients, {}
        logs = self.watch.logs
        figures = (float(logs[name]) for name in ("loss", "grad_norm", "reward_std"))
        return FirstUpdate(*figures, gradients)

    def _train(self) -> float:
        gc.collect()  # not within the step
        self.policy_passes.reset()
        self.reference_passes.reset()
        around = head_as_on_a_gpu() if self.provider.gpu_head else nullcontext()
        with around, _groups_alone() if self.provider.alone else nullcontext():
            self.trainer.train()
        return self.watch.seconds


def _make_trainer(provider: Provider, settings: Settings, watch: Watch) -> Any:
    arguments = settings.trainer_arguments()
    if provider.library == "trl":
        if importlib.util.find_spec("trl") is None:
            raise Unavailable("trl is not installed")
        if provider.gpu_head and settings.device == "cuda":
            raise Unavailable("on a GPU that is what trl does")
        from trl import RLOOConfig, RLOOTrainer
    else:
        from rloo_fast import RLOOConfig, RLOOTrainer

        arguments["layout"] = provider.layout
    try:
        config: Any = RLOOConfig(**arguments)
    except ValueError as error:
        raise Unavailable(f"its config is refused: {error}") from error
    return RLOOTrainer(
        model=settings.model_folder,
        reward_funcs=step_models.fixed_reward,  # pyright: ignore
        args=config,
        train_dataset=Dataset.from_dict({"prompt": step_models.prompt_texts(settings.shape)}),
        processing_class=step_models.make_tokenizer(),
        callbacks=[watch],
    )


@contextmanager
def head_as_on_a_gpu() -> Iterator[None]:
    """While open, TRL's fused head scores only the positions with a label on any device.

    `_use_triton` of trl.trainer.utils decides that and nothing else; the kernels ask their own.
    """
    from trl.trainer import utils

    before = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


class GroupsAlone(SharedPrefix):
    """The layout as it was before it was a tree."""

    def sharing(self, prompts: Any, completions: Any) -> None:
        return None

    def fill(self, line: Any, units: Any) -> None:
        super().fill(line, [unit._replace(alone=True) for unit in units])


@contextmanager
def _groups_alone() -> Iterator[None]:
    before = LAYOUTS["shared_prefix"]
    LAYOUTS["shared_prefix"] = GroupsAlone()
    try:
        yield
    finally:
        LAYOUTS["shared_prefix"] = before


def differences(found: FirstUpdate, baseline: FirstUpdate) -> dict[str, float]:
    """Relative differences of loss, gradient norm and (clipped) gradients, in the 2-norm.

    The loss on fresh completions is - mean A, a sum that cancels to rounding: it is measured
    against the rewards' standard deviation where that is larger.
    """
    scale = max(abs(baseline.loss), baseline.reward_std)
    return {
        "loss": abs(found.loss - baseline.loss) / scale,
        "grad_norm": abs(found.grad_norm - baseline.grad_norm) / baseline.grad_norm,
        "gradients": _distance(found.gradients, baseline.gradients),
    }


def _distance(found: Mapping[str, Tensor], baseline: Mapping[str, Tensor]) -> float:
    if found.keys() != baseline.keys():
        return float("inf")
    squares = sum(float((found[n] - g).double().square().sum()) for n, g in baseline.items())
    size = sum(float(g.double().square().sum()) for g in baseline.values())
    return (squares / size) ** 0.5


def memory_step(name: str, settings: dict[str, Any]) -> Any:
    """One update of a provider, for the memory process."""
    return Steps(name, Settings(**settings)).update
