"""Trainer and workers of a server in one process: the ways that weights take, and how they fail."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm import group as vllm_group
from rloo_fast.rollout.vllm import meeting as vllm_meeting
from rloo_fast.rollout.vllm import offers as vllm_offers
from rloo_fast.rollout.vllm import receiver as vllm_receiver
from rloo_fast.rollout.vllm import sender as vllm_sender
from rloo_fast.rollout.vllm.group import GroupBroken
from rloo_fast.rollout.vllm.offers import BucketServer
from rloo_fast.rollout.vllm.receiver import Receiver
from rloo_fast.rollout.vllm.sender import WeightSender
from rloo_fast.rollout.vllm.transport import Endpoint, Refused
from rloo_fast.rollout.vllm.ways import End, choose

WAYS = ("gloo", "http")
CPU = torch.device("cpu")


class Server:
    """Answers as `vllm serve` does, with receivers as they run in its workers."""

    base_url = "http://the-server:8000"

    def __init__(self, num_workers: int = 1):
        self.num_workers, self.got, self.met = num_workers, [], []
        self.room, self.load, self.may_join = 2**20, lambda number: None, True
        self.restart()

    def restart(self) -> None:
        self.workers = [Receiver(f"0-{rank}", CPU) for rank in range(self.num_workers)]

    def post(self, path: str, **fields: Any) -> None:
        if path == "/init_weight_transfer_engine":
            self._all(lambda worker: self._init(worker, fields["init_info"]))
        elif path == "/start_weight_update":
            self.got = [[] for _ in self.workers]

    def _init(self, worker: Receiver, info: dict[str, Any]) -> None:
        if "group" in info:
            self.met.append(info["group"])
            if not self.may_join:
                return
        if "meet" in info:
            worker.meet(info["meet"], info.get("group"))
        if "trainer" in info:
            worker.check_met(info["trainer"])

    def ask(self, path: str, fields: dict[str, Any]) -> None:
        info = fields["update_info"]

        def take(worker: Receiver) -> None:
            came = worker.arrivals(info.get("url", ""), info.get("trainer", ""), self.room)
            got = self.got[self.workers.index(worker)]
            with closing(cast(Any, came)) as arrivals:
                for number, arrived in enumerate(arrivals):
                    self.load(number)
                    got.append({n: t.clone() for n, t in arrived.weights.items()})

        self._all(take)

    def _all(self, work) -> None:
        with ThreadPoolExecutor(len(self.workers)) as pool:
            asked = [pool.submit(work, worker) for worker in self.workers]
        for each in asked:
            if (error := each.exception()) is not None:
                raise Refused(500, str(error)) from error


@pytest.fixture
def made():
    """made(server, **settings): a sender, closed at the end."""
    senders = []

    def make(server: Server, **settings: Any) -> WeightSender:
        senders.append(WeightSender(cast(Endpoint, server), "127.0.0.1", **settings))
        return senders[-1]

    yield make
    for each in senders:
        each.close()


def buckets(count: int = 4):
    torch.manual_seed(count)
    return [
        [
            (f"w{n}", torch.randn(3, n)),
            (f"v{n}", torch.randn(50).half()),
            (f"i{n}", torch.arange(n)),
        ]
        for n in range(count)
    ]


def send(sender: WeightSender, stream) -> None:
    sender.begin()
    sender.send("merged", stream)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_worker_gets_the_same_numbers_by_every_way(made, way, num_workers, dtype):
    server = Server(num_workers)
    sender = made(server, wanted=way, dtype=dtype)
    assert sender.way == way
    for count in (4, 1):
        send(sender, buckets(count))
        for got in server.got:
            assert len(got) == count
            for bucket, arrived in zip(buckets(count), got, strict=True):
                for name, tensor in bucket:
                    rounded = (
                        tensor.to(dtype) if dtype and tensor.dtype == torch.float32 else tensor
                    )
                    assert arrived[name].dtype == rounded.dtype
                    assert torch.equal(arrived[name], rounded)
    assert len(server.met) == (num_workers if way == "gloo" else 0)  # one group for all updates


@pytest.mark.parametrize("way", WAYS)
def test_a_bucket_is_gathered_while_one_is_sent_and_one_is_loaded(made, way):
    server, log = Server(), []
    asked = [threading.Event() for _ in range(5)]

    def gathered():
        for number in range(5):
            asked[number].set()
            log.append(f"gather {number}")
            yield [("w", torch.full((2,), float(number)))]

    def load(number: int) -> None:
        if number < 3:
            assert asked[number + 2].wait(10), "nothing was gathered while this one was loaded"
        if number == 0:
            time.sleep(0.3)
            assert not asked[4].is_set(), "more than two were packed"
        log.append(f"load {number}")

    server.load = load
    send(made(server, wanted=way), gathered())
    assert [line for line in log if "load" in line] == [f"load {n}" for n in range(5)]


@pytest.mark.parametrize("way", WAYS)
def test_what_the_server_refuses_ends_the_update_and_the_next_one_works(made, way):
    server, gathered = Server(2), []
    sender = made(server, wanted=way)

    def many():
        for number in range(50):
            gathered.append(number)
            yield [("w", torch.zeros(2))]

    def load(number: int) -> None:
        if number == 1:
            raise RuntimeError("no such weight")

    server.load = load
    with pytest.raises(Refused, match="no such weight"):
        send(sender, many())
    assert len(gathered) < 7
    server.load = lambda number: None
    send(sender, buckets())
    assert [len(got) for got in server.got] == [4, 4]


@pytest.mark.parametrize("way", WAYS)
def test_a_gathering_that_fails_leaves_no_worker_waiting(made, way):
    server = Server()
    sender = made(server, wanted=way)

    def failing():
        yield from buckets(2)
        raise ValueError("out of memory")

    start = time.monotonic()
    with pytest.raises(ValueError, match="out of memory"):
        send(sender, failing())
    assert time.monotonic() - start < 10
    send(sender, buckets())
    assert len(server.got[0]) == 4


@pytest.mark.parametrize("way", WAYS)
def test_no_more_bytes_are_taken_than_there_is_room_for(made, way):
    server = Server()
    server.room = 3000
    sender, said = made(server, wanted=way), {"gloo": "may come", "http": "could not fetch"}
    with pytest.raises((EngineError, Refused), match=said[way]):
        send(sender, [[("w", torch.zeros(1000))]])
    with pytest.raises((EngineError, Refused), match=said[way]):
        send(sender, [[("w", torch.zeros(100))]] * 20)


def test_a_restarted_server_and_one_that_had_another_trainer_are_met_again(made):
    server = Server()
    first = made(server)
    send(first, buckets())
    server.restart()
    send(first, buckets())
    assert len(server.got[0]) == 4
    second = made(server)
    for sender in (second, first, second):
        send(sender, buckets())
        assert len(server.got[0]) == 4


# What does not come in time


@pytest.fixture
def impatient(monkeypatch):
    for module in (vllm_group, vllm_receiver, vllm_sender):
        monkeypatch.setattr(module, "SILENT_S", 1.0)
    for module in (vllm_group, vllm_receiver, vllm_offers):
        monkeypatch.setattr(module, "STALL_S", 1.0)
    monkeypatch.setattr(vllm_meeting, "patience_s", lambda nbytes: 1.0)


def test_workers_that_never_join_are_told_of_or_done_without(made, impatient, caplog):
    server = Server()
    server.may_join = False
    with pytest.raises(EngineError, match=r"(?s)no gloo between .*: .*within 1 s.*firewall"):
        made(server, wanted="gloo")
    sender = made(server)
    assert sender.way == "http"
    assert "No gloo to the server" in caplog.text
    send(sender, buckets())
    assert len(server.got[0]) == 4


def test_a_trainer_that_never_joins_does_not_hold_the_worker(impatient):
    shelf, worker = BucketServer("127.0.0.1"), Receiver("0-0", CPU)
    with shelf.meeting(1.0) as (url, _):
        worker.meet(url, None)
        start = time.monotonic()
        with pytest.raises(GroupBroken):
            worker.meet(url, {"backend": "gloo", "workers": ["0-0"]})
        assert time.monotonic() - start < 8
    shelf.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_stops_sending_does_not_hold_the_worker(made, impatient, way, monkeypatch):
    monkeypatch.setattr(vllm_receiver, "STALL_S", -59.0)  # beside 60 s for the network
    server, woken = Server(), threading.Event()
    sender = made(server, wanted=way)

    def stalling():
        yield from buckets(2)
        assert woken.wait(20), "the worker waits"
        yield from buckets(1)

    real = server.ask

    def ask(path, fields):
        try:
            real(path, fields)
        finally:
            woken.set()

    server.ask = ask
    with pytest.raises(EngineError):
        send(sender, stalling())
    send(sender, buckets())
    assert len(server.got[0]) == 4


def test_a_worker_that_stops_taking_does_not_hold_the_trainer(made, impatient):
    server, release = Server(2), threading.Event()
    sender = made(server, wanted="gloo")
    loads = itertools.count()

    def load(number: int) -> None:
        if next(loads) == 0:  # one of the two
            release.wait(20)

    server.load = load
    threading.Timer(6, release.set).start()
    with pytest.raises(EngineError):
        send(sender, buckets(6))
    send(sender, buckets())
    assert [len(got) for got in server.got] == [4, 4]


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_never_answers_does_not_hold_the_trainer(made, impatient, way, monkeypatch):
    monkeypatch.setattr(vllm_sender, "CONTROL_S", 1.0)
    server, hung_up = Server(), threading.Event()
    sender = made(server, wanted=way)

    def ask(path: str, fields: Any) -> None:
        assert hung_up.wait(30), "the trainer waits"
        raise Refused(500, "hung up")

    server.ask, server.hang_up = ask, hung_up.set
    with pytest.raises(EngineError, match=r"did not end an update .* within 1 s"):
        send(sender, buckets(6))


# The meeting


def ask(url: str, method: str = "GET", body: bytes | None = None) -> int:
    try:
        with urlopen(Request(url, body, method=method), timeout=10) as response:
            return response.status
    except HTTPError as error:
        return error.code


def test_only_who_knows_the_place_says_or_hears_anything_and_only_while_they_meet():
    shelf = BucketServer("127.0.0.1")
    with shelf.meeting(0.2) as (url, meeting):
        place = url.removesuffix("0")
        assert ask(place + b"key".hex(), "PUT", b"value") == 200
        assert ask(place + b"key".hex()) == 200
        assert ask(place + b"other".hex()) == 404  # nobody said it in time
        assert ask(place + "xyz", "PUT", b"value") == 400
        assert ask(place + b"key".hex(), "PUT", b"x" * 70000) == 413
        wrong = f"{place[:-4]}{'a' if place[-4] != 'a' else 'b'}{place[-3:]}"
        assert ask(wrong + b"key".hex(), "PUT", b"wrong") == 404
        assert ask(wrong + b"key".hex()) == 404
        assert meeting.said("k") == {"ey": b"value"}
        for number in range(4095):
            meeting.set(str(number), b"")
        with pytest.raises(ValueError, match="more than"):
            meeting.set("one too many", b"")
    assert ask(place + b"key".hex()) == 404
    assert ask(place + b"key".hex(), "PUT", b"value") == 404
    shelf.close()


# The choice


def gpu(number: int, nccl: str = "2.27.5") -> End:
    return End("cuda", f"GPU-{number}", nccl)


@pytest.mark.parametrize(
    ("trainer", "workers", "way", "why"),
    [
        (gpu(0), [gpu(1)], "nccl", "GPUs of their own"),
        (gpu(0), [gpu(1), gpu(2)], "nccl", "GPUs of their own"),
        (gpu(0), [gpu(0)], "http", "share a GPU"),
        (gpu(0), [gpu(1), gpu(1)], "http", "workers of the server share a GPU"),
        (gpu(0), [gpu(1, "2.28.3")], "http", "versions of it differ: 2.27.5, 2.28.3"),
        (gpu(0, ""), [gpu(1)], "http", "the trainer has no NCCL"),
        (gpu(0), [End("cpu")], "http", "a worker of the server computes on cpu"),
        (End("cpu"), [gpu(0)], "http", "the trainer computes on cpu"),
        (End("cpu"), [End("cpu")] * 2, "gloo", "on CPUs"),
    ],
)
def test_the_way_follows_from_the_devices_unless_it_is_said(trainer, workers, way, why):
    assert End.heard(trainer.said()) == trainer
    found, reason = choose("auto", trainer, workers)
    assert found == way
    assert why in reason
    for wanted in ("gloo", "http"):
        assert choose(wanted, trainer, workers)[0] == wanted
    if way != "nccl":
        with pytest.raises(EngineError, match=r"vllm_weight_transfer='nccl' cannot be: .*Leave it"):
            choose("nccl", trainer, workers)
