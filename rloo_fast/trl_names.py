"""Attributes and methods of TRL 1.16's RLOOTrainer, on ours under the same names.

    NAMES      read, and where something follows, set: at once, also by a callback during a run
    NOT_HERE   attributes that have no counterpart: reading one says what to use
    NOT_CALLED methods that subclasses of TRL's trainer override and our step never calls: a class
               that has one is refused when it is made

docs/drop-in-for-trl.md has the table, which a test compares with TRL's trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .config.checks import check_eval_batch_size, clip_range
from .config.ranges import check_value
from .rewards.functions import RewardFunction, check_weights
from .rewards.models import RewardModel

Get = Callable[[Any], Any]
Set = Callable[[Any, Any], None]


class Name:
    """`get(trainer)`, and `set(trainer, value)` or the reason why it cannot be set."""

    def __init__(self, get: Get, set: Set | str):
        self.get, self.set = get, set

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return self if trainer is None else self.get(trainer)

    def __set__(self, trainer: Any, value: Any) -> None:
        if isinstance(self.set, str):
            raise AttributeError(f"{self.name} cannot be set on the trainer: {self.set}.")
        self.set(trainer, value)


class NotHere(Name):
    """A name of TRL's trainer without a counterpart; `instead`: what to use."""

    def __init__(self, instead: str):
        super().__init__(self._refuse, instead)
        self.instead = instead

    def _refuse(self, trainer: Any) -> Any:
        raise AttributeError(
            f"{type(trainer).__name__} has no {self.name}, unlike TRL's trainer: {self.instead}."
        )


class Unchanging(list[Any]):
    """A list that says so where it is changed in place, which nothing would see."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this list of the trainer is a copy: changing it has no effect.")

    __setitem__ = __delitem__ = __iadd__ = append = extend = insert = _refuse
    pop = remove = clear = reverse = _refuse


# How something is set


def _loss(name: str, field: str) -> Set:
    """A number of the loss; `field`: that of RLOOConfig whose range it has."""

    def set_to(trainer: Any, value: Any) -> None:
        check_value(field, value)
        _change_loss(trainer, **{name: value})

    return set_to


def _change_loss(trainer: Any, **values: Any) -> None:
    """The settings of the loss, in every part of the step that has them."""
    update = trainer.update
    settings = replace(update.settings, **values)
    for part in (update.advantages, update.preparer, update.updater, trainer.evaluator):
        part.settings = settings
    trainer.update = update._replace(settings=settings)


def _set_beta(trainer: Any, value: float) -> None:
    check_value("beta", value)
    if value and trainer.args.beta == 0:
        raise ValueError(
            f"beta={value} needs a reference model, and RLOOConfig(beta=0) kept none: make the "
            "trainer with beta > 0, and set it to 0 until it is wanted."
        )
    if value and any(batch.ref_logps is None for _, batch in trainer.buffer.queue):
        raise ValueError(
            "completions prepared at beta=0 are still to be trained on, without a reference: set "
            "beta where none wait (with steps_per_generation at its default, after any step)."
        )
    _change_loss(trainer, beta=value)
    trainer.recorder.beta = value


def _set_temperature(trainer: Any, value: float) -> None:
    check_value("temperature", value)
    if trainer.buffer.queue and value != trainer.policy.temperature:
        raise ValueError(
            f"completions sampled at temperature {trainer.policy.temperature} are still to be "
            "trained on: set it where none wait (with steps_per_generation and num_iterations at "
            "their defaults, after any step)."
        )
    trainer.collector.sampling = replace(trainer.collector.sampling, temperature=value)
    for policy in (trainer.policy, trainer.reference):
        if policy is not None:
            policy.temperature = value


def _set_reward_weights(trainer: Any, value: Any) -> None:
    weights = torch.as_tensor(value, dtype=torch.float32)
    check_weights(weights.tolist(), len(trainer.rewards.functions))
    trainer.rewards.weights = weights


def _set_num_generations_eval(trainer: Any, value: int) -> None:
    check_value("num_generations_eval", value)
    check_eval_batch_size(trainer.args, value)
    trainer.args.num_generations_eval = trainer.evaluator.num_generations = value


def _set_clip_range(trainer: Any, value: Any) -> None:
    trainer.collector.scores = replace(trainer.collector.scores, clip_range=clip_range(value))


def _set_router_aux_loss_coef(trainer: Any, value: float) -> None:
    check_value("router_aux_loss_coef", value)
    if value and not trainer.update.updater.aux_loss_coef:
        raise ValueError(
            "router_aux_loss_coef was 0 when the trainer was made, so that the router is not run "
            "over every token: set it in RLOOConfig."
        )
    trainer.update.updater.aux_loss_coef = value


def _set_chat_template_kwargs(trainer: Any, value: dict[str, Any] | None) -> None:
    models = [f.inputs for f in trainer.rewards.functions if isinstance(f, RewardModel)]
    for part in (trainer.collector.tokenize, *models):
        part.chat_template_kwargs = value or {}


def _set_log_completions(trainer: Any, value: bool) -> None:
    trainer.recorder.log_completions = value
    trainer.collector.with_texts |= value  # from the next rollout on


def _set_log_multimodal(trainer: Any, value: bool) -> None:
    trainer.collector.with_images = value


def _on(part: str, name: str) -> Name:
    """An attribute `name` of trainer.`part`."""

    def set_to(trainer: Any, value: Any) -> None:
        setattr(getattr(trainer, part), name, value)

    return Name(lambda trainer: getattr(getattr(trainer, part), name), set_to)


def _fixed(name: str, why: str = "set it in RLOOConfig, before the trainer is made") -> Name:
    """A field of RLOOConfig that a run cannot change."""
    return Name(lambda trainer: getattr(trainer.args, name), why)


_SAMPLING = "completions are sampled as RLOOConfig says, which is where to set it (so is TRL's)"
_METRICS = "a reward function logs by its arguments log_metric and log_extra"


class TRLNames:
    """The names alone: what they act on are the parts that RLOOTrainer is made of."""

    # The loss
    beta = Name(lambda trainer: trainer.update.settings.beta, _set_beta)
    epsilon_low = Name(lambda t: t.update.settings.epsilon_low, _loss("epsilon_low", "epsilon"))
    epsilon_high = Name(lambda t: t.update.settings.epsilon_high, _loss("epsilon_high", "epsilon"))
    normalize_advantages = Name(
        lambda trainer: trainer.update.settings.normalize_advantages,
        lambda trainer, value: _change_loss(trainer, normalize_advantages=bool(value)),
    )
    mask_truncated_completions = _on("collector", "mask_truncated")
    num_iterations = _fixed("num_iterations")
    router_aux_loss_coef = Name(
        lambda trainer: trainer.update.updater.aux_loss_coef, _set_router_aux_loss_coef
    )
    aux_loss_enabled = Name(
        lambda trainer: trainer.update.updater.aux_loss_coef != 0, "set router_aux_loss_coef"
    )
    ref_model = Name(
        lambda trainer: trainer.reference and trainer.reference.model,
        "the reference is the policy as it was passed in; sync_ref_model=True moves it",
    )

    # Rewards
    reward_weights = Name(lambda trainer: trainer.rewards.weights, _set_reward_weights)
    reward_clip_range = Name(lambda trainer: trainer.collector.scores.clip_range, _set_clip_range)
    reward_func_names = Name(
        lambda trainer: Unchanging(trainer.rewards.names), "set __name__ of the function, before"
    )
    reward_funcs = Name(
        lambda trainer: Unchanging(
            f.function if isinstance(f, RewardFunction) else f.model
            for f in trainer.rewards.functions
        ),
        "a function that changes during the run can look at trainer_state.global_step",
    )
    reward_processing_classes = Name(
        lambda trainer: Unchanging(
            f.inputs.tokenizer if isinstance(f, RewardModel) else None
            for f in trainer.rewards.functions
        ),
        "it is an argument of the trainer",
    )

    # Prompts and completions
    shuffle_dataset = _on("args", "shuffle_dataset")  # read when train() starts
    chat_template_kwargs = Name(
        lambda trainer: trainer.collector.tokenize.chat_template_kwargs, _set_chat_template_kwargs
    )
    num_generations = _fixed("num_generations")
    num_generations_eval = Name(
        lambda trainer: trainer.evaluator.num_generations, _set_num_generations_eval
    )
    temperature = Name(lambda trainer: trainer.policy.temperature, _set_temperature)
    max_completion_length = _fixed("max_completion_length", _SAMPLING)
    top_p = _fixed("top_p", _SAMPLING)
    top_k = _fixed("top_k", _SAMPLING)
    min_p = _fixed("min_p", _SAMPLING)
    repetition_penalty = _fixed("repetition_penalty", _SAMPLING)
    eos_token_ids = Name(
        lambda trainer: Unchanging(trainer.collector.sampling.stop_token_ids),
        "they are those of the model's generation_config, the tokenizer's and stop_token_id",
    )
    pad_to_multiple_of = _fixed("pad_to_multiple_of")
    use_vllm = _fixed("use_vllm")
    vllm_mode = _fixed("vllm_mode")
    vllm_gpu_memory_utilization = _fixed("vllm_gpu_memory_utilization")
    vllm_tensor_parallel_size = _fixed("vllm_tensor_parallel_size")
    use_transformers_continuous_batching = _fixed("use_transformers_continuous_batching")
    continuous_batching_config = Name(lambda trainer: None, "use_vllm=True batches continuously")

    # Logs
    log_completions = Name(lambda trainer: trainer.recorder.log_completions, _set_log_completions)
    log_multimodal = Name(lambda trainer: trainer.collector.with_images, _set_log_multimodal)
    log_unique_prompts = Name(
        lambda trainer: trainer.recorder.samples.unique_prompts,
        lambda trainer, value: setattr(trainer.recorder.samples, "unique_prompts", bool(value)),
    )
    num_completions_to_print = _on("recorder", "num_shown")
    # of {"train", "eval"}: name -> values until the next log
    _metrics = Name(lambda trainer: trainer.metrics.values, "append to its lists")

    # NOT_HERE
    generation_config = NotHere("RLOOConfig's fields and generation_kwargs say how to sample")
    generation_kwargs = NotHere("they are args.generation_kwargs")
    vllm_generation = NotHere("the engine is trainer.rollouts.engine")
    async_loop = NotHere("async rewards run on a loop that belongs to trainer.rewards")
    async_loop_thread = NotHere("async rewards run on a thread that belongs to trainer.rewards")
    async_loop_ready_event = NotHere("async rewards run on a loop that starts with the first call")
    _logs = NotHere(_METRICS)
    _pending_metrics = NotHere(_METRICS)
    _pending_extra_logs = NotHere(_METRICS)
    _step = NotHere("optimizer steps are trainer.state.global_step")
    _buffered_inputs = NotHere("completions still to be used are in trainer.buffer")

    # NOT_CALLED
    _calculate_rewards = NotHere(
        "write a reward function (reward_funcs=), which gets prompts, completions, their ids and "
        "the dataset's columns"
    )
    _compute_loss = NotHere(
        "override compute_loss, which makes a loss of super().compute_loss(model, inputs), or "
        "register one (docs/extending.md)"
    )
    _generate = NotHere("register a rollout engine (rollout_engine=, docs/extending.md)")
    _generate_single_turn = NotHere("register a rollout engine (rollout_engine=)")
    _generate_and_score_completions = NotHere(
        "write a reward function for the scores, a rollout engine for the completions, and an "
        "advantage or loss for what is made of them (docs/extending.md)"
    )
    _prepare_inputs = NotHere("override training_step, which gets the rows of the dataset")
    _get_per_token_logps_and_entropies = NotHere(
        "log-probs are made by trainer.policy, in the step's own micro-batches"
    )
    _tokenize_prompts = NotHere(
        "change the dataset, the tokenizer's chat template, or chat_template_kwargs"
    )
    _log_completion_extra = NotHere(_METRICS)
    _log_metric = NotHere(_METRICS)
    _get_train_sampler = NotHere("override get_train_dataloader")
    _get_eval_sampler = NotHere("override get_eval_dataloader")
    _send_telemetry = NotHere("nothing is sent")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(TRLNames).items():
            if isinstance(value, Name) and not _is_of_a_package(_owner(cls, name)):
                instead = value.set if isinstance(value.set, str) else "set it on the trainer"
                raise TypeError(
                    f"{cls.__name__} overrides {name}, which this trainer's step never reads, "
                    f"unlike TRL's: {instead}."
                )


def _owner(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


def _is_of_a_package(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("rloo_fast", "transformers")
