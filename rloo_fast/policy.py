"""Stage 5: micro-batch -> hidden states -> completion log-probs, inside the model's forward.

The backbone runs on the whole batch, the lm_head only on the positions that predict a completion
token, so logits of prompts and padding are never made, and [N, V] never held (`linear_logprob`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rloo_kernels import linear_logprob, selective_log_softmax
from torch import Tensor, nn

from .models import base_causal_lm
from .types import MicroBatch, Samples


class TokenScores(NamedTuple):
    """Per completion token, packed; `aux_loss` is a mixture-of-experts model's, else None."""

    logps: Tensor  # (N,) fp32, at the sampling temperature
    entropy: Tensor  # (N,) nats
    aux_loss: Tensor | None


class Head(NamedTuple):
    """What the model does between its last hidden state and the softmax."""

    linear: nn.Module | None  # None: only the model's own logits are right
    softcap: float | None
    logit_scale: float


def find_head(model: Any) -> Head:
    """The lm_head of a causal language model and the soft-cap and scale its config declares.

    A head that is not a plain linear layer (an adapter on it, say) is left to the model's own
    forward, which makes logits.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, "base_model", model)
    linear = head if type(head) is nn.Linear and backbone is not model else None
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
    return Head(linear, getattr(config, "final_logit_softcapping", None), scale)


def router_coef(model: nn.Module, coef: float | None) -> float:
    """Weight of the load-balancing loss: `coef`, or what the model's config declares; 0 without
    one.

    Raises ValueError if a weight is asked for and the model has no router.
    """
    config = base_causal_lm(model).config.get_text_config()
    has_router = hasattr(config, "output_router_logits")
    if coef and not has_router:
        raise ValueError(
            f"router_aux_loss_coef={coef}, but {type(model).__name__} has no router whose load "
            "could be balanced: leave it out."
        )
    if not has_router:
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if coef is None else coef)


class Policy:
    """Scores micro-batches with a model through whatever wraps it (DDP, autocast).

    `model` is the bare model, `wrapped` what the training engine made of it. Log-probs are of
    logits / temperature. `aux_loss` asks a mixture-of-experts model for its load-balancing loss.
    """

    def __init__(self, model: nn.Module, *, temperature: float, aux_loss: bool = False):
        self.model, self.temperature, self.aux_loss = model, temperature, aux_loss
        self.num_forwards = 0

    def __call__(self, batch: MicroBatch, wrapped: nn.Module | None = None) -> TokenScores:
        self.num_forwards += 1
        if wrapped is None or wrapped is self.model:
            return self._forward(batch)
        return run_inside(wrapped, self.model, self._forward, batch)

    def _forward(self, batch: MicroBatch) -> TokenScores:
        model = base_causal_lm(self.model)
        head = find_head(model)
        kwargs: dict[str, Any] = {"use_cache": False}
        if self.aux_loss:
            kwargs["output_router_logits"] = True
        # right-padded rows need no mask in a causal model: no real token can see the padding
        # and positions count from the row's start, which is the default
        if head.linear is None:
            out = model(input_ids=batch.input_ids, **kwargs)
            logits = out.logits.flatten(0, 1)[batch.logit_index]
            scores = selective_log_softmax(
                logits, batch.targets, temperature=self.temperature, return_entropy=True
            )
        else:
            out = model.base_model(input_ids=batch.input_ids, **kwargs)  # pyright: ignore
            hidden = out.last_hidden_state.flatten(0, 1)[batch.logit_index]
            weight, bias = head.linear.weight, head.linear.bias
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)  # pyright: ignore
                bias = bias.to(dtype) if bias is not None else None  # pyright: ignore
            scores = linear_logprob(
                hidden.to(weight.dtype),  # pyright: ignore
                weight,  # pyright: ignore
                batch.targets,
                bias=bias,  # pyright: ignore
                temperature=self.temperature,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                return_entropy=True,
            )
        aux = self._router_loss(model, out, batch) if self.aux_loss else None
        return TokenScores(scores[0], scores[1].detach(), aux)

    @staticmethod
    def _router_loss(model: Any, out: Any, batch: MicroBatch) -> Tensor:
        """Load-balancing loss over the real tokens (Switch Transformer, arXiv:2101.03961)."""
        # one function serves every mixture-of-experts family of transformers
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = model.config.get_text_config()
        num_experts = getattr(config, "num_local_experts", None) or config.num_experts
        loss = load_balancing_loss_func(
            out.router_logits, num_experts, config.num_experts_per_tok, batch.attention_mask
        )
        assert isinstance(loss, Tensor), "the model returned no router logits"
        return loss


def run_inside(
    wrapped: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any
) -> Any:
    """function(*args) as `module`'s forward in one call of `wrapped`, so that its hooks fire."""
    own = module.__dict__.get("forward")  # accelerate may have put its own there

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            module.__dict__.pop("forward", None)

    def once(*a: Any, **k: Any) -> Any:
        restore()
        return function(*a, **k)

    module.forward = once
    try:
        return wrapped(*args)
    finally:
        restore()


def padded_batch(
    samples: Samples, rows: list[int], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> MicroBatch:
    """Rows of `samples` as prompt | completion | padding, positions counted from the prompt."""
    prompts = [samples.prompt_ids[r] for r in rows]
    completions = [samples.completion_ids[r] for r in rows]
    counted = samples.cu_seqlens.diff()[torch.tensor(rows)]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    multiple = pad_to_multiple_of or 1
    width = -(-width // multiple) * multiple
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    index, targets = [], []
    for r, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        length = len(prompt) + len(completion)
        input_ids[r, :length] = torch.tensor(prompt + completion)
        mask[r, :length] = 1
        n = int(counted[r])  # 0 for a masked row
        first = r * width + len(prompt) - 1
        index.append(torch.arange(first, first + n))
        targets.append(input_ids[r, len(prompt) : len(prompt) + n])
    return MicroBatch(
        rows=rows,
        input_ids=input_ids,
        attention_mask=mask,
        logit_index=torch.cat(index),
        targets=torch.cat(targets),
        cu_seqlens=torch.cat([counted.new_zeros(1), counted.cumsum(0)]),
    )
