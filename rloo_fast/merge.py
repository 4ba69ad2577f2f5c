"""An adapter added to the weights it was trained on: W + scaling B A, summed in float32."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

logger = logging.getLogger(__name__)

RECORD = "rloo_adapter.json"  # beside an adapter that was trained on a sum with another


def merge_adapter(model: Any, name: str) -> Any:
    """The model with the adapter `name` (directory or hub id) merged into its weights.

    The sum is taken in float32 and rounded once to the type of each weight; what may be trained is
    as before. An adapter that a run has trained on such a sum has the same merged before it.
    Raises ValueError for what is no adapter of this model.
    """
    first = merged_before(name)
    if first is not None:
        logger.info("%s was trained on a sum with the adapter %s, merged before it.", name, first)
        try:
            model = merge_adapter(model, first)
        except ValueError as error:
            raise ValueError(
                f"{name} was trained on a sum with the adapter {first!r} ({RECORD}): {error}"
            ) from error
    return _add(model, name)


def record_merged(directory: str | Path, merged: str | None) -> None:
    """Note beside a saved adapter which one is to be merged before it; None: there is no such."""
    path = Path(directory) / RECORD
    if merged is None:
        path.unlink(missing_ok=True)  # of a run that wrote here before
    else:
        path.write_text(json.dumps({"merged_adapter": merged}) + "\n", encoding="utf-8")


def merged_before(name: str) -> str | None:
    """What `record_merged` noted beside the adapter `name`, a directory or hub id.

    Raises ValueError for a damaged record.
    """
    try:
        path = cached_file(
            name,
            RECORD,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such place: who loads the adapter says so
        return None
    if path is None:
        return None
    text = Path(path).read_text(encoding="utf-8")
    try:
        return str(json.loads(text)["merged_adapter"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: expected an object with 'merged_adapter', got {text[:80]!r}."
        ) from error


def _add(model: Any, name: str) -> Any:
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
