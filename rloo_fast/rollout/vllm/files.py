"""The directory that vLLM starts a model from: its configuration, and its processor's."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def saved_configuration(model: Any, processor: Any, cache: str, scratch: str) -> Path:
    """A directory with the configurations of a model and, in a run with images, of its processor,
    the same one for equal configurations.

    Its path enters the key of vLLM's cache of compiled models, so it lies in `cache`, beside those,
    and stays; where nothing can be written there, it is in `scratch`.
    """
    config = model.config
    if not config.architectures:
        config.architectures = [type(model).__name__]
    made = Path(tempfile.mkdtemp(dir=scratch))
    config.save_pretrained(made)
    if processor is not None:
        processor.save_pretrained(made)
    kept = Path(cache, "rloo_fast", _digest(made))
    try:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            arriving = Path(tempfile.mkdtemp(dir=kept.parent))
            shutil.copytree(made, arriving, dirs_exist_ok=True)
            with suppress(OSError):  # another process was faster
                os.rename(arriving, kept)
            shutil.rmtree(arriving, ignore_errors=True)
        intact = _digest(kept) == kept.name
    except OSError:
        return made
    return kept if intact else made


def _digest(folder: Path) -> str:
    """Of names and contents of its files, also of the Python files of a model with own code."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = hashlib.sha256(file.read_bytes()).digest()
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + content)
    return digest.hexdigest()
