"""rloo_fast: a kernel-optimized, high-throughput RLOO trainer for language models."""

from importlib import import_module

TYPE_CHECKING = False  # typing's, which imports much
if TYPE_CHECKING:
    from typing import Any

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

    from .config.rloo_config import RLOOConfig
    from .trainer import RLOOTrainer

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


def __getattr__(name: str) -> "Any":
    # loaded when first used: the command line's --help needs neither torch nor transformers, and
    # `python -m rloo_fast` takes the working directory from the path of modules after this file
    if name == "__version__":
        return _version()
    if name == "RLOOConfig":
        return import_module(".config.rloo_config", __name__).RLOOConfig
    if name == "RLOOTrainer":
        return import_module(".trainer", __name__).RLOOTrainer
    if name in __all__:
        return getattr(import_module("rloo_kernels"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rloo-fast")
    except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
        return "0+unknown"
