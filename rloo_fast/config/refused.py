"""Fields that transformers or TRL define and this version does not carry out: none is ignored."""

# accelerate has no stubs
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any, cast

from accelerate import ParallelismConfig
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_liger_kernel_available

from .fields import RLOOFields
from .server_address import read_address

logger = logging.getLogger(__name__)

# field: (values that are fine, why the others are refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "auto_find_batch_size is not supported by RLOO, as the batch of a step must not depend on "
        "memory: a micro-batch is halved by itself where memory runs out; leave it out",
    ),
    "ds3_gather_for_generation": (
        (True,),
        "transformers' generate gathers the weights once per rollout, not layer by layer for every "
        "token; use_vllm=True samples without whole weights of the policy; leave it True",
    ),
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

# of accelerator_config: none of them changes what is trained
HOW_BATCHES_ARE_FETCHED = (
    "dispatch_batches",
    "even_batches",
    "non_blocking",
    "use_seedable_sampler",
)

# vLLM's settings that belong to one of its two modes
SERVER = {
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_weight_transfer",
}  # fmt: skip
COLOCATED = {
    "vllm_engine_kwargs", "vllm_gpu_memory_utilization", "vllm_max_model_length",
    "vllm_model_impl", "vllm_structured_outputs_regex", "vllm_tensor_parallel_size",
}  # fmt: skip
ENGINE_PREFIXES = ("vllm_", "transformers_continuous_", "cache_implementation")


def refuse(args: RLOOFields) -> None:
    """Settings that this version does not carry out: a sentence each, with what to write."""
    if args.use_transformers_continuous_batching or args.use_transformers_paged:
        raise ValueError(
            "use_transformers_continuous_batching=True is not in this version. Set use_vllm=True "
            "for continuous batching, or leave it False: completions are then sampled with "
            "transformers' generate."
        )
    _refuse_engine_settings(args)
    if args.vllm_mode == "server":
        for url in args.server_urls:
            read_address(url)
    for name, (fine, why) in REFUSED.items():
        value = getattr(args, name, fine[0])  # not every transformers version has every field
        if value not in fine:
            raise ValueError(f"{name}={value!r} is refused: {why}.")
    _refuse_optimizer(OptimizerNames(args.optim).value)
    _refuse_accelerate(args)
    _refuse_liger_heads(args)
    _refuse_fp16(args)


def _refuse_engine_settings(args: RLOOFields) -> None:
    """Settings of another rollout engine than the one in use."""
    changed = {
        name
        for name, spec in args.__dataclass_fields__.items()
        if name.startswith(ENGINE_PREFIXES) and getattr(args, name) != spec.default
    }
    vllm = {name for name in changed if name.startswith("vllm_")}
    for wrong, why in (
        (changed & {"transformers_continuous_batching_config"}, "there is no continuous batching"),
        (changed & {"vllm_group_port"}, "the system gives free ports"),
        (set[str]() if args.use_vllm else vllm, "use_vllm is False"),
        (
            changed & COLOCATED if args.vllm_mode == "server" else set[str](),
            "the server decides it",
        ),
        (
            changed & SERVER if args.vllm_mode == "colocate" else set[str](),
            'vllm_mode is "colocate"',
        ),
        (
            changed & {"cache_implementation"} if args.use_vllm else set[str](),
            "vLLM has its own cache",
        ),
    ):
        if wrong:
            names = " and ".join(sorted(wrong))
            raise ValueError(f"{names} has no effect here, as {why}: leave it out.")
    if args.vllm_weight_transfer == "nccl" and args.use_cpu:
        raise ValueError(
            "vllm_weight_transfer='nccl' sends from a GPU, and use_cpu is True: leave one of the "
            "two out."
        )
    if args.num_processes % args.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size ({args.vllm_tensor_parallel_size}) must divide the number "
            f"of processes ({args.num_processes}): each engine is shared by so many of them."
        )


def _refuse_optimizer(name: str) -> None:
    why = None
    if name in ("lomo", "adalomo") or name.endswith("layerwise"):
        why = "it changes the weights inside the backward pass, before the step's gradient is whole"
    elif name.startswith("schedule_free"):
        why = "the weights it trains with are not those that it says to sample from"
    if why:
        raise ValueError(f"optim={name!r} is refused: {why}. Choose another, such as adamw_torch.")


def _refuse_accelerate(args: RLOOFields) -> None:
    parallel: Any = getattr(args, "parallelism_config", None)
    if parallel is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        parallel = ParallelismConfig()  # of `accelerate launch`
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ValueError(
            "RLOOTrainer does not support sequence-dim parallelism (`parallelism_config.cp_size > "
            "1` or `parallelism_config.sp_size > 1`), nor tensor parallelism: in "
            "parallelism_config, set dp_replicate_size and dp_shard_size only."
        )
    config = cast(Any, args).accelerator_config  # an AcceleratorConfig, whatever was given
    given = config.to_dict()
    standard = AcceleratorConfig().to_dict()
    for name, value in given.items():
        if name == "use_configured_state" or value in (standard[name], standard[name] or False):
            continue
        says = f"accelerator_config: {name}={value!r} has no effect here, as batches are not made "
        if name in HOW_BATCHES_ARE_FETCHED:
            logger.warning("%sby accelerate.", says)
        else:
            raise ValueError(f"{says}by accelerate: leave it out.")


def _refuse_liger_heads(args: RLOOFields) -> None:
    """Liger's layer kernels only: log-probs and loss are made by rloo_kernels."""
    heads = ("cross_entropy", "fused_linear_cross_entropy")
    config = args.liger_kernel_config or {}
    if not args.use_liger_kernel:
        config = {name: value for name, value in config.items() if value or name not in heads}
        if config:
            raise ValueError("liger_kernel_config has no effect without use_liger_kernel=True.")
        return
    if not is_liger_kernel_available():
        raise ImportError(
            "use_liger_kernel=True needs liger-kernel: pip install liger-kernel, or leave it False."
        )
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "use_liger_kernel=True needs Triton, which is not installed here (torch's CUDA builds "
            "bring it): pip install triton, or leave it False."
        )
    if asked := [name for name in heads if config.get(name)]:
        raise ValueError(
            f"liger_kernel_config asks for {' and '.join(asked)}, which RLOO's loss does not use "
            'and is not supported (as `liger_kernel_config={"fused_linear_cross_entropy": True}`): '
            "leave it out. The kernels of the layers are applied without it."
        )
    args.liger_kernel_config = {**config, **dict.fromkeys(heads, False)}


def _refuse_fp16(args: RLOOFields) -> None:
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "fp16=True needs a GPU, and this run is on a CPU: write bf16=True, or leave both out "
            "for float32."
        )
