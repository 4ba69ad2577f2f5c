"""Whether a model's logits are its last hidden state times its lm_head, by trying it out.

The trial: the model's own forward on a few tokens, with made-up logits in place of what the lm_head
computes. What reaches the lm_head must be the backbone's last hidden state, and what leaves the
model must be the made-up logits with the scale and soft-cap that `find_head` knows of. These are so
large that any soft-cap bends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.gathering import holds_whole_weights
from ..models.trial import trial_ids
from .head import ModelHead, find_backbone, find_head

# largest difference, as a share of the largest number
TOLERANCE = 1e-3
TOLERANCE_HALF = 2e-2
NUM_TOKENS = 6
LARGEST_LOGIT = 100.0


def why_own_logits(model: Any) -> str | None:
    """Why only the logits that a causal language model makes itself are right, or None.

    A model whose weights are split among processes runs without its backbone; where that fails, the
    head is taken as declared.
    """
    head = find_head(model)
    if head.linear is None:
        return "its lm_head is not a plain linear layer on top of a backbone"
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _compare(model, head, head.linear)
    finally:
        model.train(training)


def _compare(model: Any, head: ModelHead, linear: nn.Linear) -> str | None:
    device, generator = linear.weight.device, torch.Generator().manual_seed(0)
    ids = trial_ids(model, NUM_TOKENS).to(device)
    shape = (1, NUM_TOKENS, linear.out_features)
    made = torch.rand(shape, dtype=torch.float32, generator=generator) * 2 - 1
    made, reached = (made * LARGEST_LOGIT).to(device), list[Tensor]()

    def put_logits(hidden: Tensor) -> Tensor:
        reached.append(hidden)
        return made.to(hidden.dtype)

    backbone, is_whole = find_backbone(model), holds_whole_weights(model)
    stub = _BackboneStub(linear, generator)
    with ExitStack() as replaced:
        replaced.enter_context(_forward_replaced(linear, put_logits))
        if not is_whole:
            replaced.enter_context(_forward_replaced(backbone, stub))
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        except Exception:  # then there are no logits of its own to take
            return None
        if not is_whole and stub.num_calls != 1:  # it runs parts of its backbone by themselves
            return None
        try:
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        except Exception as error:  # a model's code may ask for more, and fail in any way
            sentence = (str(error).strip().splitlines() or ["no message"])[0][:200]
            return f"its backbone cannot be run by itself ({type(error).__name__}: {sentence})"
    if len(reached) != 1:
        return f"its lm_head is run {len(reached)} times in a forward"
    if not _equal(hidden, reached[0]):
        return "what reaches its lm_head is not the backbone's last hidden state"
    if not _equal(_declared(made.to(hidden.dtype), head), logits):
        return "its logits are not the lm_head's with the scale and soft-cap its config declares"
    return None


def _declared(raw: Tensor, head: ModelHead) -> Tensor:
    logits = raw.float() * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _equal(expected: Tensor, found: Tensor) -> bool:
    half = torch.bfloat16 in (expected.dtype, found.dtype) or found.dtype == torch.float16
    tolerance = TOLERANCE_HALF if half else TOLERANCE
    if expected.shape != found.shape:
        return False
    off = (expected.double() - found.double()).abs().max()
    return bool(off <= tolerance * expected.double().abs().max())


class _BackboneStub:
    """In place of a backbone's forward: made-up hidden states, whatever it is called with."""

    def __init__(self, linear: nn.Linear, generator: torch.Generator):
        shape = (1, NUM_TOKENS, linear.in_features)
        made = torch.randn(shape, dtype=torch.float32, generator=generator)
        self.output = _BackboneOutput(made.to(linear.weight.device, linear.weight.dtype))
        self.num_calls = 0

    def __call__(self, *_: Any, **__: Any) -> _BackboneOutput:
        self.num_calls += 1
        return self.output


class _BackboneOutput:
    """What a backbone returns; None for whatever else a head asks it for."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _forward_replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate may have put its own there
    module.forward = function
    try:
        yield
    finally:
        if own is not None:
            module.forward = own
        else:
            del module.__dict__["forward"]
