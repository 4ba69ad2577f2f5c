"""A pretended GPU: memory of its own on the CPU, whose copies are made at synchronize."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rloo_fast.offload.engine_room import NOTHING_ELSE, EngineRoom, measure
from rloo_fast.offload.gpu import Gpu
from tests.support.tiny import make_model


class PretendGpu(Gpu):
    """Tensors lie on it that were `put` there; `live`: its storages, gone when they are freed."""

    def __init__(self, total=1 << 40):
        super().__init__(torch.device("cpu"))
        self.size = total
        self.live: dict[int, int] = {}  # address -> bytes
        self.calls: list[str] = []
        self.fails_at: int | None = None
        self.of_others = 0  # bytes that other processes use
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def used(self):
        return sum(self.live.values())

    def put(self, *tensors):
        """Tensors of one storage stay so; one that is given twice is put there once."""
        moved: dict[int, torch.Tensor] = {}
        for t in {id(t): t for t in tensors}.values():
            old = t.untyped_storage()
            if old.data_ptr() not in moved:
                block = moved[old.data_ptr()] = self.new_block(old.nbytes())
                block.copy_(torch.empty(0, dtype=torch.uint8).set_(old))
            place = (t.storage_offset(), t.size(), t.stride())
            new = moved[old.data_ptr()].untyped_storage()
            t.data = torch.empty(0, dtype=t.dtype).set_(new, *place)
        self.calls.clear()

    def total(self):
        return self.size

    def allocated(self):
        return self.used

    def elsewhere(self):
        return self.of_others

    def holds(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.live

    def new_block(self, num_bytes):
        self.calls.append("new_block")
        array = np.full(num_bytes + 64, 0xAB, np.uint8)
        start = -array.ctypes.data % 64  # sums depend on how their numbers lie
        block = torch.from_numpy(array[start : start + num_bytes])
        self.live[block.data_ptr()] = num_bytes
        weakref.finalize(array, self.live.pop, block.data_ptr())
        return block

    def new_host(self, num_bytes):
        self.calls.append("new_host")
        return torch.full((num_bytes,), 0xCD, dtype=torch.uint8)

    def copy(self, source, target):
        self.calls.append("copy")
        if self.calls.count("copy") == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self._pending.append((source, target))

    def synchronize(self):
        self.calls.append("synchronize")
        for source, target in self._pending:
            target.copy_(source)
        self._pending.clear()

    def release(self):
        self.calls.append(f"release at {self.used}")


class EightBit(torch.optim.Optimizer):
    """State as 8-bit optimizers keep it: bytes, a table that all share, numbers, names, None."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                codes = torch.zeros(p.shape, dtype=torch.uint8)
                state |= {"step": 0, "kind": "linear", "ema": None, "table": self.table,
                          "codes": [codes, {"scale": torch.ones(())}]}  # fmt: skip
            state["step"] += 1
            codes, scale = state["codes"][0], state["codes"][1]["scale"]
            momentum = self.table[codes.long()] * scale + p.grad
            scale.copy_(momentum.abs().max())
            distance = (self.table[:, None] - momentum.flatten() / scale).abs()
            codes.copy_(distance.argmin(0).view_as(codes))
            p -= 0.1 * momentum


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "eight_bit": EightBit,
}


class Side:
    """A policy with tied embeddings, its reference and its optimizer, on a pretended GPU."""

    def __init__(self, optimizer="adamw", total=1 << 40):
        self.gpu = PretendGpu(total)
        self.policy = make_model(tie_word_embeddings=True)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.optimizer: Any = OPTIMIZERS[optimizer](self.policy.parameters())
        for model in (self.policy, self.reference):
            self.gpu.put(*model.parameters(), *model.buffers())

    def step(self):
        ids = torch.arange(3, 19).view(2, 8)
        with torch.no_grad():
            target = self.reference(input_ids=ids).logits.softmax(-1)
        loss = nn.functional.cross_entropy(
            self.policy(input_ids=ids).logits.flatten(0, 1), target.flatten(0, 1).roll(1, 0)
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        new = [t for t in self.state_tensors() if t.ndim and not self.gpu.holds(t)]
        self.gpu.put(*new)
        return loss.item()

    def state_tensors(self):
        leaves = tree_leaves(list(self.optimizer.state.values()))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def room(self, free=0, say=lambda line: None, memory=NOTHING_ELSE) -> Any:
        """On a GPU that leaves `free` bytes for what may be moved; the engine takes a quarter."""
        held = measure(self.policy, self.optimizer, self.reference, self.gpu, memory=memory)
        self.gpu.size = -(-4 * (held.fixed + free) // 3)
        room = EngineRoom(
            self.policy, lambda: self.optimizer, self.reference, torch.device("cpu"),
            share=0.25, reserve=0, say=say, gpu=self.gpu, memory=memory,
        )  # fmt: skip
        self.gpu.calls.clear()
        return room


def snapshot(tensors):
    """What must come back: the object, its bits, and how it looks at its storage."""
    return [
        (id(t), t.dtype, t.size(), t.stride(), t.storage_offset(), t.requires_grad,
         t.detach().clone().contiguous().view(-1).view(torch.uint8).tolist())
        for t in tensors
    ]  # fmt: skip
