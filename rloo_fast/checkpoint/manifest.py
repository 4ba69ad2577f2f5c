"""Whether a checkpoint is whole: name, size and hash of every file, written when all are there.

Whoever makes up a checkpoint makes up its manifest too, so that files which are unpickled are also
looked into. The files are dealt out over the processes, which hash them side by side.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path, PurePath
from typing import Any

from accelerate import Accelerator

from ..config.json_text import parse_json
from ..distributed.collectives import gather_objects
from ..distributed.pickles import foreign_object

MANIFEST = "rloo_manifest.json"
REMEDY = "Resume from another checkpoint, or give this one as the model, if its weights are whole."


def write_manifest(checkpoint: Path, step: int, accelerator: Accelerator, writes: bool) -> None:
    """`writes`: this process does. Every process must call, once all files are written."""
    files = _files(checkpoint)
    parts = gather_objects(accelerator, _hashes(checkpoint, _share(files, accelerator)))
    if writes:
        body = {"step": step, "files": {name: part[name] for part in parts for name in part}}
        text = json.dumps({**body, "digest": _digest(body)}, indent=0, sort_keys=True)
        (checkpoint / MANIFEST).write_text(text + "\n")


def check_manifest(checkpoint: Path, accelerator: Accelerator) -> None:
    """Raise ValueError, on every process, that names the first file that is not as it was saved,
    or holds objects that are no data."""
    problems = gather_objects(accelerator, _first_problem(checkpoint, accelerator))
    if problem := next(filter(None, problems), None):
        raise ValueError(f"{str(checkpoint)!r} cannot be resumed from: {problem} {REMEDY}")


def _first_problem(checkpoint: Path, accelerator: Accelerator) -> str | None:
    try:
        manifest = parse_json((checkpoint / MANIFEST).read_text())
        saved = {str(n): (int(size), str(h)) for n, (size, h) in manifest["files"].items()}
        body = {"step": manifest["step"], "files": saved}
        damaged = manifest["digest"] != _digest(body) or any(map(_is_outside, saved))
    except FileNotFoundError:
        return (
            f"it holds no {MANIFEST}, which is written when all other files are (rloo_fast before "
            "0.2 wrote none)."
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        damaged, body, saved = True, {}, {}
    if damaged:
        return f"{MANIFEST} is damaged."
    name = checkpoint.name
    if name.startswith("checkpoint-") and name != f"checkpoint-{body['step']}":
        return f"it is the checkpoint of step {body['step']} under another name."
    for name in _share(sorted(saved), accelerator):
        try:
            if problem := _problem_of(checkpoint / name, *saved[name]):
                return f"{name} {problem}"
        except FileNotFoundError:
            return f"{name} is missing."
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})."
    for name in _share(_files(checkpoint), accelerator):
        if problem := foreign_object(checkpoint / name):
            return f"{name} {problem}."
    return None


def _problem_of(path: Path, size: int, digest: str) -> str | None:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        return "is no file."
    if found.st_size != size:
        return f"has {found.st_size} bytes, it was saved with {size}."
    if _hash(path) != digest:
        return "is not what was saved: its content has changed."
    return None


def _is_outside(name: str) -> bool:
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts


def _files(checkpoint: Path) -> list[str]:
    paths = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(checkpoint)) for path in paths if path.name != MANIFEST)


def _share(files: list[str], accelerator: Accelerator) -> list[str]:
    return files[accelerator.process_index :: accelerator.num_processes]


def _hashes(checkpoint: Path, names: list[str]) -> dict[str, list[Any]]:
    return {n: [(checkpoint / n).stat().st_size, _hash(checkpoint / n)] for n in names}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
