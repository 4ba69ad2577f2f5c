"""Rollouts by one or several `vllm serve`, whose weights are replaced while they sample.

    pause (requests are frozen, their keys and values dropped) -> load, into all at once -> resume

After that the frozen requests go on: what they have so far is read again by the new weights, so
each token is sampled by exactly the policy whose version it is labelled with, given those before
it. A request goes to the server with the fewest open ones. A server that dies, or was restarted
and has no weights of this run, is taken out for the rest of it; its requests are sent to another.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self

from ...models.adapters import base_causal_lm
from ...records import Bucket, RawPrompt, Sampling
from ..ahead.flight import Sampled
from ..ahead.requests import RequestEngine
from ..engine import EngineError, StaleWeights
from ..settings import EngineSettings
from .answers import OddAnswer
from .fit import CONNECT_S, unfit
from .images import check_prompt
from .inflight import GENERATE, OtherWeights, most_bytes, read_sampled, request_fields, request_of
from .server import RESERVED, VLLMServer
from .together import gathering, others_waiting
from .transport import Endpoint, OutOfFiles, Refused, ServerGone

logger = logging.getLogger(__name__)

PARAMS = "components.schemas.GenerateRequest.properties.sampling_params.properties"
SCALE_OUT = "--enable-scale-out"
HEALTH_S = 10.0
MOST_LOST = 3  # answers to one request, of servers that are there


class InflightServer(VLLMServer):
    """One of the servers; its process loads weights into it if `is_main`."""

    def __init__(self, base_url: str, **options: Any):
        super().__init__(base_url, **options)
        self.base_url, self.num_open = self._server.base_url, 0
        with self._explained():
            schema = self._server.get("/openapi.json")
            if GENERATE not in self._server.field(schema, "/openapi.json", "paths", dict):
                reason = f"it does not offer {GENERATE}, by which tokens get their versions"
                raise unfit(self._server, reason, more=SCALE_OUT)
            known = self._server.field(schema, "/openapi.json", PARAMS, dict)
            if self._is_main and self._server.value("/is_paused", "is_paused", bool):
                self.resume()  # a run that was killed left it so
        self._params = set(known) - RESERVED

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def check(self, sampling: Sampling) -> None:
        """ValueError for what the server would ignore."""
        if unknown := sorted(sampling.extra.keys() - self._params):
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} cannot be set in a request to vLLM's "
                f"{GENERATE}; leave it out."
            )

    def sample(
        self,
        prompt_ids: list[int],
        seed: int,
        fields: dict[str, Any],
        raw: RawPrompt | None = None,
    ) -> Sampled:
        request_id = secrets.token_hex(16)
        max_tokens = fields["sampling_params"]["max_tokens"]
        answer = self._server.ask(
            GENERATE,
            request_of(fields, prompt_ids, seed, request_id, raw),
            most_bytes=most_bytes(len(prompt_ids), max_tokens),
        )
        read = answer.get("prompt_token_ids")
        if raw is not None and isinstance(read, list):
            check_prompt(read, prompt_ids)
        try:
            return read_sampled(
                answer,
                request_id=request_id,
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                vocab_size=self._vocab_size,
                run=self._label.partition("@")[2],
            )
        except OtherWeights as error:
            raise StaleWeights(self._changed(self._label, error.label)) from error
        except OddAnswer as error:
            raise self._server.odd(GENERATE, str(error)) from error

    def is_dead(self) -> bool:
        """It answers that its engine is, or not at all."""
        try:
            Endpoint(self.base_url, min(CONNECT_S, HEALTH_S)).get("/health", HEALTH_S)
        except OutOfFiles:
            raise
        except EngineError:
            return True
        return False

    def pause(self) -> None:
        """Freeze the requests under way. They are read again after `resume`, by the weights that
        are there by then."""
        self._server.post("/pause?mode=keep&clear_cache=true")

    def resume(self) -> None:
        self._server.post("/resume")

    def learn_label(self, version: int) -> None:
        """On a process that does not load: the weights are there by now."""
        self._label = self._label_now()
        if self._label.partition("@")[0] != str(version):
            raise StaleWeights(self._changed(f"{version}@..."))

    def hang_up(self) -> None:
        self._server.hang_up()


class Prepared(NamedTuple):
    """A run's sampling, checked, as the requests have it."""

    fields: dict[str, Any]


class VLLMServers(RequestEngine):
    """Servers at `base_urls`; `options`: those of VLLMServer. `barrier` returns when every process
    has called it: all take part in gathering weights, the main one loads them."""

    reads_vllm_settings = True
    reads_images = True

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Self:
        return cls(
            settings.server.base_urls,
            is_main=settings.is_main_process,
            barrier=settings.barrier,
            timeout_s=settings.server.timeout_s,
            vocab_size=base_causal_lm(settings.model).config.get_text_config().vocab_size,
            weight_transfer=settings.server.weight_transfer,
            device=settings.device,
            has_images=settings.processor is not None,
        )

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
        **options: Any,
    ):
        super().__init__()
        self._is_main, self._barrier = is_main, barrier
        self.servers = [InflightServer(url, is_main=is_main, **options) for url in base_urls]
        self.num_taken_out = self.num_sent_again = 0
        self._lock = threading.Lock()
        self._prepared: tuple[Sampling, Prepared] | None = None  # the newest, as it was asked for
        self._hung_up = False

    # Completions

    def prepare(self, sampling: Sampling, longest: int) -> Prepared:
        room = min(server.max_model_len for server in self._alive())
        if longest + sampling.max_new_tokens > room:
            raise ValueError(
                f"a prompt of {longest} tokens and max_completion_length="
                f"{sampling.max_new_tokens} exceed the server's {room} tokens: start it with "
                f"--max-model-len {longest + sampling.max_new_tokens}, or lower "
                "max_completion_length."
            )
        known = self._prepared
        if known is None or known[0] is not sampling:
            self._alive()[0].check(sampling)
            known = self._prepared = sampling, Prepared(request_fields(sampling))
        return known[1]

    def complete(self, prompt_ids: list[int], seed: int, prepared: Prepared) -> Sampled:
        return self._complete(prompt_ids, None, seed, prepared)

    def complete_raw(
        self, prompt_ids: list[int], raw: RawPrompt, seed: int, prepared: Prepared
    ) -> Sampled:
        return self._complete(prompt_ids, raw, seed, prepared)

    def _complete(
        self, prompt_ids: list[int], raw: RawPrompt | None, seed: int, prepared: Prepared
    ) -> Sampled:
        num_lost = 0  # answers, by servers that are there
        while True:
            server = self._take_least_loaded()
            try:
                return server.sample(prompt_ids, seed, prepared.fields, raw)
            except StaleWeights as error:
                self._take_out(server, error)
            except (ServerGone, Refused) as error:
                num_lost += not self._taken_out(server, error)
                if num_lost == MOST_LOST or (isinstance(error, Refused) and num_lost):
                    raise EngineError(
                        f"the server at {server.base_url} did not answer a request, and its log "
                        f"may say why: {error}"
                    ) from error
            finally:
                with self._lock:
                    server.num_open -= 1
            with self._lock:
                self.num_sent_again += 1

    def begin(self) -> None:
        self._hung_up = False

    def hang_up(self) -> None:
        self._hung_up = True
        for server in self.servers:
            server.hang_up()

    def _alive(self) -> list[InflightServer]:
        with self._lock:
            servers = list(self.servers)
        if not servers:
            raise EngineError(
                "the last of the rollout servers is gone, and the log says which when. What was "
                "trained is safe: start the servers again, then the run with "
                "resume_from_checkpoint."
            )
        return servers

    def _take_least_loaded(self) -> InflightServer:
        servers = self._alive()
        with self._lock:
            server = min(servers, key=lambda server: server.num_open)
            server.num_open += 1
        return server

    def _taken_out(self, server: InflightServer, error: BaseException) -> bool:
        """Take the server out if it is dead, which it may be since it raised `error`."""
        if self._hung_up:
            raise EngineError("the rollout was given up.") from error
        if (isinstance(error, Refused) and error.status < 500) or not server.is_dead():
            return False
        self._take_out(server, error)
        return True

    def _take_out(self, server: InflightServer, error: BaseException) -> None:
        with self._lock:
            if server not in self.servers:
                return
            self.servers.remove(server)
            self.num_taken_out += 1
            left = len(self.servers)
        logger.warning(
            "The rollout server at %s is lost (%s). Its completions are sampled again by the "
            "others, of which %d are left; start the run again with resume_from_checkpoint to have "
            "it back.",
            *(server.base_url, error, left),
        )

    # Weights

    def _load(self, version: int, buckets: Iterable[Bucket]) -> None:
        self.begin()
        with others_waiting(self._barrier), gathering(buckets) as gathered:
            if self._is_main:
                self._on_each(InflightServer.pause)
                self._on_each_fed(lambda server, some: server._load(version, some), gathered)
                self._on_each(InflightServer.resume)
        if not self._is_main:
            self._on_each(lambda server: server.learn_label(version))
        self._alive()

    def _on_each(self, do: Callable[[InflightServer], None]) -> None:
        with ThreadPoolExecutor(len(self._alive())) as pool:
            asked = [(server, pool.submit(do, server)) for server in self._alive()]
        for server, future in asked:
            self._judge(server, future.exception())

    def _on_each_fed(
        self, take: Callable[[InflightServer, Iterable[Bucket]], None], buckets: Iterable[Bucket]
    ) -> None:
        servers = self._alive()
        takers = [lambda some, server=server: take(server, some) for server in servers]
        for server, error in zip(servers, feed(buckets, takers), strict=True):
            self._judge(server, error)

    def _judge(self, server: InflightServer, error: BaseException | None) -> None:
        """What becomes of a server that raised: one that is dead, or holds other weights, is taken
        out, the others end the run."""
        if isinstance(error, StaleWeights):
            self._take_out(server, error)
        elif error is not None and not (
            isinstance(error, EngineError) and self._taken_out(server, error)
        ):
            raise error

    def _close(self) -> None:
        self.hang_up()
        for server in self.servers:
            server.close()


def feed(
    buckets: Iterable[Bucket], takers: Sequence[Callable[[Iterable[Bucket]], None]]
) -> list[BaseException | None]:
    """Give every bucket to each of the takers, and return what each has raised.

    The buckets are made in this thread, in step with other processes; each taker has a thread of
    its own. The next bucket is made once all of them ask for it, as it ends the one before.
    """
    shelves: list[queue.Queue[Bucket | None]] = [queue.Queue() for _ in takers]
    asking = [threading.Event() for _ in takers]  # or gone
    gone = [False for _ in takers]

    def run(number: int) -> None:
        def iterate() -> Iterator[Bucket]:
            while True:
                asking[number].set()
                if (bucket := shelves[number].get()) is None:
                    return
                yield bucket

        try:
            takers[number](iterate())
        finally:
            gone[number] = True  # its future is done somewhat later
            asking[number].set()

    with ThreadPoolExecutor(len(takers)) as pool:
        running = [pool.submit(run, number) for number in range(len(takers))]
        try:
            for bucket in buckets:
                for number, (event, shelf) in enumerate(zip(asking, shelves, strict=True)):
                    event.wait()
                    if not gone[number]:
                        event.clear()
                        shelf.put(bucket)
                for event in asking:
                    event.wait()
        finally:
            for shelf in shelves:
                shelf.put(None)
    return [future.exception() for future in running]
