"""Which logged names depend on the clock, and which are a reward function's own."""

from __future__ import annotations

# Logged names that depend on the clock or the machine: a resumed run repeats all but these.
TIMING = ("step_time", "eps", "model_preparation_time", "tools/wait_s")
TIMING_PREFIXES = ("time/", "throughput/", "memory/")
TIMING_SUFFIXES = ("_per_second", "_runtime")

# Whatever else stands in a log was logged by a reward function, under a name of the user's.
OWN = (
    "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "loss", "aux_loss",
    "grad_norm", "learning_rate", "lr", "epoch", "num_tokens", "step", "step_time", "episode",
    "eps", "runtime", "total_flos", "num_input_tokens_seen", "model_preparation_time",
)  # fmt: skip
OWN_PREFIXES = (
    "rewards/", "completions/", "objective/", "policy/", "val/", "loss/", "clip_ratio/", "update/",
    "async/", "dynamic/", "sampling/", "staleness/", "sync/", "time/", "throughput/", "memory/",
    "train_", "mem_", "init_mem_", "before_init_mem_",
)  # fmt: skip


def is_user_metric(name: str) -> bool:
    """Of a name without an evaluation's prefix."""
    return not (name in OWN or name.startswith(OWN_PREFIXES) or name.endswith(TIMING_SUFFIXES))


def is_timing(name: str) -> bool:
    bare = name.removeprefix("eval_")
    return bare in TIMING or bare.startswith(TIMING_PREFIXES) or name.endswith(TIMING_SUFFIXES)
