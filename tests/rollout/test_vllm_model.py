"""What vLLM's model holds beyond its parameters, on modules as vLLM makes them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rloo_fast.rollout.vllm.model import LooseTensors, kept_in_another_form, loose_tensors


class Impl:
    """An object of vLLM's that is no module, with a tensor of its own."""

    def __init__(self):
        self.slopes = torch.tensor([0.5, 0.25])
        self.workspace = None


Impl.__module__ = "vllm.v1.attention.backends.some"


@pytest.fixture
def model():
    layer = nn.Linear(2, 2)
    layer.register_buffer("cos", torch.ones(3), persistent=False)
    layer.impl = Impl()
    layer.again = [layer.impl, layer]  # a second way to it, and a circle
    layer.kv_cache = torch.ones(5)
    layer.rows = layer.weight.data[:1]  # a view of a parameter
    layer.scales = {"q": (torch.tensor(2.0),), "none": torch.empty(0)}
    return nn.ModuleDict({"0": layer, "1": nn.Linear(2, 2)})


def test_loose_tensors_are_those_that_nobody_else_keeps(model):
    found = sorted(tensor.tolist() for tensor in loose_tensors(model) if tensor.ndim)
    assert found == [[0.5, 0.25]]
    assert [t.item() for t in loose_tensors(model) if not t.ndim] == [2.0]


def test_they_come_back_in_place(model):
    impl, scale = model["0"].impl, model["0"].scales["q"][0]
    before = impl.slopes.data_ptr()
    loose = LooseTensors()
    assert loose.save(model) == 2
    impl.slopes.fill_(float("nan"))
    scale.zero_()
    assert loose.restore(model) == 2
    assert impl.slopes.tolist() == [0.5, 0.25]
    assert scale.item() == 2.0
    assert impl.slopes.data_ptr() == before


def experts(name):
    return SimpleNamespace(unquantized_backend=SimpleNamespace(name=name))


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("quant_method", experts("FLASHINFER_CUTLASS"), r"experts of 0 .*moe_backend='triton'"),
        ("quant_method", experts("CPU"), "use_vllm=False"),
        ("quant_method", experts("TRITON"), None),
        ("quant_method", SimpleNamespace(), None),
        ("W_UK_T", torch.ones(2, 2), "VLLM_MLA_DISABLE=1"),
    ],
)
def test_a_model_that_computes_with_other_weights_is_known(model, attribute, value, said):
    setattr(model["0"], attribute, value)
    reason = kept_in_another_form(model, None)
    assert reason is None if said is None else re.search(said, reason)
    assert "quantization='fp8'" in kept_in_another_form(model, "fp8")
