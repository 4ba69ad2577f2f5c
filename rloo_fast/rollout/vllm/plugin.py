"""Runs inside `vllm serve`: its workers fetch the policy's weights from the trainer over HTTP.

vLLM finds `register` through the entry point `vllm.general_plugins`, so rloo_fast must be installed
where the server runs; `--weight-transfer-config '{"backend": "rloo_fast"}'` then chooses it.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

import safetensors.torch
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group  # pyright: ignore
from vllm.distributed.weight_transfer import WeightTransferEngineFactory  # pyright: ignore
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ...records import SentParts
from ...weight_sync.coverage import poison, uncovered
from ...weight_sync.unmerged import Parted
from . import guard, lora
from .fetch import NotFetched, fetch, most_bytes
from .http import BACKEND, PROTOCOL, TRAINER_HOST, WIDER
from .package import runs_on_cpu

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the backend known to this process; vLLM calls it in each of its own."""
    with suppress(ValueError):  # called before: it is known
        WeightTransferEngineFactory.register_engine(BACKEND, PulledWeights)
    with suppress(ImportError):  # a vLLM without servers as we know them may still run in process
        guard.install()
    runs_on_cpu()


@dataclass
class InitInfo(WeightTransferInitInfo):
    protocol: int
    dtype: str = ""  # that the trainer would round all weights to; "": to none


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    url: str  # of a safetensors file: tensors under their names in a checkpoint, or an adapter's
    parts: str = "merged"  # of the policy that the whole update brings, see SentParts


class PulledWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """An update replaces every element of every parameter, or the whole adapter of weights that an
    update before it has brought, or it fails."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _token: str | None = None  # of the update under way; None: nothing has come yet
    _room = 0  # most bytes that may still come in it
    _parts = ""  # that it brings
    _has_base = False  # the parameters are those of an adapter that may come alone

    def __init__(self, *args: Any):
        guard.install()  # or this server must not start
        super().__init__(*args)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        if init_info.protocol != PROTOCOL:
            raise ValueError(
                f"the trainer's rloo_fast sends weights by protocol {init_info.protocol}, the "
                f"server's expects {PROTOCOL}: install the same version on both."
            )
        if self.model_config.quantization is not None:
            raise ValueError(
                "weights are sent as the trainer has them, and the server was started with "
                f"--quantization {self.model_config.quantization}: start it without."
            )

        for name, tensor in self.model.state_dict().items():
            if (
                init_info.dtype
                and tensor.is_floating_point()
                and _is_wider(tensor, init_info.dtype)
            ):
                raise ValueError(f"{WIDER} than {init_info.dtype}: {name} is {tensor.dtype}.")

    def start_weight_update(self) -> None:
        self._token = None
        num_workers = self.parallel_config.world_size_across_dp
        self._room = most_bytes(self.model, num_workers)
        self._room += 4 * num_workers * lora.most_numbers(self.model)
        self._adapter: dict[str, Tensor] = {}

    def _begin(self, parts: str) -> None:
        if parts not in get_args(SentParts):
            raise ValueError(f"an update brings one of {get_args(SentParts)}, not {parts!r:.100}.")
        if parts != "merged":
            if not hasattr(self.model, "lora_manager"):
                raise RuntimeError("an adapter was sent, and the server has no --enable-lora.")
            lora.install()
        if parts == "adapter" and not self._has_base:
            raise RuntimeError("an adapter was sent without the weights that it belongs to.")
        self._parts = parts
        if parts != "adapter":
            self._has_base = False
            poison(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        token, size, weights = self._fetched(update_info.url)
        if self._token not in (None, token):
            raise RuntimeError("two trainers are sending weights to this server: one must stop.")
        if self._token is None:
            self._begin(update_info.parts)
        elif update_info.parts != self._parts:
            raise ValueError(f"an update of {self._parts!r} brings nothing else.")
        self._token, self._room = token, self._room - size
        parted = Parted([list(weights.items())])
        model: Any = self.model  # vLLM's models have load_weights, which nn.Module has not
        if self._parts != "adapter":
            with lora.without_adapters(model):
                model.load_weights(iter(parted))
        if unexpected := [name for name, _ in parted]:
            raise ValueError(f"{unexpected[0]} was sent in an update of the adapter alone.")
        if parted.adapter and self._parts == "merged":
            raise ValueError("an adapter was sent in an update of merged weights.")
        self._adapter |= parted.adapter

    def _fetched(self, url: str) -> tuple[str, int, dict[str, Tensor]]:
        """(the update's token, bytes, tensors) of a bucket, fetched by the first worker alone.

        The other tensor-parallel ones get them by collectives of the engine; if
        it could not fetch them, all raise.
        """
        group: Any = get_tp_group()
        head: tuple[str, int] | None = None
        weights: dict[str, Tensor] | None = None
        if group.rank_in_group == 0:
            try:
                token, blob = fetch(url, os.environ.get(TRAINER_HOST, ""), self._room)
                weights, head = safetensors.torch.load(blob), (token, len(blob))
            except NotFetched:
                pass  # the log has the reason
            except Exception as error:  # whatever it is, the other workers are waiting
                logger.warning("what was fetched is no safetensors file: %s", error)
        head = group.broadcast_object(head, src=0)
        if head is None:
            raise NotFetched
        if group.world_size > 1 and weights is not None:
            weights = {name: tensor.to(self.device) for name, tensor in weights.items()}
        token, size = head
        return token, size, group.broadcast_tensor_dict(weights, src=0)

    def finish_weight_update(self) -> None:
        if self._token is None:
            raise RuntimeError("nothing was sent in this update.")
        if self._parts != "adapter":
            self._check_coverage()
        if self._parts != "merged":
            if (reason := lora.hold(self.model, self._adapter)) is not None:
                raise RuntimeError(f"the adapter: {reason}.")
            self._has_base = True

    def _check_coverage(self) -> None:
        with lora.without_adapters(self.model):
            missing = uncovered(self.model)
        if missing:
            raise RuntimeError(
                f"{len(missing)} weights of the server's model were not sent, or are NaN: "
                f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}."
            )

    def shutdown(self) -> None:
        return


def _is_wider(tensor: Tensor, dtype: str) -> bool:
    known = getattr(torch, dtype, None)
    return not isinstance(known, torch.dtype) or tensor.itemsize > known.itemsize
