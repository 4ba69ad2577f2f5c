"""Which rollout engine the fields rollout_engine, use_vllm and vllm_mode ask for together."""

from __future__ import annotations

# rollout_engine -> the (use_vllm, vllm_mode) that say the same
SAME_AS = {
    "transformers": (False, "colocate"),
    "vllm": (True, "colocate"),
    "vllm_server": (True, "server"),
}


def settled(rollout_engine: str | None, use_vllm: bool, vllm_mode: str) -> tuple[bool, str]:
    """use_vllm and vllm_mode as rollout_engine says; beside None or a user's engine, as they are.

    Raises ValueError where the fields contradict each other.
    """
    if rollout_engine not in SAME_AS:
        return use_vllm, vllm_mode
    needs_vllm, mode = SAME_AS[rollout_engine]
    if (use_vllm and not needs_vllm) or (vllm_mode == "server" and mode != "server"):
        raise ValueError(
            f"rollout_engine={rollout_engine!r} contradicts use_vllm={use_vllm} with "
            f"vllm_mode={vllm_mode!r}: leave those two out."
        )
    return needs_vllm, mode


def engine_name(
    rollout_engine: str | None, use_vllm: bool, vllm_mode: str, *, in_flight: bool = False
) -> str:
    """`rollout_engine`, or the name of what use_vllm and vllm_mode ask for.

    `in_flight`: servers that go on sampling while their weights are replaced, or several of them,
    or are sent images: by the endpoint that all of these need.
    """
    named = {same: name for name, same in SAME_AS.items()}
    name = rollout_engine or named[use_vllm, vllm_mode]
    return "vllm_servers" if name == "vllm_server" and in_flight else name
