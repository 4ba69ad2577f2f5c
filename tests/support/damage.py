"""Files of a checkpoint damaged, or replaced by such as run code, each in the ways there are."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rloo_fast.checkpoint.files import step_of
from rloo_fast.checkpoint.manifest import write_manifest

ALONE: Any = SimpleNamespace(process_index=0, num_processes=1)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_step(path: Path) -> None:
    shutil.copy(path.parents[1] / "checkpoint-1" / path.name, path)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "halved": halve,
    "a bit flipped": flip,
    "a directory": a_directory,
}


class Payload:
    """Makes a file of its name wherever it is unpickled."""

    def __init__(self, made: Path):
        self.made = str(made)

    def __reduce__(self) -> Any:
        return open, (self.made, "w")


def plant(path: Path, made: Path) -> None:
    """Put a Payload into a file, in the form that its reader expects."""
    payload = Payload(made)
    if path.name == ".metadata":
        path.write_bytes(pickle.dumps(payload))
    elif path.suffix == ".distcp":
        plant_value(path, payload)
    else:
        torch.save({"module": payload, "step": 1}, path)


def plant_value(path: Path, payload: Payload) -> None:
    """In place of one that is no tensor, of a torch.distributed.checkpoint."""
    record = path.with_name(".metadata")
    saved = pickle.loads(record.read_bytes())
    value = io.BytesIO()
    torch.save(payload, value)
    kinds = saved.state_dict_metadata
    places = [
        place
        for index, place in saved.storage_data.items()
        if type(kinds[index.fqn]).__name__ == "BytesStorageMetadata"
    ]
    assert places, "all values are tensors"
    for place in places:
        place.relative_path, place.offset = path.name, path.stat().st_size
        place.length = value.tell()
    path.write_bytes(path.read_bytes() + value.getvalue())
    record.write_bytes(pickle.dumps(saved))


def make_up_manifest(checkpoint: Path) -> None:
    """Anew, as who makes up a checkpoint does."""
    write_manifest(checkpoint, step_of(checkpoint), ALONE, True)
