"""Names, formulas and reductions of everything a run logs.

Rows are completions, of all processes. Two families of names are logged side by side: TRL's current
ones and those of its 2024 trainer (`objective/*`, `policy/*`, `val/*`), the latter without that
trainer's slips: padding is left out of every sum and mean.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor


class Metrics:
    """Values gathered between two logs, averaged when flushed (NaN left out, as in TRL)."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }

    def add(self, mode: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values[mode][name].append(float(value))

    def set_last(self, mode: str, name: str, value: float) -> None:
        """A running total: the newest value is logged, not a mean."""
        self.values[mode][name] = [float(value)]

    def add_sync(self, mode: str, seconds: float, num_bytes: int) -> None:
        """The policy's weights were brought into the rollout engine."""
        self.add(mode, {"time/weight_sync_s": seconds, "sync/gib": num_bytes / 2**30})

    def add_move(self, seconds: float, num_bytes: int) -> None:
        """The trainer's state went to the host for a rollout, and came back."""
        self.add("train", {"memory/move_s": seconds, "memory/moved_gib": num_bytes / 2**30})

    def flush(self, mode: str) -> dict[str, float]:
        means = {}
        for name, values in self.values[mode].items():
            kept = [v for v in values if not math.isnan(v)]
            if kept:
                means[name] = sum(kept) / len(kept)
        self.values[mode].clear()
        return means

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self.values["train"].items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.values["train"].clear()
        self.values["train"].update(state)


def _mean(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return kept.mean().item() if kept.numel() else float("nan")


def _std(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return kept.std().item() if kept.numel() > 1 else float("nan")


def rollout_metrics(
    rows: dict[str, Tensor], reward_names: list[str], num_generations: int, beta: float
) -> dict[str, float]:
    """Metrics of one generation batch from its gathered rows.

    Columns of `rows`: length (tokens), tokens (those that count in the loss), truncated (cut
    before it ended), reward_0.. (NaN: not applicable), reward (weighted sum), score (after penalty,
    normalisation and clip), kl (sum over tokens of logp - ref, whatever the loss), shaped_reward
    (what advantages are made of: score - beta kl, or the score where the KL is in the loss),
    surprisal (sum of -logp; NaN where no pass over the batch was needed before the update). Where
    no token counts, as under mask_truncated_completions, there is no KL: what is made of it is NaN.
    `val/num_eos_tokens` counts the completions that ended, whichever token or stop string did it.
    """
    length, truncated = rows["length"], rows["truncated"].bool()
    ended = length[~truncated]
    ended = ended if len(ended) else length.new_zeros(1)
    num_tokens = rows["tokens"].sum()
    kl = rows["kl"] if num_tokens else torch.full_like(rows["kl"], float("nan"))
    shaped = rows["shaped_reward"].view(-1, num_generations)
    if num_generations > 1:
        spread = torch.stack([g[~g.isnan()].std() if (~g.isnan()).sum() > 1 else g.new_zeros(())
                              for g in shaped])  # fmt: skip
    else:
        spread = shaped.new_zeros(len(shaped))
    out = {
        "completions/mean_length": length.mean().item(),
        "completions/min_length": length.min().item(),
        "completions/max_length": length.max().item(),
        "completions/clipped_ratio": truncated.double().mean().item(),
        "completions/mean_terminated_length": ended.mean().item(),
        "completions/min_terminated_length": ended.min().item(),
        "completions/max_terminated_length": ended.max().item(),
        "reward": _mean(rows["reward"]),
        "reward_std": _std(rows["reward"]),
        "frac_reward_zero_std": torch.isclose(spread, torch.zeros_like(spread), atol=1e-6)
        .double()
        .mean()
        .item(),
        "objective/scores": _mean(rows["score"]),
        "objective/kl": kl.mean().item(),
        "objective/non_score_reward": -beta * kl.mean().item(),
        "objective/rlhf_reward": _mean(rows["score"] - beta * kl),
        "objective/entropy": _mean(rows["surprisal"]),
        "val/num_eos_tokens": (~truncated).sum().item(),
    }
    for i, name in enumerate(reward_names):
        out[f"rewards/{name}/mean"] = _mean(rows[f"reward_{i}"])
        out[f"rewards/{name}/std"] = _std(rows[f"reward_{i}"])
    if beta != 0:
        out["kl"] = (kl.sum() / num_tokens).item()
    return out | sampling_metrics(rows) | staleness_metrics(rows)


def staleness_metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """How far the policy was ahead of those that sampled, in versions; nothing where all rows are
    of the policy's own weights.

    Columns of `rows`: staleness_sum and staleness_max over a row's counted tokens, stale_tokens
    (those of older weights), num_versions (that a row's tokens are of), tokens. Means are over
    counted tokens; of rows without, none is known.
    """
    if not rows["stale_tokens"].sum():
        return {}
    num_tokens, has_tokens = rows["tokens"].sum(), rows["tokens"] > 0
    return {
        "staleness/mean": (rows["staleness_sum"].sum() / num_tokens).item(),
        "staleness/max": rows["staleness_max"].max().item(),
        "staleness/frac_stale_tokens": (rows["stale_tokens"].sum() / num_tokens).item(),
        "staleness/versions_per_completion": rows["num_versions"][has_tokens].mean().item(),
    }


def sampling_metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """Sampler against trainer, from the columns of `SamplerCheck`; nothing without log-probs of the
    sampler.

    What is said of rows that an older policy sampled is apart, under staleness/. The mean of |d|,
    and of the part of it that the check judges, is over the tokens that both have a log-prob for,
    NaN if there is none. Importance ratios are the trainer's probability over the sampler's, one
    per token or one per sequence: of all rows with truncated importance sampling, without it of
    those that an older policy sampled. `sampling/ess` is the effective share of them, of the
    weights w that they are truncated to: (sum w)^2 / (n sum w^2), 1 where all weigh the same.
    """
    out: dict[str, float] = {}
    if "stale_diff_tokens" in rows and (num_stale := rows["stale_diff_tokens"].sum()):
        out["staleness/logp_diff_mean"] = (rows["stale_diff_sum"].sum() / num_stale).item()
    if "logp_diff_tokens" in rows:
        num_tokens = rows["logp_diff_tokens"].sum()
        out["sampling/logp_diff_mean"] = (rows["logp_diff_sum"].sum() / num_tokens).item()
        out["sampling/logp_diff_judged"] = (rows["logp_diff_outside"].sum() / num_tokens).item()
        out["sampling/logp_diff_max"] = (
            rows["logp_diff_max"].max().item() if num_tokens else float("nan")
        )
    if "importance_count" in rows and (count := rows["importance_count"].sum()):
        total = rows["importance_clipped"].sum()
        out |= {
            "sampling/importance_raw_mean": (rows["importance_raw"].sum() / count).item(),
            "sampling/importance_raw_max": rows["importance_raw_max"].max().item(),
            "sampling/importance_clipped_mean": (total / count).item(),
            "sampling/frac_clipped": (rows["importance_at_cap"].sum() / count).item(),
            "sampling/ess": (total**2 / (count * rows["importance_squared"].sum())).item(),
        }
    return out


def update_metrics(rows: dict[str, Tensor], micro_batch: Tensor) -> dict[str, float]:
    """Metrics of one optimizer step from its gathered rows.

    Columns of `rows`: ran (1; 0: its advantage was 0, and it was not run), tokens, entropy (sum
    over tokens), clipped_low, clipped_high, log_ratio and token_ratio (sums over tokens), loss (of
    the row). `micro_batch`: the micro-batch each row went through, for the 2024 trainer's
    variance of the mean ratio over micro-batches. Ratios are of the rows that ran, the entropy of
    those where it is known (not NaN).
    """
    ran = rows["ran"].bool()
    tokens = rows["tokens"][ran]
    low, high = rows["clipped_low"], rows["clipped_high"]
    num = int(micro_batch.max()) + 1 if ran.any() else 0
    sums = torch.zeros(2, num, dtype=torch.double)
    sums[0].index_add_(0, micro_batch[ran], rows["token_ratio"][ran])
    sums[1].index_add_(0, micro_batch[ran], tokens)
    ratios = (sums[0] / sums[1])[sums[1] > 0]
    mean_ratio = ratios.mean().item() if len(ratios) else 1.0
    known = ~rows["entropy"].isnan()
    entropy = (rows["entropy"][known].sum() / rows["tokens"][known].sum().clamp(min=1)).item()
    region = torch.clamp(low + high, max=1).mean().item()
    return {
        "entropy": entropy if known.any() else float("nan"),
        "clip_ratio/low_mean": low.mean().item(),
        "clip_ratio/low_min": low.min().item(),
        "clip_ratio/high_mean": high.mean().item(),
        "clip_ratio/high_max": high.max().item(),
        "clip_ratio/region_mean": region,
        "policy/approxkl_avg": 0.5 * _mean(rows["log_ratio"][ran].square()),
        "policy/clipfrac_avg": region,
        "policy/entropy_avg": entropy if known.any() else float("nan"),
        "loss/policy_avg": rows["loss"].mean().item(),
        "val/ratio": mean_ratio,
        "val/ratio_var": ratios.var().item() if len(ratios) > 1 else 0.0,
    }
