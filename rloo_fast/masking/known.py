"""The secrets that this process has met, and how a text may spell them."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from urllib.parse import quote, quote_plus

from .names import ALWAYS, is_random, is_secret_name

MASK = "<masked>"
NO_SECRETS = {"api_key", "api-key", "hub_token", "hf_token", *ALWAYS}  # `password` as the password
SHORT = 12  # characters: shorter ones are masked where they stand alone only
NUMBER = re.compile(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?")
MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Za-z_]{1,40}\]")  # <|im_end|>, </s>, <answer>, [/INST]
USERINFO = re.compile(  # up to the last @ before a slash, or behind a password with a slash
    r"(?<=://)(?:[^\s/?#'\"]*@|[^\s/?#'\"@:]*:(?!\d*[/?#])(?:(?!://)[^\s'\"])*?@)"
)

_met: dict[str, None] = {}


def add(value: str) -> None:
    """Mask `value` from now on, wherever it stands; not one that other texts may hold by chance."""
    if _is_distinct(value):
        _met[value] = None


def known_secrets() -> frozenset[str]:
    """Those met so far, and those in the environment now: values of secret names, URLs' users."""
    return frozenset(_met) | _of_environment(tuple(os.environ.items()))


@lru_cache(maxsize=4)
def _of_environment(variables: tuple[tuple[str, str], ...]) -> frozenset[str]:
    found = {
        value
        for name, value in variables
        if is_secret_name(name) and not os.path.exists(value)  # a file of credentials is no secret
    }
    for _, value in variables:
        found.update(secrets_of_urls(value))
    return frozenset(filter(_is_distinct, found))


def secrets_of_urls(text: str) -> Iterator[str]:
    """Passwords of the URLs in `text`; of `user@`, the user, which may be a token."""
    for match in USERINFO.finditer(text):
        user, colon, password = match[0][:-1].partition(":")
        yield password if colon else user


def _is_distinct(value: str) -> bool:
    """A secret that may be searched for: of 6 characters or more, 8 letters, or 16 digits; no mark
    such as <answer>, which models write."""
    text = value.strip()
    if text.lower() in NO_SECRETS or text == MASK:
        return False
    if NUMBER.fullmatch(text):  # the figures of a run, in files of JSON too, are as long
        return sum(map(str.isdigit, text)) >= 16
    if is_mark(text):
        return False
    return len(text) >= (8 if text.isalpha() else 6)


def is_mark(text: str) -> bool:
    """Whether it is one of the marks that texts of models are full of, or a placeholder."""
    return MARK.fullmatch(text) is not None and not is_random(text)


def masked_known(text: str) -> str:
    """`text` with MASK in place of each known secret, in any of its spellings, and of one that was
    cut: half of it or more, from its start or to its end.

    For texts that are not ours to read, such as what a program prints; `masked` knows more.
    """
    secrets = known_secrets()
    if not secrets:
        return text
    text = _search(secrets, _spellings).replaced(text)
    for secret in secrets:
        if len(secret) >= 2 * SHORT:
            text = _without_parts(text, secret)
    return _search(secrets, _words).replaced(text)


class _Search:
    """For any of these spellings."""

    def __init__(self, spellings: set[str]):
        longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
        self.literals = longest_first
        self.pattern = re.compile("|".join(map(_found_as, longest_first)) or r"(?!)")

    def replaced(self, text: str) -> str:
        # `in` is a hundred times as fast as the pattern, and most texts have none
        maybe = any(literal in text for literal in self.literals) or "%" in text
        return self.pattern.sub(MASK, text) if maybe else text


@lru_cache(maxsize=16)
def _search(secrets: frozenset[str], spellings: Callable[[str], Iterator[str]]) -> _Search:
    return _Search({spelling for secret in secrets for spelling in spellings(secret)})


def _found_as(spelling: str) -> str:
    pattern = re.sub("%[0-9A-F]{2}", lambda code: f"(?i:{code[0]})", re.escape(spelling))
    return rf"(?<!\w){pattern}(?!\w)" if len(spelling) < SHORT else pattern


def _spellings(secret: str) -> Iterator[str]:
    yield secret
    yield secret.strip()
    yield " ".join(secret.split())  # as errors are put on one line
    for part in {secret, secret.strip()}:
        yield from _escaped(part)
        yield from _encoded(part.encode(errors="surrogateescape"))


def _words(secret: str) -> Iterator[str]:
    """Of a key of several lines, which may be printed line by line."""
    words = secret.split()
    return (word for word in words if len(words) > 1 and len(word) >= SHORT)


def _escaped(secret: str) -> Iterator[str]:
    yield repr(secret)[1:-1]
    yield repr(secret.encode(errors="surrogateescape"))[2:-1]
    yield secret.replace("'", "'\"'\"'")  # of a shell
    yield html.escape(secret)
    for ascii_only in (True, False):
        once = json.dumps(secret, ensure_ascii=ascii_only)
        yield once[1:-1]
        yield json.dumps(once, ensure_ascii=ascii_only)[3:-3]  # JSON in JSON
    bytes_of_it = secret.encode(errors="surrogateescape")
    for safe in ("", "/", "/:", "/:@!$&'()*+,;=~"):
        yield quote(bytes_of_it, safe)
        yield quote_plus(bytes_of_it, safe)


def _encoded(secret: bytes) -> Iterator[str]:
    yield secret.hex()
    # base64 spells three bytes by four letters: what follows 0, 1 or 2 bytes of something else, as
    # in base64("user:password"), has letters of its own in the middle
    for before in range(3):
        whole = (before + len(secret)) // 3 * 4
        spelt = base64.b64encode(bytes(before) + secret).decode()[4 * (before > 0) : whole]
        if len(spelt) >= 8:
            yield spelt
            yield spelt.translate(str.maketrans("+/", "-_"))


def _without_parts(text: str, secret: str) -> str:
    least = max(SHORT, len(secret) // 2)
    while (start := text.find(secret[:least])) >= 0:
        end = start + _num_alike(text[start:], secret)
        text = text[:start] + MASK + text[end:]
    while (last := text.find(secret[-least:])) >= 0:
        end = last + least
        start = end - _num_alike(text[:end][::-1], secret[::-1])
        text = text[:start] + MASK + text[end:]
    return text


def _num_alike(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
