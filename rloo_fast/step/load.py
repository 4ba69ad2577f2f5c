"""Load: what RLOOTrainer is given in, models, tokenizer, rewards and datasets out.

In the order of their cost: what is wrong with an argument is said before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, set_seed

from ..checkpoint.files import check_output_dir
from ..config.images import check_images_are_offered
from ..config.rloo_config import RLOOConfig, as_dict
from ..config.rollout_engine import engine_name
from ..data.checks import (
    check_datasets,
    check_prompts,
    check_reward_columns,
    have_images,
)
from ..data.longest_prompt import longest_prompt
from ..data.prompt_lengths import drop_long_prompts
from ..data.skipping import Skipping
from ..data.tokenize import RowTokenizer
from ..masking import masked_errors
from ..models.adapters import add_adapters, check_peft_config
from ..models.dropout import disable_dropout
from ..models.loading import check_model_path, context_length, load_policy, num_embeddings
from ..models.reference import make_reference
from ..models.tokenizer import check_token_ids, load_tokenizer, stop_token_ids
from ..models.vision import ImageReader, check_takes_images, find_processor
from ..policy.router import router_coef
from ..rewards import Rewards, RewardSources
from ..rollout.engine import RolloutEngine
from ..rollout.registry import find_engine
from ..tools import RunTools
from ..tools.run_tools import EMPTY_PROMPT
from .load_tools import (
    ToolArguments,
    check_rows,
    check_template,
    dataset_of,
    load_tools,
    with_environment_rewards,
)


class Loaded(NamedTuple):
    """What a run is made of."""

    policy: Any  # nn.Module, with its adapters
    reference: nn.Module | None  # a frozen copy; None: not needed, or a policy with adapters
    tokenizer: PreTrainedTokenizerBase
    processing_class: Any  # what is saved with the policy: the tokenizer, or its processor
    stop_ids: tuple[int, ...]  # each ends a completion
    tokenize: RowTokenizer
    skipping: Skipping | None  # None: a row that cannot be used ends the run
    rewards: Rewards
    train_dataset: Any
    eval_dataset: Any
    engine_class: type[RolloutEngine]
    longest: int | None  # prompt plus completion; None: the engine need not know, or the user said
    tools: RunTools | None  # None: completions of one turn
    rollout_func: Callable[..., Any] | None  # makes the completions, in place of the engine


class Checked(NamedTuple):
    """What could be said of the arguments before a model is loaded."""

    train_dataset: Any
    processing_class: Any
    engine_class: type[RolloutEngine]
    sources: RewardSources
    tools: RunTools | None
    check_columns: Callable[[Any], None]  # of a dataset's rows
    with_images: bool
    from_hub: dict[str, Any]  # options of whatever is loaded by name


@masked_errors()
def load_run(
    model: Any,
    reward_funcs: Any,
    args: RLOOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    *,
    processing_class: Any,
    reward_processing_classes: Any,
    quantization_config: Any,
    peft_config: Any,
    trajectories: ToolArguments,
) -> Loaded:
    """Arguments as those of RLOOTrainer. Raises ValueError or TypeError with what to write."""
    checked = _check(
        model,
        (reward_funcs, reward_processing_classes),
        args,
        train_dataset,
        eval_dataset,
        processing_class,
        peft_config,
        trajectories,
    )
    rewards = checked.sources.load()
    set_seed(args.seed)  # new adapters are drawn at random
    policy: Any = load_policy(
        model,
        model_init_kwargs=as_dict(args.model_init_kwargs),
        quantization_config=quantization_config,
        trust_remote_code=args.trust_remote_code,
        merge_adapter=args.merge_adapter,
        num_processes=args.world_size,
        with_images=checked.with_images,
    )
    saved, stop_ids, tokenize = _load_texts(policy, args, checked)
    train_dataset, eval_dataset = drop_long_prompts(
        checked.train_dataset,
        eval_dataset,
        tokenize,
        args.max_prompt_length,
        args.prompts_per_generation,
    )
    skipping = Skipping(tokenize) if args.skip_unusable_rows else None
    check_prompts(train_dataset, eval_dataset, tokenize, skipping, args.prompts_per_generation)
    longest = _lay_out(checked.engine_class, args, tokenize, train_dataset, eval_dataset)
    policy = add_adapters(
        policy,
        peft_config,
        gradient_checkpointing=bool(args.gradient_checkpointing),
    )
    if args.disable_dropout:
        disable_dropout(policy)
    reference = make_reference(
        policy,
        beta=args.beta,
        sync_ref_model=args.sync_ref_model,
        use_liger_kernel=args.use_liger_kernel,
        liger_kernel_config=args.liger_kernel_config,
    )
    return Loaded(
        policy,
        reference,
        tokenize.tokenizer,
        saved,
        stop_ids,
        tokenize,
        skipping,
        rewards,
        train_dataset,
        eval_dataset,
        checked.engine_class,
        longest,
        checked.tools,
        trajectories.rollout_func,
    )


def _check(
    model: Any,
    rewards: tuple[Any, Any],  # reward_funcs, reward_processing_classes
    args: RLOOConfig,
    train: Any,
    evaluation: Any,
    processing_class: Any,
    peft_config: Any,
    trajectories: ToolArguments,
) -> Checked:
    check_output_dir(str(args.output_dir))
    engine_class = _engine_class(args, images=False)
    if args.use_vllm and not engine_class.reads_vllm_settings:
        raise ValueError(
            f"use_vllm=True has no effect with rollout_engine={args.rollout_engine!r}, and neither "
            "have the vllm_* settings: leave them out, or, if the engine reads them, write "
            "reads_vllm_settings = True in its class."
        )
    tools = load_tools(trajectories, args)
    train = dataset_of(train, tools, args)
    need_prompt = tools is None or not tools.has_environments
    check_datasets(train, evaluation, args, need_prompt=need_prompt)
    from_hub: dict[str, Any] = {
        "revision": as_dict(args.model_init_kwargs).get("revision"),
        "trust_remote_code": args.trust_remote_code,
    }
    with_images = _sees_images(model, processing_class, train, evaluation, args, from_hub)
    engine_class = _engine_class(args, images=with_images)
    if isinstance(model, str):
        check_model_path(model)
    check_peft_config(peft_config, sync_ref_model=args.sync_ref_model)
    sources = with_environment_rewards(*rewards, args, tools)
    check_columns, look = sources.check_columns, not args.skip_unusable_rows
    if trajectories.rollout_func is not None:
        check_columns = _any_columns  # the function may make more of them
    if tools is not None:
        if with_images:
            raise ValueError(
                "tools with images are not in this version: leave the tools out, or the images "
                "(without any, the model's tokenizer is the processing_class, not its processor)."
            )
        check_columns = check_rows(train, evaluation, tools, sources, look=look)
        tokenizer = check_template(model, processing_class, args, tools, from_hub)
        processing_class = processing_class or tokenizer
    check_reward_columns(
        check_columns, train, evaluation, keep_columns=not args.remove_unused_columns, look=look
    )
    return Checked(
        train,
        processing_class,
        engine_class,
        sources,
        tools,
        check_columns,
        with_images,
        from_hub,
    )


def _any_columns(columns: Any) -> None:
    return


def _load_texts(
    policy: Any, args: RLOOConfig, checked: Checked
) -> tuple[Any, tuple[int, ...], RowTokenizer]:
    """(what is saved with the policy, token ids that end a completion, how rows are read)."""
    processing_class, from_hub = checked.processing_class, checked.from_hub
    tools, with_images = checked.tools, checked.with_images
    processor = find_processor(processing_class, policy, **from_hub) if with_images else None
    reader = None if processor is None else ImageReader(processor, policy)
    tokenizer = load_tokenizer(
        processing_class if reader is None else reader.processor.tokenizer, policy, **from_hub
    )
    stop_ids = stop_token_ids(policy, tokenizer, args.stop_token_id, args.stop or ())
    if reader is not None:
        check_router(policy, args.router_aux_loss_coef)
        # within a completion an image's token would stand for an image that is not there; nothing
        # is predicted from the last one, so it may be sampled, and trained on, as an end
        stop_ids = tuple(dict.fromkeys((*stop_ids, reader.image_token_id)))
    size, context = num_embeddings(policy), _context(policy, args)
    check_token_ids(tokenizer, size, args.stop_token_id)
    tokenize = RowTokenizer.from_config(
        tokenizer,
        context,
        args,
        num_embeddings=size,
        check_columns=checked.check_columns,
        reader=reader,
        engine_reads_images=with_images and checked.engine_class.reads_images,
        schemas=tools and tools.schemas,
        default=EMPTY_PROMPT if tools is not None and tools.has_environments else None,
    )
    return processor or tokenizer, stop_ids, tokenize


def _sees_images(
    model: Any,
    processing_class: Any,
    train: Any,
    evaluation: Any,
    args: RLOOConfig,
    from_hub: dict[str, Any],
) -> bool:
    """Whether it is a run with images, which then is checked and set up as one."""
    images = have_images(train, evaluation, look=not args.skip_unusable_rows)
    with_images = images or isinstance(processing_class, ProcessorMixin)
    if with_images:
        check_images_are_offered(args, _engine_class(args, images=True))
        check_takes_images(model, processing_class, images=images, **from_hub)
        if args.ddp_find_unused_parameters is None:
            # some towers have layers behind the one that is looked at
            args.ddp_find_unused_parameters = True
    return with_images


def check_router(policy: Any, coef: float | None) -> None:
    """Raise ValueError for a load-balancing loss, which runs a completion's last token too."""
    if router_coef(policy, coef):
        raise ValueError(
            f"router_aux_loss_coef={coef} is not offered with images yet: set it to 0."
        )


def _engine_class(args: RLOOConfig, *, images: bool) -> type[RolloutEngine]:
    in_flight = args.max_staleness > 0 or len(args.server_urls) > 1 or images
    name = engine_name(args.rollout_engine, args.use_vllm, args.vllm_mode, in_flight=in_flight)
    engine = find_engine(name)
    if args.max_staleness and (engine.shares_weights or engine.sleeps_in_process):
        raise ValueError(
            f"max_staleness={args.max_staleness} needs an engine with weights of its own, on "
            f"devices of its own, and rollout_engine={args.rollout_engine!r} says of itself that "
            "it is none (shares_weights, sleeps_in_process): leave max_staleness at 0."
        )
    return engine


def _context(policy: Any, args: RLOOConfig) -> int | None:
    """Tokens of the longest sequence that model and engine take, where they say."""
    lengths = [context_length(policy), _told_length(args)]  # vLLM takes other values as well
    return min((n for n in lengths if isinstance(n, int) and n > 0), default=None)


def _lay_out(
    engine: type[RolloutEngine],
    args: RLOOConfig,
    tokenize: RowTokenizer,
    train: Any,
    evaluation: Any,
) -> int | None:
    """Tokens of the longest prompt and completion; `tokenize` refuses longer prompts then.

    None: the engine has no memory to lay out in this process, or the user says how long.
    """
    if not engine.sleeps_in_process or _told_length(args):
        return None
    prompt = longest_prompt(train, evaluation, tokenize, args.max_prompt_length)
    prompt = min(prompt, tokenize.max_prompt_tokens or prompt)  # what the model's context leaves
    tokenize.engine_length = prompt
    return prompt + args.max_completion_length


def _told_length(args: RLOOConfig) -> Any:
    """The longest sequence of a vLLM engine, where the user says it."""
    return as_dict(args.vllm_engine_kwargs).get("max_model_len", args.vllm_max_model_length)
