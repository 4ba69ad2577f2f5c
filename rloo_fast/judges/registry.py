"""The judges of `rloo-fast eval judge --judge NAME`, in one table that help and checks read.

A judge of one's own needs no entry: "module:function" and "file.py:function" name one, see
`compare.py` for what it is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..rewards import load_reward_model
from .answers import Answers
from .compare import Judge
from .endpoint import OpenAIJudge
from .local import RewardModelJudge, load_function
from .prompt import read_template
from .rouge import RougeJudge


@dataclass(frozen=True)
class JudgeSettings:
    """All that a judge may be made from: the values of --judge_*, and what the texts are."""

    model: str | None = None
    base_url: str | None = None
    prompt: str | None = None  # a file
    marker: str | None = None
    request: Mapping[str, Any] | None = None
    concurrency: int = 8
    retries: int = 6
    timeout_s: float = 120.0
    label: int | str | None = None
    position: str = "last"
    dtype: str = "auto"
    trust_remote_code: bool = False
    batch_size: int = 16
    # a prompt's text -> its reference texts; None: these are what the texts are compared with
    references: Mapping[str, Sequence[str]] | None = None
    answers: Answers = field(default_factory=Answers)


@dataclass(frozen=True)
class JudgeKind:
    """One row of JUDGES. `make` returns None where there is nothing to judge."""

    make: Callable[[JudgeSettings], Judge | None]
    needs: tuple[str, ...] = ()  # options that must be given with it
    takes: tuple[str, ...] = ()  # that may be; beside a judge that does not, they are refused
    needs_references: bool = False  # whatever the texts are compared with


def _openai(settings: JudgeSettings) -> Judge:
    assert settings.base_url is not None
    assert settings.model is not None
    return OpenAIJudge(
        settings.base_url,
        settings.model,
        template=read_template(settings.prompt),
        marker=settings.marker,
        concurrency=settings.concurrency,
        retries=settings.retries,
        timeout_s=settings.timeout_s,
        request=settings.request,
        answers=settings.answers,
    )


def _reward_model(settings: JudgeSettings) -> Judge:
    assert settings.model is not None
    model = load_reward_model(
        settings.model,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        batch_size=settings.batch_size,
        label=settings.label,
        position=settings.position,
    )
    return RewardModelJudge(model)


def _rouge(settings: JudgeSettings) -> Judge | None:
    """None against references: a reference would win by being itself."""
    return None if settings.references is None else RougeJudge(settings.references)


JUDGES: dict[str, JudgeKind] = {
    "openai": JudgeKind(
        _openai,
        needs=("judge_base_url", "judge_model"),
        takes=("judge_prompt", "judge_marker", "judge_kwargs"),
    ),
    "reward_model": JudgeKind(_reward_model, needs=("judge_model",)),
    "rouge": JudgeKind(_rouge, needs_references=True),
}
CHOICES = f"{', '.join(JUDGES)}, module:function or file.py:function"


def judge_kind(name: str) -> JudgeKind:
    """Of JUDGES, or that of a function of the user's. Raises ValueError for any other name."""
    if name in JUDGES:
        return JUDGES[name]
    if ":" in name:
        return JudgeKind(lambda _: load_function(name))
    raise ValueError(f"--judge is {CHOICES}, got {name!r}.")


def refused_options(kind: JudgeKind) -> list[str]:
    """Options of other judges, which this one does not read."""
    known = [name for other in JUDGES.values() for name in (*other.needs, *other.takes)]
    return [name for name in dict.fromkeys(known) if name not in (*kind.needs, *kind.takes)]
