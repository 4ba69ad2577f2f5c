"""Rollouts by vLLM in the training process, on the same GPU ("colocated").

The engine starts from the model's configuration alone, with no checkpoint that could be read again:
what it samples from is what `load_weights` brought. Several processes: each has its engine and its
own prompts, or, with tensor parallelism, `tensor_parallel_size` neighbours share one.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn

from ..types import Rollout, Sampling
from .coverage import poison, uncovered
from .engine import Bucket, EngineError, OnFinished, RolloutEngine
from .host import host_unchanged
from .shared import tensor_parallel_group, together, unlink_shared_memory

logger = logging.getLogger(__name__)

OLDEST = "0.32"  # that it has been tested with
CPU_CACHE_BYTES = 512 * 2**20


def import_vllm() -> Any:
    """The vllm package, set up to run in this process; ImportError with what to install."""
    # read when vllm is imported: the engine's loop in this process, so that its weights can be
    # loaded by a call, and processes launched by torchrun stay in step
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"use_vllm=True needs vLLM, and importing it failed ({error}): "
            'pip install "rloo-fast[vllm]", or leave use_vllm=False.'
        ) from error
    version = vllm.__version__  # pyright: ignore
    if Version(version).release < Version(OLDEST).release:
        raise ImportError(
            f"use_vllm=True needs vLLM {OLDEST} or newer, but {version} is installed: "
            "pip install -U vllm."
        )
    return vllm


def runs_on_cpu() -> bool:
    """Whether this vLLM is a CPU build, which is then made to use its weights as they are."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if not current_platform.is_cpu():
        return False
    import vllm._custom_ops as custom_ops  # pyright: ignore[reportMissingImports]

    # else linear layers compute with a packed copy of their weights, which no sync reaches
    custom_ops._supports_onednn = False
    return True


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """vLLM's names for how completions are drawn, in SamplingParams and in a server's requests."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # it is among the stop tokens
        "logprobs": 0,  # the sampled token's alone
    }


def check_generation_kwargs(given: dict[str, Any]) -> None:
    """ValueError for what vLLM's SamplingParams do not take."""
    try:
        import_vllm().SamplingParams(**given)
    except ImportError:
        raise
    except Exception as error:  # vLLM's own for a value, TypeError for a name
        raise ValueError(
            f"generation_kwargs: vLLM's SamplingParams say: {error}. Names are vLLM's here."
        ) from error


class VLLMEngine(RolloutEngine):
    """vllm.LLM behind the engine protocol.

    `model`: the policy without adapters; its configuration and class are taken, not its weights.
    `dtype`: what it computes in. `sleeps`: give GPU memory back at `sleep` (nothing on a CPU).
    `engine_kwargs`: further arguments of vllm.LLM.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype,
        sleeps: bool = False,
        tensor_parallel_size: int = 1,
        max_model_length: int | None = None,
        gpu_memory_utilization: float = 0.3,
        model_impl: str = "vllm",
        regex: str | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        engine_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._vllm = import_vllm()
        on_cpu = runs_on_cpu()
        if on_cpu and sleeps:
            logger.info("vLLM has nothing to give back on a CPU: it sleeps in name only.")
        self.sleeps = sleeps and not on_cpu
        self.regex = regex
        self._count = 0  # requests ever made: their ids are never reused
        self._files = tempfile.TemporaryDirectory(prefix="rloo_fast-vllm-")
        _save_configuration(model, tokenizer if regex else None, self._files.name)
        self._found_group = dist.is_initialized()  # else vLLM makes one, of this process alone
        settings: dict[str, Any] = {
            "model": self._files.name,
            "load_format": "dummy",
            "skip_tokenizer_init": regex is None,
            "generation_config": "vllm",
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_length,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "model_impl": model_impl,
            "enable_sleep_mode": self.sleeps,
            "logprobs_mode": "processed_logprobs",
            "seed": seed,
        }
        if dist.is_initialized() and dist.get_world_size() > 1:
            settings["distributed_executor_backend"] = "external_launcher"
        if on_cpu:
            settings |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
        settings |= engine_kwargs or {}
        with host_unchanged(model), _explained("starting vLLM"):
            self.llm = self._vllm.LLM(**settings)
        self._group = tensor_parallel_group(tensor_parallel_size)
        if on_cpu and self._group is not None:
            unlink_shared_memory(self._group)
        if self.sleeps:
            self.llm.sleep(level=2)

    def _wake(self, tag: str) -> None:
        if self.sleeps:
            with _explained(f"waking vLLM's {tag}"):
                self.llm.wake_up(tags=[tag])

    def _sleep(self, level: int) -> None:
        if self.sleeps:
            self.llm.sleep(level=level)

    def _close(self) -> None:
        if shutdown := getattr(self.llm.llm_engine.engine_core, "shutdown", None):
            shutdown()
        del self.llm
        if not self._found_group and dist.is_initialized():
            dist.destroy_process_group()
        self._files.cleanup()

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        weights = (named for bucket in buckets for named in bucket)

        def load(model: nn.Module) -> list[str]:
            poison(model)
            model.load_weights(weights)  # pyright: ignore
            return uncovered(model)

        with torch.no_grad(), _explained("loading weights into vLLM"):
            missing = [name for names in self.llm.apply_model(load) for name in names]
        if missing:
            raise EngineError(
                f"policy version {version} did not cover these weights of the engine (or they are "
                f"NaN): {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}."
            )
        self.llm.reset_prefix_cache()  # it holds keys and values of the former weights

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        first, own = 0, len(prompt_ids)
        if self._group is not None:  # the engines of a group must see the same requests
            prompt_ids, seeds, first = together(prompt_ids, seeds, self._group)
        outputs: list[Any] = [None] * len(prompt_ids)
        for index, output in self._run(prompt_ids, sampling, seeds):
            outputs[index] = output
            if first <= index < first + own:
                on_finished(index - first, list(output.token_ids))
        return _as_rollout(outputs[first : first + own])

    def _run(
        self, prompt_ids: list[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """(index, vLLM's completion) as they are finished."""
        engine, waiting = self.llm.llm_engine, {}
        try:
            with _explained("generating with vLLM"):
                for index, (ids, seed) in enumerate(zip(prompt_ids, seeds, strict=True)):
                    request = f"rloo-{self._count}"
                    self._count += 1
                    engine.add_request(
                        request, {"prompt_token_ids": ids}, self._params(sampling, seed)
                    )
                    waiting[request] = index
            while waiting:
                with _explained("generating with vLLM"):
                    finished = [output for output in engine.step() if output.finished]
                for output in finished:
                    yield waiting.pop(output.request_id), output.outputs[0]
        finally:
            if waiting:  # an error, here or in what is done with a completion
                engine.abort_request(list(waiting))

    def _params(self, sampling: Sampling, seed: int) -> Any:
        settings = {**sampling_fields(sampling), "detokenize": False, "seed": seed}
        if self.regex is not None:
            from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore

            settings["structured_outputs"] = StructuredOutputsParams(regex=self.regex)
        return self._vllm.SamplingParams(**{**settings, **sampling.extra})


def _as_rollout(outputs: list[Any]) -> Rollout:
    ids = [list(output.token_ids) for output in outputs]
    logps = [
        [entry[token].logprob for entry, token in zip(output.logprobs, row, strict=True)]
        for output, row in zip(outputs, ids, strict=True)
    ]
    return Rollout(ids, [output.finish_reason for output in outputs], logps)


def _save_configuration(model: Any, tokenizer: Any, directory: str) -> None:
    config = model.config
    if not config.architectures:
        config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


ADVICE = {  # words of vLLM's errors -> what may help
    ("context length", "max_model_len", "max model len", "max seq len"): (
        "shorter prompts, a smaller max_completion_length, or another vllm_max_model_length"
    ),
    ("out of memory", "kv cache", "free memory", "cache block"): (
        "a smaller vllm_max_model_length, another vllm_gpu_memory_utilization, its share of it, "
        "or vllm_enable_sleep_mode=True, with which engine and trainer take turns"
    ),
}


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """What vLLM raises becomes an EngineError that names the settings which may help."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        text = str(error).lower()
        fitting = (advice for words, advice in ADVICE.items() if any(w in text for w in words))
        help_ = next(fitting, "its log, with VLLM_LOGGING_LEVEL=INFO in the environment")
        raise EngineError(
            f"{doing} failed. {type(error).__name__}: {error}\nWhat may help: {help_}."
        ) from error
