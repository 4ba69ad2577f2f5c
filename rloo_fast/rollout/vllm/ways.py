"""The ways that weights take to a server, and which of them a trainer and its workers have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, cast

import torch

from ..engine import EngineError

Way = Literal["nccl", "gloo", "http"]


@dataclass(frozen=True)
class End:
    """Where weights begin or end their way: a process and its device, as in

    End("cuda", "GPU-5b0c", "2.27.5")
    """

    device: str  # its type
    uuid: str = ""  # of a GPU
    nccl: str = ""  # version; "": there is none

    @classmethod
    def of(cls, device: torch.device) -> End:
        """That of this process. ValueError from `uuid` never: a GPU has one."""
        if device.type != "cuda" or not torch.distributed.is_nccl_available():
            return cls(device.type)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return cls("cuda", uuid, ".".join(map(str, torch.cuda.nccl.version())))

    def said(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def heard(cls, said: bytes) -> End:
        fields = json.loads(said)
        return cls(*(str(fields[name])[:100] for name in ("device", "uuid", "nccl")))


def choose(wanted: str, trainer: End, workers: Sequence[End]) -> tuple[Way, str]:
    """The way, and why it is this one. `wanted`: "auto", or the way itself, which EngineError
    refuses if it cannot be."""
    hindered = {"nccl": _no_nccl(trainer, workers), "gloo": "", "http": ""}
    if wanted != "auto":
        if hindered[wanted]:
            raise EngineError(
                f"vllm_weight_transfer={wanted!r} cannot be: {hindered[wanted]}. Leave it out, and "
                "weights take the best way that there is."
            )
        return cast(Way, wanted), "vllm_weight_transfer says so"
    if not hindered["nccl"]:
        return "nccl", "trainer and workers are on GPUs of their own"
    if all(end.device == "cpu" for end in (trainer, *workers)):
        return "gloo", "trainer and workers are on CPUs"
    return "http", f"no NCCL, as {hindered['nccl']}"


def _no_nccl(trainer: End, workers: Sequence[End]) -> str:
    """Why it cannot be; "": it can."""
    for name, end in (("the trainer", trainer), *(("a worker of the server", w) for w in workers)):
        if end.device != "cuda":
            return f"{name} computes on {end.device}"
        if not end.nccl:
            return f"{name} has no NCCL"
    versions, uuids = {end.nccl for end in (trainer, *workers)}, [end.uuid for end in workers]
    if len(versions) > 1:
        return f"their versions of it differ: {', '.join(sorted(versions))}"
    if trainer.uuid in uuids:
        return "trainer and server share a GPU, which NCCL refuses"
    if len({*uuids}) < len(uuids):
        return "workers of the server share a GPU, which NCCL refuses"
    return ""
