"""Prompts with images, as vLLM takes them: its own copy of the processor reads the images.

vLLM is given a prompt's text and its images, and puts the tokens of the images in their places
itself. That the prompt it samples from is the one that is trained on is checked for every
completion; that it sees the same pixels follows from the processor's own files and backend.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from ...records import RawPrompt
from ..engine import EngineError


def settings(processor: Any) -> dict[str, Any]:
    """Arguments of vllm.LLM: no room is made for videos, and images are resized by the same code as
    here (Pillow's and torchvision's pixels are not the same)."""
    by_pillow = getattr(processor.image_processor, "backend", None) == "pil"
    return {
        "limit_mm_per_prompt": {"video": 0, "audio": 0},
        "mm_processor_kwargs": {"use_fast": False} if by_pillow else None,
    }


def as_parts(images: Sequence[Any]) -> list[dict[str, str]]:
    """Images in a request to a server: as PNG, which keeps every pixel."""
    return [{"type": "image_url", "url": f"data:image/png;base64,{_png(i)}"} for i in images]


def _png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # most of the time goes into better ones
    return base64.b64encode(file.getvalue()).decode()


def request_of(prompt_ids: list[int], raw: RawPrompt | None) -> dict[str, Any]:
    """What vLLM's engine is asked with; `raw`: of a run with images."""
    if raw is None or not raw.images:
        return {"prompt_token_ids": prompt_ids}
    return {"prompt_token_ids": raw.ids, "multi_modal_data": {"image": raw.images}}


def check_prompt(read: Sequence[int] | None, prompt_ids: Sequence[int]) -> None:
    """Raise EngineError if vLLM sampled from another prompt than is trained on."""
    found, expected = list(read or ()), list(prompt_ids)
    if found == expected:
        return
    pairs = enumerate(zip(found, expected, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
    raise EngineError(
        f"vLLM reads a prompt with images as {len(found)} tokens, the processor as "
        f"{len(expected)}, and they differ from token {first} on ({found[first : first + 4]}, not "
        f"{expected[first : first + 4]}): this vLLM cannot sample for this model's processor. "
        "Leave use_vllm out: transformers samples then."
    )
