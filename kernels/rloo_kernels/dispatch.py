"""Which implementation an op runs: Triton kernels on a GPU, torch everywhere else.

With TRITON_INTERPRET=1 the kernels run on CPU tensors as well, in Triton's interpreter: that is for
tests, and slow.
"""

# pyright: strict, reportMissingTypeStubs=false

from __future__ import annotations

import functools
import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

logger = logging.getLogger("rloo_kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"triton {triton.__version__} is older than 3.6"


def use_triton(x: Tensor) -> bool:
    """Whether the kernels serve `x`; why they do not serve a GPU tensor is logged once."""
    if x.dtype == torch.float64:  # the reference's dtype: torch keeps all its digits
        return False
    if not x.is_cuda:
        return INTERPRETED and triton_missing() is None
    if (reason := triton_missing()) is not None:
        log_once(f"rloo_kernels runs its torch implementation on {x.device}: {reason}.")
    return reason is None


@functools.cache
def log_once(message: str, level: int = logging.WARNING) -> None:
    """One line per message and process."""
    logger.log(level, message)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """What runs in it keeps the dtypes it is given; some devices (meta) have no autocast."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
