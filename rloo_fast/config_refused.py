"""Fields that transformers or TRL define and this version does not carry out: none is ignored."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate import ParallelismConfig
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils.import_utils import is_liger_kernel_available

if TYPE_CHECKING:
    from .config import RLOOConfig

# field: (values that are fine, why the others are refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "a micro-batch is halved by itself where memory runs out, and the batch of a step does not "
        "depend on it; leave it out",
    ),
    "ds3_gather_for_generation": (
        (True,),
        "transformers' generate gathers the weights once per rollout, not layer by layer for every "
        "token; use_vllm=True samples without whole weights of the policy; leave it True",
    ),
    "log_multimodal": ((True,), "there are no images here; leave it True"),
    "torch_empty_cache_steps": ((None,), "it is not in this version; leave it out"),
    "neftune_noise_alpha": (
        (None, 0.0),
        "noise in the embeddings makes the update's log-probs differ from the sampled "
        "ones; leave it out",
    ),
    "use_cache": ((False,), "training keeps no KV cache, generation always does; leave it out"),
    "train_sampling_strategy": (("random",), "see shuffle_dataset; leave it out"),
    "length_column_name": (("length",), "prompts are not grouped by length; leave it out"),
    "data_seed": ((None,), "prompts are shuffled by seed: set that"),
    "dataloader_drop_last": (
        (False,),
        "training always leaves prompts that fill no generation batch to the next epoch, "
        "evaluation takes every prompt; leave it out",
    ),
    "dataloader_persistent_workers": ((False,), "it is not in this version; leave it out"),
    "dataloader_prefetch_factor": ((None,), "it is not in this version; leave it out"),
    "dataloader_multiprocessing_context": (
        (None, "fork"),
        "it is not in this version; leave it out",
    ),
    "dataloader_in_order": ((True,), "a run must be repeatable; leave it True"),
    "enable_jit_checkpoint": (
        (False,),
        "SIGTERM always saves a checkpoint and ends the run here; leave it out",
    ),
    "include_num_input_tokens_seen": (
        ("no",),
        "prompt and completion tokens are always counted, in the metric num_tokens; leave it out",
    ),
    # there are no labels, logits or predictions to do something with
    "label_smoothing_factor": ((0.0,), "RLOO has no labels; leave it at 0"),
    "label_names": ((None,), "RLOO has no labels; leave it out"),
    "average_tokens_across_devices": (
        (True,),
        "the loss is a mean over the completions of all processes; leave it out",
    ),
    **dict.fromkeys(
        ("eval_accumulation_steps", "eval_use_gather_object", "batch_eval_metrics"),
        ((None, False), "evaluation keeps rewards only, no predictions; leave it out"),
    ),
    "eval_do_concat_batches": ((True,), "evaluation keeps no predictions; leave it out"),
    "include_for_metrics": (([],), "evaluation keeps no predictions; leave it out"),
}

# vLLM's settings that belong to one of its two modes
SERVER = {
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
}  # fmt: skip
COLOCATED = {
    "vllm_engine_kwargs", "vllm_gpu_memory_utilization", "vllm_max_model_length",
    "vllm_model_impl", "vllm_structured_outputs_regex", "vllm_tensor_parallel_size",
}  # fmt: skip
ENGINE_PREFIXES = ("vllm_", "transformers_continuous_", "cache_implementation")


def refuse(args: RLOOConfig) -> None:
    """Settings that this version does not carry out: a sentence each, with what to write."""
    if args.use_transformers_continuous_batching or args.use_transformers_paged:
        raise ValueError(
            "use_transformers_continuous_batching=True is not in this version. Set use_vllm=True "
            "for continuous batching, or leave it False: completions are then sampled with "
            "transformers' generate."
        )
    _refuse_engine_settings(args)
    for name, (fine, why) in REFUSED.items():
        value = getattr(args, name, fine[0])  # not every transformers version has every field
        if value not in fine:
            raise ValueError(f"{name}={value!r} is refused: {why}.")
    _refuse_optimizer(args.optim.value)  # pyright: ignore
    _refuse_accelerate(args)
    _refuse_liger_heads(args)


def _refuse_engine_settings(args: RLOOConfig) -> None:
    """Settings of another rollout engine than the one in use."""
    changed = {
        name
        for name, spec in args.__dataclass_fields__.items()
        if name.startswith(ENGINE_PREFIXES) and getattr(args, name) != spec.default
    }
    vllm = {name for name in changed if name.startswith("vllm_")}
    for wrong, why in (
        (changed & {"transformers_continuous_batching_config"}, "there is no continuous batching"),
        (changed & {"vllm_group_port"}, "weights reach a server over HTTP"),
        (set() if args.use_vllm else vllm, "use_vllm is False"),
        (changed & COLOCATED if args.vllm_mode == "server" else set(), "the server decides it"),
        (changed & SERVER if args.vllm_mode == "colocate" else set(), 'vllm_mode is "colocate"'),
        (changed & {"cache_implementation"} if args.use_vllm else set(), "vLLM has its own cache"),
    ):
        if wrong:
            names = " and ".join(sorted(wrong))
            raise ValueError(f"{names} has no effect here, as {why}: leave it out.")
    if args.world_size % args.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size ({args.vllm_tensor_parallel_size}) must divide the number "
            f"of processes ({args.world_size}): each engine is shared by so many of them."
        )


def _refuse_optimizer(name: str) -> None:
    why = None
    if name in ("lomo", "adalomo") or name.endswith("layerwise"):
        why = "it changes the weights inside the backward pass, before the step's gradient is whole"
    elif name.startswith("schedule_free"):
        why = "the weights it trains with are not those that it says to sample from"
    if why:
        raise ValueError(f"optim={name!r} is refused: {why}. Choose another, such as adamw_torch.")


def _refuse_accelerate(args: RLOOConfig) -> None:
    parallel = getattr(args, "parallelism_config", None)
    if parallel is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        parallel = ParallelismConfig()  # of `accelerate launch`
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ValueError(
            "parallelism_config: tensor, context and sequence parallelism are not in this version: "
            "set dp_replicate_size and dp_shard_size only."
        )
    given = args.accelerator_config.to_dict()  # pyright: ignore
    standard = AcceleratorConfig().to_dict()
    for name, value in given.items():
        # every process reads the prompts for itself, which is what dispatch_batches=False says
        if name != "use_configured_state" and value not in (
            standard[name],
            standard[name] or False,
        ):
            raise ValueError(
                f"accelerator_config: {name}={value!r} has no effect here, as batches are not made "
                "by accelerate: leave it out."
            )


def _refuse_liger_heads(args: RLOOConfig) -> None:
    """Liger's layer kernels only: log-probs and loss are made by rloo_kernels."""
    config = args.liger_kernel_config or {}
    if not args.use_liger_kernel:
        if config:
            raise ValueError("liger_kernel_config has no effect without use_liger_kernel=True.")
        return
    if not is_liger_kernel_available():
        raise ImportError(
            "use_liger_kernel=True needs liger-kernel: pip install liger-kernel, or leave it False."
        )
    heads = ("cross_entropy", "fused_linear_cross_entropy")
    if asked := [name for name in heads if config.get(name)]:
        raise ValueError(
            f"liger_kernel_config asks for {' and '.join(asked)}, which RLOO's loss does not use: "
            "leave it out. The kernels of the layers are applied without it."
        )
    args.liger_kernel_config = {**config, **dict.fromkeys(heads, False)}
