"""Stage 1: dataset rows in, prompts with token ids out, in an order that a resumed run repeats."""

from .sources import load_prompts

__all__ = ["load_prompts"]
