"""The weights of a checkpoint, back into the model that they were saved from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.adapters import adapter_state, is_peft_model
from ..models.pretrained import some
from ..models.reference import start_weights

START = "start_weights.pt"  # of the reference of a model with adapters

Shapes = dict[str, list[int]]  # by the name of the weight


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Every weight that save_pretrained wrote of `model` (of one with adapters, these).

    Raises ValueError unless names and shapes in the checkpoint are those of the model.
    """
    (_load_adapters if is_peft_model(model) else _load_model)(model, Path(checkpoint))


def trained_shapes(model: nn.Module) -> Shapes:
    """Of the whole weights, however an engine splits them."""
    return _shapes({name: p for name, p in model.named_parameters() if p.requires_grad})


def check_trained(model: nn.Module, saved: Shapes, checkpoint: str) -> None:
    """Raise ValueError unless the checkpoint's trained_shapes() are the model's.

    Engines load what they find: FSDP2 leaves out other weights, DeepSpeed those of adapters.
    """
    _compare(Path(checkpoint), trained_shapes(model), saved)


def save_start_weights(model: nn.Module, directory: str, *, is_main_process: bool) -> None:
    """Of the reference of a model with adapters; nothing without one. A collective."""
    start = start_weights(model)
    if start.is_taken:
        state = start.state_dict(keep=is_main_process)
        if is_main_process:
            torch.save(state, Path(directory) / START)


def load_start_weights(model: nn.Module, checkpoint: str) -> None:
    state = torch.load(Path(checkpoint) / START, map_location="cpu", weights_only=True)
    start_weights(model).load_state_dict(state)


def _load_model(model: Any, checkpoint: Path) -> None:
    if not (checkpoint / "config.json").is_file():
        raise _mismatch(checkpoint, "It holds adapters, and the run trains the whole model.")
    weights = model.state_dict()
    dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    # not from the files: of many architectures (GPT-NeoX's head, experts) their names and tensors
    # are others than the model's, and only from_pretrained turns them back
    loaded, found = type(model).from_pretrained(
        checkpoint, dtype=max(dtypes, key=lambda dtype: dtype.itemsize), output_loading_info=True
    )
    _refuse(checkpoint, found["missing_keys"], found["unexpected_keys"])
    saved = loaded.state_dict()
    _compare(checkpoint, _shapes(weights), _shapes(saved))
    model.load_state_dict(saved)


def _load_adapters(model: Any, checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    for name in model.peft_config:
        folder = checkpoint if name == "default" else checkpoint / name
        if not (folder / "adapter_config.json").is_file():
            raise _mismatch(checkpoint, f"The run trains adapters, and it holds none {name!r}.")
        saved = load_peft_weights(str(folder), device="cpu")
        expected = adapter_state(model, name, embeddings="auto")
        _compare(checkpoint, _shapes(expected), _shapes(saved))
        set_peft_model_state_dict(model, saved, name)


def _shapes(weights: dict[str, Tensor]) -> Shapes:
    return {name: list(getattr(w, "ds_shape", w.shape)) for name, w in weights.items()}


def _compare(checkpoint: Path, model: Shapes, saved: Shapes) -> None:
    reshaped = [name for name in model.keys() & saved.keys() if model[name] != saved[name]]
    _refuse(checkpoint, model.keys() - saved.keys(), saved.keys() - model.keys(), reshaped)


def _refuse(
    checkpoint: Path,
    missing: Collection[str],
    unexpected: Collection[str],
    reshaped: Collection[str] = (),
) -> None:
    found = {
        "not in the checkpoint": missing,
        "not in the model": unexpected,
        "of another shape": reshaped,
    }
    lists = [f"{what}: {some(names)}" for what, names in found.items() if names]
    if lists:
        raise _mismatch(checkpoint, f"Weights {'; '.join(lists)}.")


def _mismatch(checkpoint: Path, why: str) -> ValueError:
    return ValueError(
        f"{str(checkpoint)!r} was saved from another model than this run's. {why} Resume with the "
        "model and the adapters of the run that saved it."
    )
