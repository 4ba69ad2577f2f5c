"""Pickled files read as data: whatever their writer put there, loading them runs none of it.

torch.load reads with weights_only=True, tensors and plain values. DeepSpeed and
torch.distributed.checkpoint read the files of a checkpoint without; here they are made to, with the
few classes of their own that such files hold.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from zipfile import is_zipfile

import torch
from transformers.trainer_pt_utils import safe_globals as of_random_states

P = ParamSpec("P")
R = TypeVar("R")

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
METADATA = ".metadata"  # of a torch.distributed.checkpoint, beside its files; or __0.metadata
NEVER_LOADED = "training_args.bin"  # written for people; holds classes of many libraries
# in the checkpoints of DeepSpeed: module, names
DEEPSPEED = (
    ("deepspeed.runtime.fp16.loss_scaler", ("LossScaler", "DynamicLossScaler")),
    ("deepspeed.runtime.zero.config", ("ZeroStageEnum",)),
    ("deepspeed.utils.tensor_fragment", ("fragment_address",)),
)


@contextmanager
def only_data() -> Iterator[None]:
    """While open, torch.load and torch.distributed.checkpoint build data and no other object,
    whatever their callers ask for.

    Raises ValueError for a file that holds another.
    """
    from .dcp_metadata import used_by_dcp

    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"  # torch reads it at every load
    try:
        with used_by_dcp(), torch.serialization.safe_globals(_of_deepspeed()):
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"a file of the checkpoint {_foreign(error)}.") from error
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def loading_only_data(load: Callable[P, R]) -> Callable[P, R]:
    @wraps(load)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with only_data():
            return load(*args, **kwargs)

    return call


def foreign_object(path: Path) -> str | None:
    """What a pickled file holds beside data, as the end of a sentence; nothing of it is run.

    None for other files, and those that are never loaded. The `.metadata` of a
    torch.distributed.checkpoint stands for all its files.
    """
    of_dcp = path.name.endswith(METADATA)
    pickled = of_dcp or path.suffix in (".pt", ".pth", ".bin")
    if not pickled or path.name == NEVER_LOADED:
        return None
    try:
        with of_random_states(), torch.serialization.safe_globals(_of_deepspeed()):
            if of_dcp:
                from .dcp_metadata import check_checkpoint

                check_checkpoint(path)
            else:  # tensors without their numbers, which are left on the disk
                torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        return _foreign(error)
    except Exception as error:  # what else a file that was made up leads to
        return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split()):.200})"
    return None


def _foreign(error: BaseException) -> str:
    found = re.search(r"GLOBAL ([\w.]+\w)", str(error))
    return f"holds {found[1] if found else 'an object'}, which is no data and could run code"


def _of_deepspeed() -> list[Any]:
    """Nothing in a run without it, which reads none of its checkpoints."""
    if "deepspeed" not in sys.modules:
        return []
    return [getattr(import_module(m), name) for m, names in DEEPSPEED for name in names]
