"""From a configuration to what the steps of a run are fed with: its loaders, and the source of its
generation batches."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from ..config.code_files import load_function
from ..config.rloo_config import RLOOConfig
from ..data import loader
from ..data.skipping import Skipping
from ..data.stream import prompt_stream
from .ahead import AheadSource
from .ahead_rounds import AheadRounds, AheadSettings
from .collect import Collector
from .dynamic import StreamSource
from .group_filter import GroupFilter
from .rounds import SampledRounds
from .source import BatchSource, LoaderSource


def samples_ahead(args: RLOOConfig) -> bool:
    """Whether completions are sampled before their step."""
    return args.max_staleness > 0


def draws_prompts_itself(args: RLOOConfig) -> bool:
    """Whether generation batches are made of prompts of a PromptStream, not the loader's rows."""
    return samples_ahead(args) or args.dynamic_sampling or args.curriculum is not None


def build_source(
    collector: Collector, dataset: Any, args: RLOOConfig, skipping: Skipping | None
) -> BatchSource:
    if not draws_prompts_itself(args):
        return LoaderSource(collector, args.num_generations)
    stream = prompt_stream(
        dataset,
        prompts_per_batch=args.prompts_per_generation,
        shuffle=bool(args.shuffle_dataset),
        seed=args.seed,
        num_workers=args.dataloader_num_workers,
        skipping=skipping,
        curriculum=args.curriculum,
    )
    k, rounds = args.num_generations, None
    if samples_ahead(args):
        rounds = AheadRounds(collector, stream, AheadSettings.from_config(args))
        if not args.dynamic_sampling and args.curriculum is None:
            return AheadSource(rounds)
    keep, name = None, args.rollout_filter
    if name is not None:
        function = load_function(name, "rollout_filter")
        keep = GroupFilter(function, name, collector.accelerator)
    return StreamSource(
        collector,
        rounds or SampledRounds(collector, stream, k),
        stream,
        num_generations=k,
        prompts_per_batch=args.prompts_per_generation,
        max_rounds=args.max_sampling_rounds if args.dynamic_sampling else 0,
        keep=keep,
    )


def train_loader(dataset: Any, args: RLOOConfig, skipping: Skipping | None) -> DataLoader:
    return loader.train_loader(
        dataset,
        prompts_per_batch=args.prompts_per_generation,
        micro_steps_per_batch=int(args.steps_per_generation or 1) * args.num_iterations,
        micro_steps_per_update=args.micro_steps_per_update,
        shuffle=bool(args.shuffle_dataset),
        seed=args.seed,
        num_workers=args.dataloader_num_workers,
        skipping=skipping,
        with_rows=not draws_prompts_itself(args),
    )


def eval_loader(sets: Any, which: Any, args: RLOOConfig, skipping: Skipping | None) -> DataLoader:
    """`sets`: the trainer's eval_dataset; `which`: the name of one of them, another, or None."""
    dataset = sets[which] if isinstance(which, str) else which
    dataset = sets if dataset is None else dataset
    if dataset is None:
        raise ValueError("evaluation requires an eval_dataset: pass one to the trainer.")
    rows = args.per_device_eval_batch_size * args.world_size
    return loader.eval_loader(
        dataset,
        prompts_per_batch=max(1, rows // args.completions_per_prompt("eval")),
        num_workers=args.dataloader_num_workers,
        skipping=skipping,
    )
