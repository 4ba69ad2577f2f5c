"""A model's dropout: set to 0, or found: two forwards that draw differently cannot be compared.

Models keep its rates in many places: in nn.Dropout, in a number of the layer that is read at each
call (`functional.dropout(p=self.dropout)`, layerdrop), in an adapter's dict, in the config. So the
rates are found by their names, and whether any is left by running the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..distributed.gathering import holds_whole_weights
from .adapters import base_causal_lm
from .trial import trial_ids

logger = logging.getLogger(__name__)

# of a trial run: so many tokens that a small rate drops something, and a router's noise swaps
# two experts; the lines as short as any model has positions for
LINES, LENGTH = 16, 32


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the model's modules to 0; those of its config too, where a forward
    still draws without that (the config is saved with the model)."""
    for owner, name in _rates(model):
        _set_to_zero(owner, name)
    in_config = [rate for config in _configs(model) for rate in _rates_of(config)]
    if in_config and _draws(model):
        for owner, name in in_config:
            _set_to_zero(owner, name)


def has_dropout(model: nn.Module) -> bool:
    """True if a forward in train mode draws random numbers that change its logits.

    Of a model whose weights are not whole on this process, True if a module has a dropout rate.
    """
    if has_dropout_rates(model):
        return True
    if not _draws(model):
        return False
    logger.info(
        "Two forwards in train mode differ, although no module has a dropout rate (a router's "
        "jitter noise, for one, does that): the model is treated as one with dropout."
    )
    return True


def has_dropout_rates(model: nn.Module) -> bool:
    """True if a module has a dropout rate other than 0; nothing is run."""
    return next(_rates(model), None) is not None


def _rates(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    for module in model.modules():
        yield from _rates_of(module)


def _rates_of(owner: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """(dict, key) of each dropout rate > 0 among the attributes of a module or a config."""
    is_dropout = "drop" in type(owner).__name__.lower()  # nn.Dropout.p, DropPath.prob
    for name, value in list(vars(owner).items()):
        if "drop" not in name.lower() and not (is_dropout and name in ("p", "prob")):
            continue
        if _is_rate(value):
            yield vars(owner), name
        elif isinstance(value, dict):  # of adapters: their names -> rates
            for key, rate in list(value.items()):
                if _is_rate(rate):
                    yield value, key


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _set_to_zero(owner: dict[str, Any], name: str) -> None:
    owner[name] = 0.0


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The config objects that the modules look at, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def _draws(model: nn.Module) -> bool:
    """Whether the logits of two train-mode forwards differ by their random numbers; False if the
    model cannot be run here."""
    base = base_causal_lm(model)
    if not holds_whole_weights(model):
        return False
    device = next(model.parameters()).device
    ids = trial_ids(base, LINES * LENGTH).view(LINES, LENGTH)
    modes = {module: module.training for module in model.modules()}

    def logits(seed: int) -> tuple[Tensor, bool]:  # (., whether a random number was drawn)
        torch.manual_seed(seed)
        before = _random_states(device)
        found = model(input_ids=ids.to(device), use_cache=False).logits
        after = _random_states(device)
        return found, any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    try:
        model.train()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            first, drew = logits(0)
            if not drew:
                return False
            # random numbers may be drawn and mean nothing (layerdrop=0); and a GPU's sums may
            # differ in their last digits with the same ones
            again, other = logits(0)[0], logits(1)[0]
    except Exception as error:  # a model's code may ask for more than ids, and fail in any way
        logger.info("Dropout was looked for by name alone: a trial forward failed (%s).", error)
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return bool((first - other).abs().max() > 10 * (first - again).abs().max())


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
