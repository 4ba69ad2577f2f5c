"""The engine of a run, and the room that the trainer makes for it, from their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..offload.engine_memory import EngineMemory
from ..offload.engine_room import RESERVE, EngineRoom, OnMove
from ..weight_sync.adapted import check_can_stream
from ..weight_sync.buckets import most_in_flight
from ..weight_sync.unmerged import check_can_send_unmerged
from .engine import RolloutEngine
from .engine_need import needed_bytes
from .settings import EngineSettings


def make_engine(engine: type[RolloutEngine], settings: EngineSettings) -> RolloutEngine:
    """Start an engine of this class.

    Raises ValueError or ImportError, with what to write, where it cannot serve the model.
    """
    if not engine.shares_weights:
        check_can_stream(settings.model)
    if settings.sends_adapter:
        check_can_send_unmerged(settings.model)
    return engine.from_settings(settings)


def make_room(
    settings: EngineSettings,
    optimizer: Callable[[], Any],
    reference: nn.Module | None,
    device: torch.device,
    *,
    bucket_bytes: int,
    memory: EngineMemory,
    others: Iterable[nn.Module] = (),
    on_move: OnMove | None = None,
) -> EngineRoom:
    """For an engine that sleeps in the training processes; `memory`: of the training engine;
    `others`: modules that stay; `on_move`: is told seconds and bytes of every move.

    `bucket_bytes`: most weights in flight to the engine at a time, which the GPU holds as well.
    """
    return EngineRoom(
        settings.model,
        optimizer,
        reference,
        device,
        share=settings.in_process.gpu_share,
        need=needed_bytes(settings),
        reserve=RESERVE + most_in_flight(settings.model, bucket_bytes, settings.dtype),
        others=others,
        memory=memory,
        on_move=on_move,
    )
