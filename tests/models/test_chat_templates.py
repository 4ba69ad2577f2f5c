"""A chat template is somebody's program: it ends, or the run is told which one does not."""

from __future__ import annotations

import threading
import time

import pytest

from rloo_fast.data.row_errors import UnusableRow
from rloo_fast.data.tokenize import tokenize
from rloo_fast.models import chat_templates
from rloo_fast.models.chat_templates import TemplateLimit, apply_template
from tests.support.tiny import make_tokenizer

FIRST, SECOND = ([{"role": "user", "content": text}] for text in ("w1", "w2"))
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RECURSION = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
)
TOO_LONG, TOO_MUCH = "takes more than 1 s for the first", "takes more than 1 GiB of memory"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(chat_templates, "TRIAL_CPU_S", 1)
    monkeypatch.setattr(chat_templates, "CPU_S", 0.2)
    monkeypatch.setattr(chat_templates, "_tried", set())


def tokens(template: str, *prompts) -> list:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    rows = [{"prompt": prompt} for prompt in prompts or (FIRST,)]
    return tokenize(rows, tokenizer, chat_template_kwargs={}, max_prompt_tokens=None)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (LOOP, TOO_LONG),
        (RECURSION, TOO_LONG),
        ("{% set n = messages|length + 9 %}{{ n ** (n ** n) }}", TOO_LONG),  # no signal ends it
        ("{{ 'a' * (10 ** 11) }}", TOO_MUCH),
        ("{{ '%99999999999d'|format(1) }}", TOO_MUCH),
        ("{{ ([1] * 10 ** 10)|join }}", TOO_MUCH),
    ],
    ids=["loop", "recursion", "power", "text", "format", "list"],
)
def test_a_template_without_end(template, sentence):
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"the chat template of .* {sentence}.* prompt is"):
        tokens(template)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_the_sandbox_ends_is_the_rows_fault(template):
    with pytest.raises(UnusableRow, match="the chat template fails on a prompt"):
        tokens(template)


def test_a_template_that_loops_on_a_later_prompt():
    template = "{% if messages[0].content == 'w2' %}" + LOOP + "{% endif %}w3"
    assert len(tokens(template, FIRST, FIRST)) == 2
    with pytest.raises(ValueError, match=r"takes more than 0\.2 s.* The prompt is .*w2"):
        tokens(template, FIRST, SECOND)


def test_a_template_is_tried_once(monkeypatch):
    forks = []
    fork = chat_templates.os.fork
    monkeypatch.setattr(chat_templates.os, "fork", lambda: forks.append(1) or fork())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for _ in range(3):
        assert apply_template(tokenizer, FIRST, tokenize=False) == "w1"
    assert len(forks) == 1
    tokenizer.chat_template = LOOP
    with pytest.raises(TemplateLimit):
        apply_template(tokenizer, FIRST, tokenize=False)
    assert len(forks) == 2


def test_threads_that_meet_a_template_at_once_try_it_once(monkeypatch):
    tried = []

    def slowly(*_):
        tried.append(1)
        time.sleep(0.1)

    monkeypatch.setattr(chat_templates, "_try", slowly)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    threads = [
        threading.Thread(target=lambda: apply_template(tokenizer, FIRST, tokenize=False))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tried) == 1
