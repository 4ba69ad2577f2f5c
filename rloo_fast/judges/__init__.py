"""Judges: which of two texts is better, asked of a server, a reward model, a function, or ROUGE."""

from .answers import Answers
from .compare import TIE, Judge, JudgeError, Judgement, Verdict, compare
from .endpoint import OpenAIJudge
from .figures import summarize, wilson
from .local import RewardModelJudge, load_function
from .rouge import RougeJudge, mean_rouge, rouge

__all__ = [
    "TIE",
    "Answers",
    "Judge",
    "JudgeError",
    "Judgement",
    "OpenAIJudge",
    "RewardModelJudge",
    "RougeJudge",
    "Verdict",
    "compare",
    "load_function",
    "mean_rouge",
    "rouge",
    "summarize",
    "wilson",
]
