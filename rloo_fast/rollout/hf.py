"""Rollouts with transformers' `generate`, on the policy itself: its weights are always current.

Letters: B rows of a call, P distinct prompts among them, W the longest prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..models import base_causal_lm
from ..types import Rollout, Sampling
from .engine import Bucket, EngineError, OnFinished, RolloutEngine, step_seed
from .hf_sampling import Settings

logger = logging.getLogger(__name__)

PREFILL = GenerationConfig(
    max_new_tokens=1, do_sample=False, return_dict_in_generate=True, disable_compile=True
)


class HFEngine(RolloutEngine):
    """Left-pads the prompts, samples with a KV cache, cuts every completion at its stop token.

    A prompt that several rows of a call have runs through the model once: they start from copies of
    its KV cache. `rows_per_call`: prompts per generate call, of like length, None for all at a
    time. The model is put into eval mode for the call (no dropout, no gradient checkpointing) and
    back afterwards; `whole_weights(model)` is open while it samples.
    """

    shares_weights = True

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        *,
        rows_per_call: int | None = None,
        pad_to_multiple_of: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]],
        whole_weights: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    ):
        super().__init__()
        self.model, self.pad_token_id = model, pad_token_id
        self.rows_per_call, self.pad_to_multiple_of = rows_per_call, pad_to_multiple_of
        self.autocast, self.whole_weights = autocast, whole_weights
        self.cache_can_be_copied = True  # until seen otherwise
        self.said: set[str] = set()

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        return

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        settings = Settings(sampling, self.pad_token_id)
        if not settings.seeded:
            self._say(
                "generation_kwargs ask transformers for more than sampling: completions depend on "
                "the rows beside them, and there are no log-probs of the sampler."
            )
        count = len(prompt_ids)
        logps = [[] for _ in range(count)] if settings.seeded else None
        rollout = Rollout([[] for _ in range(count)], [""] * count, logps)
        # like lengths need little padding; the longest first: what does not fit fails at once
        order = sorted(range(count), key=lambda row: -len(prompt_ids[row]))
        size = self.rows_per_call or max(count, 1)
        with self._inference():
            for start in range(0, count, size):
                rows = order[start : start + size]
                prompts, row_seeds = [prompt_ids[i] for i in rows], [seeds[i] for i in rows]
                tokens, drawn = self._call(prompts, row_seeds, settings)
                _store(rollout, rows, tokens, drawn, set(sampling.stop_token_ids))
                for row in rows:
                    on_finished(row, rollout.completion_ids[row])
        return rollout

    @contextmanager
    def _inference(self) -> Iterator[None]:
        device = self._device()
        devices = [device] if device.type == "cuda" else []
        training = self.model.training
        self.model.eval()
        try:
            with (
                torch.random.fork_rng(devices=devices),
                torch.no_grad(),
                self.whole_weights(self.model),
                self.autocast(),
            ):
                yield
        finally:
            self.model.train(training)

    def _call(
        self, prompts: list[list[int]], seeds: list[int], settings: Settings
    ) -> tuple[Tensor, Tensor | None]:  # (B, new) tokens, (B, new) log-probs
        """One generate call; what follows a row's stop token is not cut off yet."""
        numbers: dict[tuple[int, ...], int] = {}
        index = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts]
        device = self._device()
        rows = torch.tensor(index, device=device)
        ids, mask = (part.to(device) for part in self._left_padded(list(numbers), settings))
        inputs: dict[str, Any] = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        width = ids.shape[1]
        if len(numbers) < len(prompts) and width > 1 and self._may_share_prompts(settings):
            inputs["past_key_values"] = self._prefilled(ids[:, :-1], mask[:, :-1], rows)
        if not settings.seeded:
            torch.manual_seed(step_seed(seeds[0], *seeds[1:]))
            return self._run(settings.config, **inputs)[:, width:], None
        draw = settings.draw(seeds, device)
        sequences = self._run(settings.config, logits_processor=[draw], **inputs)
        logps = draw.logps()
        if not logps.isfinite().all():
            raise EngineError(
                "the policy's logits are NaN or infinite, so no token can be drawn: lower the "
                "learning rate, or train in bfloat16 where it is float16."
            )
        return sequences[:, width:], logps

    def _left_padded(
        self, prompts: Sequence[Sequence[int]], settings: Settings
    ) -> tuple[Tensor, Tensor]:  # (P, W) ids, (P, W) mask
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(ids) for ids in prompts) // multiple) * multiple
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        padded = torch.full_like(mask, self.pad_token_id)
        for row, ids in enumerate(prompts):
            # a repetition penalty counts padding too, and the pad token may be a stop token; a
            # token of the prompt adds nothing to it, but to what n-grams are not to be repeated
            if not settings.config.no_repeat_ngram_size:
                padded[row] = ids[0]
            padded[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        return padded, mask

    def _may_share_prompts(self, settings: Settings) -> bool:
        kwargs = ("cache_implementation", "prefill_chunk_size", "use_cache")
        values = {name: getattr(settings.config, name) for name in kwargs}
        given = [f"{name}={value}" for name, value in values.items() if value not in (None, True)]
        if given:
            self._say(f"{', '.join(given)}: a prompt runs through the model for each sample.")
        return settings.seeded and not given and self.cache_can_be_copied

    def _prefilled(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Any:  # (P, W - 1) twice, (B,)
        """A KV cache whose line i holds the tokens `ids[rows[i]]`, or None where there is none."""
        cache = self._run(PREFILL, input_ids=ids, attention_mask=mask).past_key_values
        kinds = {type(layer) for layer in getattr(cache, "layers", [None])}
        copied = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        if copied and cache.get_seq_length() == ids.shape[1]:
            cache.batch_select_indices(rows)
            return cache
        self.cache_can_be_copied = False
        self._say(
            "the model keeps more than its prompt's keys and values: a prompt runs through it for "
            "each sample."
        )
        return None

    def _say(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            logger.info("Rollouts with transformers: %s", reason)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _run(self, config: GenerationConfig, **inputs: Any) -> Any:
        base = base_causal_lm(self.model)
        saved = base.generation_config
        # generate() fills settings that are None from the model's own config, so a model saved
        # with min_p=0.1 would be sampled with that although none was asked for
        base.generation_config = config
        try:
            # the weights are whole: processes need not go on until the last of them has finished
            return self.model.generate(  # pyright: ignore
                generation_config=config, synced_gpus=False, **inputs
            )
        finally:
            base.generation_config = saved


def _store(
    rollout: Rollout, rows: list[int], tokens: Tensor, logps: Tensor | None, stops: set[int]
) -> None:
    """Into `rollout`'s rows `rows`, each cut after its first stop token."""
    lines = tokens.tolist()
    for row, ids in zip(rows, lines, strict=True):
        end = next((i + 1 for i, token in enumerate(ids) if token in stops), None)
        rollout.completion_ids[row] = ids[:end]
        rollout.finish_reasons[row] = "length" if end is None else "stop"
    if logps is not None and rollout.logps is not None:
        for row, values in zip(rows, logps.tolist(), strict=True):
            rollout.logps[row] = values[: len(rollout.completion_ids[row])]
