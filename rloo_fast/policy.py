"""Stage 5: micro-batch -> hidden states -> the fused loss, inside the wrapped model's forward.

The backbone runs on the whole micro-batch, the lm_head only on the positions that predict a counted
completion token, and neither ever makes [N, V] logits: `fused_linear_rloo_loss` where a gradient is
wanted, `linear_logprob` where only log-probs are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rloo_kernels import (
    Objective,
    fused_linear_rloo_loss,
    linear_logprob,
    rloo_loss,
    selective_log_softmax,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .attention import keep_for_backward, segment_attention
from .models import base_causal_lm
from .parallel.base import HeadFunction, plain_head
from .redirect import run_inside
from .types import Credit, MicroBatch


class TokenScores(NamedTuple):
    """Per completion token, packed."""

    logps: Tensor  # (N,) fp32, at the sampling temperature
    entropy: Tensor  # (N,) nats


class Head(NamedTuple):
    """What the model does between its last hidden state and the softmax."""

    linear: nn.Linear | None  # None: only the model's own logits are right
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
    linear = head if _is_linear(head) and backbone is not model else None
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
    """Log-probs and loss of micro-batches by a model, through whatever wraps it (DDP, autocast).

    `model` is the bare model; `wrapped`, given with each call or at first, what the training engine
    made of it. Log-probs are of logits / temperature. `with_head(lm_head, f)`: f(whole weight,
    bias) within the forward. `compile_options`: arguments of torch.compile for the backbone
    (generation keeps the model as it is), None: not compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        with_head: Callable[[nn.Linear, HeadFunction], Any] = plain_head,
        compile_options: dict[str, Any] | None = None,
        wrapped: nn.Module | None = None,
    ):
        self.model, self.temperature, self.with_head = model, temperature, with_head
        self.wrapped = wrapped or model
        self.num_forwards = 0
        self.num_tokens_run = 0  # positions put through the model, fillers and padding included
        self._compile_options, self._compiled = compile_options, None

    def score(self, batch: MicroBatch, wrapped: nn.Module | None = None) -> TokenScores:
        """Log-prob and entropy of every target; for calls under no_grad."""
        return self._run(lambda: (None, self._score(batch)), batch, wrapped)[1]

    def loss(
        self,
        batch: MicroBatch,
        credit: Credit,
        options: dict[str, Any],
        wrapped: nn.Module | None = None,
        *,
        router_loss: bool = False,
    ) -> tuple[Objective, Tensor | None]:
        """The RLOO loss of the micro-batch, with its `logps` and `entropy`, and, if asked for, a
        mixture-of-experts model's load-balancing loss.

        `options` are those of `fused_linear_rloo_loss`.
        """

        def forward() -> tuple[tuple[Tensor, Tensor | None], Objective]:
            objective, aux = self._loss(batch, credit, options, router_loss)
            return (objective.loss, aux), objective

        (loss, aux), objective = self._run(forward, batch, wrapped)
        return objective._replace(loss=loss), aux

    def _run(
        self, forward: Callable[[], tuple[Any, Any]], batch: MicroBatch, wrapped: nn.Module | None
    ) -> tuple[Any, Any]:
        """What `forward` returns: first what goes through the engine's hooks, then the rest."""
        self.num_forwards += 1
        self.num_tokens_run += batch.input_ids.numel()
        rest = None

        def inner() -> Any:
            nonlocal rest
            differentiable, rest = forward()
            return differentiable

        return run_inside(wrapped or self.wrapped, self.model, inner), rest

    # Inside the forward

    def _score(self, batch: MicroBatch) -> TokenScores:
        head = find_head(base_causal_lm(self.model))
        if head.linear is None:
            return TokenScores(
                *selective_log_softmax(
                    self._logits(batch)[0],
                    batch.targets,
                    temperature=self.temperature,
                    return_entropy=True,
                )
            )
        hidden, _ = self._hidden(batch)
        return TokenScores(
            *self._at_head(head, linear_logprob, hidden, batch.targets, return_entropy=True)
        )

    def _loss(
        self, batch: MicroBatch, credit: Credit, options: dict[str, Any], router_loss: bool
    ) -> tuple[Objective, Tensor | None]:
        head = find_head(base_causal_lm(self.model))
        common = {"return_entropy": True, **credit._asdict(), **options}
        if head.linear is None:
            logits, out = self._logits(batch, router_loss)
            objective = rloo_loss(
                logits, batch.targets, batch.cu_seqlens, temperature=self.temperature, **common
            )
        else:
            hidden, out = self._hidden(batch, router_loss)
            objective = self._at_head(
                head, fused_linear_rloo_loss, hidden, batch.targets, batch.cu_seqlens, **common
            )
        return objective, self._router_loss(out, batch) if router_loss else None

    def _hidden(self, batch: MicroBatch, router_logits: bool = False) -> tuple[Tensor, Any]:
        """(hidden states (N, D) that predict the targets, model output)."""
        model = base_causal_lm(self.model)
        out = self._call(self._backbone(model), batch, router_logits)
        hidden = out.last_hidden_state
        if batch.segments is not None and hidden.requires_grad:
            keep_for_backward(hidden, model)
        return hidden.flatten(0, 1)[batch.logit_index], out

    def _logits(self, batch: MicroBatch, router_logits: bool = False) -> tuple[Tensor, Any]:
        """(logits (N, V), model output) by the model's own head."""
        model = base_causal_lm(self.model)
        if batch.segments is None:
            out = self._call(model, batch, router_logits)
            return out.logits.flatten(0, 1)[batch.logit_index], out
        out = self._call(model, batch, router_logits, logits_to_keep=batch.logit_index)
        if out.logits.requires_grad:
            keep_for_backward(out.logits, model)
        return out.logits[0], out

    def _call(self, module: Any, batch: MicroBatch, router_logits: bool, **kwargs: Any) -> Any:
        if router_logits:
            kwargs["output_router_logits"] = True
        # right-padded lines need no mask in a causal model, and positions that count from the
        # line's start are the default
        if batch.segments is None:
            return module(input_ids=batch.input_ids, use_cache=False, **kwargs)
        with segment_attention(base_causal_lm(self.model)):
            return module(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                segments=batch.segments,
                use_cache=False,
                **kwargs,
            )

    def _backbone(self, model: Any) -> Any:
        if self._compile_options is None:
            return model.base_model
        if self._compiled is None:
            self._compiled = torch.compile(model.base_model, dynamic=False, **self._compile_options)
        return self._compiled

    def _at_head(
        self, head: Head, op: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """op(hidden, weight, *args, ...) with all that the head does."""
        assert head.linear is not None

        def run(weight: Tensor, bias: Tensor | None) -> Any:
            weight = _autocast(weight)
            return op(
                hidden.to(weight.dtype),
                weight,
                *args,
                bias=None if bias is None else _autocast(bias),
                temperature=self.temperature,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                **kwargs,
            )

        return self.with_head(head.linear, run)

    def _router_loss(self, out: Any, batch: MicroBatch) -> Tensor:
        """Load-balancing loss (Switch Transformer, arXiv:2101.03961) over the tokens of all rows: a
        shared prompt's count once for each of its rows."""
        # one function serves every mixture-of-experts family of transformers
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = base_causal_lm(self.model).config.get_text_config()
        num_experts = getattr(config, "num_local_experts", None) or config.num_experts
        loss = load_balancing_loss_func(
            out.router_logits, num_experts, config.num_experts_per_tok, batch.token_weights
        )
        assert isinstance(loss, Tensor), "the model returned no router logits"
        return loss


def _is_linear(head: Any) -> bool:
    """A plain linear layer; FSDP2 puts a class of its own in front of a module's."""
    return type(head) is nn.Linear or (  # not of a subclass, such as an adapter's
        isinstance(head, FSDPModule) and type(head).__bases__ == (FSDPModule, nn.Linear)
    )


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would have it in a matrix product."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor
