"""Micro-batch -> hidden states -> the fused loss, inside the wrapped model's forward.

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
    reference_logprob_fp8,
    rloo_loss,
    selective_log_softmax,
)
from torch import Tensor, nn

from ..distributed.base import HeadFunction, plain_head
from ..distributed.inside_forward import run_inside
from ..models.adapters import base_causal_lm
from ..records import LossInputs, MicroBatch
from .attention.interface import keep_for_backward, segment_attention
from .head import ModelHead, find_backbone, find_head
from .head_probe import why_own_logits
from .image_features import features_repeated
from .router import load_balancing_loss


class TokenLogps(NamedTuple):
    """Per completion token, packed."""

    logps: Tensor  # (N,) fp32, at the sampling temperature
    entropy: Tensor  # (N,) nats


class Policy:
    """Log-probs and loss of micro-batches by a model, through whatever wraps it (DDP, autocast).

    `model` is the bare model; `wrapped`, given with each call or at first, what the training engine
    made of it. Log-probs are of logits / temperature. `with_head(lm_head, f)`: f(whole weight,
    bias) within the forward. `compile_options`: arguments of torch.compile for the backbone
    (generation keeps the model as it is), None: not compiled. `own_logits`: why the model's own
    logits are taken, [N, V] of a micro-batch, in place of lm_head and kernel; "": they are not;
    None: found out by a trial, for which the model must not have been wrapped yet.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        with_head: Callable[[nn.Linear, HeadFunction], Any] = plain_head,
        compile_options: dict[str, Any] | None = None,
        wrapped: nn.Module | None = None,
        own_logits: str | None = None,
    ):
        self.model, self.temperature, self.with_head = model, temperature, with_head
        self.wrapped = model if wrapped is None else wrapped
        if own_logits is None:
            own_logits = why_own_logits(base_causal_lm(model)) or ""
        self.own_logits = own_logits
        self.num_forwards = 0
        self.num_tokens_run = 0  # positions put through the model, fillers and padding included
        self._compile_options, self._compiled = compile_options, None

    def logps(
        self, batch: MicroBatch, wrapped: nn.Module | None = None, *, fp8_head: bool = False
    ) -> TokenLogps:
        """Log-prob and entropy of every target; for calls under no_grad.

        `fp8_head`: of a frozen reference, its lm_head multiplied in fp8.
        """
        return self._run(lambda: (None, self._logps(batch, fp8_head)), batch, wrapped)[1]

    def why_no_fp8_head(self) -> str | None:
        """Why `logps` cannot be asked for `fp8_head`, or None."""
        if self.own_logits:
            return f"the model's own logits are taken ({self.own_logits})"
        return "its lm_head is not a plain linear layer" if self._head().linear is None else None

    def loss(
        self,
        batch: MicroBatch,
        loss_inputs: LossInputs,
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
            objective, aux = self._loss(batch, loss_inputs, options, router_loss)
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

        wrapped = self.wrapped if wrapped is None else wrapped
        return run_inside(wrapped, self.model, inner), rest

    # Inside the forward

    def _head(self) -> ModelHead:
        head = find_head(base_causal_lm(self.model))
        return head._replace(linear=None) if self.own_logits else head

    def _logps(self, batch: MicroBatch, fp8_head: bool) -> TokenLogps:
        head = self._head()
        if head.linear is None:
            assert not fp8_head, self.why_no_fp8_head()
            return TokenLogps(
                *selective_log_softmax(
                    self._logits(batch)[0],
                    batch.targets,
                    temperature=self.temperature,
                    return_entropy=True,
                )
            )
        hidden, _ = self._hidden(batch)
        op = reference_logprob_fp8 if fp8_head else linear_logprob
        return TokenLogps(*self._at_head(head, op, hidden, batch.targets, return_entropy=True))

    def _loss(
        self, batch: MicroBatch, loss_inputs: LossInputs, options: dict[str, Any], router_loss: bool
    ) -> tuple[Objective, Tensor | None]:
        head = self._head()
        common = {"return_entropy": True, **loss_inputs._asdict(), **options}
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
        aux = load_balancing_loss(self.model, out, batch) if router_loss else None
        return objective, aux

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
        kwargs |= batch.inputs or {}
        # right-padded lines need no mask in a causal model, and positions that count from the
        # line's start are the default
        if batch.segments is None:
            if batch.position_ids is not None:
                kwargs["position_ids"] = batch.position_ids
            with features_repeated(base_causal_lm(self.model), batch.copies):
                return module(input_ids=batch.input_ids, use_cache=False, **kwargs)
        base = base_causal_lm(self.model)
        with segment_attention(base), features_repeated(base, batch.copies):
            return module(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                segments=batch.segments,
                use_cache=False,
                **kwargs,
            )

    def _backbone(self, model: Any) -> Any:
        if self._compile_options is None:
            return find_backbone(model)
        if self._compiled is None:
            backbone = find_backbone(model)
            self._compiled = torch.compile(backbone, dynamic=False, **self._compile_options)
        return self._compiled

    def _at_head(
        self, head: ModelHead, op: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
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


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast would have it in a matrix product."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor
