"""Runs inside `vllm serve`: its workers take the policy's weights from the trainer.

vLLM finds `register` through the entry point `vllm.general_plugins`, so rloo_fast must be installed
where the server runs; `--weight-transfer-config '{"backend": "rloo_fast"}'` then chooses it.
"""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, get_args

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
from . import executor, guard, loader, lora
from .fetch import most_bytes
from .http import BACKEND, PROTOCOL, WIDER
from .model import as_read
from .package import runs_on_cpu
from .receiver import Arrival, Receiver, shared


def register() -> None:
    """Make the backend known to this process; vLLM calls it in each of its own."""
    with suppress(ValueError):  # called before: it is known
        WeightTransferEngineFactory.register_engine(BACKEND, PulledWeights)
    with suppress(ImportError):  # a vLLM without servers as we know them may still run in process
        guard.install()
        executor.install()
        loader.register()
    runs_on_cpu()


@dataclass
class InitInfo(WeightTransferInitInfo):
    protocol: int
    dtype: str = ""  # that the trainer would round all weights to; "": to none
    meet: str = ""  # where the workers say what they are, see `meeting.py`
    group: dict[str, Any] | None = None  # that they then make with the trainer, see `Receiver.meet`
    trainer: str = ""  # the token of a trainer that asks whether they have met it


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Of safetensors files: tensors under their names in a checkpoint, or an adapter's."""

    url: str = ""  # of the first one
    trainer: str = ""  # the token of the one whose group they come through; "": from the URL
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
        parallel = self.parallel_config
        name = f"{parallel.data_parallel_index}-{parallel.rank}"
        self._receiver = Receiver(name, torch.device(self.device))

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

        if init_info.dtype:
            self._check_width(init_info.dtype)
        if get_tp_group().rank_in_group == 0:  # the others get what it gets
            if init_info.meet:
                self._receiver.meet(init_info.meet, init_info.group)
            if init_info.trainer:
                self._receiver.check_met(init_info.trainer)

    def _check_width(self, dtype: str) -> None:
        """Raise ValueError for a weight that is wider; no checkpoint has names like `_k_scale`."""
        for name, tensor in self.model.state_dict().items():
            is_own = name.rpartition(".")[2].startswith("_")
            if not is_own and tensor.is_floating_point() and _is_wider(tensor, dtype):
                raise ValueError(f"{WIDER} than {dtype}: {name} is {tensor.dtype}.")

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
        group: Any = get_tp_group()
        came = self._receiver.arrivals(update_info.url, update_info.trainer, self._room)
        failed: Exception | None = None
        with closing(shared(came, group, self.device)) as buckets:
            for bucket in buckets:
                try:
                    if failed is None:
                        self._load(bucket, update_info.parts)
                except Exception as error:
                    if group.rank_in_group == 0:
                        raise
                    failed = error  # the first worker waits for this one with each bucket
        if failed is not None:
            raise failed

    def _load(self, bucket: Arrival, parts: str) -> None:
        if self._token not in (None, bucket.token):
            raise RuntimeError("two trainers are sending weights to this server: one must stop.")
        if self._token is None:
            self._begin(parts)
        elif parts != self._parts:
            raise ValueError(f"an update of {self._parts!r} brings nothing else.")
        self._token, self._room = bucket.token, self._room - bucket.nbytes
        parted = Parted([list(bucket.weights.items())])
        model: Any = self.model  # vLLM's models have load_weights, which nn.Module has not
        if self._parts != "adapter":
            with lora.without_adapters(model):
                model.load_weights(as_read(model, parted))
        if unexpected := [name for name, _ in parted]:
            raise ValueError(f"{unexpected[0]} was sent in an update of the adapter alone.")
        if parted.adapter and self._parts == "merged":
            raise ValueError("an adapter was sent in an update of merged weights.")
        self._adapter |= parted.adapter

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
        self._receiver.close()


def _is_wider(tensor: Tensor, dtype: str) -> bool:
    known = getattr(torch, dtype, None)
    return not isinstance(known, torch.dtype) or tensor.itemsize > known.itemsize
