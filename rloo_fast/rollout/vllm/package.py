"""The vllm package, imported and set up to run inside the training process."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from packaging.version import Version

from .host import host_unchanged

OLDEST = "0.32"  # that it has been tested with


def import_vllm() -> Any:
    """The vllm package; ImportError with what to install."""
    # read when vllm is imported: the engine's loop in this process, so that its weights can be
    # loaded by a call, and processes launched by torchrun stay in step
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with host_unchanged():
            vllm = import_module("vllm")  # an optional package: its types are unknown without it
    except ImportError as error:
        raise ImportError(
            f"use_vllm=True needs vLLM, and importing it failed ({error}): "
            'pip install "rloo-fast[vllm]", or leave use_vllm=False.'
        ) from error
    if Version(vllm.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"use_vllm=True needs vLLM {OLDEST} or newer, but {vllm.__version__} is installed: "
            "pip install -U vllm."
        )
    with host_unchanged():
        _ = vllm.LLM, import_module("vllm.platforms").current_platform  # imported on first use
    return vllm


def runs_on_cpu() -> bool:
    """Whether this vLLM is a CPU build; if so, keep it from computing with copies of weights."""
    if not import_module("vllm.platforms").current_platform.is_cpu():
        return False
    layers: Any = import_module("vllm.model_executor.layers.utils")
    if layers.dispatch_cpu_unquantized_gemm.__module__ != __name__:
        layers.dispatch_cpu_unquantized_gemm = _unpacked(layers.dispatch_cpu_unquantized_gemm)
    return True


def _unpacked(dispatch: Any) -> Any:
    """In place of vLLM's choice of a product for a layer on a CPU: torch's, with the weights as
    they are. vLLM's (oneDNN; on a CPU with AMX, in bfloat16, its own for small ones; AMD's
    zentorch) compute with a packed copy of the weights, which no sync reaches."""

    def plain(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:  # no linear layer
            dispatch(layer, remove_weight)

    return plain
