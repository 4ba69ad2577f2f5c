"""Paths for datasets, which does not take every path as it is written.

It reads `data[1]` as a pattern, `a::b` as a chain of file systems and `$HOME` as a variable. A path
with such characters gets a plain name in the cache of datasets, the same one whenever it is read:
a link to the file, or a folder of links.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PLAIN = re.compile(r"[\w./ +=,@~-]+")
LINKS = "rloo_fast_links"


def plain_name(path: Path) -> Path:
    """`path` itself where datasets takes it as it is, else its plain name.

    Raises ValueError where the links cannot be made.
    """
    if PLAIN.fullmatch(str(path)):
        return path
    from datasets import config

    target = os.path.abspath(path)
    names = sorted(_names(target)) if path.is_dir() else []
    digest = hashlib.sha256(os.fsencode("\0".join((target, *names)))).hexdigest()[:32]
    place = Path(config.HF_DATASETS_CACHE).expanduser() / LINKS / (digest + path.suffix)
    try:
        for name in names or ("",):
            _link(place / name, os.path.join(target, name) if name else target)
    except OSError as error:
        raise ValueError(
            f"dataset {str(path)!r}: datasets does not take this path as it is written, and a link "
            f"to it cannot be made ({error}): rename it."
        ) from error
    return place


def _names(folder: str) -> Iterator[str]:
    """Files below `folder`, and links to folders: datasets follows the links of a folder itself."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(parent, name), folder)


def _link(link: Path, target: str) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # of a former run, or another process
        link.symlink_to(target)
    if os.readlink(link) != target:
        raise FileExistsError(f"{link} is there")
