"""The reference model: a frozen copy of the policy, or the policy with its first weights put back.

A policy with adapters trains few of its weights. Its reference is the policy itself, computed with
these as they were at the start: true for every kind of adapter, whatever it trains (biases, whole
modules, rows of embeddings) and whether or not it starts as the base model does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.liger import apply_liger_kernel

from ..distributed.gathering import gathered, parts, set_whole
from ..distributed.zero import copy_split
from .adapters import check_no_sync, is_peft_model

logger = logging.getLogger(__name__)

LARGE = 2**28  # bytes of start weights that are worth a line in the log


def make_reference(
    model: nn.Module,
    *,
    beta: float,
    sync_ref_model: bool = False,
    use_liger_kernel: bool = False,
    liger_kernel_config: dict[str, bool] | None = None,
) -> nn.Module | None:
    """A frozen copy of the policy as it is now; None without KL, or with adapters (StartWeights).

    A copy, not a second load: a policy passed as an object may differ from what its name loads.
    """
    if beta == 0:
        return None
    if is_peft_model(model):
        check_no_sync(sync_ref_model)
        return None
    is_split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    reference = copy_split(model) if is_split else copy.deepcopy(model)
    reference.requires_grad_(False).eval()
    if use_liger_kernel:  # the Trainer applies them to the policy alone
        apply_liger_kernel(reference, liger_kernel_config)
    return reference


class StartWeights:
    """The trained weights of a policy as they were when `take` was called.

    `in_place()` exchanges them with the present ones, bit for bit, in memory: it takes one tensor
    more than the copy. Of a model that an engine splits, every process holds its own share.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._held: dict[str, list[Tensor]] = {}

    @property
    def is_taken(self) -> bool:
        return bool(self._held)

    @torch.no_grad()
    def take(self) -> None:
        """Copy what is trained, as it is now."""
        self._held = {n: [part.clone() for part in parts(p)] for n, p in self._trained()}
        size = sum(part.nbytes for held in self._held.values() for part in held)
        if size >= LARGE:
            logger.info(
                "The reference keeps a copy of the weights that are trained: %.2f GiB on each "
                "process. beta=0 does without.",
                size / 2**30,
            )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model computes with the start weights.

        Raises ValueError for a weight that is trained only since the copy was taken.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters():
            held = self._held[name]
            for i, part in enumerate(parts(parameter)):
                now = part.clone()
                part.copy_(held[i])
                held[i] = now

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that are held, and no others are trained."""
        if new := [name for name, _ in self._trained() if name not in self._held]:
            raise ValueError(
                f"{new[0]} is trained, but was frozen when the run began, so that the reference "
                "has no copy of it: unfreeze it before the trainer is made, or set beta=0."
            )
        return [(n, p) for n, p in self.model.named_parameters() if n in self._held]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    # Checkpoints

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """The full tensors, on the CPU: {} where `keep` is False. Every process calls."""
        kept = {}
        with self.in_place():
            for name, parameter in self._parameters():
                (whole,) = gathered([parameter])
                if keep:
                    kept[name] = whole.cpu().clone()
        return kept

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """What a process that kept it got of `state_dict` in the run that is resumed."""
        self.take()
        if missing := self._held.keys() - state.keys():
            raise ValueError(
                f"the checkpoint holds no start weights of {min(missing)}: resume with the model "
                "and the adapters of the run that saved it."
            )
        with self.in_place():
            for name, parameter in self._parameters():
                set_whole(parameter, state[name])


def start_weights(model: nn.Module) -> StartWeights:
    """Those of a model with adapters; one object for each model, so that all find the same."""
    found = model.__dict__.get("_rloo_start_weights")
    if found is None:
        found = model.__dict__["_rloo_start_weights"] = StartWeights(model)
    return found


@contextmanager
def reference_weights(model: nn.Module) -> Iterator[None]:
    """While open, a model with adapters computes as its reference does."""
    assert is_peft_model(model), type(model)
    start: Any = start_weights(model)
    with start.in_place():
        yield
