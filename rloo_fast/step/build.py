"""From a configuration to the parts of a step, each with the values it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rloo_kernels.lm_head.fp8 import E4M3
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..batching.budget import TokenBudget
from ..batching.planner import Planner
from ..batching.retry import MicroBatchRunner
from ..config.rloo_config import RLOOConfig
from ..data.tokenize import RowTokenizer
from ..distributed import TrainingEngine
from ..distributed.collectives import any_process, gather_objects
from ..distributed.gathering import holds_whole_weights
from ..models.adapters import base_causal_lm, check_forward, is_peft_model, is_quantised
from ..models.dropout import has_dropout
from ..models.loading import num_embeddings
from ..models.reference import start_weights
from ..objective.advantages import AdvantageMaker
from ..objective.losses import LOSSES
from ..objective.settings import LossSettings
from ..offload.engine_memory import EngineMemory
from ..policy.forward import Policy
from ..policy.head_probe import why_own_logits
from ..policy.router import router_coef
from ..records import Prompt, Sampling
from ..reports.progress import rollout_bar
from ..rewards import Rewards
from ..rewards.shaping import ScoreSettings, SoftPunish
from ..rollout.ahead import Converse, SharedCycle
from ..rollout.build import make_engine, make_room
from ..rollout.cycle import RolloutCycle
from ..rollout.engine import RolloutEngine
from ..rollout.settings import EngineSettings
from ..rollout.stops import Stops
from ..rollout.trajectories import Limits
from ..tools import RunTools
from ..weight_sync.sampler_check import SamplerCheck, computes_exactly
from ..weight_sync.unmerged import policy_buckets
from .buffer import RolloutBuffer
from .clock import StepClock
from .collect import Collector
from .loaders import samples_ahead
from .prepare import Preparer
from .reference_check import ReferenceCheck
from .sessions import FunctionSession, Open, ToolSessions
from .update import Updater

logger = logging.getLogger(__name__)


class Policies(NamedTuple):
    """The models of a run, ready for forwards."""

    policy: Policy
    reference: Policy | None  # None: no KL, or the policy with its start weights in place
    has_dropout: bool  # of the policy in train mode


class UpdateParts(NamedTuple):
    """What turns generation batches into gradients."""

    settings: LossSettings
    planner: Planner
    runner: MicroBatchRunner
    advantages: AdvantageMaker
    preparer: Preparer
    updater: Updater
    reference_check: ReferenceCheck


def build_policies(
    model: nn.Module, reference: nn.Module | None, args: RLOOConfig, parallel: TrainingEngine
) -> Policies:
    """What the models are like is found out here, by running them before an engine splits them."""
    accelerator = parallel.accelerator
    common: dict[str, Any] = {
        "temperature": args.temperature,
        "compile_options": args.compile_options,
        "with_head": parallel.with_head,
    }

    def own_logits(model: nn.Module) -> str:
        with accelerator.autocast():
            mine = why_own_logits(base_causal_lm(model)) or ""
        why = gather_objects(accelerator, mine)[0]  # all must run the same modules
        if why and accelerator.is_main_process:
            logger.info(
                "The logits of a micro-batch are those that %s itself makes: %s.",
                *(type(base_causal_lm(model)).__name__, why),
            )
        return why

    if is_peft_model(model) and holds_whole_weights(model):
        with accelerator.autocast():
            check_forward(model)
    dropout = any_process(accelerator, has_dropout(model))
    policy = Policy(model, own_logits=own_logits(model), **common)
    if reference is None:
        if args.beta > 0 and not parallel.splits_weights:
            start_weights(model).take()
        return Policies(policy, None, dropout)
    common["own_logits"] = own_logits(reference)
    wrapped = parallel.reference(reference)
    return Policies(policy, Policy(reference, wrapped=wrapped, **common), dropout)


def build_rollouts(
    engine_class: type[RolloutEngine],
    settings: EngineSettings,
    reference: nn.Module | None,
    rewards: Rewards,
    args: RLOOConfig,
    device: torch.device,
    *,
    memory: EngineMemory,
    optimizer: Callable[[], Any],
    version: Callable[[], int],
    on_sync: Callable[[str, float, int], None],
    on_move: Callable[[float, int], None],
) -> RolloutCycle:
    """The engine, asleep. `memory`: what the training engine keeps. `version`: of the policy's
    weights now. `on_sync`: is told mode, seconds and bytes of every sync; `on_move`: see
    EngineRoom."""
    model, bucket_bytes = settings.model, args.weight_sync_bucket_mib * 2**20
    room = None
    if settings.sleeps and engine_class.sleeps_in_process:
        room = make_room(
            settings,
            optimizer,
            reference,
            device,
            bucket_bytes=bucket_bytes,
            memory=memory,
            others=rewards.models,
            on_move=on_move,
        )
        settings = settings.with_share(room.share)
        room.make()
    engine = make_engine(engine_class, settings)
    cycle = SharedCycle if samples_ahead(args) else RolloutCycle
    rollouts = cycle(
        engine,
        version=version,
        weights=lambda: policy_buckets(model, bucket_bytes, settings.dtype, engine.wanted),
        on_sync=on_sync,
        sleep_level=2 if settings.sleeps else 0,
        room=room,
    )
    rollouts.sleep()
    return rollouts


def build_sampler_check(
    args: RLOOConfig,
    sampling: Sampling,
    policies: Policies,
    engine: EngineSettings,
    parallel: TrainingEngine,
) -> SamplerCheck:
    accelerator, model = parallel.accelerator, policies.policy.model
    return SamplerCheck(
        sampling,
        is_exact=computes_exactly(engine.dtype, accelerator.mixed_precision)
        and not is_quantised(model),
        warn=args.logp_diff_warn,
        stop=args.logp_diff_stop,
        level=args.truncated_importance_sampling,
        cap=args.importance_sampling_cap,
        ratio_level=LOSSES[args.loss].level,
        structured_outputs=args.vllm_structured_outputs_regex,
        has_dropout=policies.has_dropout,
        is_main_process=accelerator.is_main_process,
    )


def build_collector(
    rollouts: RolloutCycle,
    tokenize: RowTokenizer,
    rewards: Rewards,
    sampling: Sampling,
    planner: Planner,
    model: nn.Module,
    args: RLOOConfig,
    accelerator: Accelerator,
    clock: StepClock,
    tools: RunTools | None = None,
    rollout_func: Callable[[list[Any]], Any] | None = None,
) -> Collector:
    open_session: Open | None = None
    converse: Converse | None = None
    if rollout_func is not None:
        padding: Any = tokenize.tokenizer.pad_token_id
        ends = {*sampling.stop_token_ids, padding}
        open_session = partial(
            FunctionSession.open,
            function=rollout_func,
            tokenizer=tokenize.tokenizer,
            ends=ends,
            num_ids=num_embeddings(model),
        )
    if tools is not None:
        open_session = ToolSessions(
            tools,
            tokenize,
            rollouts,
            sampling,
            Stops(sampling, tokenize.tokenizer),
            Limits(
                args.max_completion_length,
                args.max_tool_calling_iterations,
                args.trajectory_timeout_s,
            ),
            accelerator,
        )
        converse = open_session.converse
    hidden_size = base_causal_lm(model).config.get_text_config().hidden_size
    cache = args.soft_punish_cache
    looked_at = (
        args.log_completions, args.log_completions_csv, args.num_sample_generations,
        args.view_mib, args.rollout_filter,
    )  # fmt: skip
    return Collector(
        rollouts,
        tokenize,
        rewards,
        sampling,
        planner,
        accelerator,
        scores=ScoreSettings(
            args.missing_eos_penalty,
            SoftPunish(args.max_completion_length, cache) if cache else None,
            args.normalize_rewards,
            args.reward_clip_range,
        ),
        mask_truncated=args.mask_truncated_completions,
        overlap_rewards=args.use_vllm if args.overlap_rewards is None else args.overlap_rewards,
        with_texts=any(looked_at),
        with_images=args.log_multimodal,
        shows_images=not {"wandb", "trackio"}.isdisjoint(args.report_to or ()),
        tokens_per_pair=6 * hidden_size,  # see Layout.cost
        open_session=open_session,
        converse=converse,
        tools=tools,
        stage=clock.stage,
        hidden=lambda seconds: clock.add("reward_hidden", seconds),
        progress=partial(rollout_bar, is_shown=args.should_log and not args.disable_tqdm),
    )


def build_update(
    policies: Policies,
    tokenizer: PreTrainedTokenizerBase,
    args: RLOOConfig,
    parallel: TrainingEngine,
    clock: StepClock,
    say: Callable[[str], None],
    seen: Prompt | None,
) -> UpdateParts:
    """`say`: tells the user a sentence once. `seen`: a prompt with an image, in a run with some."""
    accelerator, settings = parallel.accelerator, loss_settings(args)
    policy, reference, dropout = policies
    coef = router_coef(policy.model, args.router_aux_loss_coef)
    pad_id, multiple_of = tokenizer.pad_token_id, args.pad_to_multiple_of
    assert isinstance(pad_id, int)
    assert not isinstance(multiple_of, str), multiple_of  # RLOOConfig has made it a number
    planner = Planner(
        TokenBudget(args.per_device_train_batch_size, args.max_tokens_per_micro_batch),
        device=accelerator.device,
        pad_token_id=pad_id,
        multiple_of=multiple_of,
        every_token=coef != 0,  # a load-balancing loss counts tokens that predict nothing, too
        few_sizes=args.torch_compile,
        seen=seen if accelerator.num_processes > 1 else None,
    )
    runner = MicroBatchRunner(accelerator, can_retry=parallel.can_retry)
    advantages = AdvantageMaker(settings, accelerator)
    why = (reference or policy).why_no_fp8_head() if args.reference_head_fp8 else None
    if why is not None:
        raise ValueError(f"reference_head_fp8=True cannot be used: {why}. Leave it out.")
    preparer = Preparer(
        policy,
        reference,
        planner,
        runner,
        advantages,
        settings,
        parallel,
        rows_per_pass=args.rollout_forward_batch_size,
        has_dropout=dropout,
        reference_head_fp8=args.reference_head_fp8,
        stage=clock.stage,
        say=say,
    )
    updater = Updater(
        policy,
        planner,
        runner,
        advantages,
        settings,
        parallel,
        rows_per_micro_step=args.per_device_train_batch_size,
        aux_loss_coef=coef,
    )
    check = ReferenceCheck(
        beta=args.beta,
        dtype=E4M3 if args.reference_head_fp8 else _coarsest(policy.model, accelerator),
        device=accelerator.device,
        stops=args.logp_diff_stop != 0,
        has_dropout=dropout,
    )
    return UpdateParts(settings, planner, runner, advantages, preparer, updater, check)


def _coarsest(model: nn.Module, accelerator: Accelerator) -> torch.dtype:
    """Of what the model is held and computed in; a quantised model computes in few bits."""
    if accelerator.mixed_precision != "no" or is_quantised(model):
        return torch.bfloat16 if accelerator.mixed_precision != "fp16" else torch.float16
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def loss_settings(args: RLOOConfig) -> LossSettings:
    """The loss that a configuration asks for."""
    return LossSettings(
        row=LOSSES[args.loss],
        beta=args.beta,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        advantage=args.advantage,
        normalize_advantages=args.normalize_advantages,
        whiten_rewards=args.whiten_rewards,
        bias_corrected_kl=args.use_bias_correction_kl,
        truncated_importance_sampling=args.truncated_importance_sampling,
        importance_sampling_cap=args.importance_sampling_cap,
        max_completion_length=args.max_completion_length,
    )


def build_buffer(args: RLOOConfig) -> RolloutBuffer:
    return RolloutBuffer(
        args.per_device_train_batch_size,
        int(args.steps_per_generation or 1),
        args.num_iterations,
        args.seed,
    )
