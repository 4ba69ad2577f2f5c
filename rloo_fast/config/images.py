"""What a run with images cannot be combined with yet, said before a model is loaded."""

from __future__ import annotations

from typing import Any

from .rloo_config import RLOOConfig


def check_images_are_offered(args: RLOOConfig, engine: Any) -> None:
    """Raise ValueError for settings that do not go with images; `engine`: class of the rollouts."""
    sampler = "use_vllm=True" if args.use_vllm else f"rollout_engine={args.rollout_engine!r}"
    refused: dict[str, tuple[bool, str]] = {
        "torch_compile=True": (bool(args.torch_compile), "leave it out"),
        "max_staleness": (args.max_staleness > 0, "leave it out"),
        sampler: (
            not (engine.takes_images or engine.reads_images),
            "let transformers sample, which is the default",
        ),
    }
    for what, (is_set, advice) in refused.items():
        if is_set:
            raise ValueError(
                f"images, or a processor as processing_class, are not offered with {what} yet: "
                f"{advice}."
            )
