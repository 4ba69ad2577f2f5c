"""rloo_fast: a kernel-optimized, high-throughput RLOO trainer for language models."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rloo_kernels import (
        LossOptions,
        Objective,
        fused_linear_rloo_loss,
        leave_one_out,
        linear_logprob,
        rloo_advantages,
        rloo_loss,
        rloo_objective,
        selective_log_softmax,
        token_level_advantages,
    )

    from .config import RLOOConfig
    from .trainer import RLOOTrainer

try:
    __version__ = version("rloo-fast")
except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
    __version__ = "0+unknown"

__all__ = [
    "LossOptions",
    "Objective",
    "RLOOConfig",
    "RLOOTrainer",
    "fused_linear_rloo_loss",
    "leave_one_out",
    "linear_logprob",
    "rloo_advantages",
    "rloo_loss",
    "rloo_objective",
    "selective_log_softmax",
    "token_level_advantages",
]


def __getattr__(name: str) -> Any:
    # loaded when first used: the command line's --help needs neither torch nor transformers
    if name == "RLOOConfig":
        return import_module(".config", __name__).RLOOConfig
    if name == "RLOOTrainer":
        return import_module(".trainer", __name__).RLOOTrainer
    if name in __all__:
        return getattr(import_module("rloo_kernels"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
