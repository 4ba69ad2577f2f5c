"""Rollouts by vLLM in the training process, on the same GPU ("colocated").

The engine starts from the model's configuration alone, without a checkpoint: its only weights are
those that `load_weights` brings. Each process has an engine and prompts of its own; with tensor
parallelism, `tensor_parallel_size` neighbouring processes share one engine.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from ...models.adapters import base_causal_lm
from ...offload.memory_plan import LEAST_SHARE, MOST_SHARE
from ...records import Bucket, RawPrompt, Rollout, Sampling, SentParts
from ...weight_sync.coverage import poison, uncovered
from ...weight_sync.unmerged import AdapterShape, Parted, adapter_shape
from ..engine import EngineError, OnFinished, RolloutEngine
from ..settings import EngineSettings
from . import images, loader, lora
from .files import saved_configuration
from .host import host_unchanged
from .model import LooseTensors, as_read, kept_in_another_form
from .package import import_vllm, runs_on_cpu
from .placement import check_all_reduce, launched_as_here, placement
from .ranks import tensor_parallel_group, together, unlink_shared_memory

logger = logging.getLogger(__name__)


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """vLLM's names for how completions are drawn, in SamplingParams and in a server's requests."""
    fields: dict[str, Any] = {
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
    if sampling.stop_strings:
        # vLLM cuts its text alone, never the ids: what is kept of them is `stops.py`'s to say
        fields |= {"stop": list(sampling.stop_strings), "include_stop_str_in_output": True}
    return fields


def check_generation_kwargs(given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that vLLM's SamplingParams do not take."""
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
    `dtype`: what it computes in. `tokenizer`: None where nothing asks for the text of tokens, such
    as a `regex` or stop strings. `processor`: of a run with images. `sleeps`: free GPU memory at
    `sleep` (nothing on a CPU).
    `adapter`: it is sent apart from the weights. `engine_kwargs`: further arguments of vllm.LLM,
    which win.
    """

    sleeps_in_process = True
    reads_vllm_settings = True
    reads_images = True

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        check_generation_kwargs(settings.generation_kwargs)
        own = settings.in_process
        return cls(
            base_causal_lm(settings.model),
            dtype=settings.dtype,
            sleeps=settings.sleeps,
            tensor_parallel_size=own.tensor_parallel_size,
            max_model_length=own.max_model_length,
            max_num_seqs=own.max_num_seqs,
            gpu_memory_utilization=own.gpu_memory_utilization,
            model_impl=own.model_impl,
            regex=own.regex,
            tokenizer=settings.tokenizer if own.regex or settings.stop_strings else None,
            processor=settings.processor,
            seed=settings.seed,
            adapter=adapter_shape(settings.model) if settings.sends_adapter else None,
            engine_kwargs=own.engine_kwargs,
        )

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype,
        sleeps: bool = False,
        tensor_parallel_size: int = 1,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float | None = None,
        model_impl: str = "vllm",
        regex: str | None = None,
        tokenizer: Any = None,
        processor: Any = None,
        seed: int = 0,
        adapter: AdapterShape | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self._vllm = import_vllm()
        if processor is not None:
            tokenizer = tokenizer or processor.tokenizer
        on_cpu = runs_on_cpu()
        if on_cpu and sleeps:
            logger.info("On a CPU vLLM frees no memory when it sleeps.")
        self.sleeps = sleeps and not on_cpu
        self.regex = regex
        self._count = 0  # requests ever made: their ids are never reused
        self._files = tempfile.TemporaryDirectory(prefix="rloo_fast-vllm-")
        self._loose = LooseTensors()
        self._adapter = None if adapter is None else lora.request()
        self._has_images = processor is not None
        self._has_base = False  # the weights that the adapter belongs to are there
        self._found_group = dist.is_initialized()  # else vLLM makes one, of this process alone
        settings: dict[str, Any] = {
            "model": str(
                saved_configuration(
                    model, processor, self._vllm.envs.VLLM_CACHE_ROOT, self._files.name
                )
            ),
            "language_model_only": processor is None,  # prompts are token ids alone
            "load_format": loader.register(),
            "skip_tokenizer_init": tokenizer is None,
            "generation_config": "vllm",
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_length,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization or _share(self.sleeps),
            "model_impl": model_impl,
            "enable_sleep_mode": self.sleeps,
            "logprobs_mode": "processed_logprobs",
            "seed": seed,
        }
        if processor is not None:
            settings |= images.settings(processor)
        if tokenizer is not None:
            # in a folder of its own: beside a configuration, the class that usually belongs to the
            # model would be loaded in place of this one
            settings["tokenizer"] = str(Path(self._files.name, "tokenizer"))
            tokenizer.save_pretrained(settings["tokenizer"])
        settings |= placement(
            on_cpu=on_cpu, sleeps=self.sleeps, tensor_parallel_size=tensor_parallel_size
        )
        if adapter is not None:
            settings |= lora.settings(adapter)
        settings |= engine_kwargs or {}
        if adapter is not None:
            lora.check_settings(settings)
        check_all_reduce(settings)
        with host_unchanged(model), launched_as_here(on_cpu=on_cpu), _explained("starting vLLM"):
            self.llm = self._vllm.LLM(**settings)
        self._group = tensor_parallel_group(tensor_parallel_size)
        if on_cpu and self._group is not None:
            unlink_shared_memory(self._group)
        self._refuse_other_forms()
        self._sleep(2)

    def _refuse_other_forms(self) -> None:
        quantization = self.llm.llm_engine.vllm_config.model_config.quantization

        def reason(model: Any) -> str | None:
            return kept_in_another_form(model, quantization)

        for found in self.llm.apply_model(reason):
            if found is not None:
                self._close()
                raise EngineError(f"vLLM cannot compute with the policy's weights: {found}.")

    @property
    def wanted(self) -> SentParts:
        if self._adapter is None:
            return "merged"
        return "adapter" if self._has_base else "base+adapter"

    def _wake(self, tag: str) -> None:
        if self.sleeps:
            with _explained(f"waking vLLM's {tag}"):
                self.llm.wake_up(tags=[tag])
                if tag == "weights":
                    self.llm.apply_model(self._loose.restore)

    def _sleep(self, level: int) -> None:
        if self.sleeps:
            if level == 2:
                self.llm.apply_model(self._loose.save)
                self._has_base = False
            self.llm.sleep(level=level)

    def _close(self) -> None:
        if shutdown := getattr(self.llm.llm_engine.engine_core, "shutdown", None):
            shutdown()
        del self.llm
        if not self._found_group and dist.is_initialized():
            dist.destroy_process_group()
        self._files.cleanup()

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        parted = Parted(buckets)
        if self.wanted != "adapter":
            self._has_base = False
            self._load_base(version, parted)
        if left := [name for name, _ in parted]:
            raise EngineError(f"policy version {version}: {left[0]} was sent beside the adapter.")
        if self._adapter is not None:
            self._load_adapter(version, parted.adapter)
            self._has_base = True
        if not self.llm.reset_prefix_cache():  # it holds keys and values of the former weights
            raise EngineError(
                f"vLLM kept its prefix cache when policy version {version} was loaded, so that it "
                "would sample from older weights: blocks of it are still in use."
            )
        if self._has_images:  # what the former image tower has made of some is kept as well
            self.llm.llm_engine.reset_encoder_cache()

    def _load_base(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        def load(model: Any) -> list[str]:
            with lora.without_adapters(model):
                poison(model)
                model.load_weights(as_read(model, weights))
                return uncovered(model)

        with torch.no_grad(), _explained("loading weights into vLLM"):
            missing = [name for names in self.llm.apply_model(load) for name in names]
        if missing:
            raise EngineError(
                f"policy version {version} did not cover these weights of the engine (or they are "
                f"NaN): {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}."
            )

    def _load_adapter(self, version: int, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad(), _explained("loading the adapter into vLLM"):
            for reason in self.llm.apply_model(lambda model: lora.hold(model, tensors)):
                if reason is not None:
                    raise EngineError(f"the adapter of policy version {version}: {reason}.")
            self.llm.llm_engine.add_lora(self._adapter)

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        return self._generate_requests(
            prompt_ids, [None] * len(prompt_ids), sampling, seeds, on_finished
        )

    def _generate_raw(
        self,
        prompt_ids: list[list[int]],
        raw: Sequence[RawPrompt],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        return self._generate_requests(prompt_ids, raw, sampling, seeds, on_finished)

    def _generate_requests(
        self,
        prompt_ids: list[list[int]],
        raw: Sequence[RawPrompt | None],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        first, own = 0, len(prompt_ids)
        rows = list(zip(prompt_ids, raw, seeds, strict=True))
        if self._group is not None:  # the engines of a group must see the same requests
            rows, first = together(rows, self._group)
        outputs: list[Any] = [None] * len(rows)
        for index, output in self._run(rows, sampling):
            outputs[index] = output
            if first <= index < first + own:
                on_finished(index - first, list(output.token_ids))
        return _as_rollout(outputs[first : first + own])

    def _run(
        self, rows: Sequence[tuple[list[int], RawPrompt | None, int]], sampling: Sampling
    ) -> Iterator[tuple[int, Any]]:
        """(index, vLLM's completion) as they are finished."""
        engine, waiting = self.llm.llm_engine, {}
        named = {} if self._adapter is None else {"lora_request": self._adapter}
        try:
            with _explained("generating with vLLM"):
                for index, (ids, raw, seed) in enumerate(rows):
                    request = f"rloo-{self._count}"
                    self._count += 1
                    asked = images.request_of(ids, raw)
                    params = self._params(sampling, seed, len(ids))
                    engine.add_request(request, asked, params, **named)
                    waiting[request] = index
            while waiting:
                with _explained("generating with vLLM"):
                    finished = engine.step()
                for output in finished:
                    ids, raw, _ = rows[waiting[output.request_id]]
                    if raw is not None:
                        images.check_prompt(output.prompt_token_ids, ids)
                    yield waiting.pop(output.request_id), output.outputs[0]
        finally:
            if waiting:  # an error, here or in what is done with a completion
                engine.abort_request(list(waiting))

    def _params(self, sampling: Sampling, seed: int, num_prompt: int) -> Any:
        settings = {**sampling_fields(sampling), "seed": seed}
        settings["max_tokens"] = sampling.num_new(num_prompt)
        settings["detokenize"] = bool(sampling.stop_strings)
        module = self._vllm.sampling_params
        if self.regex is not None:
            settings["structured_outputs"] = module.StructuredOutputsParams(regex=self.regex)
        final = module.RequestOutputKind.FINAL_ONLY  # no output after each token
        return self._vllm.SamplingParams(**{**settings, **sampling.extra, "output_kind": final})


def _share(sleeps: bool) -> float:
    """Of the GPU's memory, where nobody said and nothing is known of the GPU."""
    return MOST_SHARE if sleeps else LEAST_SHARE


# vLLM's finish reasons -> Rollout's; others are failures
REASONS = {"stop": "stop", "length": "length", "repetition": "length"}


def finish_reason(said: str) -> str:
    """Rollout's word for vLLM's. Raises EngineError for a completion that failed."""
    if said not in REASONS:
        raise EngineError(f"vLLM ended a completion with finish reason {said!r}: see its log.")
    return REASONS[said]


def _as_rollout(outputs: list[Any]) -> Rollout:
    ids = [list(output.token_ids) for output in outputs]
    logps = [
        [entry[token].logprob for entry, token in zip(output.logprobs, row, strict=True)]
        for output, row in zip(outputs, ids, strict=True)
    ]
    return Rollout(ids, [finish_reason(output.finish_reason) for output in outputs], logps)


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
    """Turn what vLLM raises into an EngineError that names settings which may help."""
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
