"""The inputs of the loss benchmarks, their float64 references, and the correctness gate.

One job: given what a policy forward yields and what the rollout scored, the RLOO loss (KL penalty
in the reward, leave-one-out, on-policy) and its gradients.

    KL_i = sum_t (logp_it - ref_it)      R_i = r_i - beta KL_i      A_i = R_i - mean_{j != i} R_j
    loss = - mean_i min(rho_i A_i, clip(rho_i, 0.8, 1.2) A_i)       rho_i = exp(sum_t logp_it - sg)

Letters: N rows (tokens), D hidden, V vocabulary, R = N / 64 completions, K = 4 per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

TOKENS_PER_COMPLETION = 64
NUM_GENERATIONS = 4
BETA = 0.05
EPSILON = 0.2
LOGIT_STD = 3.0  # tokens sampled from such logits have the spread of log-probs of a trained model
BLOCK_BYTES = 256 << 20  # what one piece of logits may take while inputs or references are made

# Added to twice eager's own error, which may be at the rounding of fp32 while another provider's
# output is rounded to the inputs' dtype: one unit in its last place (fp32: of a sum of many).
ATOL = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass
class Batch:
    """Packed rows of R completions; `leaves` are what gradients are asked for."""

    leaves: tuple[Tensor, ...]  # (hidden (N, D), weight (V, D)) or (logits (N, V),)
    token_ids: Tensor  # (N,)
    rewards: Tensor  # (R,) fp32
    ref_logps: Tensor  # (N,) fp32
    cu_seqlens: Tensor  # (R + 1,)

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def vocab_size(self) -> int:
        return self.leaves[1].shape[0] if len(self.leaves) == 2 else self.leaves[0].shape[-1]

    def save(self, path: str) -> None:
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

    @classmethod
    def load(cls, path: str) -> Batch:
        batch = cls(**torch.load(path))
        return replace(batch, leaves=tuple(x.requires_grad_() for x in batch.leaves))


Objective = Callable[[Tensor, Batch], Tensor]  # log-probs (N,) -> loss


def rloo_loss_torch(logps: Tensor, batch: Batch) -> Tensor:
    """The loss of the module's docstring from log-probs (N,), in plain torch, in their dtype."""
    logps = logps.view(-1, TOKENS_PER_COMPLETION)
    kl = (logps.detach() - batch.ref_logps.view_as(logps)).sum(1)
    rewards = batch.rewards.to(logps.dtype) - BETA * kl
    groups = rewards.view(-1, NUM_GENERATIONS)
    others = (groups.sum(1, keepdim=True) - groups) / (NUM_GENERATIONS - 1)
    advantages = (groups - others).flatten()
    ratio = torch.exp((logps - logps.detach()).sum(1))
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def _blocks(num_rows: int, row_bytes: int) -> list[slice]:
    size = max(1, BLOCK_BYTES // row_bytes)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _sample(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token of softmax(logits) per row by its inverse cumulative distribution, and its logp."""
    logps = logits.float().log_softmax(-1)
    u = torch.rand(len(logps), 1, device=logps.device, generator=generator)
    cumulative = logps.exp().cumsum(-1)
    ids = torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_(max=logps.shape[1] - 1)
    return ids.squeeze(1), logps.gather(1, ids).squeeze(1)


def _finish(leaves, ids: Tensor, logps: Tensor, generator: torch.Generator) -> Batch:
    device, num_rows = ids.device, len(ids)
    num_completions = num_rows // TOKENS_PER_COMPLETION
    noise = torch.randn(num_rows, device=device, generator=generator)
    return Batch(
        leaves=tuple(x.requires_grad_() for x in leaves),
        token_ids=ids,
        rewards=torch.randn(num_completions, device=device, generator=generator),
        ref_logps=logps + 0.1 * noise,
        cu_seqlens=torch.arange(num_completions + 1, device=device) * TOKENS_PER_COMPLETION,
    )


def check_rows(num_rows: int) -> None:
    """Raise ValueError unless the rows make whole groups."""
    group = TOKENS_PER_COMPLETION * NUM_GENERATIONS
    if num_rows < group or num_rows % group:
        raise ValueError(
            f"rows must be a multiple of {group} ({NUM_GENERATIONS} completions of "
            f"{TOKENS_PER_COMPLETION} tokens per group), got {num_rows}."
        )


def linear_batch(
    num_rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Batch:
    """Random hidden states and lm_head; the tokens are sampled from the softmax they define."""
    check_rows(num_rows)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(num_rows, hidden, device=device, generator=generator).to(dtype)
    w = torch.randn(vocab, hidden, device=device, generator=generator)
    w = w.mul_(LOGIT_STD / hidden**0.5).to(dtype)
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    logps = torch.empty(num_rows, device=device)
    for rows in _blocks(num_rows, 4 * vocab):
        ids[rows], logps[rows] = _sample(x[rows] @ w.T, generator)
    return _finish((x, w), ids, logps, generator)


def logits_batch(
    num_rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Batch:
    """Random logits, and tokens sampled from their softmax."""
    check_rows(num_rows)
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(num_rows, vocab, dtype=dtype, device=device)
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    logps = torch.empty(num_rows, device=device)
    for rows in _blocks(num_rows, 4 * vocab):
        shape = logits[rows].shape
        logits[rows] = LOGIT_STD * torch.randn(shape, device=device, generator=generator)
        ids[rows], logps[rows] = _sample(logits[rows], generator)
    return _finish((logits,), ids, logps, generator)


@dataclass
class Reference:
    """Float64 results by name; gradients of leaves are kept in fp32, whose rounding is 6e-8."""

    outputs: dict[str, Tensor]
    loss_scale: float = 1.0  # mean |A_i|: on-policy the loss itself is a sum of advantages, near 0

    def errors(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """|loss - ref| / mean |A|, and ||x - ref|| / ||ref|| of everything else."""
        return {
            name: self._loss_error(value) if name == "loss" else _norm_error(value, ref)
            for name, value, ref in ((n, v, self.outputs[n]) for n, v in outputs.items())
        }

    def _loss_error(self, loss: Tensor) -> float:
        return abs(loss.item() - self.outputs["loss"].item()) / self.loss_scale


def _norm_error(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        return float("inf")
    rows = _blocks(len(reference), 8 * (reference[0].numel() if reference.ndim > 1 else 1))
    difference = square = 0.0
    for r in rows:
        x, ref = value[r].detach().double(), reference[r].double()
        difference += (x - ref).square().sum().item()
        square += ref.square().sum().item()
    return (difference / square) ** 0.5


def _loss_and_coefficients(
    logps: Tensor, batch: Batch, objective: Objective = rloo_loss_torch
) -> tuple[Tensor, Tensor, float]:
    """(loss, dL/dlogp (N,), mean |A|) in float64."""
    logps = logps.detach().requires_grad_()
    loss = objective(logps, batch)
    (coefficients,) = torch.autograd.grad(loss, logps)
    # on-policy dL/dlogp_it = -A_i / R
    scale = coefficients.abs().mean().item() * len(batch.rewards)
    return loss.detach(), coefficients, scale


@torch.no_grad()
def linear_reference(batch: Batch, objective: Objective = rloo_loss_torch) -> Reference:
    """Float64 loss and gradients, block by block of the vocabulary: 8NDV, never [N, V]."""
    hidden, weight = batch.leaves
    num_rows, vocab = len(hidden), len(weight)
    x = hidden.double()
    columns = _blocks(vocab, 8 * num_rows)
    log_z = torch.full((num_rows,), float("-inf"), dtype=torch.float64, device=x.device)
    for cols in columns:
        z = x @ weight[cols].double().T
        log_z = torch.logaddexp(log_z, z.logsumexp(-1))
    target = (x * weight[batch.token_ids].double()).sum(-1)
    with torch.enable_grad():
        loss, c, scale = _loss_and_coefficients(target - log_z, batch, objective)
    grad_hidden = torch.zeros_like(x)
    grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    for cols in columns:
        w = weight[cols].double()
        d = torch.exp(x @ w.T - log_z[:, None]).mul_(-c[:, None])
        local = batch.token_ids - cols.start
        inside = ((local >= 0) & (local < len(w))).nonzero().squeeze(1)
        d[inside, local[inside]] += c[inside]
        grad_hidden += d @ w
        grad_weight[cols] = (d.T @ x).float()
    outputs = {"loss": loss, "grad_hidden": grad_hidden.float(), "grad_weight": grad_weight}
    return Reference(outputs, scale)


@torch.no_grad()
def logits_reference(batch: Batch) -> Reference:
    """Float64 log-probs, entropies, loss and gradient of the logits, block by block of rows."""
    (logits,) = batch.leaves
    ids = batch.token_ids[:, None]
    logps = torch.empty(len(ids), dtype=torch.float64, device=ids.device)
    entropy = torch.empty_like(logps)
    rows_list = _blocks(len(ids), 8 * logits.shape[1])
    for rows in rows_list:
        log_p = logits[rows].double().log_softmax(-1)
        logps[rows] = log_p.gather(1, ids[rows]).squeeze(1)
        entropy[rows] = -(log_p.exp() * log_p).sum(-1)
    with torch.enable_grad():
        loss, c, scale = _loss_and_coefficients(logps, batch)
    grad = torch.empty(logits.shape, dtype=torch.float32, device=ids.device)
    for rows in rows_list:
        d = logits[rows].double().softmax(-1).mul_(-c[rows, None])
        grad[rows] = d.scatter_add_(1, ids[rows], c[rows, None]).float()
    outputs = {"loss": loss, "grad_logits": grad, "logps": logps, "entropy": entropy}
    return Reference(outputs, scale)


def refusal(
    errors: dict[str, float], eager_errors: dict[str, float], dtype: torch.dtype
) -> str | None:
    """Why a provider gets no figures: error > 2 x eager's error in the same dtype + atol."""
    for name, error in errors.items():
        bound = 2 * eager_errors[name] + ATOL[dtype]
        if not error <= bound:  # also catches nan
            return f"wrong: error of {name} {error:.1e}, allowed {bound:.1e}"
    return None
