"""Whether a running `vllm serve` can be used for rollouts."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from ...weight_sync.unmerged import AdapterShape
from ..engine import EngineError
from .http import BACKEND, KEY, PROTOCOL, WIDER
from .lora import room_for
from .transport import Endpoint, Refused

logger = logging.getLogger(__name__)

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --generation-config vllm --logprobs-mode "
    f"""processed_logprobs --weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
)
CONNECT_S = 30.0


def wait_until_up(server: Endpoint, timeout_s: float) -> None:
    """Return when it answers; ConnectionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            server.get("/health", max(1.0, deadline - time.monotonic()))
            return
        except EngineError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"no vLLM server answered at {server.base_url} within {timeout_s:g} s "
                    f"({error}). Start one with\n  {COMMAND}\nand see to vllm_server_base_url "
                    "(or vllm_server_host and vllm_server_port) and vllm_server_timeout."
                ) from None
        time.sleep(0.5)


def check_fit(
    server: Endpoint, *, sleeps: bool, adapter: AdapterShape | None = None
) -> tuple[int, torch.dtype | None]:
    """The most tokens of a sequence, and the dtype that weights may be rounded to before they are
    sent, if any; EngineError if the server was started unfit for us."""
    path = "/server_info?config_format=json"
    if server.has_key and _takes_strangers(server):
        raise unfit(server, f"it asks nobody for the key that {KEY} holds here: set it there")
    try:
        info = server.get(path)
        server.post("/init_weight_transfer_engine", init_info={"protocol": PROTOCOL})
        server.value("/weight_info", "weight_version", str)
    except Refused as error:
        raise unfit(server, f"{error} (HTTP {error.status})", sleeps) from error
    config = server.field(info, path, "vllm_config.model_config", dict)
    needed: dict[str, Any] = {"logprobs_mode": "processed_logprobs"}
    needed |= {"generation_config": "vllm"}  # else the model's own settings join in
    if sleeps:
        needed |= {"enable_sleep_mode": True}
    for name, value in needed.items():
        if config.get(name) != value:
            raise unfit(server, f"its {name} is {config.get(name)!r:.100}, not {value}", sleeps)
    if adapter is not None:
        _check_adapters(server, info, adapter)
    dtype = _dtype_of_all(server, str(config.get("dtype", "")).removeprefix("torch."))
    return server.field(config, path, "max_model_len", int), dtype


def _dtype_of_all(server: Endpoint, name: str) -> torch.dtype | None:
    """The dtype of this name, if the server holds no weight in a wider one."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        return None
    try:
        info = {"protocol": PROTOCOL, "dtype": name}
        server.post("/init_weight_transfer_engine", init_info=info)
    except Refused as error:
        if WIDER not in str(error):
            raise
        logger.info("Weights are sent to the server in the trainer's dtype: %s", error)
        return None
    return dtype


def _check_adapters(server: Endpoint, info: dict[str, Any], adapter: AdapterShape) -> None:
    options = f"--enable-lora --max-lora-rank {room_for(adapter.rank)}"
    lora = info["vllm_config"].get("lora_config")
    if not isinstance(lora, dict):
        raise unfit(server, f"vllm_lora='adapter' needs {options}", more=options)
    rank, names = lora.get("max_lora_rank"), lora.get("target_modules")
    if not isinstance(rank, int) or rank < adapter.rank:
        reason = f"its max_lora_rank is {rank!r:.100}, and the adapter has {adapter.rank}"
        raise unfit(server, reason, more=options)
    if isinstance(names, list) and (left_out := sorted(set(adapter.names) - set(map(str, names)))):
        options += f" --lora-target-modules {' '.join(adapter.names)}"
        raise unfit(server, f"its LoRA leaves out {', '.join(left_out)}", more=options)


def _takes_strangers(server: Endpoint) -> bool:
    """Whether the endpoints that load weights answer to a request without the key."""
    try:
        Endpoint(server.base_url, CONNECT_S).get("/weight_info")
    except Refused:
        return False
    return True


def unfit(server: Endpoint, reason: str, sleeps: bool = False, more: str = "") -> EngineError:
    options = f"{' --enable-sleep-mode' if sleeps else ''}{' ' if more else ''}{more}"
    return EngineError(
        f"the server at {server.base_url} cannot be used for rollouts: {reason}. Start vLLM 0.32 "
        "or newer, on a machine that has rloo_fast installed, with\n  "
        f"{COMMAND}{options}"
    )
