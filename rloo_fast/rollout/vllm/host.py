"""Undo what importing and starting vLLM change in the training process."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def host_unchanged(model: nn.Module | None = None) -> Iterator[None]:
    """Restore at the end what the block changes of the process that the trainer works in.

    Restored: random states, variables of the environment (but vLLM's own, VLLM_*), sys.excepthook,
    the number of threads, the precision of float32 matrix products, the kernels that
    scaled_dot_product_attention may use, and the garbage collector's sight of all objects (vLLM
    freezes them, so that no cycle of the trainer's would ever be freed). `model`: its classes too,
    which vLLM changes where it runs transformers' model code. Stays: what vLLM needs while it
    samples, such as the stand-ins for streams that its CPU build puts into torch.cuda.
    """
    with ExitStack() as restored:
        restored.enter_context(_random_states())
        restored.enter_context(_environment())
        restored.enter_context(_excepthook())
        restored.enter_context(_torch_settings())
        restored.enter_context(_garbage_collector())
        if model is not None:
            restored.enter_context(_classes(model))
        yield


@contextmanager
def _random_states() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in {*os.environ, *before}:
            if name.startswith("VLLM_"):
                continue  # vLLM may read it at any time
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextmanager
def _excepthook() -> Iterator[None]:
    before = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = before


@contextmanager
def _torch_settings() -> Iterator[None]:
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    cuda = torch.backends.cuda
    kernels = (
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
    )
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(precision)
        for enable, enabled in kernels:
            enable(enabled)


@contextmanager
def _garbage_collector() -> Iterator[None]:
    before = gc.get_freeze_count()
    try:
        yield
    finally:
        if not before:  # else some are frozen by whoever started the process, and stay so
            gc.unfreeze()


@contextmanager
def _classes(model: nn.Module) -> Iterator[None]:
    classes = {
        cls for module in model.modules() for cls in type(module).__mro__ if cls is not object
    }
    before = {cls: (dict(vars(cls)), cls.__bases__) for cls in classes}
    try:
        yield
    finally:
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
