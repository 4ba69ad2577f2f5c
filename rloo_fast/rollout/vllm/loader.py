"""How vLLM's model gets its first weights, which nobody samples from: at random."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

FORMAT = "rloo_fast"  # vLLM's load_format


def register() -> str:
    """Make the format known to vLLM, once; returns its name.

    vLLM's own "dummy" draws the buffers at random as well, of which some are no weights but what a
    layer has computed from the configuration (the mean and deviation of pixels, in the towers of
    Qwen-VL): nothing would ever bring them back.
    """
    loaders: Any = import_module("vllm.model_executor.model_loader")
    if FORMAT in loaders._LOAD_FORMAT_TO_MODEL_LOADER:
        return FORMAT
    dummy: Any = import_module("vllm.model_executor.model_loader.dummy_loader")

    class RandomParameters(dummy.DummyModelLoader):
        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            kept = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
            super().load_weights(model, model_config)
            for buffer, values in kept:
                buffer.copy_(values)

    loaders.register_model_loader(FORMAT)(RandomParameters)
    return FORMAT
