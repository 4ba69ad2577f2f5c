"""CUDA tensors on a machine without CUDA: computed on the CPU, with every wait of the host noted.

    with PretendCuda() as cuda:
        x = torch.ones(3).to(CUDA)
        x.sum().item()
    assert cuda.waits == ["aten._local_scalar_dense.default"]

Waiting are: reading a number, a copy to
the host, a copy from host memory that is not pinned or not `non_blocking`, and ops whose result's
shape depends on values.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
SHAPED_BY_VALUES = (
    aten.nonzero, aten.masked_select, aten._local_scalar_dense, aten.equal, aten._unique2,
    aten.unique_consecutive, aten.bincount, aten.item, aten.is_nonzero, aten.argwhere,
    aten.nonzero_numpy,
)  # fmt: skip


class OnCuda(torch.Tensor):
    """A tensor that says it lies on a GPU; `host` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host):
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, device="meta",  # a CPU build of torch cannot make tensors of CUDA
        )  # fmt: skip
        made.host = host
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a pretended CUDA tensor outside PretendCuda")


class PretendCuda(TorchDispatchMode):
    """While open, tensors go to and are made on a pretended GPU."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.to_host: list[int] = []  # elements of every copy to the host
        self._pinned: list[torch.Tensor] = []
        self._around: list[contextlib.ExitStack] = []  # one each time that it is entered

    def __enter__(self):
        around = contextlib.ExitStack()
        around.enter_context(mock.patch("torch.cuda._lazy_init"))
        # vLLM's CPU build replaces it in a process that it has started in
        pin_memory = torch._C.TensorBase.pin_memory
        around.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin_memory))
        self._around.append(around)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._around.pop().close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        own = torch._library.custom_ops.OPDEFS.get(func._schema.name)
        if own is not None:  # an op of ours: what it runs is looked at, too
            with self:
                return own._init_fn(*args, **kwargs)
        if func.overloadpacket is aten.to:  # where autograd is left out, it comes here whole
            with self:
                return func.decompose(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        on_cuda = any(isinstance(x, OnCuda) for x in given)
        device = kwargs.get("device")
        to_cuda = on_cuda if device is None else torch.device(device).type in ("cuda", "meta")
        if func in (aten.pin_memory.default, aten._pin_memory.default):
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        self._note(func, args, kwargs, on_cuda, to_cuda)
        if device is not None and to_cuda:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        args, kwargs = tree_map(lambda x: x.host if isinstance(x, OnCuda) else x, (args, kwargs))
        # a copy must not share memory with what it was made of
        if func is aten._to_copy.default:
            out = args[0].to(kwargs.get("dtype") or args[0].dtype, copy=True)
        else:
            out = func(*args, **kwargs)
        if func is aten.copy_.default:
            return given[0]
        if not to_cuda:
            return out
        named = {id(x.host): x for x in given if isinstance(x, OnCuda)}  # ops in place

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return named[id(x)] if id(x) in named else OnCuda(x)

        return tree_map(wrap, out)

    def _note(self, func, args, kwargs, on_cuda, to_cuda):
        packet = func.overloadpacket
        if packet is aten._to_copy or packet is aten.copy_:
            source = args[1] if packet is aten.copy_ else args[0]
            target = args[0] if packet is aten.copy_ else None
            arrives = to_cuda if target is None else isinstance(target, OnCuda)
            leaves = isinstance(source, OnCuda)
            if leaves and not arrives:
                self.to_host.append(source.numel())
                self.waits.append(str(func))
            queued = kwargs.get("non_blocking") or (packet is aten.copy_ and args[2:3] == (True,))
            pinned = any(source is x for x in self._pinned)
            if arrives and not leaves and not (queued and pinned):
                self.waits.append(f"{func} from pageable memory")
        elif on_cuda and packet in SHAPED_BY_VALUES:
            self.waits.append(str(func))
        elif on_cuda and packet in (aten.index, aten.index_put_, aten.index_put):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.waits.append(f"{func} by a mask")
                elif index is not None and not isinstance(index, OnCuda):
                    self.waits.append(f"{func} by an index on the host")
        elif packet is aten.repeat_interleave and on_cuda and kwargs.get("output_size") is None:
            self.waits.append(str(func))
