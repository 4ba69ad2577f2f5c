"""Stage 3: prompts and completions in, a reward per completion and reward function out."""

from .arguments import check_reward_kwargs
from .builtin import BUILTINS, completion_text
from .calls import RewardError, RewardTimeout
from .functions import RewardFunction, Rewards
from .loading import RewardFunc, RewardSources, load_reward_functions
from .models import RewardModel, load_reward_model
from .overlap import Scoring

__all__ = [
    "BUILTINS",
    "RewardError",
    "RewardFunc",
    "RewardFunction",
    "RewardModel",
    "RewardSources",
    "RewardTimeout",
    "Rewards",
    "Scoring",
    "check_reward_kwargs",
    "completion_text",
    "load_reward_functions",
    "load_reward_model",
]
