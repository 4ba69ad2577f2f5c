"""From a run's configuration to the values that engines are made from, and to how they sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..config.rloo_config import RLOOConfig, as_dict
from ..config.shares import given_share
from ..distributed import TrainingEngine
from ..models.adapters import base_causal_lm
from ..records import Sampling

MOST_SEQUENCES = 1024  # vLLM's own default on large GPUs

Context = AbstractContextManager[Any]


@dataclass(frozen=True)
class InProcessSettings:
    """Of an engine in the training processes, with weights and KV cache of its own."""

    tensor_parallel_size: int = 1
    max_model_length: int | None = None  # None: the model's own limit
    max_num_seqs: int | None = None  # sequences at a time; None: vLLM's default
    gpu_memory_utilization: float | None = None  # None: nobody said
    model_impl: str = "vllm"
    regex: str | None = None
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)  # these win

    @property
    def gpu_share(self) -> float | None:
        """Share of the GPU's memory that the engine takes, if anybody said."""
        given = self.engine_kwargs.get("gpu_memory_utilization")
        return self.gpu_memory_utilization if given is None else given


@dataclass(frozen=True)
class ServerSettings:
    """Of an engine that runs elsewhere and is asked over HTTP."""

    base_urls: tuple[str, ...] = ("http://0.0.0.0:8000",)
    timeout_s: float = 240.0
    weight_transfer: str = "auto"  # the way that weights take to it

    @property
    def base_url(self) -> str:
        return self.base_urls[0]


@dataclass(frozen=True)
class EngineSettings:
    """All that an engine may need to know; each reads what concerns it."""

    model: nn.Module  # the policy, with its adapters
    tokenizer: Any
    dtype: torch.dtype  # of the policy's matrix products
    processor: Any = None  # of a run with images
    seed: int = 0
    rows_per_call: int | None = None  # most prompts at a time; None: all
    pad_to_multiple_of: int | None = None
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop_strings: tuple[str, ...] = ()
    sends_adapter: bool = False  # LoRA is sent beside its frozen weights, not in them
    sleeps: bool = False  # gives its memory back between rollouts
    in_process: InProcessSettings = InProcessSettings()
    server: ServerSettings = ServerSettings()
    autocast: Callable[[], Context] = nullcontext  # around forwards of the policy
    whole_weights: Callable[[nn.Module], Context] = nullcontext  # gathers a sharded policy
    device: torch.device = torch.device("cpu")  # that the policy is trained on
    is_main_process: bool = True
    barrier: Callable[[], None] = lambda: None  # returns when every process has called it

    def with_share(self, share: float | None) -> EngineSettings:
        """The same, of an engine that takes this share of the GPU's memory."""
        return replace(self, in_process=replace(self.in_process, gpu_memory_utilization=share))

    @classmethod
    def from_config(
        cls,
        args: RLOOConfig,
        model: nn.Module,
        tokenizer: Any,
        parallel: TrainingEngine,
        longest: int | None = None,
        processor: Any = None,
    ) -> EngineSettings:
        """The engine's part of a run's configuration; `longest`: tokens of prompt and completion
        together, where the configuration does not say; `processor`: of a run with images."""
        multiple, accelerator = args.pad_to_multiple_of, parallel.accelerator
        assert not isinstance(multiple, str), multiple  # read by now
        return cls(
            model=model,
            tokenizer=tokenizer,
            processor=processor,
            dtype=compute_dtype(model, bf16=bool(args.bf16), fp16=args.fp16),
            # tensor-parallel engines must draw alike, and requests carry seeds of their own
            seed=args.seed,
            rows_per_call=args.rollout_forward_batch_size,
            pad_to_multiple_of=multiple,
            generation_kwargs=as_dict(args.generation_kwargs),
            stop_strings=tuple(args.stop or ()),
            sends_adapter=args.vllm_lora == "adapter",
            sleeps=args.vllm_enable_sleep_mode,
            in_process=InProcessSettings(
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                max_model_length=args.vllm_max_model_length or longest,
                max_num_seqs=_sequences_at_a_time(args),
                gpu_memory_utilization=given_share(args.vllm_gpu_memory_utilization),
                model_impl=args.vllm_model_impl,
                regex=args.vllm_structured_outputs_regex,
                engine_kwargs=as_dict(args.vllm_engine_kwargs),
            ),
            server=ServerSettings(
                base_urls=tuple(args.server_urls),
                timeout_s=args.vllm_server_timeout,
                weight_transfer=args.vllm_weight_transfer,
            ),
            autocast=lambda: accelerator.autocast(),
            whole_weights=parallel.whole_weights,
            device=accelerator.device,
            is_main_process=accelerator.is_main_process,
            barrier=accelerator.wait_for_everyone,
        )


def _sequences_at_a_time(args: RLOOConfig) -> int:
    """Completions that one engine is asked for together: those of all processes that share it."""
    k = args.completions_per_prompt("eval")
    evaluated = max(k, args.per_device_eval_batch_size)
    own = max(args.local_generation_size, evaluated)
    return min(own * args.vllm_tensor_parallel_size, MOST_SEQUENCES)


def compute_dtype(model: nn.Module, *, bf16: bool, fp16: bool) -> torch.dtype:
    """What the policy's matrix products are computed in."""
    if bf16:
        return torch.bfloat16
    if fp16:
        return torch.float16
    return next(base_causal_lm(model).parameters()).dtype


def sampling_of(args: RLOOConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How a configuration wants its completions drawn."""
    extra = as_dict(args.generation_kwargs)
    if args.cache_implementation is not None:
        extra.setdefault("cache_implementation", args.cache_implementation)
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=args.max_completion_length,
        stop_token_ids=stop_token_ids,
        extra=extra,
        stop_strings=tuple(args.stop or ()),
        include_stop_strings=args.include_stop_str_in_output,
    )
