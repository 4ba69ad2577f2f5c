"""What a model does between its last hidden state and the softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule


class ModelHead(NamedTuple):
    """What the model does between its last hidden state and the softmax."""

    linear: nn.Linear | None  # None: only the model's own logits are right
    softcap: float | None
    logit_scale: float


SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def find_head(model: Any) -> ModelHead:
    """The lm_head of a causal language model and the soft-cap and scale its config declares.

    A head that is not a plain linear layer (an adapter on it, say) is left to the model's own
    forward, which makes logits. Whether a model does what is declared, `head_probe` finds out.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = head if _is_linear(head) and find_backbone(model) is not model else None
    softcaps = (getattr(config, name, None) for name in SOFTCAPS)
    scale = 1.0
    for name, divides in (
        ("logit_scale", False),
        ("output_multiplier", False),
        ("lm_head_multiplier", False),
        ("logits_scaling", config.model_type != "hyperclovax"),
    ):
        value = getattr(config, name, None)
        if value is not None:
            scale = 1.0 / value if divides else float(value)
            break
    return ModelHead(linear, next((cap for cap in softcaps if cap is not None), None), scale)


def find_backbone(model: Any) -> Any:
    """What makes the last hidden state; the model itself where there is no such part."""
    backbone = getattr(model, "base_model", model)
    # some families name another part in base_model_prefix than the one they have
    return getattr(model, "model", model) if backbone is model else backbone


def _is_linear(head: Any) -> bool:
    """A plain linear layer; FSDP2 puts a class of its own in front of a module's."""
    return type(head) is nn.Linear or (  # not of a subclass, such as an adapter's
        isinstance(head, FSDPModule) and type(head).__bases__ == (FSDPModule, nn.Linear)
    )
