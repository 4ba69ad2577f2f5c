"""What each figure of each part must be. None: no bound; a row without bounds is for the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Limit(NamedTuple):
    """low <= figure <= high"""

    low: float | None
    high: float | None
    meaning: str

    def holds(self, value: float) -> bool:
        """False for NaN, unless nothing is asked."""
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is not None and self.low == self.high:
            return f"{self.low:g}"
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f">= {self.low:g}"
        return "-" if self.high is None else f"<= {self.high:g}"


_ALLOCATOR = {
    "cycles": Limit(3, None, "sleeps and wakes that were run: 20, with --dry 4"),
    "addresses_changed": Limit(0, 0, "cycles after which a tensor of the pool lay elsewhere"),
    "replays_wrong": Limit(0, 0, "cycles whose CUDA graph gave other bits than eager code"),
    "weights_lost": Limit(0, 0, "weights that a level-1 sleep did not bring back bit for bit"),
    "trainer_tensors_changed": Limit(0, 0, "tensors outside the pool with other bits"),
    "freed_share": Limit(0.9, 1.1, "bytes that a sleep gave back / bytes of the pool"),
    "leaked_gib": Limit(None, 0.05, "in use after the last cycle - after the first"),
    "expandable_segments": Limit(None, None, "1: the trainer's allocator used them"),
}

LIMITS: dict[str, dict[str, Limit]] = {
    "allocator": _ALLOCATOR,
    "allocator_expandable": _ALLOCATOR | {
        "expandable_segments": Limit(1, 1, "1: the trainer's allocator used them"),
    },
    "room": {
        "tensors_changed": Limit(0, 0, "tensors with other bits after four round trips"),
        "moved_share": Limit(1, 1, "bytes moved / bytes of optimizer state and reference"),
        "unattributed_gib": Limit(None, 0.3, "torch's tensors - what `measure` names"),
        "unaccounted_gib": Limit(None, 0.3, "in use on the GPU after make() - what the plan says"),
        "out_gb_per_s": Limit(40, None, "to the host, median of all but the first, which pins"),
        "back_gb_per_s": Limit(40, None, "back to the GPU"),
        "moved_gib": Limit(None, None, "bytes moved"),
        "first_out_s": Limit(None, None, "the first make(), which pins the host memory"),
    },
    "ddp": {
        "buckets_over_weights": Limit(0.95, 1.05, "DDP's buckets / the trained weights"),
        "counted_over_allocated": Limit(0.95, 1.05, "counted / allocated, beside the weights"),
        "replicas_differ": Limit(0, 0, "1: the two processes hold other weights after two steps"),
        "other_process_seen": Limit(0.9, None, "bytes seen elsewhere / what the other reserves"),
        "buckets_gib": Limit(None, None, "bytes of the buckets"),
    },
    "start": {
        "settings_changed": Limit(0, 0, "settings of the process that two starts changed"),
        "compile_key_changed": Limit(0, 0, "1: the second start has another key for the cache"),
        "leaked_gib": Limit(None, 1.0, "in use after the second close - after the first"),
        "start_1_s": Limit(None, None, "seconds of the first start"),
        "start_2_s": Limit(None, None, "seconds of the second, which finds what was compiled"),
    },
    "rollout": {
        "tokens_per_s": Limit(None, None, "with a seed per row, as in a run; median"),
        "tokens_per_s_without_seeds": Limit(None, None, "the same without seeds (vLLM alone)"),
        "seeds_share": Limit(0.8, None, "speed with seeds / without"),
        "tokens": Limit(1, None, "sampled in each call"),
        "logps_not_finite": Limit(0, 0, "sampled tokens without a finite log-prob"),
    },
    "sampler_check": {
        "noise": Limit(None, 0.06, "mean |sampler - trainer|, nats per token, same weights"),
        "stale_step": Limit(None, None, "the sampler is one optimizer step behind"),
        "stale_norm": Limit(None, None, "its final norm is 20 steps behind, the rest current"),
        "stale_matrix": Limit(None, None, "one MLP matrix is 20 steps behind, the rest current"),
        "stale_all": Limit(None, None, "all of it is 20 steps behind"),
        "other_policy_over_noise": Limit(10, None, "weights perturbed by 10 %, over the noise"),
        "noise_after_planting": Limit(None, 0.06, "the noise once more, all weights loaded again"),
    },
    "training": {
        "last_step": Limit(1, None, "of the run that was resumed"),
        "steps_missing": Limit(0, 0, "steps that the two runs together did not log once each"),
        "killed_at_step": Limit(1, None, "last step that was logged when the first run was killed"),
        "largest_logp_diff": Limit(None, 0.5, "of all steps: mean |sampler - trainer| of the step"),
        "reward_first": Limit(None, None, "mean reward of the first five steps"),
        "reward_last": Limit(None, None, "mean reward of the last five steps"),
    },
    "transfer": {
        "group_differ": Limit(0, 0, "1: by NCCL the worker has other bits than the trainer"),
        "http_differ": Limit(0, 0, "1: by HTTP it has"),
        "after_given_up_differ": Limit(0, 0, "1: after a sync that the trainer gave up it has"),
        "after_killed_differ": Limit(0, 0, "1: a new worker in place of a killed one has"),
        "given_up_s": Limit(None, 20, "until a gathering that fails is told on both sides"),
        "killed_s": Limit(None, 20, "until the trainer is told that the worker was killed"),
        "group_gb_per_s": Limit(None, None, "by NCCL, fastest of all but the first"),
        "http_gb_per_s": Limit(None, None, "by HTTP on the same machine"),
    },
}  # fmt: skip


def judged(part: str, figures: Mapping[str, float | str | None]) -> dict[str, dict[str, object]]:
    """Figure -> its value, limit and whether it passes: None where it has no value or no limit."""
    rows: dict[str, dict[str, object]] = {}
    for name, value in figures.items():
        limit = LIMITS[part].get(name)
        row: dict[str, object] = {"value": value}
        if limit is not None:
            asked = limit.low is not None or limit.high is not None
            number = value if isinstance(value, int | float) else None
            row |= {
                "limit": str(limit),
                "pass": limit.holds(number) if asked and number is not None else None,
                "meaning": limit.meaning,
            }
        rows[name] = row
    return rows
