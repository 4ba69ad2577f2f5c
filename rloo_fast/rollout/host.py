"""A process as it was before another library started in it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def host_unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what starting an engine does to the process that trains: random states are reset, the
    number of threads is fixed, the environment changed, and, where the engine runs transformers'
    model code, the policy's own classes are patched."""
    classes = {
        cls for module in model.modules() for cls in type(module).__mro__ if cls is not object
    }
    before = {cls: (dict(vars(cls)), cls.__bases__) for cls in classes}
    set_num_threads, environment = torch.set_num_threads, dict(os.environ)
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python)
        np.random.set_state(numpy)
        for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD"):
            if name in environment:
                os.environ[name] = environment[name]
            else:
                os.environ.pop(name, None)
        for cls, (attributes, bases) in before.items():
            _restore_class(cls, attributes, bases)


def _restore_class(cls: type, attributes: dict[str, Any], bases: tuple[type, ...]) -> None:
    for name in vars(cls).keys() - attributes.keys():
        delattr(cls, name)
    for name, value in attributes.items():
        if vars(cls).get(name) is not value:
            setattr(cls, name, value)
    if cls.__bases__ != bases:
        cls.__bases__ = bases
