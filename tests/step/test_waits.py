"""How often the host waits for the device in an update: once, to fetch what the step found."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from rloo_kernels.transfer import to_device, to_host

from rloo_fast.batching.budget import TokenBudget
from rloo_fast.batching.planner import Planner
from rloo_fast.batching.retry import MicroBatchRunner
from rloo_fast.distributed.base import TrainingEngine
from rloo_fast.objective.advantages import AdvantageMaker
from rloo_fast.objective.losses import LOSSES
from rloo_fast.objective.settings import LossSettings
from rloo_fast.policy.forward import Policy
from rloo_fast.records import Piece
from rloo_fast.step.update import Updater
from tests.support.batches import prepared_batch
from tests.support.pretend_cuda import CUDA, PretendCuda
from tests.support.tiny import make_model

COPY = "aten._to_copy.default"  # to the host


def make_batch(advantages, off_policy):
    """Four groups of two, a row without tokens among them."""
    g = torch.Generator().manual_seed(1)
    lengths = [3, 5, 2, 7, 4, 0, 6, 1]
    ids = [torch.randint(2, 32, (n,), generator=g).tolist() for n in (4, 1, 6, 3)]
    num_tokens = sum(lengths)
    made = {"ref_logps": -3 * torch.rand(num_tokens, generator=g)}
    if advantages:
        made["advantages"] = torch.tensor([1.0, -1, 0, 0, 2, 0.5, 3, -3])
    if off_policy:
        made |= {"old_logps": -3 * torch.rand(num_tokens, generator=g), "on_policy": False}
    return prepared_batch(
        [ids[row // 2] for row in range(8)],
        [torch.randint(2, 32, (n,), generator=g).tolist() for n in lengths],
        scores=torch.tensor([1.0, 0, 1, 1, 0, 2, 0, 3]),
        prepared=made,
    )


def attempt(device, batch, beta=0.0, budget=14):
    """(StepResult, gradients) of a step over the batch."""
    accelerator = Accelerator(cpu=True)
    model = make_model().to(device)
    settings = LossSettings(
        row=LOSSES["rloo"], beta=beta, epsilon_low=0.2, epsilon_high=0.2, advantage="rloo",
        normalize_advantages=False, whiten_rewards=False, bias_corrected_kl=False,
        truncated_importance_sampling=None, importance_sampling_cap=2.0, max_completion_length=8,
    )  # fmt: skip
    planner = Planner(TokenBudget(2, budget), device=device, pad_token_id=0)
    planner.layout_name = "shared_prefix"
    updater = Updater(
        Policy(model, temperature=0.7, own_logits=""),
        planner,
        MicroBatchRunner(accelerator, can_retry=True),
        AdvantageMaker(settings, accelerator),
        settings,
        TrainingEngine(accelerator),
        rows_per_micro_step=8,
    )
    with mock.patch.object(Accelerator, "device", device):
        plan = updater.plan([Piece(batch, list(range(8)), 0)])
        result = updater.attempt(plan, model, updater.loss)
    return result, {name: p.grad for name, p in model.named_parameters()}


KINDS = {
    "known advantages": {"advantages": True, "off_policy": False},
    "off-policy": {"advantages": True, "off_policy": True},
    "out of the forward": {"advantages": False, "off_policy": False, "beta": 0.1},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def run(device, kind, **options):
    fields = dict(KINDS[kind])
    batch = make_batch(fields.pop("advantages"), fields.pop("off_policy"))
    return attempt(device, batch, **fields, **options)


@pytest.fixture
def cuda(monkeypatch):
    """A pretended GPU, without Triton's kernels."""
    monkeypatch.setattr("rloo_kernels.dispatch.triton_missing", lambda: "pretended")
    with PretendCuda() as cuda:
        yield cuda


@kinds
@pytest.mark.parametrize("budget", [14, 1000])
def test_a_step_waits_once_whatever_the_number_of_micro_batches(kind, budget, cuda, monkeypatch):
    model = make_model().to(CUDA)  # loading weights waits, and is no part of a step
    monkeypatch.setattr("tests.step.test_waits.make_model", lambda: model)
    cuda.waits.clear()
    result, _ = run(CUDA, kind, budget=budget)
    assert result.num_micro_batches > 2 if budget == 14 else result.num_micro_batches == 1
    assert cuda.waits == [COPY]


@kinds
def test_numbers_are_those_of_a_cpu(kind, cuda):
    got, gradients = run(CUDA, kind)
    got_loss = got.loss.host
    gradients = {name: None if g is None else g.host for name, g in gradients.items()}
    want, want_gradients = run(torch.device("cpu"), kind)
    torch.testing.assert_close(got_loss, want.loss)
    for name, column in vars(want.rows).items():
        torch.testing.assert_close(getattr(got.rows, name), column, equal_nan=True)
    for name in ("old_logps", "advantages"):
        mine, theirs = (getattr(r.pieces[0].batch, name) for r in (got, want))
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    for name, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0])],
        lambda x: x.cpu(),
        lambda x: torch.empty(3).copy_(x),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x.repeat_interleave(x.long()),
    ],
    ids=[
        "item", "bool", "nonzero", "mask", "index on the host", "cpu", "copy to the host",
        "copy from the host", "pageable", "pageable, said not to wait", "repeat_interleave",
    ],
)  # fmt: skip
def test_a_wait_is_seen(wait, cuda):
    x = to_device(torch.ones(3), CUDA)
    assert cuda.waits == []
    wait(x)
    assert cuda.waits


def test_many_tensors_come_in_one_copy(cuda):
    given = [torch.ones(2, 3), torch.tensor(4.0), torch.empty(0), torch.arange(2.0)]
    found = to_host([to_device(x, CUDA) for x in given])
    assert cuda.to_host == [9]
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    assert to_host([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@kinds
def test_a_gpu_is_waited_for_once(kind, monkeypatch):
    device = torch.device("cuda", 0)
    run(device, kind)  # compiles what there is to compile
    model = make_model().to(device)
    monkeypatch.setattr("tests.step.test_waits.make_model", lambda: model)
    copies = []

    def fetched(tensors):
        copies.append(len(tensors))
        torch.cuda.set_sync_debug_mode("default")
        return to_host(tensors)

    monkeypatch.setattr("rloo_fast.step.update.to_host", fetched)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(device, kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(copies) == 1
