"""Several rollout servers, whose weights change in flight, and who die."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from rloo_fast.records import Bucket, Sampling
from rloo_fast.rollout.ahead import Sampled
from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm.answers import OddAnswer
from rloo_fast.rollout.vllm.inflight import read_versions
from rloo_fast.rollout.vllm.server import VLLMServer
from rloo_fast.rollout.vllm.servers import VLLMServers, feed
from rloo_fast.rollout.vllm.transport import Endpoint, ServerGone
from rloo_fast.rollout.vllm.watch import Watch
from tests.support.stand_in_server import StandInServer

SAMPLING = Sampling(1.0, 1.0, 0, None, 1.0, max_new_tokens=20, stop_token_ids=())


def buckets(count: int = 3) -> Iterator[Bucket]:
    for number in range(count):
        bucket = [(f"w{number}", torch.zeros(64))]
        yield bucket
        bucket.clear()  # as weight_buckets does


@contextmanager
def servers_of(*servers: StandInServer) -> Iterator[VLLMServers]:
    engine = VLLMServers([server.url for server in servers], timeout_s=5, weight_transfer="http")
    load(engine, 1)
    try:
        yield engine
    finally:
        engine.close()
        for server in servers:
            server.die()


def load(engine: VLLMServers, version: int) -> None:
    """As SharedCycle does it."""
    if engine.state.value == "ready":
        engine.sleep(0)
    engine.wake(("weights",))
    engine.load_weights(version, buckets())
    engine.wake(("kv_cache",))


class Asking:
    """Completions that are asked for in threads."""

    def __init__(self, engine: VLLMServers, count: int):
        self.found: dict[int, Sampled] = {}
        self.errors: list[BaseException] = []
        prepared = engine.prepare(SAMPLING, 3)

        def ask(seed: int) -> None:
            try:
                self.found[seed] = engine.complete([5, 6, 7], seed, prepared)
            except EngineError as error:
                self.errors.append(error)

        self._threads = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> list[Sampled]:
        for thread in self._threads:
            thread.join()
        return list(self.found.values())


def num_asked(server: StandInServer) -> int:
    return server.asked.count("/inference/v1/generate")


def test_a_request_goes_to_the_server_with_the_fewest_open_ones():
    fast, stuck = StandInServer(0.001), StandInServer(0.001)
    with servers_of(fast, stuck) as engine:
        stuck.running.clear()
        asking = Asking(engine, 2)
        while len(asking.found) < 1:
            time.sleep(0.01)
        prepared = engine.prepare(SAMPLING, 1)
        for seed in range(4):
            engine.complete([5], seed, prepared)
        assert (num_asked(fast), num_asked(stuck)) == (5, 1)
        stuck.running.set()
        assert len(asking.wait()) == 2


def test_weights_are_replaced_in_flight_and_tokens_say_which_sampled_them():
    servers = StandInServer(), StandInServer()
    with servers_of(*servers) as engine:
        asking = Asking(engine, 4)
        time.sleep(0.1)
        load(engine, 2)
        found = asking.wait()
        assert len(found) == 4
        for sampled in found:
            assert set(sampled.versions) == {1, 2}
            assert sampled.versions == sorted(sampled.versions)
            assert len(sampled.versions) == len(sampled.ids) == 20
        assert servers[0].num_fetched == servers[1].num_fetched > 0
        paths = [path.partition("?")[0] for path in servers[0].asked]
        second = paths[paths.index("/resume") + 1 :]
        order = [p for p in second if p in ("/pause", "/update_weights", "/resume")]
        assert order == ["/pause", "/update_weights", "/resume"]


def test_a_dead_servers_completions_are_sampled_by_the_others(caplog):
    dying, other = StandInServer(), StandInServer()
    with servers_of(dying, other) as engine:
        asking = Asking(engine, 6)
        time.sleep(0.05)
        dying.die()
        assert len(asking.wait()) == 6
        assert not asking.errors
        assert engine.num_taken_out == 1
        assert engine.num_sent_again == 3
        assert f"The rollout server at {dying.url} is lost" in caplog.text
        load(engine, 2)
        assert [sampled.versions[0] for sampled in Asking(engine, 2).wait()] == [2, 2]


def test_a_server_that_dies_between_two_updates_is_taken_out_of_the_second():
    dying, other = StandInServer(), StandInServer()
    with servers_of(dying, other) as engine:
        dying.die()
        load(engine, 2)
        assert engine.num_taken_out == 1
        assert other.label.startswith("2@")


def test_when_the_last_one_dies_the_error_says_what_to_do():
    servers = StandInServer(), StandInServer()
    with servers_of(*servers) as engine:
        asking, prepared = Asking(engine, 4), engine.prepare(SAMPLING, 1)
        for server in servers:
            time.sleep(0.05)
            server.die()
        asking.wait()
        assert len(asking.errors) == 4
        with pytest.raises(EngineError, match=r"the last .* is gone.*resume_from_checkpoint"):
            engine.complete([5], 0, prepared)


def test_a_restarted_server_is_taken_out_and_named_so(caplog):
    servers = StandInServer(0.001), StandInServer(0.001)
    with servers_of(*servers) as engine:
        servers[0].label = "default"  # as vLLM's is, until a trainer loads weights
        asking = Asking(engine, 6)
        assert len(asking.wait()) == 6
        assert not asking.errors
        assert (engine.num_taken_out, len(engine.servers)) == (1, 1)
        assert "holds weights 'default'" in caplog.text
        assert "the server was restarted" in caplog.text


def test_a_restarted_server_ends_no_process_that_only_waits_for_weights(caplog):
    servers = StandInServer(0.001), StandInServer(0.001)
    with servers_of(*servers) as engine:
        urls = [server.url for server in servers]
        waiting = VLLMServers(urls, timeout_s=5, is_main=False, weight_transfer="http")
        load(waiting, 1)
        servers[0].label = "default"
        Asking(engine, 2).wait()  # the main process finds out
        for one in (engine, waiting):
            load(one, 2)
            assert [server.base_url for server in one.servers] == [servers[1].url]
        assert "holds weights 'default'" in caplog.text
        waiting.close()


def test_whoever_waits_for_the_main_process_is_met_also_when_it_fails():
    server, together = StandInServer(), threading.Barrier(2)

    def barrier() -> None:
        together.wait(20)

    engines = [
        VLLMServer(
            server.url,
            timeout_s=5,
            is_main=is_main,
            barrier=barrier,
            weight_transfer="http",
        )
        for is_main in (True, False)
    ]
    failed: list[EngineError] = []

    def process(engine: VLLMServer) -> None:
        try:
            engine.wake(("weights",))
            engine.load_weights(1, buckets())
        except EngineError as error:
            failed.append(error)

    server.die()
    threads = [threading.Thread(target=process, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(failed) == 2
    assert all("is gone" in str(error) for error in failed)
    engines[0].close()


def test_where_weights_cannot_be_loaded_the_other_processes_are_met_before_the_error():
    server, met = StandInServer(), []
    engine = VLLMServers(
        [server.url], timeout_s=5, weight_transfer="http", barrier=lambda: met.append("barrier")
    )

    def gathered() -> Iterator[Bucket]:
        for bucket in buckets():
            met.append("bucket")
            yield bucket

    server.die()
    engine.wake(("weights",))
    with pytest.raises(EngineError, match="the last of the rollout servers is gone"):
        engine.load_weights(1, gathered())
    assert met == ["barrier", "bucket", "bucket", "bucket", "barrier"]
    engine.close()


def test_a_process_without_files_to_open_does_not_take_servers_for_dead(monkeypatch):
    server = StandInServer(0.001)

    def no_files(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with servers_of(server) as engine:
        prepared = engine.prepare(SAMPLING, 1)
        with monkeypatch.context() as patched:
            patched.setattr("socket.create_connection", no_files)
            with pytest.raises(EngineError, match=r"as many open files as it may.*ulimit -n"):
                engine.complete([5], 0, prepared)
        assert engine.num_taken_out == 0
        assert len(engine.complete([5], 0, prepared).ids) == 20


def test_a_server_that_a_killed_run_left_paused_goes_on():
    server = StandInServer()
    server.running.clear()
    with servers_of(server) as engine:
        assert len(Asking(engine, 1).wait()) == 1


def test_a_server_without_versions_is_refused_with_what_to_start():
    server = StandInServer(scale_out=False)
    with pytest.raises(EngineError, match="--enable-scale-out"):
        VLLMServers([server.url], timeout_s=5)
    server.die()


def test_hanging_up_ends_every_request():
    server = StandInServer(token_s=1.0)
    with servers_of(server) as engine:
        asking, begin = Asking(engine, 3), time.monotonic()
        time.sleep(0.1)
        engine.hang_up()
        asking.wait()
        assert len(asking.errors) == 3
        assert time.monotonic() - begin < 5


def test_what_ends_a_call_ends_its_other_requests():
    server = StandInServer(token_s=1.0)

    def ends(*_: Any) -> Any:
        raise KeyboardInterrupt

    with servers_of(server) as engine:
        begin = time.monotonic()
        short = Sampling(1.0, 1.0, 0, None, 1.0, max_new_tokens=1, stop_token_ids=())
        asking = Asking(engine, 2)  # of 20 s each
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[5]], short, [0], version=1, on_finished=ends)
        asking.wait()
        assert len(asking.errors) == 2
        assert time.monotonic() - begin < 10


def test_requests_of_a_call_have_the_room_that_their_prompts_leave_them():
    # as turns of conversations, of which the longest and the one with most room are not the same
    turns = replace(SAMPLING, max_new_tokens=120, max_length=128)
    with servers_of(StandInServer(0.0)) as engine:
        found = engine.generate([[5] * 8, [6] * 100], turns, [0, 1], version=1)
        assert [len(ids) for ids in found.completion_ids] == [120, 28]


def test_after_hanging_up_dead_servers_are_taken_out_as_before():
    dying, other = StandInServer(0.001), StandInServer(0.001)
    with servers_of(dying, other) as engine:
        engine.hang_up()  # a first run has ended
        dying.die()
        found = engine.generate([[5], [6], [7]], SAMPLING, [0, 1, 2], version=1)
        assert len(found.completion_ids) == 3
        assert engine.num_taken_out == 1
    dying, other = StandInServer(0.001), StandInServer(0.001)
    with servers_of(dying, other) as engine:
        engine.hang_up()
        dying.die()
        load(engine, 2)
        assert engine.num_taken_out == 1


def test_hanging_up_also_ends_a_request_that_is_about_to_connect(monkeypatch):
    server = StandInServer(token_s=1.0)
    endpoint = Endpoint(server.url, 5)
    connect = socket.create_connection

    def late(*args: Any, **named: Any) -> socket.socket:
        endpoint.hang_up()
        return connect(*args, **named)

    monkeypatch.setattr("socket.create_connection", late)
    with pytest.raises(ServerGone, match="was given up"):
        endpoint.get("/health")
    monkeypatch.undo()
    assert endpoint.get("/is_paused") == {"is_paused": False}
    server.die()


def test_a_server_that_is_there_and_answers_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr("rloo_fast.rollout.vllm.transport.HEALTH_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as frozen:  # its host accepts connections
        endpoint = Endpoint(f"http://127.0.0.1:{frozen.getsockname()[1]}", 5)
        endpoint._watch = Watch(endpoint._answers, every_s=0.05, most_silent=2)
        with pytest.raises(ServerGone):
            endpoint.ask("/v1/completions", {})


def test_a_process_without_files_to_ask_with_goes_on_waiting(monkeypatch):
    server = StandInServer(0.01)

    def no_files(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with servers_of(server) as engine:
        endpoint = engine.servers[0]._server
        endpoint._watch = Watch(endpoint._answers, every_s=0.02, most_silent=2)
        asking = Asking(engine, 1)
        while not num_asked(server):
            time.sleep(0.01)
        monkeypatch.setattr("socket.create_connection", no_files)
        assert len(asking.wait()) == 1


def test_a_slow_answer_of_a_server_that_is_well_is_waited_for():
    server = StandInServer(token_s=0.05)
    with servers_of(server) as engine:
        endpoint = engine.servers[0]._server
        endpoint._watch = Watch(endpoint._answers, every_s=0.05, most_silent=2)
        assert len(engine.complete([5], 0, engine.prepare(SAMPLING, 1)).ids) == 20
        assert server.asked.count("/health") >= 3


def test_what_a_request_cannot_say_is_refused():
    server = StandInServer()
    with servers_of(server) as engine:
        odd = Sampling(1.0, 1.0, 0, None, 1.0, 20, (), extra={"best_of": 3})
        with pytest.raises(ValueError, match="best_of cannot be set"):
            engine.prepare(odd, 3)
        with pytest.raises(ValueError, match="--max-model-len 140"):
            engine.prepare(SAMPLING, 120)


# Feeding several at a time


def test_every_taker_gets_every_bucket_while_it_holds():
    taken: dict[int, list[str]] = {0: [], 1: []}

    def taker(number: int) -> Any:
        def take(some: Any) -> None:
            for bucket in some:
                time.sleep(0.01 * number)
                taken[number] += [name for name, _ in bucket]

        return take

    assert feed(buckets(), [taker(0), taker(1)]) == [None, None]
    assert taken == {0: ["w0", "w1", "w2"], 1: ["w0", "w1", "w2"]}


def test_one_that_fails_does_not_keep_the_others_waiting():
    taken = []

    def fails(some: Any) -> None:
        next(iter(some))
        raise EngineError("full")

    errors = feed(buckets(), [fails, lambda some: taken.extend(len(b) for b in some)])
    assert [type(error) for error in errors] == [EngineError, type(None)]
    assert taken == [1, 1, 1]


def test_one_that_is_gone_though_its_thread_has_not_ended_is_fed_no_more(monkeypatch):
    set_exception = Future.set_exception

    def late(*args: Any) -> None:
        time.sleep(0.2)
        set_exception(*args)

    def fails(some: Any) -> None:
        raise EngineError("full")

    monkeypatch.setattr(Future, "set_exception", late)
    errors: list[BaseException | None] = []
    fed = threading.Thread(target=lambda: errors.extend(feed(buckets(), [fails])), daemon=True)
    fed.start()
    fed.join(10)
    assert [type(error) for error in errors] == [EngineError]


def test_an_error_of_the_buckets_ends_all_takers():
    def broken() -> Iterator[Bucket]:
        yield [("w", torch.zeros(1))]
        raise RuntimeError("gathering")

    def take(some: Any) -> None:
        for _ in some:
            pass

    with pytest.raises(RuntimeError, match="gathering"):
        feed(broken(), [take, take])


# Labels of tokens


def span(version: str, start: int, end: int) -> dict[str, Any]:
    return {"version": version, "start": start, "end": end}


def test_spans_become_a_version_per_token():
    spans = [span("3@run", 0, 2), span("4@run", 2, 2), span("5@run", 2, 3)]
    assert read_versions(spans, 3, "run") == [3, 3, 5]


@pytest.mark.parametrize(
    "spans",
    [
        None,
        [],
        [span("3@run", 0, 2)],
        [span("3@run", 0, 4)],
        [span("3@other", 0, 3)],
        [span("loading 3@run", 0, 3)],
        [span("default", 0, 3)],
        [span("3@run", 0, 1), span("4@run", 2, 3)],
        [span("4@run", 0, 1), span("3@run", 1, 3)],
        [3],
    ],
)
def test_spans_that_do_not_say_it_are_refused(spans):
    with pytest.raises(OddAnswer):
        read_versions(spans, 3, "run")
