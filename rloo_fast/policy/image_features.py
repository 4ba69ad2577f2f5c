"""An image runs through its tower once for all completions of its prompt, also where each of them
has a line of its own: what the tower makes of it is repeated, and its gradients add up.

A model finds features by its `get_image_features`, and puts them into the places of the image's
token one after another: the features of a prompt are as many rows as it has of these tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..models.vision import image_token_of
from ..records import ImageCopies


@contextmanager
def features_repeated(model: Any, copies: ImageCopies | None) -> Iterator[None]:
    """Inside, `model` is given every image once, and finds its features as often as the lines
    have it; None: as it is given them.

    Raises ValueError for features that are not one row a token.
    """
    tower: Any = getattr(model, "model", model)  # whose forward asks for the features
    if copies is None or not hasattr(tower, "get_image_features"):
        yield
        return
    name = "get_image_features"
    token, own, held = image_token_of(model.config), getattr(tower, name), vars(tower).get(name)
    assert token is not None, type(model).__name__  # an ImageReader was made of it
    counts = [(ids.count(token), times) for ids, times in copies]

    def found(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.pooler_output = _repeated(out.pooler_output, counts)
        if getattr(out, "deepstack_features", None) is not None:
            out.deepstack_features = [_repeated(f, counts) for f in out.deepstack_features]
        return out

    setattr(tower, name, found)
    try:
        yield
    finally:
        delattr(tower, name)  # the class's own again
        if held is not None:
            setattr(tower, name, held)


def _repeated(features: Any, counts: list[tuple[int, int]]) -> Any:
    """Features of all prompts -> the same, those of each prompt as often as it says. A tensor of
    (tokens, D) or of (images, tokens of each, D), or a list of such by image."""
    parts = features if isinstance(features, list | tuple) else [features]
    rows = torch.cat([part.flatten(0, -2) for part in parts])
    ends = list(accumulate((count for count, _ in counts), initial=0))
    if ends[-1] != len(rows):
        raise ValueError(f"it makes {len(rows)} features of {ends[-1]} tokens of images")
    blocks = [rows[start:end] for start, end in pairwise(ends)]
    often = zip(blocks, counts, strict=True)
    lined = torch.cat([block for block, (_, times) in often for _ in range(times)])
    if isinstance(features, Tensor):
        return lined.view(-1, *features.shape[1:])
    return (lined,)
