"""A worker's side of a weight update: buckets as they come, the next one while one is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .fetch import NotFetched, fetch
from .group import Group
from .http import NOT_MET, SILENT_S, STALL_S, TRAINER_HOST
from .meeting import MeetingOverHttp
from .pack import unpack
from .ways import End

logger = logging.getLogger(__name__)

HELLO = "worker/"  # what begins the names under which workers say who they are
END = ("", -1)  # in place of a bucket's token and bytes
T = TypeVar("T")


class Arrival(NamedTuple):
    """A bucket that has come. `token`: of the update that it belongs to."""

    token: str
    nbytes: int
    weights: dict[str, Tensor]


class Receiver:
    """How the first worker of a tensor-parallel group gets buckets; the others have one that is
    never used. `name`: that of no other such worker of the server."""

    def __init__(self, name: str, device: torch.device):
        self._name, self.device = name, device
        self._group: Group | None = None
        self._trainer = ""  # the token under which it met us

    def meet(self, url: object, group: dict[str, Any] | None) -> None:
        """Say what we are; `group`: make this one with the trainer: {"backend": ..., "workers":
        [name of rank 1, ...]}. The one before is closed, whoever's it was."""
        self.close()
        meeting = MeetingOverHttp(url, os.environ.get(TRAINER_HOST, ""), SILENT_S)
        if group is None:
            meeting.set(HELLO + self._name, End.of(self.device).said())
        else:
            meeting.set(f"joining/{self._name}", b"")  # and we know our address
            workers = list(group["workers"])
            self._group = Group(
                group["backend"],
                meeting,
                1 + workers.index(self._name),
                1 + len(workers),
                address=meeting.own_address,
                device=self.device,
            )
        self._trainer = str(url).split("/")[3]

    def check_met(self, trainer: str) -> None:
        """RuntimeError where another trainer, or none, was the last one we met."""
        if trainer != self._trainer:
            raise RuntimeError(f"{NOT_MET}, or another one since.")

    def arrivals(self, url: str, trainer: str, room: int) -> Iterator[Arrival]:
        """The buckets of an update, at most `room` bytes: by HTTP from `url`, or through the group
        with `trainer`. NotFetched or GroupBroken where they do not come to their end."""
        if not trainer:
            yield from ahead(_fetched(url, room))
            return
        self.check_met(trainer)
        if self._group is None:
            raise RuntimeError(f"{NOT_MET} in a group.")
        try:
            yield from ahead(_received(self._group, trainer, room))
        except BaseException:  # the trainer must not wait for a worker that takes no more
            self.close()
            raise

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._trainer = None, ""


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same; each is made in a thread while the one before it is used."""
    pool, none = ThreadPoolExecutor(1), object()
    try:
        coming: Any = pool.submit(next, items, none)
        while (item := coming.result()) is not none:
            coming = pool.submit(next, items, none)
            yield item
    finally:
        pool.shutdown(wait=False)  # what is still on its way ends with the trainer's update


def _fetched(url: str, room: int) -> Iterator[Arrival]:
    hosts = os.environ.get(TRAINER_HOST, "")
    while True:
        token, file = fetch(url, hosts, room, STALL_S)
        if file is None:
            return
        begin = 8 + int.from_bytes(file[:8], "little")
        weights = unpack(bytes(file[:begin]), torch.frombuffer(file, dtype=torch.uint8)[begin:])
        yield Arrival(token, len(file), weights)
        room -= len(file)
        folder, _, number = url.rpartition("/")
        url = f"{folder}/{int(number) + 1}"


def _received(group: Group, trainer: str, room: int) -> Iterator[Arrival]:
    while (packed := group.receive(room)) is not None:
        yield Arrival(trainer, packed.nbytes, unpack(packed.header, packed.data))
        room -= packed.nbytes


def shared(arrivals: Iterator[Arrival], tensor_parallel: Any, device: Any) -> Iterator[Arrival]:
    """What the first worker of vLLM's group gets, for all of it.

    Where it fails, or takes no more, the others raise NotFetched: they wait for its next word. One
    of the others must therefore go on to the end, whatever is wrong with what it gets.
    """
    is_first = tensor_parallel.rank_in_group == 0
    while True:
        head, weights, error = _next(arrivals) if is_first else (None, None, None)
        head = tensor_parallel.broadcast_object(head, src=0)
        if head is None:
            raise error or NotFetched()
        if head == END:
            return
        if tensor_parallel.world_size > 1 and weights is not None:
            weights = {name: tensor.to(device) for name, tensor in weights.items()}
        try:
            yield Arrival(*head, tensor_parallel.broadcast_tensor_dict(weights, src=0))
        except GeneratorExit:
            if is_first:
                tensor_parallel.broadcast_object(None, src=0)
            raise


def _next(
    arrivals: Iterator[Arrival],
) -> tuple[tuple[str, int] | None, dict[str, Tensor] | None, Exception | None]:
    """(token and bytes of the next bucket, its tensors, why there is none)."""
    try:
        arrived = next(arrivals, None)
    except RuntimeError as error:  # NotFetched, GroupBroken
        return None, None, error
    except Exception as error:  # whatever it is, the other workers are waiting
        logger.warning("what was fetched is no bucket of weights: %s", error)
        return None, None, NotFetched()
    if arrived is None:
        return END, None, None
    return (arrived.token, arrived.nbytes), arrived.weights, None


def heard(said: dict[str, bytes]) -> dict[str, End]:
    """Who was at a meeting, from what was said there under HELLO. ValueError for no description."""
    try:
        return {name: End.heard(said[name]) for name in sorted(said)}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"what a worker says of itself is none: {error}") from error
