"""`.metadata` of torch.distributed.checkpoint (DCP), read with its own few classes and no others.

DCP itself unpickles the file, and with it the values that are no tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

NAMES = (
    "Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
    "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
CLASSES: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in NAMES},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # Python 3.13
}


DISPATCH: dict[int, Callable[..., None]] = {**pickle._Unpickler.dispatch}


class _Unpickler(pickle._Unpickler):  # the one in Python: that in C builds into classes too
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {**DISPATCH}

    def find_class(self, module: str, name: str) -> Any:
        found = CLASSES.get((module, name))
        if found is None and module == "torch":
            found = getattr(torch, name, None)
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return found

    def build(self) -> None:
        """Set attributes of an object; those of a class would change it for the whole process."""
        stack: list[Any] = vars(self)["stack"]
        if isinstance(stack[-2], type) or callable(stack[-2]):
            raise pickle.UnpicklingError("a class that is changed")
        DISPATCH[pickle.BUILD[0]](self)

    dispatch[pickle.BUILD[0]] = build


def load(file: IO[bytes]) -> Any:
    """A Metadata. Raises UnpicklingError for an object of another class."""
    return _Unpickler(file).load()


@contextmanager
def used_by_dcp() -> Iterator[None]:
    """While open, DCP reads its `.metadata` with `load`.

    Its errors become UnpicklingError, where an object was refused, and ValueError.
    """
    module: Any = filesystem
    module.pickle = SimpleNamespace(load=load, dump=pickle.dump)
    try:
        yield
    except CheckpointException as error:  # the same on all processes, and not an Exception
        first, _ = next(iter(error.failures.values()))
        if "GLOBAL " in str(first):
            raise pickle.UnpicklingError(str(first)) from error
        text = f"{type(first).__name__}: {' '.join(str(first).split()):.200}"
        raise ValueError(f"the checkpoint cannot be loaded ({text}).") from error
    finally:
        module.pickle = pickle


def check_checkpoint(path: Path) -> None:
    """Raise what torch.load does for a value that is no data, of those that `path` tells about.

    Each is pickled for itself, somewhere within a file of tensors.
    """
    with path.open("rb") as file:
        saved = load(file)
    for index, place in saved.storage_data.items():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"it names {place.relative_path!r}, which is no file beside it")
        if isinstance(saved.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with path.with_name(place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
