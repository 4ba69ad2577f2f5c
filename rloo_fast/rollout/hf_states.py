"""What a model's modules keep in plain attributes from prefill to decoding, beside parameters and
buffers: `rope_deltas` of Qwen-VL, recurrent states of RecurrentGemma."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Place = tuple[nn.Module, str]  # a module, and the name of its attribute
KeptStates = dict[Place, tuple[Tensor | None, int]]  # with the number of times it was written to


def kept_states(model: nn.Module) -> KeptStates:
    """Every attribute that is a tensor or None."""
    return {
        (module, name): (value, 0 if value is None else value._version)
        for module in model.modules()
        for name, value in vars(module).items()
        if value is None or isinstance(value, Tensor)
    }


def changed_states(model: nn.Module, before: KeptStates) -> dict[Place, Tensor | None]:
    """The attributes that are others than `before`, or were written to since."""

    def is_same(place: Place, value: Tensor | None, version: int) -> bool:
        old, old_version = before.get(place, (None, 0))
        return value is old and version == old_version

    now = kept_states(model)
    return {at: value for at, (value, version) in now.items() if not is_same(at, value, version)}


def select_rows(states: dict[Place, Tensor | None], rows: Tensor, num_rows: int) -> bool:
    """Give row i of every state the values of row `rows[i]`; False, and nothing is done, if one
    does not have `num_rows` rows."""
    tensors = {place: state for place, state in states.items() if state is not None}
    if any(not x.ndim or len(x) != num_rows for x in tensors.values()):
        return False
    for (module, name), state in tensors.items():
        setattr(module, name, state[rows.to(state.device)])
    return True


@contextmanager
def states_put_back(model: nn.Module) -> Iterator[None]:
    """Afterwards the attributes are what they were: the next call begins without this one's."""
    before = kept_states(model)
    try:
        yield
    finally:
        for module, name in changed_states(model, before):
            setattr(module, name, before.get((module, name), (None, 0))[0])
