"""verl's log-prob functions replaced: their contract against float64, and verl's own ones.

verl's are tested where it can be imported (on a CPU: `pip install --no-deps verl==0.9.1`, and ray,
tensordict, omegaconf); the contract, written out below under verl's names, always.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rloo_fast.integrations.verl as fast_verl
from tests.support import verl_split_worker
from tests.support.paths import SUPPORT
from tests.support.tiny import make_model
from tests.support.triton_process import run_worker

LOGITS = "verl.utils.torch_functional"
FUSED = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
ENGINE = "verl.workers.engine.fsdp"  # stands for whatever has imported a function by name


def logprobs_from_logits(logits, labels, inplace_backward=True):
    """What verl promises; overwrites nothing."""
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def entropy_from_logits(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    return torch.cat([entropy_from_logits(part) for part in logits.split(chunk_size)])


class FusedLinearForPPOFunction:
    @staticmethod
    def apply(hidden_states, vocab_weights, input_ids, temperature=1.0, chunk_size=512):
        logits = hidden_states @ vocab_weights.T / temperature
        return logprobs_from_logits(logits, input_ids), entropy_from_logits(logits)


def linear_cross_entropy(
    hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
):
    found = FusedLinearForPPOFunction.apply(hidden, weight, labels, temperature)
    return tuple(x.flatten() if reduction == "none" else x.mean() for x in found)


DEFINED = {
    LOGITS: (logprobs_from_logits, entropy_from_logits, entropy_from_logits_with_chunking),
    FUSED: (FusedLinearForPPOFunction,),
    KERNEL: (linear_cross_entropy,),
    ENGINE: (logprobs_from_logits,),
}


@pytest.fixture
def contract(monkeypatch):
    """A package with verl's names."""
    for name in DEFINED:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if not hasattr(sys.modules.get(path), "made_by_this_test"):
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
                sys.modules[path].made_by_this_test = True
        for function in DEFINED[name]:
            setattr(sys.modules[name], function.__name__, function)
    yield SimpleNamespace(
        logits=sys.modules[LOGITS],
        fused=sys.modules[FUSED],
        kernel=sys.modules[KERNEL],
        engine=sys.modules[ENGINE],
    )
    fast_verl.unpatch()


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, exact, strict=True)
    )


def loss_gradients(logps: Tensor, entropy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Both, and the gradients of a loss on both, as an actor's with an entropy bonus."""
    rows = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64)
    loss = (rows * logps.double().flatten()).sum()
    loss = loss - 0.3 * (rows.flip(0) * entropy.double().flatten()).sum()
    found = (logps, entropy, *torch.autograd.grad(loss, inputs))
    return [x.detach().double() for x in found]


def on_logits(module: Any, logits: Tensor, labels: Tensor, chunked: bool = False) -> list[Tensor]:
    logps = module.logprobs_from_logits(logits, labels, inplace_backward=False)
    if chunked:
        entropy = module.entropy_from_logits_with_chunking(logits, chunk_size=2)
    else:
        entropy = module.entropy_from_logits(logits)
    return loss_gradients(logps, entropy, [logits])


def sample_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (4 * torch.randn(6, 41)).to(dtype).requires_grad_(), torch.randint(0, 41, (6,))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_logits_as_close_to_float64_as_plain_torch(contract, dtype, chunked):
    logits, labels = sample_logits(dtype)
    wide = logits.detach().double().requires_grad_()
    exact = on_logits(contract.logits, wide, labels, chunked)
    plain = error(on_logits(contract.logits, logits, labels, chunked), exact)
    fast_verl.patch()
    assert contract.logits.entropy_from_logits is fast_verl.entropy_from_logits
    assert error(on_logits(contract.logits, logits, labels, chunked), exact) <= 2 * plain + 1e-6


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_backward_overwrites_the_logits_with_their_gradient(contract, inplace):
    source, labels = sample_logits()
    logits = source * 1.0
    before = logits.detach().clone()
    (exact,) = torch.autograd.grad(logprobs_from_logits(logits, labels).sum(), logits)
    fast_verl.patch()
    logps = contract.engine.logprobs_from_logits(logits, labels, inplace_backward=inplace)
    logps.sum().backward()
    torch.testing.assert_close(source.grad, exact)
    torch.testing.assert_close(logits.detach(), exact if inplace else before)


def test_an_ignored_label_gives_zero_and_no_gradient(contract):
    logits, labels = sample_logits()
    labels[2] = -100  # flash-attn's cross entropy, verl's GPU path, takes it
    fast_verl.patch()
    logps = contract.logits.logprobs_from_logits(logits, labels, inplace_backward=False)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert logps[2] == 0
    assert not grad[2].any()
    assert grad[3].any()


def test_entropy_can_be_compiled_as_verl_does(contract):
    logits, _ = sample_logits()
    exact = entropy_from_logits(logits.detach().double())
    fast_verl.patch()
    compiled = torch.compile(contract.logits.entropy_from_logits, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(logits).double(), exact, rtol=1e-5, atol=1e-5)


def sample_hidden(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """hidden (2, 7, 16) and weight (41, 16); labels (2, 7)."""
    inputs = [torch.randn(2, 7, 16), torch.randn(41, 16)]
    return [x.to(dtype).requires_grad_() for x in inputs], torch.randint(0, 41, (2, 7))


FUSED_OPS = {
    "torch backend": lambda c: c.fused.FusedLinearForPPOFunction.apply,
    "triton backend": lambda c: c.kernel.linear_cross_entropy,
}


@pytest.mark.parametrize("op", FUSED_OPS.values(), ids=FUSED_OPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_hidden_as_close_to_float64_as_plain_torch(contract, dtype, op):
    inputs, labels = sample_hidden(dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = loss_gradients(*op(contract)(*wide, labels, 0.7), wide)
    plain = error(loss_gradients(*op(contract)(*inputs, labels, 0.7), inputs), exact)
    fast_verl.patch()
    ours = loss_gradients(*op(contract)(*inputs, labels, 0.7), inputs)
    assert error(ours, exact) <= 2 * plain + 1e-6


def test_shapes_on_hidden_are_those_of_verl(contract):
    inputs, labels = sample_hidden()
    fast_verl.patch()
    shapes = {n: [x.shape for x in op(contract)(*inputs, labels)] for n, op in FUSED_OPS.items()}
    assert shapes == {"torch backend": [(2, 7)] * 2, "triton backend": [(14,)] * 2}


def test_on_hidden_under_autocast_in_its_dtype(contract):
    (hidden, weight), labels = sample_hidden()
    fast_verl.patch()
    with torch.autocast("cpu", torch.bfloat16):
        found = contract.fused.FusedLinearForPPOFunction.apply(hidden, weight, labels)
    halves = [x.detach().bfloat16().double() for x in (hidden, weight)]
    rounded = (halves[0] @ halves[1].T).bfloat16().double()  # what an autocast head gives
    exact = [logprobs_from_logits(rounded, labels), entropy_from_logits(rounded)]
    torch.testing.assert_close([x.double() for x in found], exact, rtol=2e-2, atol=5e-2)
    assert torch.autograd.grad(found[0].sum(), weight)[0].dtype == torch.float32


def test_a_reduction_stays_with_verl(contract, caplog):
    inputs, labels = sample_hidden()
    expected = contract.kernel.linear_cross_entropy(*inputs, labels, 1.0, "mean")
    fast_verl.patch()
    found = contract.kernel.linear_cross_entropy(*inputs, labels, 1.0, "mean")
    torch.testing.assert_close(found, expected)
    assert "verl keeps its own linear_cross_entropy: reduction is 'mean'." in caplog.messages


def test_unpatch_restores_the_very_same_objects(contract):
    with fast_verl.patched():
        assert contract.engine.logprobs_from_logits is fast_verl.logprobs_from_logits
    for name, functions in DEFINED.items():
        for function in functions:
            assert getattr(sys.modules[name], function.__name__) is function


@pytest.fixture
def verl(monkeypatch):
    """The installed verl's modules."""
    if find_spec("verl") is None:
        pytest.skip("verl is not installed: pip install --no-deps verl==0.9.1")
    names = (LOGITS, FUSED, "verl.models.transformers.dense_common")
    try:
        logits, fused, models = (importlib.import_module(name) for name in names)
    except ModuleNotFoundError as error:
        pytest.skip(f"verl needs more to be imported: {error}")
    yield SimpleNamespace(logits=logits, fused=fused, models=models)
    fast_verl.unpatch()


@pytest.mark.parametrize("chunked", [False, True])
def test_functions_of_verl_give_the_same(verl, chunked):
    logits, labels = sample_logits()
    theirs = on_logits(verl.logits, logits, labels, chunked)
    fast_verl.patch()
    ours = on_logits(verl.logits, logits, labels, chunked)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def score(verl: Any, temperature: float) -> list[Tensor]:
    """A model scored as verl's fused path does, and the gradients of all its weights."""
    model = make_model()
    model.forward = MethodType(verl.models.forward_with_torch_backend, model)
    torch.manual_seed(1)
    ids = torch.randint(6, 32, (2, 11))
    output = model(input_ids=ids, temperature=temperature, return_dict=True)
    return loss_gradients(output.log_probs, output.entropy, list(model.parameters()))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_forward_of_verl_gives_the_same(verl, temperature):
    theirs = score(verl, temperature)
    fast_verl.patch()
    assert verl.fused.FusedLinearForPPOFunction is fast_verl.FusedLinearForPPOFunction
    ours = score(verl, temperature)
    scale = max(float(t.abs().max()) for t in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * scale)


def test_the_source_of_verl_takes_a_group_where_ours_does():
    """Also where verl cannot be imported: the name and the parameters that `patch` relies on."""
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("verl is not installed: pip install --no-deps verl==0.9.1")
    source = Path(spec.submodule_search_locations[0], *KERNEL.split(".")[1:]).with_suffix(".py")
    forward = next(
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "forward"
    )
    taken = [argument.arg for argument in forward.args.args][1:]  # after ctx
    assert taken == list(inspect.signature(fast_verl.linear_cross_entropy).parameters)
    assert "linear_cross_entropy = LinearCrossEntropy.apply" in source.read_text()


@pytest.fixture
def split(verl):
    """What two ranks found, each with half of the vocabulary."""
    found = run_worker(SUPPORT / "verl_split_worker.py", interpret=False, timeout_s=600)
    return [{k: [torch.tensor(x) for x in xs] for k, xs in rank.items()} for rank in found]


@pytest.mark.slow
def test_a_split_vocabulary_is_that_of_one_process_and_of_verl(split):
    exact = verl_split_worker.exact()
    for rank in split:
        torch.testing.assert_close(
            [x.double() for x in rank["ours"][:2]], exact[:2], rtol=1e-5, atol=1e-5
        )
        # verl's own code on the split logits, to the part of a sum that each rank's dX is
        torch.testing.assert_close(
            rank["ours, entropy"], rank["verl, entropy"], rtol=1e-5, atol=1e-5
        )
    grad_hidden = sum(rank["ours"][2] for rank in split)
    grad_weight = torch.cat([rank["ours"][3] for rank in split])
    torch.testing.assert_close(
        [grad_hidden.double(), grad_weight.double()], exact[2:], rtol=1e-5, atol=1e-5
    )
