"""What runs inside `vllm serve`: its workers pull the policy's weights from the trainer over HTTP.

vLLM finds `register` through the entry point `vllm.general_plugins`, so rloo_fast must be installed
where the server runs; `--weight-transfer-config '{"backend": "rloo_fast"}'` then chooses it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from urllib.request import ProxyHandler, build_opener

import safetensors.torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory  # pyright: ignore
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from .coverage import poison, uncovered
from .transport import BACKEND, PROTOCOL
from .vllm import runs_on_cpu

SILENT_S = 120  # a trainer that sends nothing for so long is gone


def register() -> None:
    """Make the backend known to this process; vLLM calls it in each of its own."""
    with suppress(ValueError):  # called before: it is known
        WeightTransferEngineFactory.register_engine(BACKEND, PulledWeights)
    runs_on_cpu()


@dataclass
class InitInfo(WeightTransferInitInfo):
    protocol: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    url: str  # of a safetensors file: tensors under their names in a checkpoint


class PulledWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Every element of every parameter is replaced by an update, or the update fails."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _folder: str | None = None  # that the update under way is taken from; None: not known yet

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

    def start_weight_update(self) -> None:
        self._folder = None
        poison(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        folder = update_info.url.rpartition("/")[0]
        if self._folder not in (None, folder):
            raise RuntimeError("two trainers are sending weights to this server: one must stop.")
        self._folder = folder
        direct = build_opener(ProxyHandler({}))  # a proxy is for the internet, not for the trainer
        with direct.open(update_info.url, timeout=SILENT_S) as response:
            weights = safetensors.torch.load(response.read())
        self.model.load_weights(iter(weights.items()))  # pyright: ignore[reportCallIssue]

    def finish_weight_update(self) -> None:
        missing = uncovered(self.model)
        if missing:
            raise RuntimeError(
                f"{len(missing)} weights of the server's model were not sent, or are NaN: "
                f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}."
            )

    def shutdown(self) -> None:
        return
