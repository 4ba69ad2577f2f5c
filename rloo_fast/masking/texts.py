"""Texts: which parts of one are secrets, by their place, format or name."""

from __future__ import annotations

import re

from . import known
from .known import MASK, USERINFO
from .names import is_random, is_secret_in_query, is_secret_name

EMPTY = {"", "none", "null", "true", "false", MASK}
# all that repeats has a bound: texts come from servers too, and must not take quadratic time
NAME = r"(?P<name>[A-Za-z][\w.-]{0,63})"
QUOTED = r"'(?:[^'\\\n]|\\.){0,9999}'|\"(?:[^\"\\\n]|\\.){0,9999}\""
FORMATS = re.compile(
    r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}|\bsk-(?=[\w-]{0,99}\d)(?=[\w-]{0,99}\w{10})[\w-]{20,}|\bgh[pousr]_\w{20,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bxox[abeprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bAIza[\w-]{35}|\b(?:sk|rk|whsec|gsk|r8)_(?=\w{0,40}\d)\w{20,}"
    r"|\b(?:nvapi|xai|pplx)-(?=[\w-]{0,40}\d)[\w-]{20,}"
    r"|\beyJ[\w-]{8,999}\.eyJ[\w-]{8,9999}\.[\w-]*|\bSG\.[\w-]{16,99}\.[\w-]{16,}"
    r"|\bhooks\.slack\.com/services/(?P<slack>[\w/-]+)"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
ALWAYS = (
    FORMATS,
    re.compile(  # headers
        r"(?i)\b(?:(?:proxy-)?authorization|x-api-key|api-key|x-auth-token|(?:set-)?cookie)"
        r"['\"]?\s*[:=]\s*['\"]?"
        r"(?P<value>digest\s[^\n]*|(?:(?:bearer|basic|token)\s+)?[^\s,'\"<>]+)"
    ),
    re.compile(r"(?<!\S)(?:-u|--user)[ =](?P<value>[^\s:'\"]{1,99}:[^\s'\"]+)"),  # of curl
    re.compile(r"(?i)%3A%2F%2F(?P<value>[^\s&]{1,999}?)%40"),  # user:password@ in a query
)
SCHEME = re.compile(r"(?i)\b(?:bearer|basic)\s+(?P<value>[\w.~+/=-]{8,})")
IN_QUERY = re.compile(rf"(?<=[?&]){NAME}=(?P<value>[^\s&#'\"<>]+)")
NAMED = (  # name=value, "name": "value", --name value, <name>value</name>
    re.compile(rf"(?<![\w.]){NAME}\s?=\s?(?P<value>{QUOTED}|(?:,(?=\S)|[^\s&,;'\"<>()\[\]{{}}])+)"),
    re.compile(
        rf"(?P<quote>\\{{0,9}}['\"]){NAME}(?P=quote)\s*:\s*b?"
        r"(?P<value>(?P<open>\\{0,9}['\"])(?:[^\\\n]|\\.){0,9999}?(?:(?P=open)|\Z)|\d+)"
    ),
    re.compile(rf"(?<![\w-])--{NAME}\s+(?P<value>{QUOTED}|(?!--)[^\s'\"]+)"),
    re.compile(rf"<{NAME}>(?P<value>[^<>]+)</"),
)
BARE = re.compile(rf"(?<![\w.-]){NAME}(?::| is)\s+(?P<value>[^\s,;'\"<>]+)")  # where it looks drawn


def masked_text(text: str, learning: bool) -> str:
    """`text` with MASK for every secret; `learning`: they are remembered, and known ones stay."""

    def hide(match: re.Match[str]) -> str:
        groups = match.groupdict()
        group = next((name for name in ("value", "slack") if groups.get(name)), 0)
        start, end = match.span(group)
        if opening := re.match(r"\\*['\"]", match[group]):  # the quotes stay
            start += len(opening[0])
            end -= len(opening[0]) * match.string.endswith(opening[0], start, end)
        secret = match.string[start:end]
        if secret.lower() in EMPTY or secret.startswith("<"):
            return match[0]
        if learning:
            known.add(secret)
        return match.string[match.start() : start] + MASK + match.string[end : match.end()]

    def hide_if(condition: bool, match: re.Match[str]) -> str:
        return hide(match) if condition else match[0]

    if learning:
        for secret in known.secrets_of_urls(text):
            known.add(secret)
    else:
        text = known.masked_known(text)
    text = USERINFO.sub(lambda m: m[0] if m[0] == "git@" else f"{MASK}@", text)
    for pattern in ALWAYS:
        text = pattern.sub(hide, text)
    text = SCHEME.sub(lambda m: hide_if(is_random(m["value"]), m), text)
    text = IN_QUERY.sub(lambda m: hide_if(is_secret_in_query(m["name"]), m), text)
    for pattern in NAMED:
        text = pattern.sub(lambda m: hide_if(is_secret_name(m["name"]), m), text)
    return BARE.sub(lambda m: hide_if(is_secret_name(m["name"]) and is_random(m["value"]), m), text)
