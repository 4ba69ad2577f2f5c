"""Rollouts by a running `vllm serve`, asked over HTTP; it pulls the policy's weights the same way.

Every load gives the server's weights a label that no other run can give them. It is read before
and after every rollout: completions of weights that another trainer, or a restart of the server,
has put there are never returned. See `vllm_plugin.py` for what runs inside the server.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from ..types import Rollout, Sampling
from .engine import Bucket, EngineError, OnFinished, RolloutEngine, StaleWeights
from .transport import BACKEND, PROTOCOL, BucketServer, Endpoint, Refused, ServerGone
from .vllm import sampling_fields

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --generation-config vllm --logprobs-mode "
    f"""processed_logprobs --weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
)
CONNECT_S = 30.0
RESET_S = 10.0
# fields of a request that are not the user's to set: one prompt, one answer, its ids and log-probs
RESERVED = {"prompt", "prompt_embeds", "n", "seed", "stream", "echo", "model"}
RESERVED |= {"logprobs", "return_token_ids", "use_beam_search"}


class _Completion(NamedTuple):
    ids: list[int]
    logps: list[float]
    finish_reason: str


class VLLMServer(RolloutEngine):
    """One server for all processes of a run: the main one loads weights, each asks its own prompts.

    `timeout_s`: how long to wait for the server to come up. `barrier`: returns when every process
    has called it. `trainer_host`: address at which the server reaches the main process, default:
    that of the network which leads to the server. `sleeps`: the server runs on the trainer's own
    GPUs with --enable-sleep-mode. `num_requests`: most under way at a time, per process.
    """

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
    ):
        super().__init__()
        self._server = Endpoint(base_url, CONNECT_S)
        self._is_main, self._barrier = is_main, barrier
        self._sleeps = sleeps
        self._num_requests = num_requests
        self._run = secrets.token_hex(8)  # tells the weights of this run from those of others
        self._label = ""  # of the weights that the server holds for this run
        self._buckets: BucketServer | None = None
        self._wait_until_up(timeout_s)
        with self._explained():
            self._max_model_len = self._check_server()
            # it may be: a run was killed after it had put the server to sleep
            self._asleep = sleeps and self._server.get("/is_sleeping")["is_sleeping"]
            schemas = self._server.get("/openapi.json")["components"]["schemas"]
            if is_main:
                self._buckets = BucketServer(trainer_host or self._server.local_address())
        self._fields = set(schemas["CompletionRequest"]["properties"]) - RESERVED

    def _wait_until_up(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._server.get("/health")
                return
            except EngineError as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"no vLLM server answered at {self._server.base_url} within {timeout_s:g} "
                        f"s ({error}). Start one with\n  {COMMAND}\nand see to "
                        "vllm_server_base_url (or vllm_server_host and vllm_server_port) and "
                        "vllm_server_timeout."
                    ) from None
            time.sleep(0.5)

    def _check_server(self) -> int:
        """The most tokens of a sequence; EngineError if the server was started unfit for us."""
        try:
            info = self._server.get("/server_info?config_format=json")
            self._server.post("/init_weight_transfer_engine", init_info={"protocol": PROTOCOL})
            self._server.get("/weight_info")
        except Refused as error:
            raise self._unfit(f"{error} (HTTP {error.status})") from error
        config = info["vllm_config"]["model_config"]
        needed: dict[str, Any] = {"logprobs_mode": "processed_logprobs"}
        needed |= {"generation_config": "vllm"}  # else the model's own settings join in
        if self._sleeps:
            needed |= {"enable_sleep_mode": True}
        for name, value in needed.items():
            if config[name] != value:
                raise self._unfit(f"its {name} is {config[name]}, not {value}")
        return config["max_model_len"]

    def _unfit(self, reason: str) -> EngineError:
        return EngineError(
            f"the server at {self._server.base_url} cannot be used for rollouts: {reason}. Start "
            "vLLM 0.32 or newer, on a machine that has rloo_fast installed, with\n  "
            f"{COMMAND}{' --enable-sleep-mode' if self._sleeps else ''}"
        )

    # Sleeping

    def _wake(self, tag: str) -> None:
        if self._asleep:
            self._by_main_process(f"/wake_up?tags={tag}")
            self._asleep = tag != "kv_cache"  # which wakes last

    def _sleep(self, level: int) -> None:
        if self._sleeps and level > 0:
            self._by_main_process(f"/sleep?level={level}")
            self._asleep = True

    def _by_main_process(self, path: str) -> None:
        self._barrier()  # nobody's completions are under way
        if self._is_main:
            with self._explained():
                self._server.post(path)
        self._barrier()

    def _close(self) -> None:
        if self._buckets is not None:
            self._buckets.close()

    # Weights

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        self._barrier()  # nobody's completions are under way
        if self._buckets is not None:
            with self._explained():
                self._send(f"{version}@{self._run}", buckets, self._buckets)
        else:
            for _ in buckets:  # every process takes part in gathering a sharded one
                pass
        self._barrier()
        self._label = self._label_now()
        if self._label.partition("@")[0] != str(version):
            raise StaleWeights(self._changed(f"{version}@..."))

    def _send(self, label: str, buckets: Iterable[Bucket], offers: BucketServer) -> None:
        self._server.post("/update_weight_version", new_version=f"loading {label}")
        self._start_update()
        folder = offers.new_folder()
        for number, bucket in enumerate(buckets):
            with offers.offer(f"{folder}/{number}", bucket) as url:
                self._server.post("/update_weights", update_info={"url": url})
        self._reset_prefix_cache()
        self._server.post("/finish_weight_update", weight_version=label)
        if self._label_now() != label:
            raise StaleWeights(self._changed(label))

    def _start_update(self) -> None:
        try:
            self._server.post("/start_weight_update")
        except Refused:
            # a run that was killed may have left an update open; a failed bucket ends it
            with suppress(Refused):
                self._server.post("/update_weights", update_info={"url": ""})
            self._server.post("/start_weight_update")

    def _reset_prefix_cache(self) -> None:
        """Forget the keys and values of the former weights."""
        deadline = time.monotonic() + RESET_S
        while not self._server.post("/reset_prefix_cache")["success"]:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the server at {self._server.base_url} cannot drop what its cache holds of "
                    "the former weights while it answers someone else's requests: a server works "
                    "for one run."
                )
            time.sleep(0.1)

    def _label_now(self) -> str:
        with self._explained():
            return self._server.get("/weight_info")["weight_version"]

    def _changed(self, expected: str) -> str:
        return (
            f"the server at {self._server.base_url} holds weights {self._label_now()!r}, this run "
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
        fields = self._request_fields(sampling)
        self._check_lengths(prompt_ids, fields["max_tokens"])
        self._check_label()
        done: dict[int, _Completion] = {}
        pool = ThreadPoolExecutor(self._num_requests)
        try:
            asked = {
                pool.submit(self._complete, ids, seed, fields): index
                for index, (ids, seed) in enumerate(zip(prompt_ids, seeds, strict=True))
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

    def _request_fields(self, sampling: Sampling) -> dict[str, Any]:
        unknown = sorted(sampling.extra.keys() - self._fields)
        if unknown:  # the server would ignore them
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} cannot be set in a request to vLLM's "
                "/v1/completions; leave it out."
            )
        return {
            **sampling_fields(sampling),
            "return_token_ids": True,
            **sampling.extra,
        }

    def _check_lengths(self, prompt_ids: list[list[int]], max_tokens: int) -> None:
        longest = max(map(len, prompt_ids), default=0)
        if longest + max_tokens > self._max_model_len:
            raise ValueError(
                f"a prompt of {longest} tokens and max_completion_length={max_tokens} exceed the "
                f"server's {self._max_model_len} tokens: start it with --max-model-len "
                f"{longest + max_tokens}, or lower max_completion_length."
            )

    def _check_label(self) -> None:
        if self._label_now() != self._label:
            raise StaleWeights(self._changed(self._label))

    def _complete(self, ids: list[int], seed: int, fields: dict[str, Any]) -> _Completion:
        answer = self._server.post("/v1/completions", prompt=ids, seed=seed, **fields)
        [choice] = answer["choices"]
        completion = _Completion(
            choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        )
        cut = completion.finish_reason == "length" and len(completion.ids) < fields["max_tokens"]
        if cut or completion.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"the server ended a completion after {len(completion.ids)} of "
                f"{fields['max_tokens']} tokens, finish reason {completion.finish_reason!r}. Was "
                f"it started with\n  {COMMAND}"
            )
        return completion

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What went wrong on the way to the server, in the words of who runs the trainer."""
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
