"""The program in a completion: what stands between the fences of CommonMark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import dedent

from markdown_it import MarkdownIt
from markdown_it.token import Token

# Not by parsing: a solution that was cut off is one, too.
_DEFINES = re.compile(
    r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=[ \t]*lambda\b", re.M
)
_STUB = re.compile(r"\s*(?:async[ \t]+)?def[ \t]+\w+\([^)]*\)[^:\n]*:\s*(?:\.\.\.|pass)\s*")
_PYTHON = re.compile(r"[{.]*(?:lang-|language-|i)?(?:python|python3|py)\b", re.IGNORECASE)
_MARKDOWN_INFO = re.compile(r"(?:markdown|md)\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")
# Containers and fences are all that matters here; others only take time.
_MARKDOWN = MarkdownIt("commonmark").disable(
    ["inline", "heading", "hr", "html_block", "lheading", "reference"]
)
_INDENTED_FENCE = re.compile(r"^[ \t]+(?=```|~~~)", re.MULTILINE)
# A tag before a fence, a tag after one, which models write in its line
_TAG_BEFORE = re.compile(r"[ \t]*(?:</?[\w|]{1,40}>|[\ufeff\u200b]{1,9})[ \t]*(?=```|~~~)")
_TAG_AFTER = re.compile(r"[ \t]*(?:```|~~~)(?=[ \t]*<[/|\w])")
_INFO = re.compile(r"[\w+-]{1,40}[ \t\r]*")


def verify(text: str, tests: list[str]) -> str:
    """extract_code(text, tests)"""
    return extract_code(text, tests)


def warm_up() -> None:
    extract_code("```python\n1\n```")


def extract_code(text: str, tests: Sequence[str] = ()) -> str:
    """The last block between fences (CommonMark's) that says Python, else the last block, else the
    text.

    Before all others come the blocks that define a function or class which the tests use, and then
    those that define any: a block with a use or with tests of the solution does not replace it,
    nor does one that repeats its first line.
    """
    text = "\n".join(map(_with_fence_apart, text.split("\n")))
    # A block that the length limit cut off ends with the text.
    # By more than three columns is no fence to CommonMark, but models write that, too.
    fences = _fences(text) or _fences(_INDENTED_FENCE.sub("", text))
    python = [fence for fence in fences if _PYTHON.match(fence.info)]
    blocks = [dedent(fence.content) for fence in python or fences]
    used = set().union(*(_WORD.findall(test) for test in tests))
    solutions = [code for code in blocks if _defined(code)]
    asked = [code for code in solutions if used & _defined(code)]
    written = [code for code in asked if not _STUB.fullmatch(code)]
    return (written or asked or solutions or blocks or [text])[-1]


def _with_fence_apart(line: str) -> str:
    """A fence gets a line of its own: after or before a tag, and after `Here it is: `."""
    place = line.rfind("```")
    if place < 0 and "~~~" not in line:
        return line
    for tag_beside in (_TAG_BEFORE, _TAG_AFTER):
        if found := tag_beside.match(line):
            return f"{found[0]}\n{line[found.end() :]}"
    before = line[:place]
    is_prose = before[-1:].isspace() and any(map(str.isalpha, before)) and "`" not in before
    return f"{before}\n{line[place:]}" if is_prose and _INFO.fullmatch(line, place + 3) else line


def _defined(code: str) -> set[str]:
    return {found[1] or found[2] for found in _DEFINES.finditer(code)}


def _fences(text: str) -> list[Token]:
    """Also those in a block of Markdown."""
    if "```" not in text and "~~~" not in text:
        return []
    fences = [token for token in _MARKDOWN.parse(text) if token.type == "fence"]
    return [
        inner
        for fence in fences
        for inner in (_MARKDOWN_INFO.match(fence.info) and _fences(fence.content)) or [fence]
    ]
