"""An adapter added to the weights it was trained on: W + scaling B A, summed in float32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any


def merge_adapter(model: Any, name: str) -> Any:
    """The model with the adapter `name` (directory or hub id) merged into its weights.

    The sum is taken in float32 and rounded once to the type of each weight; what may be trained is
    as before. Raises ValueError for what is no adapter of this model.
    """
    from peft import PeftConfig, PeftModel

    where = f"merge_adapter={name!r}"
    if isinstance(model, PeftModel):
        raise ValueError(f"{where}: the model has adapters already: merge_and_unload them first.")
    is_split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if is_split or getattr(model, "is_quantized", False):
        why = "split over processes" if is_split else "quantised"
        raise ValueError(
            f"{where}: the model's weights are {why}, and nothing can be added to them: merge once "
            "without that, save the sum, and give its directory as the model."
        )
    if Path(name).expanduser().is_dir() and not (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"{where}: the directory holds no adapter_config.json, so no adapter.")
    before = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    buffers = {n: b.dtype for n, b in model.named_buffers()}
    try:
        if PeftConfig.from_pretrained(name).is_prompt_learning:
            raise ValueError("it adds tokens to the prompt, and has no weights to merge")
        with warnings.catch_warnings():  # peft only warns of weights that the adapter lacks
            warnings.filterwarnings("error", message="Found missing adapter keys")
            both = PeftModel.from_pretrained(model.float(), name)
        merged: Any = both.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{where} is no adapter of this model: {text:.300}") from error
    for n, parameter in merged.named_parameters():
        dtype, trained = before[n]
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(trained)
    for n, buffer in merged.named_buffers():
        buffer.data = buffer.data.to(buffers[n])
    return merged
