"""The policy's LoRA inside vLLM: kept apart from the weights, and replaced as a whole by each sync.

vLLM reads adapters from directories. Ours never is in one: `hold` leaves its tensors with a worker,
and a request that names the path HELD is served from these, also when vLLM has dropped its own copy
(after a weight update it drops all) and loads it again. Every sync keeps the id; it first removes
the adapter that vLLM has under it, as vLLM loads an id that it knows no second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ...weight_sync.unmerged import AdapterShape

NAME = "rloo_fast"  # of the adapter, in requests
ID = 2**30  # that of no adapter of a server's own: those are counted from 1
HELD = "/rloo_fast/held by the worker"  # absolute: vLLM takes no other path for a local one
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def install() -> None:
    """Let every worker of this process serve HELD. Raises ImportError for another vLLM than 0.32.

    It must run before the workers get requests; a second call changes nothing.
    """
    try:
        workers: Any = import_module("vllm.lora.worker_manager").WorkerLoRAManager
        original = workers._load_adapter
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"vllm_lora='adapter' does not know this vLLM ({error}): use vLLM 0.32, or "
            "vllm_lora='merged'."
        ) from error
    if original.__module__ == __name__:
        return

    def load(self: Any, request: Any) -> Any:
        if request.lora_path == HELD:
            return _lora_model(self._adapter_manager, request.lora_int_id)
        return original(self, request)

    workers._load_adapter = load


def settings(shape: AdapterShape) -> dict[str, Any]:
    """Arguments of vllm.LLM for one adapter of this shape, which every request uses."""
    install()
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": room_for(shape.rank),
        "lora_target_modules": list(shape.names),  # other layers stay as fast as they are
    }


def check_settings(given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of vllm.LLM that leave no room for adapters."""
    if not given.get("enable_lora"):
        raise ValueError(
            "vllm_lora='adapter' needs vLLM's LoRA: leave enable_lora out of vllm_engine_kwargs."
        )


def room_for(rank: int) -> int:
    """The max_lora_rank to start vLLM with. Raises ValueError if it has no room for so much."""
    fitting = [room for room in RANKS if room >= rank]
    if not fitting:
        raise ValueError(
            f"vllm_lora='adapter': a layer's active adapters have rank {rank} together, and vLLM "
            f"takes {RANKS[-1]} at most: use a smaller rank, or vllm_lora='merged'."
        )
    return fitting[0]


def request() -> Any:
    """vLLM's LoRARequest for the adapter that the workers hold."""
    lora: Any = import_module("vllm.lora.request")
    return lora.LoRARequest(lora_name=NAME, lora_int_id=ID, lora_path=HELD)


def hold(model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Make these tensors, named as peft names them, the adapter of `model`; the one before is gone.

    Returns why the model cannot compute with them, or None. vLLM itself would leave out the tensors
    of layers that it does not have.
    """
    manager: Any = model.lora_manager
    manager.remove_adapter(ID)
    manager.held = dict(tensors)
    layers = set(_lora_model(manager, ID).loras)
    if not layers:
        return "no adapter was sent"
    if wrong := sorted(name for name, t in tensors.items() if not bool(t.abs().amax().isfinite())):
        return f"{wrong[0]} holds NaN or infinite numbers"
    held = {part for name in manager.modules for part in manager.packed_modules.get(name, [name])}
    missing = [name for name in sorted(layers - held) if not _is_elsewhere(model, name)]
    if missing:
        return (
            f"vLLM has no layer with LoRA for {len(missing)} of the {len(layers)} adapted ones "
            f"({', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}): leave them out of "
            "target_modules, or set vllm_lora='merged'"
        )
    return None


def most_numbers(model: nn.Module) -> int:
    """Most numbers of an adapter that this worker's part of `model` has room for."""
    manager: Any = getattr(model, "lora_manager", None)
    return sum(
        tensor.numel()
        for layer in (() if manager is None else manager.modules.values())
        for tensor in (*layer.lora_a_stacked, *layer.lora_b_stacked)
    )


class Named:
    """ASGI middleware of a server with LoRA: requests may name the adapter that its workers hold.

    vLLM's own ways to make an adapter known to a running server want its path, and open an endpoint
    to which one may send any.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/completions"):
            models: Any = getattr(scope["app"].state, "openai_serving_models", None)
            if models is not None:
                models.lora_requests[NAME] = request()
        await self._app(scope, receive, send)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the layers are vLLM's plain ones, under the names that `load_weights` knows."""
    if not hasattr(model, "lora_manager"):
        yield
        return
    wrapper: Any = import_module("vllm.lora.layers").BaseLayerWithLoRA
    wrapped: list[tuple[dict[str, Any], str, Any]] = [
        (module._modules, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, wrapper)
    ]
    for children, name, child in wrapped:
        children[name] = child.base_layer
    try:
        yield
    finally:
        for children, name, child in wrapped:
            children[name] = child


def _lora_model(manager: Any, adapter_id: int) -> Any:
    """vLLM's record of the tensors that are held."""
    loading: Any = import_module("vllm.lora.lora_model")
    peft: Any = import_module("vllm.lora.peft_helper")
    tensors: dict[str, Tensor] = getattr(manager, "held", {})
    rank = max((len(t) for n, t in tensors.items() if n.endswith("lora_A.weight")), default=1)
    if rank > manager.lora_config.max_lora_rank:
        raise ValueError(
            f"the adapter has rank {rank}, and vLLM was started with max_lora_rank "
            f"{manager.lora_config.max_lora_rank}: start it with {room_for(rank)}."
        )
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    return loading.LoRAModel.from_lora_tensors(
        adapter_id,
        tensors,
        peft.PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # the scale is in B
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )


def _is_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether another stage of a pipeline has the layer."""
    module: Any = model
    for part in name.split("."):
        module = getattr(module, part, None)
        if type(module).__name__ == "PPMissingLayer":
            return True
    return False
