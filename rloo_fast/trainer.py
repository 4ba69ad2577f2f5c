"""RLOOTrainer: TRL's RLOOTrainer on transformers' Trainer, with a step of our own.

    prompts -> completions -> rewards -> [reference] -> policy forward, loss, backward -> update

One step of the Trainer is one optimizer step over the whole effective batch; the micro-batches in
it are ours, so transformers runs with gradient_accumulation_steps = 1.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .checkpoint.lock import locked
from .checkpoint.resume import checkpoint_to_resume
from .checkpoint.run_state import RunState
from .checkpoint.writer import CheckpointWriter
from .config.changes import FixedFields
from .config.names_2024 import refuses_arguments_2024
from .config.rloo_config import RLOOConfig, trainer_args
from .data import loader
from .data.seeds import step_seed
from .distributed import check_launch, make_training_engine
from .policy.layout_probe import choose_layout, runs_images_once
from .records import GenerationBatch, MicroBatchInputs, MicroBatchResult, PreparedBatch
from .reports.metrics import Metrics
from .reports.progress import show_lines
from .reports.recorder import Recorder
from .reports.run_card import RunCard, has_chats
from .rewards import RewardFunc, RewardSources
from .rollout.settings import EngineSettings, sampling_of
from .step import build, loaders
from .step.callbacks import StepCallback, SyncReference
from .step.clock import StepClock
from .step.evaluation import Evaluator
from .step.failures import SaveOnFailure
from .step.load import Loaded, ToolArguments, load_run
from .step.nonfinite import NonfiniteSteps
from .step.policy_version import PolicyVersion
from .step.retries import update_with_retries
from .step.rows import rollout_rows
from .step.termination import Termination
from .tools import EnvironmentFactory
from .transformers_hooks import LossSinceLog, TransformersHooks
from .trl_names import TRLNames

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)

EvalDataset = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


class RLOOTrainer(TransformersHooks, TRLNames):
    """REINFORCE Leave-One-Out (arXiv:2402.14740) for causal language models.

    Arguments are those of TRL 1.16's RLOOTrainer, and of its GRPOTrainer those for tools:
    model: a directory or hub id, a PreTrainedModel, or a PeftModel.
    reward_funcs: one or several of: a function f(prompts, completions, completion_ids, **columns)
        that returns a float or None per completion (async too), a builtin name, "module:function",
        a sequence-classification model as object, directory or hub id, a RewardModel. Or the
        RewardSources that were found of them before.
    args: RLOOConfig. train_dataset: rows with a `prompt` (string or messages); other columns go to
    the reward functions. eval_dataset: the same, or a dict of them. processing_class: tokenizer.

    command, dataset_name: for the model card, where a command started the run.
    Bad input raises ValueError or TypeError with what to write, before training starts.
    """

    loss_is_scaled_for_ga = False
    _tag_names = ("rloo_fast",)  # and those of the model card
    command: str | None = None
    dataset_name: str | None = None

    @refuses_arguments_2024
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | RewardSources | None = None,
        args: RLOOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Any] | str | None = None,
        rollout_func: Any = None,
        environment_factory: EnvironmentFactory | None = None,
    ):
        args = trainer_args(args, model)
        check_launch(args)
        loaded = load_run(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            quantization_config=quantization_config,
            peft_config=peft_config,
            trajectories=ToolArguments.of(self, tools, environment_factory, rollout_func),
        )
        self.rewards, self.skipping = loaded.rewards, loaded.skipping
        super().__init__(
            model=loaded.policy,
            args=args,
            data_collator=_unchanged,
            train_dataset=loaded.train_dataset,
            eval_dataset=loaded.eval_dataset,
            processing_class=loaded.processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.parallel = make_training_engine(self.accelerator)
        self.metrics, self.clock = Metrics(), StepClock(self.accelerator.device)
        self.policy_version = PolicyVersion()
        self.nonfinite = NonfiniteSteps(args.max_nonfinite_steps)
        self.termination = Termination(self.accelerator)
        self._said: set[str] = set()
        self._fixed = FixedFields(args)
        self._newest_result: MicroBatchResult | None = None  # of compute_loss
        self._build_step(loaded)
        self._build_records(loaded.tokenizer)
        if args.log_format == "line":
            show_lines(self)
        self._build_checkpoints(loaded.reference)

    # The step

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One optimizer step's rollouts, loss and gradients; `inputs`: its new prompts.

        If it fails, a checkpoint of the step before is saved first.
        """
        with self._saved_if_it_fails(model):
            return self._training_step(model, inputs)

    def _training_step(self, model: nn.Module, inputs: list[loader.Row]) -> Tensor:
        self._fixed.check()
        self._choose_layout(model)
        self.clock.begin_step()
        model.train()
        micro_steps = self.args.micro_steps_per_update
        for rows in loader.generation_batches(inputs, self.args.prompts_per_generation):
            # prompts -> completions -> rewards -> what must be known before the update
            batch = self._collect(rows, step_seed(self.args.seed, self.buffer.num_added), "train")
            covered = self.buffer.ends_within(micro_steps)
            self.buffer.add(self.update.preparer(batch, model, covered_by_first_update=covered))
        pieces = self.buffer.take(micro_steps)
        with self.clock.stage("policy"):
            result = update_with_retries(pieces, model, self._loss_and_result, self.update)
        self.recorder.record_update(result)
        for batch in result.first_used:
            rows = self._record_rollout(batch, "train")
            # safety gates, ahead of the optimizer: the policy sampled, and starts as the reference
            self.sampler_check.judge(rows, self._where("train", batch), trains=True)
            self.update.reference_check.judge(rows, self.state.global_step)
        self.buffer.replace(result.pieces)
        self.buffer.mark_off_policy()  # the weights change now
        return result.loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatchInputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The RLOO loss of one micro-batch, as a share of the step's: the step's loss is the sum
        over its micro-batches. With `return_outputs`: (loss, MicroBatchResult).

        The step calls it without, so that a subclass may return another loss made of this one.
        """
        loss, result = self.update.updater.loss(model, inputs)
        self._newest_result = result
        return (loss, result) if return_outputs else loss

    def _loss_and_result(
        self, model: nn.Module, inputs: MicroBatchInputs
    ) -> tuple[Tensor, MicroBatchResult]:
        self._newest_result = None
        loss = self.compute_loss(model, inputs)
        result, self._newest_result = self._newest_result, None
        if not isinstance(loss, Tensor) or result is None:
            raise TypeError(
                "compute_loss must call super().compute_loss(model, inputs) and return a loss made "
                f"of its loss, got {type(loss).__name__}."
            )
        return loss, result

    def _choose_layout(self, model: nn.Module) -> None:
        planner = self.update.planner
        if not planner.layout_name:
            planner.layout_name, why = choose_layout(
                self.args.layout, self.policy, model, self.accelerator, self.collector.seen
            )
            planner.images_once, also = runs_images_once(
                planner.layout_name, self.policy, model, self.accelerator, self.collector.seen
            )
            self._say_once(f"Micro-batches: {why}{also}.")

    def _collect(self, rows: list[loader.Row], seed: int, mode: str) -> GenerationBatch:
        """Completions of these prompts, scored: this process' share."""
        if mode == "train":
            collected = self.source.next(rows, seed, self.state)
        else:
            k = self.args.completions_per_prompt(mode)
            collected = self.collector(rows, k, seed, mode, self.state)
        step = self.state.global_step
        self.recorder.record_collected(mode, collected.logged, collected.texts, step)
        if self.skipping is not None:
            self.metrics.set_last(mode, "rows_skipped", self.skipping.num_skipped[mode])
        if mode == "train":
            self.state.num_input_tokens_seen += collected.num_tokens
        return collected.batch

    def _record_rollout(
        self, batch: PreparedBatch, mode: str, num_real: int | None = None
    ) -> dict[str, Tensor]:
        """Metrics of a generation batch; its rows of all processes. `num_real`: rows that are not
        repeats."""
        rows = rollout_rows(
            batch,
            self.sampler_check,
            self.accelerator,
            advantages_per_token=self.update.settings.advantages_per_token,
            num_real=num_real,
        )
        self.recorder.record_rollout(rows, mode, batch, self.state.num_input_tokens_seen)
        return rows

    def _record_evaluated(self, batch: PreparedBatch, num_real: int) -> None:
        rows = self._record_rollout(batch, "eval", num_real)
        self.sampler_check.judge(rows, self._where("eval", batch))

    def _where(self, mode: str, batch: PreparedBatch) -> str:
        step, version = self.state.global_step, batch.generation.weights_version
        return f"{mode}, after step {step}, weights version {version}"

    def _saved_if_it_fails(self, model: nn.Module) -> AbstractContextManager[None]:
        save = partial(self._save_checkpoint, model, None)
        save = partial(self.checkpoints.save_at_the_end, self.state, save)
        return self._save_on_failure.around(model, self.state.global_step, save)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        return loaders.train_loader(self.train_dataset, self.args, self.skipping)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return loaders.eval_loader(self.eval_dataset, eval_dataset, self.args, self.skipping)

    # What transformers' Trainer offers

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; True resumes from the newest checkpoint of output_dir, a string from that one.

        SIGTERM: the step is finished, a checkpoint saved, and the process exits with status 0.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args, self.parallel)
        self.run_state.resume_from = checkpoint
        self.policy_version.advance()  # as the weights there are now, or those of a checkpoint
        self.sampler_check.announce()
        whole_batch = self.args.accumulating_by_ourselves()
        try:
            with locked(self.args, self.accelerator), self.termination, whole_batch:
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.source.close()
            self.rewards.close()
        self.termination.exit_if_requested(self.state.global_step, self.checkpoints.last_saved_step)
        self.recorder.draw_curves(self.state.log_history)
        # transformers' mean covers this call of train() only, ours every step (see Recorder)
        return output._replace(training_loss=output.metrics["train_loss"])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self.parallel.is_set_up(self.model):
            raise ValueError(
                f"evaluate() before train() is not offered with {self.parallel.name}, which splits "
                "the model together with its optimizer: set eval_on_start=True."
            )
        self.evaluator.begin()
        if not self.is_in_train:
            self.policy_version.advance()  # its weights may have been changed by hand
        return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Samples, scores, and returns the loss, with ratio 1: nothing was updated."""
        with self._saved_if_it_fails(model) if self.is_in_train else nullcontext():
            self._choose_layout(model)
            loss = self.evaluator(inputs, model, self.state.global_step)
            return loss.to(self.accelerator.device), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = self.state.global_step
        self.recorder.complete(logs, step)
        seen = dict(logs)  # a callback's changes are its own: train(), evaluate() return `logs`
        super().log(seen, start_time)
        kept = seen | self.state.log_history[-1]  # what a callback adds is written
        self.recorder.write(kept, step, interrupted=self.termination.agreed)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        **_: Any,
    ) -> None:
        """README.md with base model, data, command, versions, curves and the newest metrics."""
        if self.accelerator.is_main_process:
            self.card.write(
                output_dir,
                model_name=model_name,
                dataset_name=dataset_name or self.dataset_name,
                tags=[*([tags] if isinstance(tags, str) else tags or ()), *self._tag_names],
                hub_model_id=self.hub_model_id or self.args.hub_model_id,
                command=self.command,
                log_history=self.state.log_history,
            )

    def end(self) -> None:
        """Close the rollout engine, trackers and process groups, in this order."""
        self.source.close()
        self.rollouts.close()
        # transformers < 5.18 has no such method
        getattr(super(), "end", self.accelerator.end_training)()

    # What the step is made of, each part with the values it needs

    def _build_step(self, loaded: Loaded) -> None:
        """The stages, from prompts to gradients."""
        args, parallel, device = self.args, self.parallel, self.accelerator.device
        reference, tokenizer = loaded.reference, loaded.tokenizer
        models = build.build_policies(self.model, reference, args, parallel)
        self.policy, self.reference, _ = models
        self.rewards.place(device, offload=args.reward_model_offload)
        engine = EngineSettings.from_config(
            args, self.model, tokenizer, parallel, loaded.longest, loaded.tokenize.processor
        )
        self.rollouts = build.build_rollouts(
            loaded.engine_class,
            engine,
            reference,
            self.rewards,
            args,
            device,
            memory=parallel.memory(lambda: self.model_wrapped),
            optimizer=lambda: self.optimizer,
            version=self.policy_version.current,
            on_sync=self.metrics.add_sync,
            on_move=self.metrics.add_move,
        )
        sampling = sampling_of(args, loaded.stop_ids)
        self.sampler_check = build.build_sampler_check(args, sampling, models, engine, parallel)
        self.update = build.build_update(
            models, tokenizer, args, parallel, self.clock, self._say_once, loaded.tokenize.seen
        )
        self.collector = build.build_collector(
            self.rollouts,
            loaded.tokenize,
            self.rewards,
            sampling,
            self.update.planner,
            self.model,
            args,
            self.accelerator,
            self.clock,
            loaded.tools,
            loaded.rollout_func,
        )
        self.source = loaders.build_source(
            self.collector, self.train_dataset, args, loaded.skipping
        )
        self.buffer = build.build_buffer(args)
        self.evaluator = Evaluator(
            self._collect,
            self._record_evaluated,
            self.update.preparer,
            self.update.advantages,
            self.update.settings,
            num_processes=self.accelerator.num_processes,
            num_generations=args.completions_per_prompt("eval"),
            seed=args.seed,
        )

    def _build_records(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Logs, samples, curves and the model card."""
        self.recorder = Recorder.from_config(
            self.args,
            self.accelerator,
            self.metrics,
            self.callback_handler.callbacks,
            reward_names=self.rewards.names,
            tokenizer=tokenizer,
            limits=self.sampler_check.limits,
        )
        self.card = RunCard.from_config(
            self.args,
            self.model,
            has_chats=lambda: has_chats(self.train_dataset, tokenizer),
            world_size=self.accelerator.num_processes,
        )

    def _build_checkpoints(self, reference: nn.Module | None) -> None:
        """What is saved and restored, and what happens around a step."""
        args, parallel = self.args, self.parallel
        moving = reference if args.sync_ref_model else None
        self.run_state = RunState(
            self.model,
            moving,
            parallel,
            {
                "buffer": self.buffer,
                "metrics": self.metrics,
                "planner": self.update.planner.budget,
                "source": self.source,
            },
            [self.nonfinite, self.recorder, self.sampler_check.limits, LossSinceLog(self)],
            load_rng_state=self._load_rng_state,
        )
        self.checkpoints = CheckpointWriter.from_config(
            args,
            self.model,
            moving,
            parallel,
            self.run_state,
            completions_wait=lambda: bool(self.buffer.queue),
            write_card=lambda directory: self.create_model_card(output_dir=directory),
        )
        # of a step that fails
        undone = [self.source, self.buffer, self.metrics, self.sampler_check.limits]
        self._save_on_failure = SaveOnFailure(undone, self.collector, parallel, self.checkpoints)
        if moving is not None:
            self.add_callback(SyncReference(parallel, self.model, moving))
        self.add_callback(
            StepCallback(
                run_state=self.run_state,
                writer=self.checkpoints,
                recorder=self.recorder,
                clock=self.clock,
                version=self.policy_version,
                nonfinite=self.nonfinite,
                termination=self.termination,
                rollouts=self.rollouts,
                buffer=self.buffer,
                parallel=parallel,
                wrapped=lambda: self.model_wrapped,
            )
        )

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said and self.accelerator.is_main_process:
            self._said.add(sentence)
            logger.info(sentence)


def _unchanged(rows: Any) -> Any:
    """The rows of a step as they are: a reward function may need any column."""
    return rows
