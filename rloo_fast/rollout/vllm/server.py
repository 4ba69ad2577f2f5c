"""Rollouts by a running `vllm serve` over HTTP; it takes the policy's weights from the trainer.

Every load labels the server's weights with the version and this run's own id. The label is read
before and after every rollout, so completions from other weights (another trainer loaded them, or
the server was restarted) are never returned. `plugin.py` runs inside the server.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, Self

import torch

from ...models.adapters import base_causal_lm
from ...records import Bucket, Rollout, Sampling, SentParts
from ...weight_sync.unmerged import AdapterShape, adapter_shape
from ..engine import EngineError, OnFinished, RolloutEngine, StaleWeights
from ..settings import EngineSettings
from . import lora
from .answers import Completion, OddAnswer, most_bytes, read_completion
from .colocate import sampling_fields
from .fit import COMMAND, CONNECT_S, check_fit, wait_until_up
from .http import api_key
from .sender import WeightSender
from .together import gathering, others_waiting
from .transport import Endpoint, Refused, ServerGone

RESET_S = 10.0
# fields of a request that are not the user's to set: one prompt, one answer, its ids and log-probs
RESERVED = {"prompt", "prompt_embeds", "n", "seed", "stream", "echo", "model"}
RESERVED |= {"logprobs", "return_token_ids", "use_beam_search", "request_id"}
COMPLETIONS = "/v1/completions"
SCHEMA = "components.schemas.CompletionRequest.properties"


class VLLMServer(RolloutEngine):
    """One server for all processes: the main one loads weights, each sends its own prompts.

    `timeout_s`: how long to wait for the server to come up. `barrier`: returns when every process
    has called it. `trainer_host`: address at which the server reaches the main process; default:
    this machine's on the network that leads to the server. `sleeps`: the server runs on the
    trainer's GPUs with --enable-sleep-mode. `num_requests`: most open requests of a process.
    `vocab_size`: tokens that the policy knows; None: not checked. `adapter`: it is sent apart from
    the weights. `weight_transfer`, `device`: see `WeightSender`. `has_images`: prompts may have.
    The key of the server is read from the environment (`api_key`), never from a configuration,
    which is written to files.
    """

    reads_vllm_settings = True

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        return cls(
            settings.server.base_url,
            timeout_s=settings.server.timeout_s,
            sleeps=settings.sleeps,
            is_main=settings.is_main_process,
            barrier=settings.barrier,
            vocab_size=base_causal_lm(settings.model).config.get_text_config().vocab_size,
            adapter=adapter_shape(settings.model) if settings.sends_adapter else None,
            weight_transfer=settings.server.weight_transfer,
            device=settings.device,
        )

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 240.0,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
        trainer_host: str | None = None,
        sleeps: bool = False,
        num_requests: int = 256,
        vocab_size: int | None = None,
        adapter: AdapterShape | None = None,
        weight_transfer: str = "auto",
        device: torch.device | None = None,
        has_images: bool = False,
    ):
        super().__init__()
        self._server = Endpoint(base_url, CONNECT_S, api_key())
        self._is_main, self._barrier = is_main, barrier
        self._sleeps = sleeps
        self._sends_adapter, self._has_base = adapter is not None, False
        self._num_requests, self._vocab_size = num_requests, vocab_size
        self._has_images = has_images
        self._run = secrets.token_hex(8)  # tells the weights of this run from those of others
        self._label = ""  # of the weights that the server holds for this run
        self._sender: WeightSender | None = None
        wait_until_up(self._server, timeout_s)
        with self._explained():
            self._max_model_len, self.sent_dtype = check_fit(
                self._server, sleeps=sleeps, adapter=adapter
            )
            # it may be: a run was killed after it had put the server to sleep
            self._asleep = sleeps and self._server.value("/is_sleeping", "is_sleeping", bool)
            fields = self._server.value("/openapi.json", SCHEMA, dict)
            if is_main:
                self._sender = WeightSender(
                    self._server,
                    trainer_host or self._server.local_address(),
                    wanted=weight_transfer,
                    device=device,
                    dtype=self.sent_dtype,
                )
        self._fields = set(fields) - RESERVED

    @property
    def wanted(self) -> SentParts:
        if not self._sends_adapter:
            return "merged"
        return "adapter" if self._has_base else "base+adapter"

    # Sleeping

    def _wake(self, tag: str) -> None:
        if self._asleep:
            self._by_main_process(f"/wake_up?tags={tag}")
            self._asleep = tag != "kv_cache"  # which wakes last

    def _sleep(self, level: int) -> None:
        if self._sleeps and level > 0:
            self._by_main_process(f"/sleep?level={level}")
            self._asleep = True
            self._has_base = self._has_base and level < 2

    def _by_main_process(self, path: str) -> None:
        with others_waiting(self._barrier):
            if self._is_main:
                with self._explained():
                    self._server.post(path)

    def _close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    # Weights

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        with others_waiting(self._barrier), gathering(buckets) as gathered:
            if self.wanted == "adapter":
                self._check_label()  # of the weights that it belongs to
            parts, self._has_base = self.wanted, False
            if self._sender is not None:
                with self._explained():
                    self._send(f"{version}@{self._run}", parts, gathered, self._sender)
        self._label = self._label_now()
        if self._label.partition("@")[0] != str(version):
            raise StaleWeights(self._changed(f"{version}@..."))
        self._has_base = self._sends_adapter

    def take_way(self, wanted: str) -> None:
        """Send weights by this way from now on; see `WeightSender`. Of the main process."""
        assert self._sender is not None
        with self._explained():
            self._sender.take_way(wanted)

    def _send(
        self, label: str, parts: SentParts, buckets: Iterable[Bucket], sender: WeightSender
    ) -> None:
        sender.begin()
        self._server.post("/update_weight_version", new_version=f"loading {label}")
        sender.send(parts, buckets)
        self._reset_prefix_cache()
        if self._label_now() != f"loading {label}":
            raise StaleWeights(self._changed(label))
        self._server.post("/finish_weight_update", weight_version=label)
        if self._label_now() != label:
            raise StaleWeights(self._changed(label))

    def _reset_prefix_cache(self) -> None:
        """Drop the keys and values that were computed with the former weights, and what the former
        image tower made of images."""
        if self._has_images:
            self._server.post("/reset_mm_cache")
            self._server.post("/reset_encoder_cache")
        deadline = time.monotonic() + RESET_S
        path = "/reset_prefix_cache"
        while not self._server.field(self._server.post(path), path, "success", bool):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the server at {self._server.base_url} cannot drop what its cache holds of "
                    "the former weights while it answers someone else's requests: a server works "
                    "for one run."
                )
            time.sleep(0.1)

    def _label_now(self) -> str:
        with self._explained():
            return self._server.value("/weight_info", "weight_version", str)

    def _changed(self, expected: str, held: str | None = None) -> str:
        held = held or repr(self._label_now())
        return (
            f"the server at {self._server.base_url} holds weights {held}, this run "
            f"loaded {expected!r}: the server was restarted, or another run loads weights into it. "
            "A server works for one run; start this one again with resume_from_checkpoint."
        )

    # Completions

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnFinished,
    ) -> Rollout:
        requests = [self._request_fields(sampling, len(ids)) for ids in prompt_ids]
        for ids, fields in zip(prompt_ids, requests, strict=True):
            self._check_length(len(ids), fields["max_tokens"])
        self._check_label()
        done: dict[int, Completion] = {}
        pool = ThreadPoolExecutor(self._num_requests)
        try:
            asked = {
                pool.submit(self._complete, *asked): index
                for index, asked in enumerate(zip(prompt_ids, seeds, requests, strict=True))
            }
            with self._explained():
                for future in as_completed(asked):
                    index = asked[future]
                    done[index] = future.result()
                    on_finished(index, done[index].ids)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._server.hang_up()  # on an error: nobody waits for the others any more
            pool.shutdown()
        self._check_label()
        rows = [done[index] for index in range(len(prompt_ids))]
        return Rollout(
            [row.ids for row in rows],
            [row.finish_reason for row in rows],
            [row.logps for row in rows],
        )

    def _request_fields(self, sampling: Sampling, num_prompt: int) -> dict[str, Any]:
        unknown = sorted(sampling.extra.keys() - self._fields)
        if unknown:  # the server would ignore them
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} cannot be set in a request to vLLM's "
                "/v1/completions; leave it out."
            )
        named = {"model": lora.NAME} if self._sends_adapter else {}
        return {
            **sampling_fields(sampling),
            "max_tokens": sampling.num_new(num_prompt),
            "return_token_ids": True,
            **named,
            **sampling.extra,
        }

    def _check_length(self, num_prompt: int, max_tokens: int) -> None:
        if num_prompt + max_tokens > self._max_model_len:
            raise ValueError(
                f"a prompt of {num_prompt} tokens and max_completion_length={max_tokens} exceed "
                f"the server's {self._max_model_len} tokens: start it with --max-model-len "
                f"{num_prompt + max_tokens}, or lower max_completion_length."
            )

    def _check_label(self) -> None:
        if self._label_now() != self._label:
            raise StaleWeights(self._changed(self._label))

    def _complete(self, ids: list[int], seed: int, fields: dict[str, Any]) -> Completion:
        request_id, max_tokens = secrets.token_hex(16), fields["max_tokens"]
        asked = {**fields, "prompt": ids, "seed": seed, "request_id": request_id}
        size = most_bytes(len(ids), max_tokens)
        answer = self._server.ask(COMPLETIONS, asked, most_bytes=size)
        try:
            completion = read_completion(
                answer,
                request_id=request_id,
                prompt_ids=ids,
                max_tokens=max_tokens,
                vocab_size=self._vocab_size,
            )
        except OddAnswer as error:
            raise self._server.odd(COMPLETIONS, str(error)) from error
        if answer["choices"][0]["finish_reason"] == "length" and len(completion.ids) < max_tokens:
            raise EngineError(
                f"the server cut a completion after {len(completion.ids)} of {max_tokens} tokens. "
                f"Was it started with\n  {COMMAND}"
            )
        return completion

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the connection into EngineErrors that say what to do."""
        try:
            yield
        except ServerGone as error:
            raise EngineError(
                f"the server at {self._server.base_url} is gone ({error}). The last checkpoint is "
                "safe: start the server again, then the run with resume_from_checkpoint."
            ) from error
        except Refused as error:
            raise EngineError(
                f"the server at {self._server.base_url} refused, and its log says more: {error}"
            ) from error
