"""Full tensors of parameters that an engine keeps in shards: FSDP2 (DTensor) or ZeRO-3 (`ds_*`).

Gathering is a collective: every process asks for the same parameters in the same order. The model
is sharded again before a full tensor is handed out, and the tensor lives as long as the caller
keeps it: a caller that stops half-way leaves nothing open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def holds_whole_weights(model: nn.Module) -> bool:
    """Whether this process has every parameter whole and can run the model without its engine:
    none is sharded, on the meta device, or ZeRO-3's."""
    return not any(
        isinstance(p, DTensor) or p.is_meta or hasattr(p, "ds_id") for p in model.parameters()
    )


def full_nbytes(parameter: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of the whole parameter as `gathered` gives it, however much of it is here."""
    size = (_cast(parameter, dtype) or parameter.dtype).itemsize
    return getattr(parameter, "ds_numel", parameter.numel()) * size


@torch.no_grad()
def gathered(parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The full tensor of each, on every process; one that is not sharded: itself, not a copy.

    `dtype`: what FSDP2's floating-point shards are rounded to first, as it does for a forward.
    """
    with kept_whole(parameters):
        # ZeRO-3 lets go of the gathered memory, which lives on in the detached tensors
        return [_whole(parameter, dtype) for parameter in parameters]


def _whole(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    # offloaded shards lie on the CPU, where the processes' collectives may not reach
    shard: Any = parameter.detach().to(parameter.device_mesh.device_type, _cast(parameter, dtype))
    return shard.full_tensor()


def _cast(parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to change to, or None."""
    rounds = isinstance(parameter, DTensor) and parameter.is_floating_point()
    return dtype if rounds else None


def _is_partitioned(parameter: Tensor) -> bool:
    """Small parameters stay whole under ZeRO-3; to gather them would partition them afterwards."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def kept_whole(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """While open, ZeRO-3's parameters are whole, in place; others are left as they are."""
    partitioned = [parameter for parameter in parameters if _is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    _wait_for_prefetches(partitioned)
    return deepspeed.zero.GatheredParameters(partitioned)


def is_in_flight(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has begun to gather the parameter, and nobody has waited for it yet."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name == "INFLIGHT"


def _wait_for_prefetches(parameters: Sequence[Tensor]) -> None:
    """Wait for those of the parameters that ZeRO-3 has in flight.

    It begins to gather ahead of time, a prefetch bucket further with every module that runs, what
    the recorded forward and backward need next: an embedding for its backward pass, say, while the
    lm_head tied to it is still to come; everything of a backward pass that does not follow, after
    a forward without gradients. GatheredParameters passes over what is in flight, whose memory is
    still being written to.
    """
    waiting = [parameter for parameter in parameters if is_in_flight(parameter)]
    if not waiting:
        return
    # at the bottom of the stack are the models of all engines
    offload: Any = import_module("deepspeed.runtime.zero.parameter_offload")
    for module in offload.FWD_MODULE_STACK:
        registry = getattr(module, "ds_inflight_param_registry", {})
        for parameter in waiting:
            if parameter in registry:
                registry.pop(parameter).wait()
    left = [parameter for parameter in waiting if is_in_flight(parameter)]
    assert not left, f"{len(left)} parameters are in flight for no engine"


def parts(parameter: Any) -> list[Tensor]:
    """The tensors on this process that hold the parameter between two forwards, to be written to.

    One, but for a small parameter of ZeRO-3, which is kept whole beside this process' share of it.
    Raises ValueError where DeepSpeed keeps a part that cannot be written to.
    """
    if isinstance(parameter, DTensor):
        return [parameter.to_local().detach()]
    if not hasattr(parameter, "ds_tensor"):
        return [parameter.detach()]
    share = parameter.ds_tensor
    if share.status.name != "AVAILABLE" or parameter.ds_secondary_tensor is not None:
        raise ValueError(
            "the reference of a policy with adapters is the policy with its first weights put "
            "back, which zero_hpz_partition_size > 1 and offload_param to NVMe do not allow: leave "
            "them out, or set beta=0."
        )
    whole = [parameter.detach()] if parameter.ds_persist and not _is_partitioned(parameter) else []
    return [share.detach(), *whole]


@torch.no_grad()
def set_whole(parameter: Any, whole: Tensor) -> None:
    """Write a full tensor into the parameter's `parts`; each process has the tensor, none waits."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = whole.to(mesh.device_type, parameter.dtype)
        split: Any = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        parts(parameter)[0].copy_(split.to_local())
        return
    for part in parts(parameter):
        if part.shape == whole.shape:
            part.copy_(whole)
        else:  # ZeRO-3 cuts the flat tensor into shares of one size, the last one padded
            start = dist.get_rank(parameter.ds_process_group) * part.numel()
            share = whole.flatten()[start : start + part.numel()]
            part[: len(share)].copy_(share)


@contextmanager
def own_class(model: Any) -> Iterator[None]:
    """Inside, `model` is of the class that FSDP2 found it in, not of FSDP2's subclass of that.

    transformers looks up by the class's name how a checkpoint's names and tensors differ.
    """
    found = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = found.__mro__[2]  # after the subclass and FSDPModule
    try:
        yield
    finally:
        model.__class__ = found
