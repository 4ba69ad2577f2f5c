"""The engines that `benchmarks.rollout` compares, each asked for the same completions.

    hf          ours with transformers: what all prompts begin with runs once, then a prompt once
                for its K samples; KV caches are copied
    hf-prompts  the same, but every prompt runs its beginning
    hf-plain    every row runs its prompt
    vllm        ours with vLLM in this process: a seed per row, log-probs of the sampled tokens
    vllm-n      vLLM's own LLM.generate with n=K, no seeds and no log-probs: what those cost ours
    trl-hf      RLOOTrainer._generate_single_turn of TRL, called on such a trainer: every row runs
                its prompt, left-padded

All sample at temperature 1 and nothing stops a completion before the shape's limit. vLLM's prefix
cache is emptied before each call, as a weight sync empties it, so that a prompt is found there only
by the other samples of its call. All weights are equal, and random.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.common import models as step_models
from benchmarks.common.models import PAD, Shape
from benchmarks.step import providers as step_providers
from benchmarks.step.providers import Passes, Steps, Unavailable
from rloo_fast.records import Rollout, Sampling
from rloo_fast.rollout import HFEngine
from rloo_fast.weight_sync.buckets import weight_buckets

# every completion has as many tokens as the limit
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tldr", 400, 53, 4, 8, uniform=(53, 53)),
        Shape("chat", 32, 128, 8, 4, uniform=(128, 128)),
        Shape("math", 100, 512, 8, 4, uniform=(512, 512)),
        Shape("system", 1100, 53, 4, 8, uniform=(53, 53), system=1000),
        Shape("short", 24, 8, 4, 2, uniform=(8, 8)),  # for tests
    )
}
BUCKET_BYTES = 256 * 2**20
NEVER = [2**31 - 1]  # a stop token beyond any vocabulary, where there must be one
CACHE_BLOCK = 128  # tokens; vLLM's on a CPU


@dataclass(frozen=True)
class Settings(step_providers.Settings):
    """Of the step benchmark's trainers, for the one that is TRL's here."""

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name].with_sizes(self.num_generations, self.num_prompts)

    def trainer_arguments(self) -> dict[str, Any]:
        return {**super().trainer_arguments(), "generation_kwargs": {"eos_token_id": NEVER}}


@dataclass
class Provider:
    """`generate` samples all rows, prompt-major; `model` is what runs for it."""

    generate: Callable[[], Rollout]
    model: nn.Module
    note: str = ""


class Watched(Passes):
    """Tokens, forwards and threads of a model, from when it is made."""

    threads = 0

    def __init__(self, model: nn.Module):
        super().__init__()
        embeddings = next(m for m in model.modules() if hasattr(m, "num_embeddings"))
        self._handle = embeddings.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        super().hook(module, inputs, output)
        self.threads = torch.get_num_threads()

    def stop(self) -> None:
        self._handle.remove()


class Engines:
    """The policy, what is asked of it, and the engines made so far; vLLM is started once."""

    def __init__(self, settings: Settings):
        self.settings, shape = settings, settings.shape
        model = AutoModelForCausalLM.from_pretrained(settings.model_folder, dtype=torch.float32)
        self.model: Any = model.eval()
        step_models.perturb(self.model)  # as Steps does with TRL's
        texts = step_models.prompt_texts(shape)
        self.prompts: list[list[int]] = step_models.make_tokenizer()(texts)["input_ids"]  # pyright: ignore
        self.rows = [ids for ids in self.prompts for _ in range(shape.num_generations)]
        self.seeds = range(shape.num_rows)
        self.threads = torch.get_num_threads()
        self.sampling = Sampling(
            temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
            max_new_tokens=shape.limit, stop_token_ids=(),
        )  # fmt: skip
        self.start_s: float | None = None  # of vLLM, with its first weights
        self._vllm: Any = None

    def make(self, name: str) -> Provider:
        """Raises Unavailable where its library is missing."""
        return MAKERS[name](self)

    def vllm(self) -> Any:
        """A VLLMEngine that is ready with the policy's weights as version 0."""
        if self._vllm is None:
            start = time.perf_counter()
            self._vllm = start_vllm(self.model, self.settings.shape)
            self.start_s = time.perf_counter() - start
        return self._vllm

    def close(self) -> None:
        if self._vllm is not None:
            self._vllm.close()


def start_vllm(model: Any, shape: Shape) -> Any:
    if importlib.util.find_spec("vllm") is None:
        raise Unavailable("vllm is not installed")
    from rloo_fast.rollout.vllm.colocate import VLLMEngine

    engine = VLLMEngine(
        model,
        dtype=torch.float32,
        max_model_length=shape.prompt + shape.limit,
        engine_kwargs={"kv_cache_memory_bytes": cache_bytes(model.config, shape)},
    )
    engine.wake(("weights",))
    engine.load_weights(0, weight_buckets(model, BUCKET_BYTES))
    engine.wake(("kv_cache",))
    return engine


def cache_bytes(config: Any, shape: Shape) -> int:
    """Keys and values of all rows in fp32, each in blocks of its own, so that no row must wait.

    layers x 2 x key-value heads x head size x 4 bytes x tokens
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    blocks = -(-(shape.prompt + shape.limit) // CACHE_BLOCK) * shape.num_rows + 1
    return config.num_hidden_layers * 2 * heads * head_size * 4 * blocks * CACHE_BLOCK


def _hf(engines: Engines, share_prompts: bool = True, share_beginnings: bool = True) -> Provider:
    engine = HFEngine(engines.model, PAD, autocast=nullcontext)
    engine.cache_can_be_copied = share_prompts
    engine.prefixes_can_be_shared = share_beginnings
    engine.wake(("weights",))
    engine.load_weights(0, ())
    engine.wake(("kv_cache",))
    # What an engine tries out once, with its first prompts, is not part of a rollout.
    k = engines.settings.shape.num_generations
    two, seeds = engines.rows[: 2 * k : k], engines.seeds[:2]
    engine.generate(two, engines.sampling, seeds[: len(two)], version=0)
    return Provider(
        lambda: engine.generate(engines.rows, engines.sampling, engines.seeds, version=0),
        engines.model,
    )


def _vllm(engines: Engines) -> Provider:
    engine = engines.vllm()

    def generate() -> Rollout:
        engine.llm.reset_prefix_cache()
        return engine.generate(engines.rows, engines.sampling, engines.seeds, version=0)

    cache = cache_bytes(engines.model.config, engines.settings.shape) >> 20
    note = f"keeps its own weights and {cache} MiB of KV cache besides"
    return Provider(generate, served_model(engine), note)


def _vllm_n(engines: Engines) -> Provider:
    engine, shape = engines.vllm(), engines.settings.shape
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    params = SamplingParams(
        n=shape.num_generations, max_tokens=shape.limit, ignore_eos=True, detokenize=False
    )
    asked = [{"prompt_token_ids": ids} for ids in engines.prompts]

    def generate() -> Rollout:
        engine.llm.reset_prefix_cache()
        groups = engine.llm.generate(asked, params, use_tqdm=False)
        rows = [row for group in groups for row in group.outputs]
        return Rollout([list(row.token_ids) for row in rows], [row.finish_reason for row in rows])

    return Provider(generate, served_model(engine))


def _trl_hf(engines: Engines) -> Provider:
    trainer = Steps("trl", engines.settings).trainer
    trainer.eos_token_ids = NEVER  # it cuts completions there also where generation did not stop
    trainer.model.train()  # as it is when it samples

    def generate() -> Rollout:
        ids = trainer._generate_single_turn(engines.rows, None, {})
        return Rollout(ids, ["length"] * len(ids))

    return Provider(generate, trainer.model)


MAKERS: dict[str, Callable[[Engines], Provider]] = {
    "hf": _hf,
    "hf-prompts": lambda engines: _hf(engines, share_beginnings=False),
    "hf-plain": lambda engines: _hf(engines, share_prompts=False),
    "vllm": _vllm,
    "vllm-n": _vllm_n,
    "trl-hf": _trl_hf,
}


def served_model(engine: Any) -> nn.Module:
    """The module that vLLM runs."""
    (model,) = engine.llm.apply_model(lambda model: model)
    return model


@torch.no_grad()
def largest_error(model: Any, prompt_ids: list[list[int]], rollout: Rollout) -> float:
    """max |log-prob by the engine - log-prob by a full forward of `model`| at temperature 1."""
    assert rollout.logps is not None
    errors = []
    for prompt, ids, logps in zip(prompt_ids, rollout.completion_ids, rollout.logps, strict=True):
        tokens = torch.tensor([prompt + ids])
        logits = model(input_ids=tokens, logits_to_keep=len(ids) + 1).logits[0, :-1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        errors.append((exact - torch.tensor(logps)).abs().max())
    return float(torch.stack(errors).max())


def memory_step(name: str, settings: dict[str, Any]) -> Any:
    """One rollout of a provider, for the memory process."""
    return Engines(Settings(**settings)).make(name).generate
