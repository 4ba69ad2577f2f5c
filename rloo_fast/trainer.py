"""RLOOTrainer: TRL's RLOOTrainer on transformers' Trainer, with a step of our own.

    prompts -> rollout -> rewards -> [reference] -> policy forward, loss, backward -> update

One step of the Trainer is one optimizer step over the whole effective batch; the micro-batches in
it are ours, so transformers runs with gradient_accumulation_steps = 1.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from . import models, prompts
from .buffer import RolloutBuffer
from .callbacks import StepCallback, SyncReference, Termination
from .checkpoint import CheckpointMixin
from .checkpoint_files import check_output_dir, find_checkpoint
from .collect import Collector
from .config import RLOOConfig, trainer_args
from .dataset_checks import check_datasets, check_prompts, check_reward_columns
from .evaluation import EvaluationMixin
from .exchange import balance_rows
from .names_2024 import refuses_arguments_2024
from .parallel import check_launch, make_parallel
from .planner import Planner
from .policy import Policy, router_coef
from .probe import choose_layout
from .prompt_lengths import drop_long_prompts
from .reports.metrics import Metrics
from .reports.run_report import RunReportMixin
from .rewards import RewardFunc, load_reward_functions
from .rollout.build import compute_dtype, make_engine, make_room
from .rollout.cycle import RolloutCycle
from .rollout.engine import sampling_of, step_seed
from .run_state import RunStateMixin
from .scorer import Scorer
from .truth import TruthCheck
from .types import Prompt, Samples
from .update import Updater
from .weight_sync import weight_buckets

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)

EvalDataset = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


class RLOOTrainer(CheckpointMixin, RunStateMixin, RunReportMixin, EvaluationMixin, Trainer):
    """REINFORCE Leave-One-Out (arXiv:2402.14740) for causal language models.

    Arguments are those of TRL 1.16's RLOOTrainer:
    model: a directory or hub id, a PreTrainedModel, or a PeftModel.
    reward_funcs: one or several of: a function f(prompts, completions, completion_ids, **columns)
        that returns a float or None per completion (async too), a builtin name, "module:function",
        a sequence-classification model as object, directory or hub id, a RewardModel.
    args: RLOOConfig. train_dataset: rows with a `prompt` (string or messages); other columns go to
    the reward functions. eval_dataset: the same, or a dict of them. processing_class: tokenizer.

    Bad input raises ValueError or TypeError with what to write, before training starts.
    """

    loss_is_scaled_for_ga = False
    _tag_names = ("rloo", "rloo_fast")

    @refuses_arguments_2024
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: RLOOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        args = trainer_args(args, model)
        check_output_dir(args.output_dir)  # pyright: ignore
        check_datasets(train_dataset, eval_dataset, args)
        if isinstance(model, str):
            models.check_model_path(model)
        models.check_peft_config(peft_config, args)
        self.rewards = load_reward_functions(
            reward_funcs,
            reward_processing_classes,
            weights=args.reward_weights,
            reward_kwargs=args.reward_kwargs,  # pyright: ignore
            execute_model_code=args.execute_model_code,
            model_options={
                "label": args.reward_model_label,
                "output": args.reward_model_output,
                "position": args.reward_model_position,
                "dtype": args.reward_model_dtype,
            },
            model_init_kwargs=args.model_init_kwargs,  # pyright: ignore
            trust_remote_code=args.trust_remote_code,
            chat_template_kwargs=args.chat_template_kwargs,  # pyright: ignore
            timeout_s=args.reward_timeout_s,
            batch_size=args.rollout_forward_batch_size,
            processes=args.reward_processes,
        )
        check_reward_columns(self.rewards, train_dataset, eval_dataset, args)
        set_seed(args.seed)  # new adapters are drawn at random
        policy_model = models.load_policy(model, args, quantization_config)  # pyright: ignore
        tokenizer = models.load_tokenizer(processing_class, policy_model, args)
        stop_ids = models.stop_token_ids(policy_model, tokenizer, args.stop_token_id)
        longest = [models.context_length(policy_model), args.vllm_max_model_length]
        context = min((length for length in longest if length), default=None)
        self._tokenize = prompts.RowTokenizer(tokenizer, context, args)
        train_dataset, eval_dataset = drop_long_prompts(
            train_dataset, eval_dataset, self._tokenize, args
        )
        check_prompts(train_dataset, eval_dataset, self._tokenize)
        policy_model = models.add_adapters(policy_model, peft_config, args)
        if args.disable_dropout:
            models.disable_dropout(policy_model)
        reference = models.make_reference(policy_model, args)
        super().__init__(
            model=policy_model,
            args=args,
            data_collator=lambda rows: rows,  # pyright: ignore
            train_dataset=train_dataset,  # pyright: ignore
            eval_dataset=eval_dataset,  # pyright: ignore
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_launch(self.accelerator, self.args.n_gpu)
        self.parallel = make_parallel(self.accelerator)
        self.metrics = Metrics()
        self.termination = Termination()
        self.last_grad_norm = 0.0
        self.policy_version = 0  # of the weights; never falls, so that an older one is told apart
        self._said: set[str] = set()
        self._wire(reference, stop_ids)

    def _wire(self, reference: nn.Module | None, stop_ids: tuple[int, ...]) -> None:
        """The stages, each with the values it needs."""
        args, parallel = self.args, self.parallel
        coef = router_coef(self.model, args.router_aux_loss_coef)
        pad_id = self.processing_class.pad_token_id  # pyright: ignore
        common: dict[str, Any] = {
            "temperature": args.temperature,
            "compile_options": args.compile_options,
            "with_head": parallel.with_head,
        }
        self.policy = Policy(self.model, **common)
        self.reference = None
        if reference is not None:
            wrapped = parallel.reference(reference)
            self.reference = Policy(reference, wrapped=wrapped, **common)
            if args.sync_ref_model:
                self.add_callback(SyncReference(self, reference))
        self.rewards.place(
            self.accelerator.device, offload=args.reward_model_offload, stop_token_ids=stop_ids
        )
        room = None
        if args.vllm_enable_sleep_mode and args.vllm_mode == "colocate":
            room = make_room(self, reference)
            room.make()
        self.rollouts = RolloutCycle(
            make_engine(self.model, self.processing_class, args, parallel),
            version=lambda: self.policy_version,
            weights=lambda: weight_buckets(
                self.model, args.weight_sync_bucket_mib * 2**20, compute_dtype(self.model, args)
            ),
            metrics=self.metrics,
            sleep_level=2 if args.vllm_enable_sleep_mode else 0,
            room=room,
        )
        self.rollouts.sleep()
        sampling = sampling_of(args, stop_ids)
        self.truth = TruthCheck(
            args,
            sampling,
            self.accelerator,
            compute_dtype(self.model, args),
            has_dropout=models.has_dropout(self.model),
        )
        self.collector = Collector(
            self.rollouts,
            self.processing_class,  # pyright: ignore
            self.rewards,
            sampling,
            args,
            self.accelerator,
            self.metrics,
        )
        self.planner = Planner(
            self.accelerator,
            rows=args.per_device_train_batch_size,
            max_tokens=args.max_tokens_per_micro_batch,
            pad_token_id=pad_id,
            multiple_of=args.pad_to_multiple_of,  # pyright: ignore
            every_token=coef != 0,
            few_sizes=args.torch_compile,
            can_retry=parallel.can_retry,
        )
        self.scorer = Scorer(
            self.policy,
            self.reference,
            self.planner,
            args,
            parallel,
            has_dropout=models.has_dropout(self.model),
        )
        self.updater = Updater(
            self.policy, self.scorer, self.planner, args, parallel, aux_loss_coef=coef
        )
        self.buffer = RolloutBuffer(
            args.per_device_train_batch_size,
            int(args.steps_per_generation),  # pyright: ignore
            args.num_iterations,
            args.seed,
        )
        self.add_callback(StepCallback(self))

    # Stage 1: prompts

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        return prompts.train_loader(
            self.train_dataset,
            prompts_per_batch=args.prompts_per_generation,
            micro_steps_per_batch=args.steps_per_generation * args.num_iterations,
            micro_steps_per_update=args.micro_steps_per_update,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
            num_workers=args.dataloader_num_workers,
        )

    # The step

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One optimizer step's rollouts, loss and gradients; `inputs`: its new prompts.

        If it fails, a checkpoint of the step before is saved first.
        """
        with self.saved_if_it_fails(model):
            return self._training_step(model, inputs)

    def _training_step(self, model: nn.Module, inputs: Any) -> Tensor:
        self._choose_layout(model)
        self._step_start = time.perf_counter()
        self.metrics.stages.clear()
        model.train()
        size = self.args.prompts_per_generation
        for start in range(0, len(inputs), size):
            self.buffer.add(self._collect_train(inputs[start : start + size], model))
        pieces = self.buffer.take(self.args.micro_steps_per_update)
        with self.metrics.stage("policy", self.accelerator.device):
            loss, rows, counts = self.updater.backward(pieces, model, self.compute_loss)
        self.buffer.mark_off_policy()
        self._step_loss = self.accelerator.gather(loss).mean().item()  # pyright: ignore
        self._record_update(rows, counts)
        for samples in {id(s): s for s, _ in pieces}.values():
            self._record_rollout(samples, "train")
        return loss

    def _choose_layout(self, model: nn.Module) -> None:
        if self.planner.layout:
            return
        asked = self.args.layout
        self.planner.layout, why = choose_layout(asked, self.policy, model, self.accelerator)
        self._say_once(f"Micro-batches: {why}.")

    def _collect_train(self, rows: list[prompts.Row], model: nn.Module) -> Samples:
        seed = step_seed(self.args.seed, self.buffer.num_added)
        samples = self._collect(self._tokenize(rows), seed, "train", model)
        with self.metrics.stage("reference", self.accelerator.device):
            self.scorer.score_reference(samples, model)
        waiting = self.buffer.pending_micro_steps()
        covered = waiting + self.args.steps_per_generation <= self.args.micro_steps_per_update
        reason = self.scorer.first_pass_reason(samples, covered)
        if reason is not None:
            self._say_once(f"A policy pass without gradients runs before the update: {reason}.")
            with self.metrics.stage("old_logps", self.accelerator.device):
                self.scorer.first_pass(samples, model)
        elif not self.scorer.loss.kl_in_reward:
            self.scorer.credit_all(samples)
        return samples

    def _collect(self, batch: list[Prompt], seed: int, mode: str, model: nn.Module) -> Samples:
        k = self._num_generations(mode)
        samples = self.collector(batch, k, seed, mode, self.state)
        self.rollouts.sleep()
        lengths = samples.stats["length"] + torch.tensor([len(p) for p in samples.prompt_ids])
        if mode == "train":
            hidden = models.base_causal_lm(self.model).config.get_text_config().hidden_size
            samples = balance_rows(
                samples, self.accelerator, layout=self.planner.layout, tokens_per_pair=6 * hidden
            )
            total = lengths.sum().reshape(1).to(self.accelerator.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(total).sum())  # pyright: ignore
        self.planner.survey(samples)
        return samples

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The RLOO loss of one micro-batch, as a share of the step's (see Updater.loss).

        The step's loss is the sum over its micro-batches.
        """
        if return_outputs:
            raise ValueError(
                "RLOOTrainer has no outputs to return: call with return_outputs=False."
            )
        return self.updater.loss(model, inputs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; True resumes from the newest checkpoint of output_dir, a string from that one.

        SIGTERM: the step is finished, a checkpoint saved, and the process exits with status 0.
        """
        output_dir = str(self.args.output_dir)
        checkpoint = find_checkpoint(resume_from_checkpoint, output_dir, self.parallel)
        self._resume_from = checkpoint
        self.policy_version += 1  # as the weights that are there now, or loaded from a checkpoint
        self.truth.announce()
        try:
            with self.termination:
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.rewards.close()
        self.exit_if_terminated()
        self.draw_curves()
        # transformers' mean covers this call of train() only, ours every step (see log)
        return output._replace(training_loss=output.metrics["train_loss"])

    def end(self) -> None:
        """Close the rollout engine, trackers and process groups, in this order."""
        self.rollouts.close()
        # transformers < 5.18 has no such method
        getattr(super(), "end", self.accelerator.end_training)()

    # transformers' own, adapted

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        # not the whole model is compiled, but its backbone, in the update only (see Policy)
        built["dynamo_plugin"] = TorchDynamoPlugin(backend=DynamoBackend.NO)
        return built

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) * self.args.micro_steps_per_update

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        self.parallel.adopt_optimizer(self.optimizer)
        return super().create_scheduler(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = self.parallel.grad_norm()
        if norm is None:
            norm = super()._get_grad_norm(model, grad_norm)
        self.last_grad_norm = float(norm)  # pyright: ignore
        return norm

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]

    def _num_generations(self, mode: str) -> int:
        args = self.args
        return (
            args.num_generations
            if mode == "train"
            else (args.num_generations_eval or args.num_generations)
        )

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said and self.accelerator.is_main_process:
            self._said.add(sentence)
            logger.info(sentence)
