"""OpenRLHF's log-prob functions replaced: its contract against float64, and its own Actor.

The Actor is tested where OpenRLHF is installed (`pip install --no-deps openrlhf==0.11.2` is
enough); the contract, written out below under OpenRLHF's names, always.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import rloo_fast.integrations.openrlhf as fast_openrlhf
from rloo_fast.integrations._patching import Patch
from tests.support.tiny import make_model

MODELS = "openrlhf.models"


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """What OpenRLHF promises; divides the logits in place."""
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def compute_entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.fixture
def contract(monkeypatch):
    """A package with OpenRLHF's names: utils defines the functions, actor has imported them."""
    modules = {n: ModuleType(n) for n in ("openrlhf", MODELS, f"{MODELS}.utils", f"{MODELS}.actor")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in (f"{MODELS}.utils", f"{MODELS}.actor"):
        modules[name].log_probs_from_logits = log_probs_from_logits
        modules[name].compute_entropy = compute_entropy
    yield modules[f"{MODELS}.actor"]
    fast_openrlhf.unpatch()


def sample(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = (4 * torch.randn(3, 5, 41)).to(dtype).requires_grad_()
    return logits, torch.randint(0, 41, (3, 5))


def values_and_gradient(module: Any, logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Log-probs, entropies, and the gradient of a loss on both, as an actor's with a bonus."""
    rows = torch.linspace(-1, 2, labels.numel(), dtype=torch.float64).view(labels.shape)
    logps = module.log_probs_from_logits(logits, labels)
    entropy = module.compute_entropy(logits)
    loss = (rows * logps.double() - 0.3 * rows.flip(0) * entropy.double()).sum()
    found = (logps, entropy, *torch.autograd.grad(loss, logits))
    return [x.detach().double() for x in found]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_functions_are_as_close_to_float64_as_plain_ones(contract, dtype):
    logits, labels = sample(dtype)
    exact = values_and_gradient(contract, logits.detach().double().requires_grad_(), labels)
    plain = error(values_and_gradient(contract, logits, labels), exact)
    fast_openrlhf.patch()
    assert contract.log_probs_from_logits is fast_openrlhf.log_probs_from_logits
    assert error(values_and_gradient(contract, logits, labels), exact) <= 2 * plain + 1e-6


def test_results_are_fp32(contract):
    logits, labels = sample(torch.bfloat16)
    fast_openrlhf.patch()
    assert contract.log_probs_from_logits(logits, labels).dtype == torch.float32
    assert contract.compute_entropy(logits).dtype == torch.float32


def test_temperature_divides_the_logits_in_place(contract):
    logits, labels = sample()
    theirs, ours = logits.detach().clone(), logits.detach().clone()
    expected = contract.log_probs_from_logits(theirs, labels, temperature=0.6)
    fast_openrlhf.patch()
    found = contract.log_probs_from_logits(ours, labels, temperature=0.6)
    torch.testing.assert_close([found, ours], [expected, theirs])


def test_an_ignored_label_gives_zero_and_no_gradient(contract):
    logits, labels = sample()
    labels[1, 2] = -100  # flash-attn's cross entropy, OpenRLHF's GPU path, takes it
    fast_openrlhf.patch()
    logps = contract.log_probs_from_logits(logits, labels)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert logps[1, 2] == 0
    assert not grad[1, 2].any()
    assert grad[1, 3].any()


def test_unpatch_restores_the_very_same_functions(contract):
    with fast_openrlhf.patched():
        assert contract.compute_entropy is fast_openrlhf.compute_entropy
    assert contract.compute_entropy is compute_entropy
    assert contract.log_probs_from_logits is log_probs_from_logits


def test_a_version_without_the_function_is_refused(contract, monkeypatch):
    monkeypatch.delattr(sys.modules[f"{MODELS}.utils"], "compute_entropy")
    with pytest.raises(ImportError, match=r"compute_entropy is missing.*openrlhf 0\.11\.2"):
        fast_openrlhf.patch()
    assert contract.log_probs_from_logits is log_probs_from_logits


def test_a_package_that_is_not_installed_is_said():
    patch = Patch("no_such_trainer", "1.2", {"no_such_trainer.utils": (compute_entropy,)})
    with pytest.raises(ImportError, match=r"not installed: pip install no_such_trainer==1\.2"):
        patch.patch()


@pytest.fixture
def actor_module(monkeypatch):
    """The installed openrlhf.models.actor.

    flash-attn, DeepSpeed and pylatexenc need not be there: of what they are imported for
    (packing, ZeRO-3, grading), nothing runs here.
    """
    if find_spec("openrlhf") is None:
        pytest.skip("openrlhf is not installed: pip install --no-deps openrlhf==0.11.2")
    needed = {
        "deepspeed": [],
        "flash_attn": [],
        "flash_attn.bert_padding": ["index_first_axis", "pad_input", "rearrange", "unpad_input"],
        "flash_attn.utils": [],
        "flash_attn.utils.distributed": ["all_gather"],
        "pylatexenc": ["latex2text"],
    }
    with pytest.MonkeyPatch.context() as only_for_the_import:
        for name in [n for n in needed if find_spec(n.split(".")[0]) is None]:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            for function in needed[name]:
                setattr(module, function, None)
            only_for_the_import.setitem(sys.modules, name, module)
        import openrlhf.models.actor as actor
    yield actor
    fast_openrlhf.unpatch()


def score(actor_module: Any, temperature: float) -> list[Tensor]:
    """The Actor's action log-probs, entropies, and the gradients of all its weights."""
    model = make_model()
    actor = actor_module.Actor(model, temperature=temperature)
    actor.packing_samples = False
    torch.manual_seed(1)
    sequences = torch.randint(6, 32, (3, 11))
    mask = torch.ones_like(sequences)
    mask[1, :4] = 0
    logps, output = actor(
        sequences, mask[:, -6:], attention_mask=mask, return_output=True, return_entropy=True
    )
    rows = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    (rows * logps - 0.2 * output.entropy[:, -6:]).mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [logps.detach(), output.entropy.detach(), *gradients]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_actor_of_openrlhf_scores_the_same(actor_module, temperature):
    with torch.compiler.set_stance("force_eager"):  # compute_entropy is compiled
        theirs = score(actor_module, temperature)
    with fast_openrlhf.patched():
        assert actor_module.log_probs_from_logits is fast_openrlhf.log_probs_from_logits
        ours = score(actor_module, temperature)
    scale = max(float(t.abs().max()) for t in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * scale)
