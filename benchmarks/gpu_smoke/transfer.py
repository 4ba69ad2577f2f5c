"""(h) Weights from one GPU to a process on another, by NCCL and by HTTP, and what ends them.

The part's own process is the trainer; `python -m benchmarks.gpu_smoke.transfer [--dry]` is a worker
of a server, without vLLM: it takes the requests that vLLM would pass on, as lines of JSON, and
receives as the plugin does. With --dry both are on the host, and gloo is in NCCL's place.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor

from rloo_fast.records import Bucket
from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.vllm.receiver import Receiver
from rloo_fast.rollout.vllm.sender import WeightSender
from rloo_fast.rollout.vllm.transport import Endpoint, Refused, ServerGone

from .device import Skipped
from .part import Smoke
from .shapes import checksum

BUCKET = 2**28
ROUNDS = 4  # of which the first connects


class Worker:
    """A worker's process, in place of the connection to its server."""

    base_url = "a process of its own"

    def __init__(self, dry: bool):
        command = [sys.executable, "-m", f"{__package__}.transfer", *(["--dry"] if dry else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.taken: dict[str, int] = {}  # checksums of what it took last

    def post(self, path: str, **fields: Any) -> None:
        if path == "/init_weight_transfer_engine":
            self._ask(fields["init_info"])

    def ask(self, path: str, fields: dict[str, Any]) -> None:
        self.taken = self._ask(fields["update_info"])

    def _ask(self, info: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(info) + "\n")
            self.process.stdin.flush()
            said = self.process.stdout.readline()
        except OSError as error:
            raise ServerGone(str(error)) from error
        if not said:
            raise ServerGone("the worker's process is gone")
        answer = json.loads(said)
        if "error" in answer:
            raise Refused(500, answer["error"])
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def run(smoke: Smoke) -> None:
    on = smoke.device
    if on.is_cuda and torch.cuda.device_count() < 2:
        raise Skipped("one GPU is visible: NCCL refuses two processes on a device")
    by = "nccl" if on.is_cuda else "gloo"
    weights = make_weights(on.device, 24 if on.is_cuda else 3, BUCKET if on.is_cuda else 2**16)
    expected = {name: checksum(tensor)[0] for name, tensor in weights}
    worker = Worker(smoke.dry)
    try:
        for way in (by, "http"):
            sender = new_sender(worker, way, on.device)
            took = [timed_send(sender, stream(weights)) for _ in range(ROUNDS)]
            gb = sum(tensor.nbytes for _, tensor in weights) / 1e9
            smoke.record(**{
                f"{'group' if way == by else way}_gb_per_s": gb / min(took[1:]),
                f"{'group' if way == by else way}_differ": int(worker.taken != expected),
            })  # fmt: skip
            sender.close()
        sender = new_sender(worker, by, on.device)
        smoke.record(given_up_s=time_to_error(sender, failing(weights)))
        timed_send(sender, stream(weights))
        smoke.record(after_given_up_differ=int(worker.taken != expected))
        smoke.record(killed_s=time_to_error(sender, killing(weights, worker)))
        sender.close()
        worker = Worker(smoke.dry)
        sender = new_sender(worker, by, on.device)
        timed_send(sender, stream(weights))
        smoke.record(after_killed_differ=int(worker.taken != expected))
        sender.close()
    finally:
        worker.kill()


def make_weights(device: torch.device, count: int, nbytes: int) -> Bucket:
    torch.manual_seed(0)
    return [(f"w{n}", torch.randn(nbytes // 2, device=device).bfloat16()) for n in range(count)]


def new_sender(worker: Worker, way: str, device: torch.device) -> WeightSender:
    return WeightSender(cast(Endpoint, worker), "127.0.0.1", wanted=way, device=device)


def stream(weights: Bucket) -> Iterator[Bucket]:
    for named in weights:
        yield [named]


def failing(weights: Bucket) -> Iterator[Bucket]:
    yield from stream(weights[:2])
    raise MemoryError("gathering failed")


def killing(weights: Bucket, worker: Worker) -> Iterator[Bucket]:
    yield from stream(weights[:2])
    worker.kill()
    yield from stream(weights[2:])


def timed_send(sender: WeightSender, buckets: Iterator[Bucket]) -> float:
    start = time.perf_counter()
    sender.begin()
    sender.send("merged", buckets)
    return time.perf_counter() - start


def time_to_error(sender: WeightSender, buckets: Iterator[Bucket]) -> float:
    start = time.perf_counter()
    try:
        timed_send(sender, buckets)
    except (EngineError, MemoryError) as error:
        print(f"as it should be: {type(error).__name__}: {error}", flush=True)
        return time.perf_counter() - start
    raise AssertionError("an update that was broken off has succeeded")


def work(receiver: Receiver, info: dict[str, Any]) -> dict[str, int]:
    """What the plugin does with a request."""
    if "meet" in info:
        receiver.meet(info["meet"], info.get("group"))
    elif "parts" in info:
        return take(receiver, info)
    elif "trainer" in info:
        receiver.check_met(info["trainer"])
    return {}


def take(receiver: Receiver, info: dict[str, Any]) -> dict[str, int]:
    found: dict[str, Tensor] = {}
    came: Any = receiver.arrivals(info.get("url", ""), info.get("trainer", ""), 2**40)
    with closing(came) as arrivals:
        for arrived in arrivals:
            for name, tensor in arrived.weights.items():
                found[name] = tensor.to(receiver.device, copy=True)  # as load_weights copies
    return {name: checksum(tensor)[0] for name, tensor in found.items()}


def serve(device: torch.device) -> None:
    receiver = Receiver("0-0", device)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = work(receiver, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    serve(torch.device("cpu") if parser.parse_args().dry else torch.device("cuda", 1))
