"""torch.func, second derivatives and the meta device: right, or an error, for every public op."""

from __future__ import annotations

import pytest
import rloo_kernels as ops
import torch

N, D, V = 6, 4, 9
BOUNDS = torch.tensor([0, 3, 6])
REASON = "has no forward-mode derivative"


def inputs(device="cpu"):
    torch.manual_seed(0)
    made = {
        "logits": torch.randn(N, V),
        "hidden": torch.randn(N, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "logps": -torch.rand(N),
        "rewards": torch.randn(2),
        "ids": torch.randint(V, (N,)),
        "mask": torch.arange(N) != 2,
    }
    return {name: x.to(device) for name, x in made.items()}


def first(found):
    return found[0] if isinstance(found, tuple) else found


# what is differentiated -> the op's number
FUSED = {
    "selective_log_softmax": (
        "logits",
        lambda i: ops.selective_log_softmax(i["logits"], i["ids"], mask=i["mask"]).sum(),
    ),
    "linear_logprob by hidden": (
        "hidden",
        lambda i: ops.linear_logprob(i["hidden"], i["weight"], i["ids"]).sum(),
    ),
    "linear_logprob by weight": (
        "weight",
        lambda i: ops.linear_logprob(i["hidden"], i["weight"], i["ids"]).sum(),
    ),
    "linear_logprob by bias": (
        "bias",
        lambda i: first(
            ops.linear_logprob(
                i["hidden"], i["weight"], i["ids"], bias=i["bias"], mask=i["mask"],
                return_entropy=True,
            )
        ).sum(),
    ),
    "rloo_objective": (
        "logps",
        lambda i: ops.rloo_objective(i["logps"], BOUNDS, advantages=i["rewards"]).loss,
    ),
    "rloo_objective by rewards": (
        "rewards",
        lambda i: ops.rloo_objective(
            i["logps"], BOUNDS, rewards=i["rewards"], num_generations=2
        ).loss,
    ),
    "rloo_loss": (
        "logits",
        lambda i: ops.rloo_loss(i["logits"], i["ids"], BOUNDS, advantages=i["rewards"]).loss,
    ),
    "fused_linear_rloo_loss": (
        "hidden",
        lambda i: ops.fused_linear_rloo_loss(
            i["hidden"], i["weight"], i["ids"], BOUNDS, rewards=i["rewards"], num_generations=2,
            ref_logps=i["logps"], beta=0.1, mask=i["mask"],
        ).loss,
    ),
}  # fmt: skip
PLAIN = {
    "leave_one_out": lambda x: ops.leave_one_out(x.view(2, 3)).square().sum(),
    "rloo_advantages": lambda x: ops.rloo_advantages(
        x, 3, normalize=True, whiten_rewards=True
    ).square().sum(),
    "token_level_advantages": lambda x: ops.token_level_advantages(
        x[:2], x, BOUNDS, 0.1
    ).square().sum(),
}  # fmt: skip


def function_of(name, device="cpu"):
    """(the op as a function of one tensor, that tensor)."""
    argument, op = FUSED[name]
    given = inputs(device)
    return lambda x: op({**given, argument: x}), given[argument]


def jvp(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def jacfwd(f, x):
    return torch.func.jacfwd(f)(x)


def compiled_jvp(f, x):
    return torch.compile(lambda x: jvp(f, x), backend="eager")(x)


@pytest.mark.parametrize("transform", [jvp, dual, jacfwd, compiled_jvp])
@pytest.mark.parametrize("name", FUSED)
def test_forward_mode_is_refused(name, transform):
    with pytest.raises(Exception, match=REASON):  # dynamo may wrap it
        transform(*function_of(name))


def test_forward_mode_elsewhere_is_none_of_its_business():
    """An op on plain tensors inside of a jvp of something else."""
    f, x = function_of("rloo_loss")
    assert jvp(lambda y: (y * f(x)).sum(), torch.ones(3)) == pytest.approx(3 * float(f(x)))


@pytest.mark.parametrize("name", [name for name in FUSED if "by rewards" not in name])
def test_a_second_derivative_is_refused(name):
    f, x = function_of(name)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("name", [name for name in FUSED if "by rewards" not in name])
def test_functional_reverse_mode_is_an_error_or_right(name):
    f, x = function_of(name)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(f)(x)


@pytest.mark.parametrize("name", FUSED)
def test_vmap_is_a_loop(name):
    f, x = function_of(name)
    both = torch.stack([x, x.flip(0)])
    assert torch.allclose(torch.vmap(f)(both), torch.stack([f(x) for x in both]), atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_advantages_have_every_derivative(name):
    f, x = PLAIN[name], torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("name", [name for name in FUSED if "by rewards" not in name])
def test_the_meta_device_has_shapes_and_no_numbers(name):
    f, x = function_of(name, "meta")
    x.requires_grad_()
    loss = f(x)
    loss.backward()
    assert (loss.shape, loss.device.type) == ((), "meta")
    assert (x.grad.shape, x.grad.dtype, x.grad.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("name", PLAIN)
def test_advantages_on_the_meta_device(name):
    assert PLAIN[name](torch.randn(6, device="meta")).device.type == "meta"


@pytest.mark.parametrize("padded", [False, True])
def test_every_output_on_the_meta_device_is_shaped_as_on_a_cpu(padded):
    def outputs(device):
        i = inputs(device)
        shape = (2, 3) if padded else (6,)
        return ops.fused_linear_rloo_loss(
            i["hidden"].view(*shape, D), i["weight"], i["ids"].view(shape),
            None if padded else BOUNDS, rewards=i["rewards"], num_generations=2,
            mask=i["mask"].view(shape), return_entropy=True,
        )  # fmt: skip

    for name, here, there in zip(
        ops.Objective._fields, outputs("cpu"), outputs("meta"), strict=True
    ):
        assert (here.shape, here.dtype) == (there.shape, there.dtype), name
        assert there.is_meta
