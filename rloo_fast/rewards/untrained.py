"""The reward of recipe smoke_2024: a reward model that was never trained."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification

from . import RewardModel


class UntrainedHead(RewardModel):
    """r_i = what a head drawn from `seed` reads from the language model `model`: no signal.

    By its own name such a model is refused as reward model, as its rewards would be noise.
    """

    def __init__(self, model: str = "EleutherAI/pythia-14m", seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        super().__init__(classifier)
