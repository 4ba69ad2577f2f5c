"""A model that was given compiled -> the model itself."""

from __future__ import annotations

import logging

from torch import nn
from torch._dynamo import OptimizedModule

logger = logging.getLogger(__name__)


def without_compile(model: nn.Module) -> nn.Module:
    """`model` without the wrappers that torch.compile put around it or around modules in it.

    Their names would stand in those of the weights (`_orig_mod.`), which checkpoints and rollout
    engines read, and every length of a rollout would be compiled. `torch_compile=True` compiles
    what is trained.
    """
    found = [(parent, name) for parent in model.modules() for name in _compiled_children(parent)]
    for parent, name in found:
        setattr(parent, name, getattr(parent, name)._orig_mod)
    in_place = [module for module in model.modules() if module._compiled_call_impl is not None]
    for module in in_place:  # by module.compile()
        module._compiled_call_impl = None
    whole: nn.Module = model._orig_mod if isinstance(model, OptimizedModule) else model
    if found or in_place or whole is not model:
        logger.warning(
            "The model was given compiled: it is trained without. torch_compile=True compiles the "
            "training forward (torch_compile_backend and torch_compile_mode say how)."
        )
    return whole


def _compiled_children(parent: nn.Module) -> list[str]:
    if isinstance(parent, OptimizedModule):  # it is one itself
        return []
    return [name for name, child in parent.named_children() if isinstance(child, OptimizedModule)]
