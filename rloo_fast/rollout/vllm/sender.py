"""The trainer's side of a weight update: the way it takes, and the buckets on that way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ...records import Bucket, SentParts
from ..engine import EngineError
from .group import Backend, Group, GroupBroken
from .http import KEY, NOT_FETCHED, NOT_MET, PROTOCOL, SILENT_S, TRAINER_HOST
from .offers import BucketServer, BucketStream, Over
from .pack import Packed, pack
from .receiver import HELLO, heard
from .transport import CONTROL_S, Endpoint, Refused
from .ways import End, Way, choose

logger = logging.getLogger(__name__)


class WeightSender:
    """Sends updates to one server. It belongs to the main process.

    `host`: address of this machine at which the server reaches it. `wanted`: see `ways.choose`.
    `device`: the trainer's; None: the CPU. `dtype`: what wider weights are rounded to; None: they
    stay.
    """

    def __init__(
        self,
        server: Endpoint,
        host: str,
        *,
        wanted: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        self._server, self._wanted, self._dtype = server, wanted, dtype
        self._device = device or torch.device("cpu")
        self.offers = BucketServer(host)
        self.way: Way = "http"
        self._told = ""  # what the log says of the way
        self._group: Group | None = None
        self._token = ""  # under which the server's workers met us
        self._num_workers = 1
        self.meet()

    def take_way(self, wanted: str) -> None:
        self._wanted = wanted
        self.meet()

    def meet(self) -> None:
        """Find out what the server's workers have, and make a group with them if they can."""
        self._leave()
        with self.offers.meeting(SILENT_S) as (url, meeting):
            self._init(meet=url)
            workers = heard(meeting.said(HELLO))
            if not workers:
                raise EngineError(f"no worker of the server at {self._server.base_url} came to us.")
            self._num_workers = len(workers)
            self.way, why = choose(self._wanted, End.of(self._device), list(workers.values()))
            if self.way != "http":
                try:
                    self._group = self._joined(self.way, url, meeting, list(workers))
                except (GroupBroken, Refused) as error:
                    if self._wanted != "auto":
                        raise EngineError(
                            f"no {self.way} between trainer and {self._server.base_url}: {error}. "
                            "Let no firewall stop connections between the two machines, or set "
                            "vllm_weight_transfer='http'."
                        ) from error
                    logger.warning("No %s to the server: %s", self.way, error)
                    self.way, why = "http", "it could not be made"
                    self._init(meet=url)
            self._token = url.split("/")[3]
        told = f"Weights go to {self._server.base_url} by {self.way}: {why}."
        if told != self._told:
            logger.info(told)
            self._told = told

    def _joined(self, backend: Backend, url: str, meeting: Any, workers: list[str]) -> Group:
        group = {"backend": backend, "workers": workers}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self._init, meet=url, group=group)
            asked.add_done_callback(lambda done: done.exception() and meeting.close())
            try:
                made = Group(
                    backend, meeting, 0, 1 + len(workers),
                    address=self.offers.address, device=self._device,
                )  # fmt: skip
            except GroupBroken as error:
                asked.result()  # the reason, if the server has one
                raise error
            try:
                asked.result()
            except BaseException:
                made.close()
                raise
        return made

    def _init(self, **fields: Any) -> None:
        try:
            info = {"protocol": PROTOCOL, **fields}
            self._server.post("/init_weight_transfer_engine", init_info=info)
        except Refused as error:
            raise self._explained(error) from error

    def _explained(self, error: Refused) -> Exception:
        if NOT_FETCHED not in str(error):
            return error
        return EngineError(
            f"the server at {self._server.base_url} could not fetch weights from this machine, and "
            f"its log says why. If it runs on another one, start it with {TRAINER_HOST}="
            f"{self.offers.address} and a {KEY}, and let no firewall stop connections to that "
            "address."
        )

    def send(self, parts: SentParts, buckets: Iterable[Bucket]) -> None:
        """While the server receives a bucket and loads the one before, the next is gathered and
        packed: two of them at most are packed here. The gathering stays in this thread, in step
        with other processes.
        """
        device = self._device if self.way == "nccl" else None
        with self._stream() as stream, ThreadPoolExecutor(1) as pool:
            request = pool.submit(self._ask, {**stream.request, "parts": parts})
            # an answer before the end says that the server takes no more
            request.add_done_callback(lambda _: stream.close())
            try:
                for bucket in buckets:
                    stream.put(pack(bucket, self._dtype, device))
                stream.end()
            except Over as over:
                self._end_of(request)
                raise EngineError(
                    f"the server at {self._server.base_url} ended an update before all was sent: "
                    f"{over.__cause__ or 'it asked for no more'}."
                ) from over
            except BaseException:
                stream.close()
                raise
            self._end_of(request)

    def _end_of(self, request: Future[None]) -> None:
        """Of an update in which the server gets nothing more: what it has it must load by then."""
        try:
            request.result(CONTROL_S)
        except TimeoutError:
            self._server.hang_up()
            raise EngineError(
                f"the server at {self._server.base_url} did not end an update of its weights "
                f"within {CONTROL_S:.0f} s, and its log may say why: start it again, then the run "
                "with resume_from_checkpoint."
            ) from None

    def _ask(self, update_info: dict[str, Any]) -> None:
        try:
            self._server.ask("/update_weights", {"update_info": update_info})
        except Refused as error:
            raise self._explained(error) from error

    def begin(self) -> None:
        """Open an update, of workers that have met us."""
        try:
            self._init(trainer=self._token)
        except Refused as error:
            if NOT_MET not in str(error):
                raise
            self.meet()  # the server was restarted, or had another trainer
        if self._group is None and self.way != "http":  # an update went wrong in it
            self.meet()
        try:
            self._server.post("/start_weight_update")
        except Refused:
            # a run that was killed may have left an update open; a failed bucket ends it
            with suppress(Refused):
                self._server.post("/update_weights", update_info={"url": ""})
            self._server.post("/start_weight_update")

    @contextmanager
    def _stream(self) -> Iterator[BucketStream | GroupStream]:
        if self._group is None:
            with self.offers.stream(self._num_workers) as stream:
                yield stream
            return
        try:
            with GroupStream(self._group, self._token) as stream:
                yield stream
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def close(self) -> None:
        self._leave()
        self.offers.close()


class GroupStream:
    """Buckets through a group: one is on its way while the next is packed."""

    def __init__(self, group: Group, token: str):
        self._group, self._pool = group, ThreadPoolExecutor(1)
        self.request = {"trainer": token}  # by which a server is asked to take them
        self._on_its_way: Future[None] | None = None
        self._is_whole = False

    def __enter__(self) -> GroupStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._pool.shutdown()

    def put(self, bucket: Packed | None) -> None:
        """Return when all have the one before. Raises Over."""
        try:
            if self._on_its_way is not None:
                self._on_its_way.result()
        except GroupBroken as error:
            raise Over from error
        self._on_its_way = self._pool.submit(self._group.send, bucket)

    def end(self) -> None:
        """No more come."""
        self._is_whole = True
        self.put(None)

    def close(self) -> None:
        """Give up what has not been sent."""
        if not self._is_whole:
            self._group.close()
