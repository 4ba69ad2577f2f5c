"""Prompts and pairs of texts in; which text is better, and a model's win rate, out."""

from .answers import Answers
from .compare import TIE, Judge, JudgeError, Judgement, Verdict, compare
from .endpoint import OpenAIJudge
from .figures import summarize, wilson
from .local import RewardModelJudge, load_function
from .registry import JUDGES, JudgeKind, JudgeSettings, judge_kind
from .rouge import RougeJudge, mean_rouge, rouge

__all__ = [
    "JUDGES",
    "TIE",
    "Answers",
    "Judge",
    "JudgeError",
    "JudgeKind",
    "JudgeSettings",
    "Judgement",
    "OpenAIJudge",
    "RewardModelJudge",
    "RougeJudge",
    "Verdict",
    "compare",
    "judge_kind",
    "load_function",
    "mean_rouge",
    "rouge",
    "summarize",
    "wilson",
]
