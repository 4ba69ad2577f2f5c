"""Token ids to find out with what a model is like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def trial_ids(model: Any, num_tokens: int) -> Tensor:  # -> (1, num_tokens), on the CPU
    """The same random ids each time, none of them an image's, or the model's padding: some families
    (RoBERTa, XGLM) give padding within a prompt no position of its own, which shifts those behind
    it."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, num_tokens), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    image = getattr(model.config, "image_token_id", None)
    for special in (padding, image, padding):  # the next id after one may be the other
        if special is not None:
            ids = ids.where(ids != special, (ids + 1) % config.vocab_size)
    return ids
