"""The model card of a run: what the run knows of itself, given to `model_card.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ..config.rloo_config import RLOOConfig, as_dict
from ..data.tokenize import is_conversational
from ..models.adapters import base_causal_lm, is_peft_model
from .example_prompt import Prompt, as_chat, general_prompt
from .model_card import write_model_card
from .recorder import CURVES


class RunCard:
    """Writes README.md with base model, data, command, versions, curves and the newest metrics.

    has_chats: whether prompts are conversations. template_kwargs: what their chat template is
    given. merged_adapter: what was merged into the base model before training.

    example_prompt: of the quick start, to be set by whoever knows one that may be public; text
    becomes a message where prompts are conversations. None: `general_prompt`.
    """

    example_prompt: Prompt | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        output_dir: str,
        loss: str,
        advantage: str,
        merged_adapter: str | None,
        has_chats: Callable[[], bool],
        template_kwargs: Mapping[str, Any],
        world_size: int,
    ):
        self.model, self.output_dir = model, output_dir
        self.loss, self.advantage, self.merged_adapter = loss, advantage, merged_adapter
        self.has_chats, self.template_kwargs = has_chats, template_kwargs
        self.world_size = world_size

    @classmethod
    def from_config(
        cls, args: RLOOConfig, model: nn.Module, *, has_chats: Callable[[], bool], world_size: int
    ) -> RunCard:
        return cls(
            model,
            output_dir=str(args.output_dir),
            loss=args.loss,
            advantage=args.advantage,
            merged_adapter=args.merge_adapter,
            has_chats=has_chats,
            template_kwargs=as_dict(args.chat_template_kwargs),
            world_size=world_size,
        )

    def write(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        model_name: str | None,
        dataset_name: str | None,
        tags: str | list[str] | None,
        hub_model_id: str | None,
        command: str | None,
        log_history: Sequence[Mapping[str, Any]],
    ) -> None:
        """To `directory`, or the run's; by the main process."""
        folder = Path(directory or self.output_dir)
        is_peft = is_peft_model(self.model)
        write_model_card(
            folder / "README.md",
            model_name=model_name or (hub_model_id or Path(self.output_dir).name).split("/")[-1],
            base_model=getattr(base_causal_lm(self.model).config, "_name_or_path", "") or None,
            dataset_name=dataset_name,
            tags=[tags] if isinstance(tags, str) else list(tags or []),
            is_peft=is_peft,
            merged_adapter=self.merged_adapter,
            prompt=self._prompt(),
            template_kwargs=self.template_kwargs,
            loss=self.loss,
            advantage=self.advantage,
            hub_model_id=hub_model_id,
            local_path=self.output_dir,
            command=command,
            world_size=self.world_size,
            versions=_versions(is_peft),
            metrics=log_history,
            curves=CURVES if (folder / CURVES).is_file() else None,
            tracker_urls=_tracker_urls(),
        )

    def _prompt(self) -> Prompt:
        is_chat, prompt = self.has_chats(), self.example_prompt
        if prompt is None:
            return general_prompt(is_chat)
        return as_chat(prompt) if is_chat and isinstance(prompt, str) else prompt


def has_chats(train_dataset: Any, tokenizer: Any) -> bool:
    """Whether the training prompts are conversations; without any, whether the model chats."""
    first = next(iter(train_dataset), None) if train_dataset is not None else None
    if first is None:
        return bool(getattr(tokenizer, "chat_template", None))
    return is_conversational(first.get("prompt"))


def _versions(is_peft: bool) -> dict[str, str]:
    names = ["rloo-fast", "torch", "transformers", "accelerate", "datasets"]
    versions = {name: version(name) for name in [*names, *(["peft"] if is_peft else [])]}
    if "vllm" in sys.modules:  # its CPU build is a package of another name
        versions["vllm"] = sys.modules["vllm"].__version__
    return versions


def _tracker_urls() -> dict[str, str]:
    """Addresses of the trackers' pages of this run, where one is active."""
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    url = getattr(run, "url", None)
    return {"wandb": url} if url else {}
