"""The ops under torch.library: schemas, fake tensors, torch.compile, and who gets a gradient."""

import pytest
import torch
from rloo_kernels import (
    fused_linear_rloo_loss,
    linear_logprob,
    rloo_loss,
    rloo_objective,
    selective_log_softmax,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.kernel_helpers import bounds
from tests.support.kernel_losses import LENGTHS, LOSSES, make_loss

TOKENS, D, V = sum(LENGTHS), 4, 9
SOME = torch.arange(TOKENS) % 3 != 1
NONE = torch.zeros(TOKENS, dtype=torch.bool)
# Options of a head (and of what is worked on at a time), with the leaves that require a gradient.
HEADS = {
    "plain": ("hidden weight", {}),
    "bias": ("hidden weight bias", {"softcap": 2.0, "temperature": 0.7, "logit_scale": 1.3}),
    "pieces": ("hidden weight bias", {"chunk_bytes": 4 * V * 5}),
    "entropy": ("hidden weight", {"return_entropy": True}),
    "entropy-pieces": ("hidden weight bias", {"return_entropy": True, "chunk_bytes": 4 * V * 5}),
    "frozen-head": ("hidden", {}),
    "frozen-head-entropy": ("hidden", {"return_entropy": True, "chunk_bytes": 4 * V * 5}),
    "frozen-hidden": ("weight", {}),
    "no-gradient": ("", {"return_entropy": True}),
    "masked": ("hidden weight bias", {"mask": SOME}),
    "masked-pieces": ("hidden weight", {"mask": SOME, "chunk_bytes": 4 * V * 5}),
    "masked-frozen-head": ("hidden", {"mask": SOME}),
    "masked-no-gradient": ("", {"mask": SOME}),
    "all-masked": ("hidden weight", {"mask": NONE}),
}
SOFTMAX = {
    "plain": {},
    "entropy": {"return_entropy": True, "temperature": 0.7},
    "masked": {"return_entropy": True, "mask": SOME},
    "all-masked": {"mask": NONE},
    "inplace": {"inplace_backward": True},
}


def make(need="", num_rows=TOKENS, dtype=torch.float32):
    """name -> tensor: hidden, weight, bias, ids."""
    torch.manual_seed(0)
    made = {
        "hidden": torch.randn(num_rows, D, dtype=dtype),
        "weight": torch.randn(V, D, dtype=dtype),
        "bias": torch.randn(V, dtype=dtype),
    }
    made = {name: x.requires_grad_(name in need.split()) for name, x in made.items()}
    return made | {"ids": torch.randint(V, (num_rows,))}


def call_linear(x, **options):
    return linear_logprob(x["hidden"], x["weight"], x["ids"], bias=x["bias"], **options)


def call_fused(x, **options):
    return fused_linear_rloo_loss(
        x["hidden"], x["weight"], x["ids"], bounds(LENGTHS), bias=x["bias"], **options
    )


def call_softmax(x, **options):
    logits = x["hidden"] @ x["weight"].T
    return selective_log_softmax(logits, x["ids"], **options)


def call_objective(x, **options):
    return rloo_objective(x["hidden"][:, 0], bounds(LENGTHS), **options)


def loss_options(name, masked=False, dtype=torch.float32):
    made = make_loss(name, -torch.ones(TOKENS), masked)
    if "rewards" in made:  # opcheck does not take nan for equal to nan
        made["rewards"] = made["rewards"].nan_to_num()
    return {key: v.to(dtype) if isinstance(v, torch.Tensor) and key != "mask" else v
            for key, v in made.items()}  # fmt: skip


CASES = {
    **{f"softmax-{n}": (call_softmax, "hidden", o) for n, o in SOFTMAX.items()},
    **{f"linear-{n}": (call_linear, need, o) for n, (need, o) in HEADS.items()},
    **{f"fused-{n}": (call_fused, need, o | loss_options("rloo"))
       for n, (need, o) in HEADS.items()},
    **{f"objective-{n}": (call_objective, "hidden", loss_options(n)) for n in LOSSES},
    "objective-masked": (call_objective, "hidden", loss_options("grpo", True)),
    **{f"loss-{n}": (call_fused, "hidden weight bias", loss_options(n))
       for n in ("ratio", "rloo-kl", "rloo-kl-normalized", "reward-to-go", "grpo")},
}  # fmt: skip
FEW_OBJECTIVES = ["objective-rloo-kl-ratio", "objective-grpo", "objective-masked",
                  "objective-reward-to-go", "objective-token-advantages"]  # fmt: skip
cases = pytest.mark.parametrize("case", list(CASES))


def scalar(found):
    """A differentiable number of an op's output: the loss, or log-probs (and entropies) summed."""
    if hasattr(found, "loss"):
        return found.loss
    return sum(((i + 2) * x).sum() for i, x in enumerate(found if isinstance(found, tuple)
                                                         else (found,)))  # fmt: skip


def tensors(found):
    return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def copied(x):
    if isinstance(x, torch.Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    return x


class Calls(TorchDispatchMode):
    """Our ops' calls and copies of their arguments, as the public functions make them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rloo_kernels":
            self.seen.append((func, [copied(x) for x in args]))
        return func(*args, **(kwargs or {}))


def calls(case, num_rows=TOKENS):
    function, need, options = CASES[case]
    with Calls() as recorded:
        found = scalar(function(make(need, num_rows), **options))
        if found.requires_grad:
            found.backward()
    return recorded.seen


ALL_OPS = {
    "logprob", "logprob_backward", "logprob_backward_", "linear_logprob",
    "linear_logprob_backward", "segments", "linear_rloo", "loss_backward",
}  # fmt: skip


def check(op, args, given_rewards=True):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if given_rewards or op._schema.name.split("::")[1] not in ("segments", "linear_rloo"):
        tests.append("test_aot_dispatch_dynamic")  # else shaped_rewards are nan: see above
    if "backward" in op._schema.name:  # not differentiable, and said so
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize("case", [
    n for n in CASES if not n.startswith("objective") or n in FEW_OBJECTIVES
])  # fmt: skip
def test_opcheck(case):
    """Schema, autograd registration, fake kernel, and the same gradients through AOTAutograd."""
    seen = calls(case)
    assert seen
    for op, args in seen:
        check(op, args, given_rewards="rewards" in CASES[case][2])


def test_every_op_is_among_the_cases():
    few = ["softmax-entropy", "softmax-inplace", "linear-bias", "objective-grpo", "fused-bias"]
    seen = {op._schema.name.split("::")[1] for case in few for op, _ in calls(case)}
    assert seen == ALL_OPS


@pytest.mark.parametrize("op", ["softmax", "linear"])
@pytest.mark.parametrize("need", ["hidden weight bias", "hidden", ""])
def test_opcheck_of_an_empty_batch(op, need):
    with Calls() as recorded:
        found = scalar({"softmax": call_softmax, "linear": call_linear}[op](make(need, 0)))
        if found.requires_grad:
            found.backward()
    assert recorded.seen
    for overload, args in recorded.seen:
        check(overload, args)


def results(function, need, options):
    """Outputs and gradients, of fresh leaves."""
    leaves = make(need)
    found = function(leaves, **options)
    loss = scalar(found)
    if loss.requires_grad:
        loss.backward()
    return [x.detach() for x in tensors(found)] + [
        leaves[name].grad for name in need.split() if leaves[name].grad is not None
    ]


def assert_compiled_is_eager(case, backend):
    function, need, options = CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    got, want = (results(f, need, options) for f in (compiled, function))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("case", [
    "softmax-entropy", "softmax-masked", "softmax-inplace",
    "linear-bias", "linear-entropy-pieces", "linear-frozen-head", "linear-masked",
    "linear-masked-pieces", "linear-masked-frozen-head", "linear-masked-no-gradient",
    "objective-ratio", "objective-masked", "objective-rloo-kl-normalized",
    "fused-bias", "fused-masked", "fused-frozen-head", "fused-no-gradient", "loss-grpo",
])  # fmt: skip
def test_compiled_whole_graph_gives_the_same_numbers(case):
    assert_compiled_is_eager(case, "aot_eager")


@pytest.mark.parametrize("case", ["fused-bias"])
def test_inductor_gives_the_same_numbers(case):
    assert_compiled_is_eager(case, "inductor")


@pytest.mark.parametrize("case", ["linear-bias", "linear-frozen-head", "softmax-entropy"])
def test_compiled_once_for_all_numbers_of_tokens(case):
    """Lengths change every step: one graph serves them."""
    function, need, options = CASES[case]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for num_rows in (7, 8, 12):
        got, want = (scalar(f(make(need, num_rows), **options)) for f in (compiled, function))
        got.backward()
        torch.testing.assert_close(got, want)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
# with a mask, how many rows linear_logprob keeps is not known to a fake tensor: opcheck covers it
@pytest.mark.parametrize("case", [
    name for name, (f, _, o) in CASES.items() if f is not call_linear or "mask" not in o
])  # fmt: skip
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(case, dtype):
    function, need, options = CASES[case]
    options = {key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
               for key, x in options.items()}  # fmt: skip
    real = tensors(function(make(need, dtype=dtype), **options))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = {name: mode.from_tensor(x) for name, x in make(need, dtype=dtype).items()}
        given = {key: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
                  for key, x in options.items()}  # fmt: skip
        fake = tensors(function(leaves, **given))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (
            b.shape, b.dtype, b.stride(), b.requires_grad)  # fmt: skip


@cases
def test_no_gradient_is_made_under_no_grad(case):
    function, need, options = CASES[case]
    with torch.no_grad():
        found = function(make(need), **options)
    assert not any(x.requires_grad for x in tensors(found))
    with torch.inference_mode():
        again = function(make(need), **options)
    for a, b in zip(tensors(found), tensors(again), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("case", [n for n, (f, *_) in CASES.items() if f is not call_softmax])
def test_autocast_does_not_reach_in(case):
    function, need, options = CASES[case]
    want = results(function, need, options)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(function, need, options)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_rloo_loss_compiles():
    torch._dynamo.reset()
    given = loss_options("rloo-kl")

    def function(logits, ids):
        return rloo_loss(logits, ids, bounds(LENGTHS), **given).loss

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    base, ids = torch.randn(TOKENS, V), torch.randint(V, (TOKENS,))
    grads = []
    for f in (compiled, function):
        leaf = base.clone().requires_grad_()
        f(leaf, ids).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
