"""What a run with images cannot be combined with, said before a model is loaded."""

from __future__ import annotations

from typing import Any

from .rloo_config import RLOOConfig

SAMPLE_HERE = "let transformers sample, which is the default"


def check_images_are_offered(args: RLOOConfig, engine: Any) -> None:
    """Raise ValueError for settings that do not go with images; `engine`: class of the rollouts."""
    sampler = "use_vllm=True" if args.use_vllm else f"rollout_engine={args.rollout_engine!r}"
    takes = engine.reads_images or (engine.takes_images and not args.max_staleness)
    sleeps = args.vllm_enable_sleep_mode and args.vllm_mode == "server"
    refused: dict[str, tuple[bool, str]] = {
        "torch_compile=True": (bool(args.torch_compile), "leave it out"),
        sampler: (not takes, SAMPLE_HERE),
        "vllm_lora='adapter'": (
            args.vllm_lora == "adapter",  # vLLM leaves its layers in the image tower out
            "leave it 'merged', which sends W + scale B A",
        ),
        "vllm_enable_sleep_mode=True and a server": (sleeps, "leave it out"),
    }
    for what, (is_set, advice) in refused.items():
        if is_set:
            raise ValueError(
                f"images, or a processor as processing_class, are not offered with {what} yet: "
                f"{advice}."
            )
