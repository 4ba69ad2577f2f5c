"""From a configuration to the engine it asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import RLOOConfig, as_dict
from ..memory import RESERVE, Room
from ..models import base_causal_lm
from ..parallel import Parallel
from ..weight_sync import check_can_stream, most_in_flight
from .engine import RolloutEngine
from .hf import HFEngine


def make_engine(
    model: nn.Module, tokenizer: Any, args: RLOOConfig, parallel: Parallel
) -> RolloutEngine:
    """The engine of `use_vllm` and `vllm_mode`. Raises ValueError or ImportError, with what to
    write, where it cannot serve this model."""
    if not args.use_vllm:
        return HFEngine(
            model,
            tokenizer.pad_token_id,
            rows_per_call=args.rollout_forward_batch_size,
            pad_to_multiple_of=args.pad_to_multiple_of,  # pyright: ignore
            autocast=parallel.accelerator.autocast,  # pyright: ignore
            whole_weights=parallel.whole_weights,
        )
    check_can_stream(model)
    if args.vllm_mode == "server":
        return _server(args, parallel.accelerator)
    from . import vllm

    vllm.check_generation_kwargs(as_dict(args.generation_kwargs))
    return vllm.VLLMEngine(
        base_causal_lm(model),
        dtype=compute_dtype(model, args),
        sleeps=args.vllm_enable_sleep_mode,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        max_model_length=args.vllm_max_model_length,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        model_impl=args.vllm_model_impl,
        regex=args.vllm_structured_outputs_regex,
        tokenizer=tokenizer,
        # tensor-parallel engines must draw alike, and requests carry seeds of their own
        seed=args.seed,
        engine_kwargs=as_dict(args.vllm_engine_kwargs),
    )


def make_room(trainer: Any, reference: nn.Module | None) -> Room:
    """What the trainer can move away while the engine of this process is awake."""
    args, rewards = trainer.args, trainer.rewards
    bucket = args.weight_sync_bucket_mib * 2**20
    share = as_dict(args.vllm_engine_kwargs).get("gpu_memory_utilization")
    return Room(
        trainer.model,
        lambda: trainer.optimizer,
        reference,
        trainer.accelerator.device,
        share=args.vllm_gpu_memory_utilization if share is None else share,
        reserve=RESERVE + most_in_flight(trainer.model, bucket, compute_dtype(trainer.model, args)),
        others=rewards.models,
    )


def _server(args: RLOOConfig, accelerator: Any) -> RolloutEngine:
    from .vllm_server import VLLMServer

    return VLLMServer(
        args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}",
        timeout_s=args.vllm_server_timeout,
        sleeps=args.vllm_enable_sleep_mode,
        is_main=accelerator.is_main_process,
        barrier=accelerator.wait_for_everyone,
    )


def compute_dtype(model: nn.Module, args: RLOOConfig) -> torch.dtype:
    """What the policy's matrix products are computed in."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    return next(base_causal_lm(model).parameters()).dtype
