"""The repository's Markdown: its pages, their links and anchors, and the code that they show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .paths import ROOT

NOT_OURS = {".venv", "build", "dist", "runs", "node_modules"}
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not NOT_OURS & {*page.relative_to(ROOT).parts} and ".egg-info" not in str(page)
)

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


class Link(NamedTuple):
    page: Path
    target: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}: {self.target}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code for _, language, code in _FENCED.findall(text) if language == kind]


def files_shown(page: Path) -> dict[str, str]:
    """The Python files that a page shows, by the name in their first line: `# name.py`."""
    blocks = code_blocks(page.read_text(), "python")
    heads = [re.match(r"# (\w+\.py)\n", code) for code in blocks]
    return {head[1]: code for head, code in zip(heads, blocks, strict=True) if head}


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", _FENCED.sub("", text))


def links() -> Iterator[Link]:
    """Those that lead to a file or heading of this repository."""
    for page in PAGES:
        for target in _LINK.findall(prose(page.read_text())):
            if not re.match(r"[a-z]+:", target):
                yield Link(page, target)


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives a page's headings: lower case, without punctuation, - for spaces;
    the second of the same name ends in -1, and so on."""
    found: dict[str, int] = {}
    for heading in _HEADING.findall(_FENCED.sub("", text)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = found.get(anchor, -1) + 1
        found[anchor] = number
        if number:
            found[f"{anchor}-{number}"] = 0
    return {*found}


def commands(text: str) -> list[list[str]]:
    """The words of every command of a page's bash blocks, without comments and `...`."""
    found = []
    for block in code_blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [w for w in shlex.split(line, comments=True) if w not in ("...", "…")]
            for is_and, command in groupby(words, "&&".__eq__):
                if not is_and:
                    found.append([*command])
    return found
