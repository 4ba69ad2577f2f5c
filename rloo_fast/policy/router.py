"""The load-balancing loss of mixture-of-experts models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..models.adapters import base_causal_lm
from ..records import MicroBatch


def router_coef(model: nn.Module, coef: float | None) -> float:
    """Weight of the load-balancing loss: `coef`, or what the model's config declares; 0 without
    one.

    Raises ValueError if a weight is asked for and the model has no router.
    """
    config = base_causal_lm(model).config.get_text_config()
    has_router = hasattr(config, "output_router_logits")
    if coef and not has_router:
        raise ValueError(
            f"`router_aux_loss_coef` is set to {coef} but {type(model).__name__} is not a "
            "Mixture-of-Experts model that returns its router logits: leave it out."
        )
    if not has_router:
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if coef is None else coef)


def load_balancing_loss(model: nn.Module, out: Any, batch: MicroBatch) -> Tensor:
    """() of the model's output `out` (Switch Transformer, arXiv:2101.03961), over the tokens of all
    rows: a shared prompt's count once for each of its rows."""
    # one function serves every mixture-of-experts family of transformers
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = base_causal_lm(model).config.get_text_config()
    num_experts = getattr(config, "num_local_experts", None) or config.num_experts
    loss = load_balancing_loss_func(
        out.router_logits, num_experts, config.num_experts_per_tok, batch.token_weights
    )
    assert isinstance(loss, Tensor), "the model returned no router logits"
    return loss
