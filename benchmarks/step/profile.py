"""Where the time of one update goes: torch.profiler's own times, grouped.

Every profiled operation's own time (its children's taken off) counts for the first of these that
matches it or what encloses it; backward is what runs inside the autograd engine, recomputation
under gradient checkpointing included, forward the rest: the reference's forward too.

    optimizer        Optimizer.step
    head + loss      the ops of rloo_kernels, TRL's chunked log-prob
    attention        scaled_dot_product_attention and kin
    other products   matrix products of the linear layers
    other            norms, activations, rotary embeddings, clipping; Python in between is not seen
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

# name of the group: parts of the names of its operations, in lower case
GROUPS = {
    "optimizer": ("optimizer.step",),
    "head + loss": ("rloo_kernels", "chunkedlogprob"),
    "attention": ("attention", "flex", "flash"),
    "other products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
}
OTHER = "other"
BACKWARD = "autograd::engine::evaluate_function"

Shares = dict[tuple[str, str], float]  # (group, "forward" | "backward") -> seconds


def profile_update(update: Callable[[], object], device: str, runs: int = 3) -> Shares:
    """Seconds by group and phase, of the CPU or of the GPU's kernels, in the fastest of `runs`
    calls: what another process took the machine for is not where our time goes."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    found = []
    for _ in range(runs):
        with profile(activities=activities) as run:
            update()
        found.append(group_events(run.events() or (), device))
    return min(found, key=lambda seconds: sum(seconds.values()))


def group_events(events: Iterable[Any], device: str) -> Shares:
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    seconds: Shares = defaultdict(float)
    for event in events:
        enclosing = _names(event)
        phase = "backward" if any(BACKWARD.lower() in n for n in enclosing) else "forward"
        seconds[_group(enclosing), phase] += getattr(event, own) / 1e6
    return dict(seconds)


def _names(event: Any) -> list[str]:
    """Lower-case names of an event and of all that enclose it."""
    names = []
    while event is not None:
        names.append(event.name.lower())
        event = event.cpu_parent
    return names


def _group(names: list[str]) -> str:
    for group, parts in GROUPS.items():
        if any(part in name for name in names for part in parts):
            return group
    return OTHER


def format_shares(name: str, seconds: Shares) -> str:
    """A line per group: seconds and share of the total, forward and backward."""
    total = sum(seconds.values())
    lines = [f"profile of one update of {name}: {total:.4g} s in operations"]
    lines.append(
        f"  {'':<16}{'forward s':>11}{'share':>8}{'backward s':>12}{'share':>8}{'both':>8}"
    )
    for group in (*GROUPS, OTHER):
        both = [seconds.get((group, phase), 0.0) for phase in ("forward", "backward")]
        shares = [f"{s / total:.1%}" for s in (*both, sum(both))]
        lines.append(
            f"  {group:<16}{both[0]:>11.4g}{shares[0]:>8}{both[1]:>12.4g}{shares[1]:>8}"
            f"{shares[2]:>8}"
        )
    return "\n".join(lines)
