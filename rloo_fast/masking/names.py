"""Which names say that their value is a secret: of options, fields, variables, headers, queries."""

from __future__ import annotations

import re
from functools import lru_cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of snake_case, kebab-case, camelCase
ALWAYS = _words(
    "password passwords passwd passphrase passcode secret secrets credential credentials "
    "authorization apikey apikeys apitoken authtoken accesstoken hftoken hubtoken secretkey "
    "accesskey privatekey cookie cookies jwt bearer webhook"
)
ENDINGS = ("password", "passwd", "passphrase", "secret", "apikey")  # as in PGPASSWORD
OF_PASSES = _words("db user smtp imap ftp http proxy mysql redis login admin mail basic auth")
# `password_file`, `secret_name`: about a secret, not one
ABOUT = _words(
    "file files path dir directory home root name names type length len size count id enabled "
    "required column field func function prompt level policy pattern ttl timeout expiry"
)
# `api_key`, `openai_key`; not `sort_key`, `answer_key`, `public_key`
OF_KEYS = _words(
    "api access secret private signing encryption auth service account master subscription ssh "
    "storage client shared license deploy judge openai anthropic azure google gemini mistral "
    "cohere together groq deepseek openrouter hf hub huggingface wandb comet neptune app "
    "application consumer functions"
)
# `pad_token`, `stop_token`, `next_token`: of a vocabulary
OF_TOKENS = _words(
    "pad eos bos unk sep cls mask stop image audio video special next prev end start begin new "
    "last first per prompt completion newline think thinking tool row boundary trigger suffix "
    "prefix middle fill fim additional single one every target decoder separator final by"
)
OF_SEVERAL_TOKENS = _words("api access auth hub hf refresh bearer session")
IN_QUERIES = _words("key sig signature code auth")  # of a URL: ?key=...
IN_HEADERS = _words(  # all others of a dict of headers may hold a secret
    "accept accept-charset accept-encoding accept-language cache-control connection content-length "
    "content-type host keep-alive origin referer te user-agent"
)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a value of this name is a secret, by the words that the name is made of.

    True: api_key, HF_TOKEN, hub-token, clientSecret, X-Auth-Token, Authorization, db_password.
    False: pad_token, eos_token_ids, max_tokens, tokenizer, token_level_kl, sort_key, PWD.
    """
    words = [word.lower() for word in WORD.findall(name)]
    if not words:
        return False
    *before, last = words
    former = before[-1] if before else ""
    if last in ABOUT:
        return False
    if last == "token":
        return former not in OF_TOKENS
    if last == "tokens":
        return former in OF_SEVERAL_TOKENS
    if last in ("key", "keys"):
        return former in OF_KEYS
    if last == "pass":
        return former in OF_PASSES
    if last in ("pwd", "auth", "pat"):
        return bool(before) or last == "auth"
    return last.endswith(ENDINGS) or not ALWAYS.isdisjoint(words)


def is_secret_in_query(name: str) -> bool:
    """Likewise of a URL's query, where `key` and `sig` are secrets too."""
    return name.lower().removeprefix("x-amz-") in IN_QUERIES or is_secret_name(name)


def holds_headers(name: str) -> bool:
    """Whether a dict of this name is one of HTTP headers."""
    return [word.lower() for word in WORD.findall(name)][-1:] == ["headers"]


def is_random(text: str) -> bool:
    """Whether it looks drawn at random, as keys are: 16 letters and digits in a row, and mixed."""
    runs = re.findall(r"[A-Za-z0-9]{16,}", text)
    return any(len(re.findall(r"\d", run)) > 1 and re.search("[A-Za-z]", run) for run in runs)
