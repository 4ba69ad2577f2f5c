"""Rollouts with transformers' `generate` on the policy itself, whose weights are always current.

Letters: B rows of a call, P distinct prompts among them, W the longest prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..batching.images import join_images
from ..data.seeds import step_seed
from ..models.adapters import base_causal_lm
from ..records import PER_TOKEN_INPUTS, Bucket, ImageInputs, Rollout, Sampling
from .engine import EngineError, OnFinished, RolloutEngine
from .hf_padding import gaps_change_logits, padding_changes_logits
from .hf_prefix import Prefilled, prefill_levels, prefix_levels
from .hf_sampling import TransformersSampling
from .hf_states import changed_states, kept_states, select_rows, states_put_back
from .settings import EngineSettings
from .stops import Stops, StopStringCriterion

logger = logging.getLogger(__name__)

# generate's name for the KV cache, an argument and a field of what it returns; "cache" since 5.24
CACHE = next(
    name for name in ("cache", "past_key_values")
    if name in {f.name for f in fields(GenerateDecoderOnlyOutput)}
)  # fmt: skip
NO_INPUTS: ImageInputs = {}
PREFILL = GenerationConfig(
    max_new_tokens=1, do_sample=False, return_dict_in_generate=True, disable_compile=True
)


class HFEngine(RolloutEngine):
    """Left-pads the prompts, samples with a KV cache, cuts every completion where it ends.

    A prompt that several rows of a call share runs through the model once, and so does what prompts
    begin with alike: the rows start from copies of its KV cache. `rows_per_call`: prompts per
    generate call, of like length; None: all. Where padding changes what a model computes, the
    prompts of a call are of equal length. For the call the model is in eval mode (no dropout, no
    gradient checkpointing) and inside `whole_weights(model)`.
    """

    shares_weights = True
    takes_images = True

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        return cls(
            settings.model,
            settings.tokenizer.pad_token_id,
            rows_per_call=settings.rows_per_call,
            pad_to_multiple_of=settings.pad_to_multiple_of,
            autocast=settings.autocast,
            whole_weights=settings.whole_weights,
            tokenizer=settings.tokenizer,
        )

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        *,
        rows_per_call: int | None = None,
        pad_to_multiple_of: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]],
        whole_weights: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.model: Any = model  # generate is not nn.Module's
        self.pad_token_id = pad_token_id
        self.rows_per_call, self.pad_to_multiple_of = rows_per_call, pad_to_multiple_of
        self.autocast, self.whole_weights = autocast, whole_weights
        self.tokenizer = tokenizer  # for stop strings only
        self.cache_can_be_copied = self.prefixes_can_be_shared = True  # until seen otherwise
        self.may_pad: bool | None = None  # None: not tried yet
        self.may_have_gaps: bool | None = None
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
        return self._generate_with_images(
            prompt_ids, [NO_INPUTS] * len(prompt_ids), sampling, seeds, on_finished
        )

    def _generate_with_images(
        self,
        prompt_ids: list[list[int]],
        inputs: Sequence[ImageInputs],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        settings = TransformersSampling(sampling, self.pad_token_id)
        if not settings.seeded:
            self._say(
                "generation_kwargs ask transformers for more than sampling: completions depend on "
                "the rows beside them, and there are no log-probs of the sampler."
            )
        count, stops = len(prompt_ids), Stops(sampling, self.tokenizer)
        ended: dict[int, bool] = {}
        done: dict[int, tuple[list[int], list[float]]] = {}  # row -> its tokens and their log-probs
        # rows of like length need little padding; longest first: what does not fit fails at once
        order = sorted(range(count), key=lambda row: -len(prompt_ids[row]))
        with self._inference():
            for rows in self._calls(order, prompt_ids):
                prompts, row_seeds = [prompt_ids[i] for i in rows], [seeds[i] for i in rows]
                others = [inputs[i] for i in rows]
                with states_put_back(self.model):
                    tokens, drawn = self._call(prompts, others, row_seeds, settings, stops)
                values = drawn.tolist() if drawn is not None else [[] for _ in rows]
                for row, ids, logps in zip(rows, tokens.tolist(), values, strict=True):
                    end = stops.end(prompt_ids[row], ids)
                    ended[row], done[row] = end is not None, (ids[:end], logps[:end])
                    on_finished(row, done[row][0])
        completions = [done[row][0] for row in range(count)]
        return Rollout(
            completions,
            ["stop" if ended[row] else "length" for row in range(count)],
            [done[row][1] for row in range(count)] if settings.seeded else None,
        )

    def _calls(self, order: list[int], prompt_ids: list[list[int]]) -> Iterator[list[int]]:
        """The rows of each generate call: `rows_per_call`, of equal length where none may be
        padded."""
        if self.may_pad is None:
            self.may_pad = not padding_changes_logits(base_causal_lm(self.model), self._run)
            if not self.may_pad:
                self._say(
                    "padding before a prompt changes what the model computes: each call has "
                    "prompts of one length."
                )
        size, lengths = self.rows_per_call or len(order), [len(ids) for ids in prompt_ids]
        for _, same in groupby(order, key=(lambda _: 0) if self.may_pad else lengths.__getitem__):
            rows = list(same)
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

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
        self,
        prompts: list[list[int]],
        others: list[ImageInputs],
        seeds: list[int],
        settings: TransformersSampling,
        stops: Stops,
    ) -> tuple[Tensor, Tensor | None]:  # (B, new) tokens, (B, new) log-probs
        """One generate call; what follows a row's end is not cut off yet."""
        numbers: dict[tuple[tuple[int, ...], int], int] = {}
        # rows of one prompt have one object of inputs
        keys = [(tuple(ids), id(other)) for ids, other in zip(prompts, others, strict=True)]
        index = [numbers.setdefault(key, len(numbers)) for key in keys]
        device = self._device()
        rows = torch.tensor(index, device=device)
        own = [list(ids) for ids, _ in numbers]
        tree = None if any(others) else self._prefilled_tree(own, settings)
        if tree is None:
            ids, mask = (part.to(device) for part in self._left_padded(own, settings))
        else:
            ids, mask = tree.ids, tree.mask
        inputs: dict[str, Any] = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        width = ids.shape[1]
        if stops.strings:
            inputs["stopping_criteria"] = [
                StopStringCriterion(stops, prompts, width, reorders=not settings.seeded)
            ]
        if tree is not None:
            tree.cache.batch_select_indices(rows)
            inputs[CACHE] = tree.cache
        elif len(numbers) < len(prompts) and width > 1 and self._may_share_prompts(settings):
            firsts = [others[index.index(number)] for number in range(len(numbers))]
            inputs[CACHE] = self._prefilled(
                ids[:, :-1], mask[:, :-1], rows, self._beside(firsts, width, last=False)
            )
        if inputs.get(CACHE) is None:
            inputs |= self._beside(others, width)
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
        self, prompts: Sequence[Sequence[int]], settings: TransformersSampling
    ) -> tuple[Tensor, Tensor]:  # (P, W) ids, (P, W) mask
        multiple = (self.pad_to_multiple_of or 1) if self.may_pad else 1
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

    def _beside(
        self, prompts: list[ImageInputs], width: int, *, last: bool = True
    ) -> dict[str, Tensor]:
        """Images and, without the `last` of them, token types of left-padded prompts; generate
        finds positions itself."""
        given: dict[str, Tensor] = join_images(prompts)
        for name in PER_TOKEN_INPUTS:
            if any(name in prompt for prompt in prompts):
                types = torch.zeros((len(prompts), width), dtype=torch.long)
                for row, prompt in enumerate(prompts):
                    types[row, width - len(prompt[name]) :] = prompt[name]
                given[name] = types if last else types[:, :-1]
        return {name: value.to(self._device()) for name, value in given.items()}

    def _may_share_prompts(self, settings: TransformersSampling) -> bool:
        kwargs = ("cache_implementation", "prefill_chunk_size", "use_cache")
        values = {name: getattr(settings.config, name) for name in kwargs}
        given = [f"{name}={value}" for name, value in values.items() if value not in (None, True)]
        if given:
            self._say(f"{', '.join(given)}: a prompt runs through the model for each sample.")
        return settings.seeded and not given and self.cache_can_be_copied

    def _prefilled(
        self,
        ids: Tensor,  # (P, W - 1)
        mask: Tensor,
        rows: Tensor,  # (B,)
        beside: dict[str, Tensor],
    ) -> Any:
        """A KV cache whose row i holds the tokens `ids[rows[i]]`; None: it cannot be copied.

        What the modules keep beside it until decoding (such as `rope_deltas`) is given the same
        rows.
        """
        before = kept_states(self.model)
        cache = getattr(self._run(PREFILL, input_ids=ids, attention_mask=mask, **beside), CACHE)
        kinds = {type(layer) for layer in getattr(cache, "layers", [None])}
        copied = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        copied = copied and cache.get_seq_length() == ids.shape[1]
        if copied and select_rows(changed_states(self.model, before), rows, len(ids)):
            cache.batch_select_indices(rows)
            return cache
        self.cache_can_be_copied = False
        self._say(
            "the model keeps more than its prompt's keys and values: a prompt runs through it for "
            "each sample."
        )
        return None

    def _prefilled_tree(
        self, prompts: list[list[int]], settings: TransformersSampling
    ) -> Prefilled | None:
        """The prompts' keys and values, of what several begin with alike computed once; None: they
        share too little, or the model keeps more than keys and values of every token."""
        may = self.may_pad and self.prefixes_can_be_shared
        if not may or settings.config.no_repeat_ngram_size or not self._may_share_prompts(settings):
            return None
        levels = prefix_levels(prompts)
        if levels is None or self._gaps_matter():
            return None
        before = kept_states(self.model)

        def prefill(ids: Tensor, mask: Tensor, cache: Any) -> Any:
            more = {} if cache is None else {CACHE: cache}
            made = self._run(PREFILL, input_ids=ids, attention_mask=mask, **more)
            cache = getattr(made, CACHE)
            plain = all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
            plain = plain and cache.get_seq_length() == ids.shape[1]
            return cache if plain and not changed_states(self.model, before) else None

        found = prefill_levels(levels, prefill, self._device())
        if found is None:
            self._share_no_prefixes("the model's cache is no plain one")
        return found

    def _gaps_matter(self) -> bool:
        if self.may_have_gaps is None:
            self.may_have_gaps = not gaps_change_logits(base_causal_lm(self.model), self._run)
            if not self.may_have_gaps:
                self._share_no_prefixes("padding within a prompt changes what the model computes")
        return not self.may_have_gaps

    def _share_no_prefixes(self, reason: str) -> None:
        self.prefixes_can_be_shared = False
        self._say(f"what prompts begin with alike runs for each: {reason}.")

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
            # synced_gpus=False: the weights are whole, so no process waits for another's rows
            return self.model.generate(generation_config=config, synced_gpus=False, **inputs)
        finally:
            base.generation_config = saved
