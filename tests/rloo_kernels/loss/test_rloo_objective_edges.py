"""The clipped objective where it is delicate: clipping, NaN, empty rows, dtypes, arguments."""

import math

import pytest
import torch
from rloo_kernels import (
    LossOptions,
    rloo_advantages,
    rloo_loss,
    rloo_objective,
    selective_log_softmax,
)

from tests.support.kernel_helpers import NAN, bounds, nan_in_new_memory  # noqa: F401
from tests.support.kernel_losses import (
    LENGTHS,
    LOSSES,
    TOKENS,
    assert_objective,
    backward,
    log_probs,
    make_loss,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
losses = pytest.mark.parametrize("name", list(LOSSES))
masks = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
levels = pytest.mark.parametrize("level", ["sequence", "token"])


def close(got, want, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


# --- clipping


def objective(log_ratio, advantage, **changes):
    """The objective of one row with one token, and its gradient."""
    options = {"epsilon_low": 0.2, "epsilon_high": 0.3, "old_logps": torch.zeros(1), **changes}
    found, gradient = backward(
        torch.tensor([float(log_ratio)]), torch.tensor([0, 1]),
        advantages=torch.tensor([float(advantage)]), **options,
    )  # fmt: skip
    return found, gradient.item()


@levels
@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "side"), [
    (1.5, 2.0, -2.6, 0.0, "high"),
    (1.5, -2.0, 3.0, 3.0, None),
    (0.5, 2.0, -1.0, -1.0, None),
    (0.5, -2.0, 1.6, 0.0, "low"),
    (1.1, 2.0, -2.2, -2.2, None),
    (1.5, 0.0, 0.0, 0.0, None),
])  # fmt: skip
def test_clipping_sides(ratio, advantage, loss, slope, side, level):
    found, gradient = objective(math.log(ratio), advantage, level=level)
    assert found.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradient == pytest.approx(slope, rel=1e-6)
    clipped = (found.clipped_low.item(), found.clipped_high.item())
    assert clipped == (float(side == "low"), float(side == "high"))


@levels
@pytest.mark.parametrize(("advantage", "loss"), [(2.0, -2.6), (0.0, 0.0)])
def test_a_ratio_beyond_fp32_that_is_clipped_has_gradient_zero(advantage, loss, level):
    """exp(100) is inf in fp32: neither inf * 0 nor 0 * inf may reach the loss or the gradient."""
    found, gradient = objective(100.0, advantage, level=level)
    assert found.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradient == 0


@pytest.mark.parametrize("log_ratio", [100.0, NAN])
def test_what_is_not_finite_is_seen_as_such(log_ratio):
    found, gradient = objective(log_ratio, -1.0)
    assert not math.isfinite(found.loss.item())
    assert not math.isfinite(gradient)


@pytest.mark.parametrize("name", [n for n in LOSSES if "normalized" not in n])
def test_a_nan_in_one_group_stays_there(name):
    """Coefficients of other groups do not see it (normalize=True looks at all of them)."""
    logps = log_probs()
    loss = make_loss(name, logps)
    want = backward(logps, bounds(LENGTHS), **loss)[1]
    logps[0] = NAN
    got = backward(logps, bounds(LENGTHS), **loss)[1]
    close(got[5:], want[5:])


# --- edges


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("num_rows", [0, 2])
def test_no_tokens(num_rows, padded):
    shape = (num_rows, 0) if padded else (0,)
    cu = None if padded else torch.zeros(num_rows + 1, dtype=torch.long)
    rewards = torch.arange(num_rows).float()
    found, gradient = backward(torch.empty(shape), cu, rewards=rewards, num_generations=2)
    assert gradient.shape == shape
    assert found.num_tokens.tolist() == [0] * num_rows
    assert found.loss.item() == pytest.approx(0.0)  # - mean A: a row without tokens has ratio 1


def test_all_rows_masked():
    """Padding may hold anything: no token, no gradient, a ratio of 1."""
    logps = torch.full((4, 3), NAN)
    found, gradient = backward(
        logps, rewards=torch.tensor([1.0, 2, 3, 5]), old_logps=logps, ref_logps=logps,
        mask=torch.zeros(4, 3), num_generations=2, beta=0.1,
    )  # fmt: skip
    assert (gradient == 0).all()
    assert found.advantages.tolist() == [-1, 1, -2, 2]
    assert found.loss.isfinite()


def test_only_the_new_log_probs_get_a_gradient():
    given = {name: torch.zeros(2, requires_grad=True)
             for name in ("rewards", "old_logps", "ref_logps", "entropy")}  # fmt: skip
    logps = torch.zeros(2, requires_grad=True)
    rloo_objective(
        logps, torch.tensor([0, 1, 2]), **given, num_generations=2, beta=0.1
    ).loss.backward()
    assert logps.grad is not None
    assert all(x.grad is None for x in given.values())


def test_a_derivative_of_the_gradient_is_refused():
    """The ratio depends on logp, the coefficients are constants: an error, not a wrong number."""
    logps = torch.zeros(2, requires_grad=True)
    loss = rloo_objective(
        logps, torch.tensor([0, 2]), advantages=torch.ones(1), old_logps=torch.zeros(2)
    ).loss
    scale = torch.ones((), requires_grad=True)

    def differentiate_twice():
        (grad,) = torch.autograd.grad(scale * loss, logps, create_graph=True)
        grad.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"no autograd formula|once_differentiable"):
        differentiate_twice()


@pytest.mark.parametrize("given", ["rewards", "advantages", "old_logps", "ref_logps", "entropy"])
def test_the_result_has_the_dtype_of_the_log_probs(given):
    """Rewards summed in fp64, as metrics are, change no dtype."""
    options = {"advantages": torch.ones(2)} if given != "rewards" else {"num_generations": 2}
    size = 2 if given in ("rewards", "advantages") else 4
    options[given] = torch.zeros(size, dtype=torch.double)
    found = rloo_objective(torch.zeros(4), bounds([2, 2]), **options)
    assert {x.dtype for x in found if x is not None} == {torch.float32}


@masks
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@losses
def test_rloo_loss_is_the_objective_of_the_log_probs(name, inplace, masked):
    torch.manual_seed(0)
    base, ids = torch.randn(TOKENS, 7).double(), torch.randint(7, (TOKENS,))
    options = {"temperature": 0.7}
    loss = make_loss(name, selective_log_softmax(base, ids, **options), masked)
    one, two = (base.clone().requires_grad_() for _ in range(2))
    found = rloo_loss(one * 1.0, ids, bounds(LENGTHS), **loss, **options,
                      inplace_backward=inplace, return_entropy=True)  # fmt: skip
    found.loss.backward()
    logps, entropy = selective_log_softmax(
        two, ids, **options, return_entropy=True, mask=loss.get("mask")
    )
    want = rloo_objective(logps, bounds(LENGTHS), **loss, entropy=entropy)
    want.loss.backward()
    close(one.grad, two.grad)
    fields = want._replace(logps=logps, entropy=entropy)._asdict()
    assert_objective(found, fields)
    assert not found.logps.requires_grad
    assert not found.entropy.requires_grad


# --- errors


@pytest.mark.parametrize(("change", "message"), [
    ({"advantages": None}, "exactly one of rewards, advantages and token_advantages, got none"),
    ({"rewards": torch.zeros(2)}, "exactly one of"),
    ({"advantages": torch.zeros(3)}, r"advantages must be \(2,\), one per row, got \(3,\)"),
    ({"old_logps": torch.zeros(3)}, r"old_logps must be \(4,\)"),
    ({"mask": torch.ones(2, 2)}, r"mask must be \(4,\)"),
    ({"entropy": torch.zeros(2, 2)}, r"entropy must be \(4,\)"),
    ({"advantages": None, "token_advantages": torch.zeros(4)}, 'need level="token"'),
    ({"advantages": None, "rewards": torch.zeros(2)}, "whole groups of num_generations >= 2"),
    ({"advantages": None, "rewards": torch.zeros(2), "num_generations": 2, "beta": 0.1},
     "needs ref_logps"),
    ({"normalize": True}, "give rewards"),
    ({"cu_seqlens": None}, r"per-token tensors must be \(R, T\)"),
    ({"cu_seqlens": torch.tensor([0, 2, 3])}, "cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 2, 5])}, "cu_seqlens"),
    ({"cu_seqlens": torch.tensor([1, 2, 4])}, "cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 5, 4])}, "cu_seqlens"),
], ids=str)  # fmt: skip
def test_arguments_that_do_not_fit(change, message):
    given = {"cu_seqlens": bounds([2, 2]), "advantages": torch.zeros(2), **change}
    with pytest.raises(ValueError, match=message):
        rloo_objective(torch.zeros(4), **given)


@pytest.mark.parametrize(("options", "message"), [
    ({"kl": "k3"}, "kl must be one of"), ({"level": "row"}, "level must be one of"),
    ({"advantage": "ppo"}, "advantage must be one of"),
    ({"kl": "loss"}, 'needs level="token"'), ({"token_mean": True}, 'needs level="token"'),
    ({"denominator": 0}, "denominator must be > 0"),
], ids=str)  # fmt: skip
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)


def test_the_advantages_are_those_of_rloo_advantages():
    rewards = torch.tensor([1.0, NAN, 2.0, 5.0, 3.0, 3.0])
    for options in ({}, {"normalize": True}, {"advantage": "grpo"}):
        found = rloo_objective(torch.zeros(6), torch.arange(7), rewards=rewards,
                               num_generations=3, **options)  # fmt: skip
        assert torch.equal(found.advantages, rloo_advantages(rewards, 3, **options))
