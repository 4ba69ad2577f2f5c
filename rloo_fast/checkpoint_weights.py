"""The weights of a checkpoint, back into the model that they were saved from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from .models import is_peft_model


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Every weight that save_pretrained wrote of `model` (of one with adapters, these).

    Raises ValueError, and leaves a model without adapters as it is, unless the names and shapes of
    the checkpoint are those of the model.
    """
    (_load_adapters if is_peft_model(model) else _load_model)(model, Path(checkpoint))


def _load_model(model: Any, checkpoint: Path) -> None:
    if not (checkpoint / "config.json").is_file():
        raise _mismatch(checkpoint, "It holds adapters, and the run trains the whole model.")
    weights = model.state_dict()
    # not from the files: of many architectures (GPT-NeoX's head, experts) their names and tensors
    # are others than the model's, and only from_pretrained turns them back
    loaded, found = type(model).from_pretrained(
        checkpoint,
        dtype=max((w.dtype for w in weights.values() if w.is_floating_point()), key=_size),
        output_loading_info=True,
    )
    saved = loaded.state_dict()
    shared = weights.keys() & saved.keys()
    _check(
        checkpoint,
        missing=(weights.keys() - shared) | set(found["missing_keys"]),
        unexpected=(saved.keys() - shared) | set(found["unexpected_keys"]),
        reshaped={name for name in shared if weights[name].shape != saved[name].shape},
    )
    model.load_state_dict(saved)


def _load_adapters(model: Any, checkpoint: Path) -> None:
    for name in model.peft_config:
        folder = checkpoint if name == "default" else checkpoint / name
        if not (folder / "adapter_config.json").is_file():
            raise _mismatch(checkpoint, f"The run trains adapters, and it holds none {name!r}.")
        # is_trainable only keeps the model in training mode: the adapter is there
        found = model.load_adapter(str(folder), name, is_trainable=True)
        _check(checkpoint, missing=found.missing_keys, unexpected=found.unexpected_keys)


def _size(dtype: Any) -> int:
    return dtype.itemsize


def _check(checkpoint: Path, **differing: Collection[str]) -> None:
    what = {
        "missing": "not in the checkpoint",
        "unexpected": "not in the model",
        "reshaped": "of another shape",
    }
    lists = [f"{what[kind]}: {_some(names)}" for kind, names in differing.items() if names]
    if lists:
        raise _mismatch(checkpoint, f"Weights {'; '.join(lists)}.")


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + f" and {more} more" * (more > 0)


def _mismatch(checkpoint: Path, why: str) -> ValueError:
    return ValueError(
        f"{str(checkpoint)!r} was saved from another model than this run's. {why} Resume with the "
        "model and the adapters of the run that saved it."
    )
