"""An adapter added to the weights it was trained on: W + scaling B A, summed in float32."""

from __future__ import annotations

import json
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from ..config.json_text import parse_json
from ..config.paths import user_path
from .pretrained import damage, some

logger = logging.getLogger(__name__)

RECORD = "rloo_adapter.json"  # beside an adapter that was trained on a sum with another


def merge_adapter(model: Any, name: str) -> Any:
    """The model with the adapter `name` (directory or hub id) merged into its weights.

    The sum is taken in float32 and rounded once to the type of each weight; what may be trained is
    as before. An adapter that a run has trained on such a sum has the same merged before it.
    Raises ValueError for what is no adapter of this model.
    """
    chain = _chain(name)
    for first, then in pairwise(chain):
        logger.info("%s was trained on a sum with the adapter %s, merged before it.", then, first)
    for i, adapter in enumerate(chain):
        try:
            model = _add(model, adapter)
        except ValueError as error:
            if i + 1 == len(chain):
                raise
            raise ValueError(
                f"{chain[i + 1]} was trained on a sum with the adapter {adapter!r} ({RECORD}): "
                f"{error}"
            ) from error
    return model


def _chain(name: str) -> list[str]:
    """The adapters to merge, `name` last. Raises ValueError for one that comes before itself."""
    chain, places = [name], [_place(name)]
    while (first := merged_before(chain[0])) is not None:
        if _place(first) in places:
            raise ValueError(
                f"merge_adapter={name!r}: {first!r} is to be merged before {chain[0]!r} "
                f"({RECORD}), but has to be merged after it too: mend the file, or delete it."
            )
        chain.insert(0, first)
        places.append(_place(first))
    return chain


def _place(name: str) -> str:
    """The same for every way to write one directory."""
    path = user_path(name)
    return str(path.resolve()) if path.is_dir() else name


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
    content = Path(path).read_bytes()
    try:
        first = parse_json(content.decode())["merged_adapter"]
        if not isinstance(first, str) or not first:
            raise TypeError("no name")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: expected an object with 'merged_adapter', a directory or hub id, got "
            f"{content[:80].decode(errors='replace')!r}."
        ) from error
    return first


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
    if user_path(name).is_dir() and not (user_path(name) / "adapter_config.json").is_file():
        raise ValueError(f"{where}: the directory holds no adapter_config.json, so no adapter.")
    before = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    buffers = {n: b.dtype for n, b in model.named_buffers()}
    try:
        if PeftConfig.from_pretrained(name).is_prompt_learning:
            raise ValueError("it adds tokens to the prompt, and has no weights to merge")
        with warnings.catch_warnings():  # peft only warns of weights that the adapter lacks
            warnings.filterwarnings("error", message="Found missing adapter keys")
            both: Any = PeftModel.from_pretrained(model.float(), name)
            # a second time, for what peft does not say of the first
            if left := both.load_adapter(name, "default").unexpected_keys:
                raise ValueError(f"the model has no place for {some(left)}")
        merged = both.merge_and_unload(safe_merge=True)
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # readers of several formats, each with errors of its own
        text = damage(user_path(name)) or " ".join(str(error).split())
        raise ValueError(f"{where} is no adapter of this model: {text:.300}") from error
    for n, parameter in merged.named_parameters():
        dtype, trained = before[n]
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(trained)
    for n, buffer in merged.named_buffers():
        buffer.data = buffer.data.to(buffers[n])
    return merged
