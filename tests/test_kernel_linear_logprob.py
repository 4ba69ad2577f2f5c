"""linear_logprob against float64, against what plain torch loses, and its cost as it claims it."""

import pytest
import torch
from rloo_kernels import linear_logprob
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]


def plain(hidden, weight, ids, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """(log-probs, entropies) with [N, V] logits made in the inputs' dtype, as models do."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z if z.dtype == torch.double else z.float()
    logq = (z / temperature).log_softmax(-1)
    p = logq.exp()
    entropy = -torch.where(p > 0, p * logq, 0.0).sum(-1)
    return logq.gather(-1, ids[:, None]).squeeze(-1), entropy


def ours(hidden, weight, ids, **kwargs):
    return linear_logprob(hidden, weight, ids, return_entropy=True, **kwargs)


def make(num_rows, vocab_size, dtype, size=24, scale=1.0, bias=False, seed=0):
    """(hidden, weight, ids, bias or None, upstream gradient); logits of std `scale`."""
    torch.manual_seed(seed)
    hidden = torch.randn(num_rows, size).to(dtype)
    weight = (torch.randn(vocab_size, size) * scale / size**0.5).to(dtype)
    ids = torch.randint(vocab_size, (num_rows,))
    b = torch.randn(vocab_size).to(dtype) if bias else None
    return hidden, weight, ids, b, torch.randn(num_rows)


def run(function, hidden, weight, ids, bias, upstream, **kwargs):
    """name -> log-prob, entropy, and the gradients of sum upstream * log-prob."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in
              (hidden, weight, bias)]  # fmt: skip
    logps, entropy = function(leaves[0], leaves[1], ids, bias=leaves[2], **kwargs)
    (logps * upstream.to(logps.dtype)).sum().backward()
    out = {"log-prob": logps.detach(), "entropy": entropy.detach()}
    for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True):
        if leaf is not None:
            out[name] = leaf.grad
    return out


def in_double(inputs):
    return [x if x is None or not x.is_floating_point() else x.double() for x in inputs]


def assert_as_exact_as_torch(inputs, chunk_bytes=None, **kwargs):
    got = run(ours, *inputs, chunk_bytes=chunk_bytes, **kwargs)
    torch_s = run(plain, *inputs, **kwargs)
    exact = run(plain, *in_double(inputs), **kwargs)
    for name, want in exact.items():
        assert got[name].isfinite().all(), name
        errors = [(x[name].double() - want).abs().max().item() for x in (got, torch_s)]
        scale = max(1.0, want.abs().max().item())
        assert errors[0] <= 2 * errors[1] + 1e-6 * scale, f"{name}: {errors}"


def assert_same(got, want, rtol=1e-5, atol=1e-6):
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("pieces", [False, True], ids=["one-piece", "pieces"])
@pytest.mark.parametrize("shape", [(1, 7), (127, 7), (1, 5003), (127, 5003)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_error_is_at_most_twice_that_of_torch(dtype, shape, pieces):
    chunk_bytes = 4 * shape[1] * 40 if pieces else None  # 40 rows at a time
    assert_as_exact_as_torch(make(*shape, dtype), chunk_bytes)


@pytest.mark.parametrize("temperature", [1e-2, 0.7, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_temperature(dtype, temperature):
    assert_as_exact_as_torch(make(37, 251, dtype), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_softcap_scale_and_bias_together(dtype):
    inputs = make(37, 251, dtype, bias=True)
    assert_as_exact_as_torch(inputs, softcap=2.0, logit_scale=1.7, temperature=0.8)


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_logits_of_ten_thousand(dtype, temperature):
    if (dtype, temperature) == (torch.float16, 1e-2):
        temperature = 0.1  # at 0.01 the gradient itself is beyond fp16
    assert_as_exact_as_torch(make(31, 251, dtype, scale=3e3), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_offset_of_all_logits_costs_no_digits(temperature):
    """A bias of 10^4 on every token changes no probability."""
    hidden, weight, ids, _, upstream = make(31, 251, torch.float32)
    # multiples of 1/64, so that adding 10^4 is exact
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    far = (hidden, weight, ids, torch.full((251,), 1e4), upstream)
    near = (hidden, weight, ids, torch.zeros(251), upstream)
    got, want = (run(ours, *x, temperature=temperature) for x in (far, near))
    assert_same(got, want, rtol=0, atol=2e-6)


def test_almost_certain_tokens():
    hidden = torch.tensor([[2.0], [8.0], [14.0], [20.0], [60.0]])
    weight = torch.zeros(101, 1)
    weight[3] = 1.0
    inputs = hidden, weight, torch.full((5,), 3), None, torch.ones(5)
    assert_as_exact_as_torch(inputs)
    assert (linear_logprob(*inputs[:3]) <= 0).all()


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 11 * 2], ids=["one-piece", "pieces"])
def test_impossible_tokens_have_entropy_without_nan(chunk_bytes):
    hidden, weight, ids, bias, upstream = make(5, 11, torch.float32, bias=True)
    bias[::2] = -torch.inf
    ids = torch.full((5,), 3)
    assert_as_exact_as_torch((hidden, weight, ids, bias, upstream), chunk_bytes)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_no_rows(bias):
    got = run(ours, *make(0, 7, torch.float32, bias=bias))
    want = run(plain, *make(0, 7, torch.float32, bias=bias))
    assert_same(got, want)


@pytest.mark.parametrize("rows", [1, 3, 10, 64])
def test_pieces_equal_one_piece(rows):
    inputs = make(10, 23, torch.float32, bias=True)
    options = {"temperature": 0.7, "softcap": 3.0, "logit_scale": 0.5}
    pieces = run(ours, *inputs, chunk_bytes=4 * 23 * rows, **options)
    assert_same(pieces, run(ours, *inputs, **options))


@pytest.mark.parametrize("options", [
    {},
    {"temperature": 0.6},
    {"softcap": 0.9},
    {"logit_scale": -1.3},
    {"temperature": 2.0, "softcap": 1.1, "logit_scale": 0.4},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows", [2, 64], ids=["pieces", "one-piece"])
def test_gradcheck(rows, options):
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.double, requires_grad=True)
    bias = torch.randn(7, dtype=torch.double, requires_grad=True)
    ids = torch.tensor([0, 6, 2, 2, 5])

    def function(h, w, b):
        return linear_logprob(h, w, ids, bias=b, chunk_bytes=4 * 7 * rows, **options)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_gradients_go_only_to_what_requires_them(wanted):
    hidden, weight, ids, bias, upstream = make(10, 23, torch.float32, bias=True)
    want = run(plain, hidden, weight, ids, bias, upstream)
    leaves = [x.clone().requires_grad_(bool(w)) for x, w in
              zip((hidden, weight, bias), wanted, strict=True)]  # fmt: skip
    logps = linear_logprob(leaves[0], leaves[1], ids, bias=leaves[2], chunk_bytes=4 * 23 * 3)
    (logps * upstream).sum().backward()
    for name, leaf, w in zip(("hidden", "weight", "bias"), leaves, wanted, strict=True):
        assert (leaf.grad is not None) == bool(w), name
        if w:
            torch.testing.assert_close(leaf.grad, want[name], rtol=1e-5, atol=1e-6)


def test_nothing_requires_a_gradient():
    hidden, weight, ids, _, _ = make(4, 9, torch.float32)
    assert not linear_logprob(hidden, weight, ids).requires_grad


class Watch(TorchDispatchMode):
    """FLOPs of the matrix products, and elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.flops = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        for x in out if isinstance(out, tuple | list) else (out,):
            self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def flops(hidden_grad, weight_grad, rows):
    """FLOPs of forward and of backward, in units of N D V."""
    hidden, weight, ids, _, _ = make(12, 31, torch.float32)
    hidden.requires_grad_(hidden_grad)
    weight.requires_grad_(weight_grad)
    with Watch() as forward:
        logps = linear_logprob(hidden, weight, ids, chunk_bytes=4 * 31 * rows)
    with Watch() as backward:
        logps.sum().backward()
    return [count / (12 * 24 * 31) for count in (forward.flops, backward.flops)]


@pytest.mark.parametrize(("hidden_grad", "weight_grad", "rows", "backward"), [
    (True, True, 12, 4), (True, True, 3, 6),
    (True, False, 12, 2), (True, False, 3, 4),
    (False, True, 12, 2),
], ids=["all", "all-pieces", "frozen-head", "frozen-head-pieces", "frozen-hidden"])  # fmt: skip
def test_flops_are_those_of_the_docstring(hidden_grad, weight_grad, rows, backward):
    assert flops(hidden_grad, weight_grad, rows) == [2, backward]


def test_the_logits_of_all_rows_never_exist():
    hidden, weight, ids, _, _ = make(200, 100, torch.float32, size=4)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Watch() as watch:
        logps, _ = ours(hidden, weight, ids, chunk_bytes=4 * 100 * 20)
        logps.sum().backward()
    assert watch.largest == 20 * 100  # of 200 * 100


def test_a_second_backward_repeats_the_first():
    for rows in (3, 64):
        hidden, weight, ids, bias, _ = make(10, 23, torch.float32, bias=True)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        logps = linear_logprob(
            hidden, weight, ids, bias=bias, softcap=2.0, chunk_bytes=4 * 23 * rows
        )
        first = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(logps.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), rows


def test_a_derivative_of_the_gradient_is_refused():
    """The backward of this op is not differentiable: an error, not a wrong number."""
    hidden, weight, ids, _, upstream = make(3, 7, torch.float32)
    hidden.requires_grad_()
    loss = (upstream.requires_grad_() * linear_logprob(hidden, weight, ids)).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_entropy_carries_no_gradient():
    hidden, weight, ids, _, _ = make(4, 9, torch.float32)
    logps, entropy = ours(hidden.requires_grad_(), weight, ids)
    assert (logps.requires_grad, entropy.requires_grad) == (True, False)


def test_non_contiguous_inputs():
    hidden, weight, ids, bias, upstream = make(10, 23, torch.float32, bias=True)
    strided = (hidden.T.contiguous().T, weight.T.contiguous().T, ids, bias, upstream)
    assert_same(
        run(ours, *strided, chunk_bytes=4 * 23 * 3), run(plain, hidden, weight, ids, bias, upstream)
    )


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 23 * 3], ids=["one-piece", "pieces"])
def test_autocast_does_not_change_the_products(chunk_bytes):
    inputs = make(10, 23, torch.float32, bias=True)
    want = run(ours, *inputs, chunk_bytes=chunk_bytes)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(ours, *inputs, chunk_bytes=chunk_bytes)
    assert_same(got, want, rtol=0, atol=0)


def many_pieces(dtype=torch.bfloat16, num_rows=4096, size=16, vocab_size=32, rows=4):
    """A weight of zero makes every p exactly 1 / V, so that dL/dz holds no rounding of its own."""
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, size).to(dtype)
    weight = torch.zeros(vocab_size, size, dtype=dtype, requires_grad=True)
    ids = torch.randint(vocab_size, (num_rows,))
    upstream = torch.randint(0, 2, (num_rows,)) * 2.0 - 1.0
    logps = linear_logprob(hidden, weight, ids, chunk_bytes=4 * vocab_size * rows)
    (logps * upstream).sum().backward()
    d = torch.nn.functional.one_hot(ids, vocab_size).double() - 1 / vocab_size
    d = d * upstream[:, None].double()
    return weight.grad, d, hidden, rows


def test_weight_gradient_is_rounded_once_not_once_per_piece():
    got, d, hidden, _ = many_pieces()
    exact = d.T @ hidden.double()
    # half a unit in the last place of bf16, and fp32's own rounding of a sum of 4096
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def test_weight_gradient_summed_in_bf16_would_be_much_worse():
    got, d, hidden, rows = many_pieces()
    exact = d.T @ hidden.double()
    in_bf16 = torch.zeros_like(got)
    for start in range(0, len(hidden), rows):
        piece = slice(start, start + rows)
        in_bf16 += d[piece].to(got.dtype).T @ hidden[piece]
    errors = [(x.double() - exact).square().mean().sqrt().item() for x in (got, in_bf16)]
    assert errors[0] * 10 < errors[1], errors


@pytest.mark.parametrize("bad", [-1, 7])
def test_token_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 7\)"):
        linear_logprob(torch.randn(2, 3), torch.randn(7, 3), torch.tensor([0, bad]))


@pytest.mark.parametrize(("shapes", "message"), [
    (((2, 3), (7, 4), None), r"with the same D, got \(2, 3\) and \(7, 4\)"),
    (((1, 2, 3), (7, 3), None), r"hidden must be \(N, D\)"),
    (((2, 3), (7, 3), (1,)), r"bias must be \(7,\), got \(1,\)"),
], ids=["D", "three-dimensional", "bias"])  # fmt: skip
def test_shapes_that_do_not_fit(shapes, message):
    hidden, weight, bias = (None if s is None else torch.randn(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), bias=bias)


def test_dtypes_that_do_not_fit():
    with pytest.raises(ValueError, match="must have the same dtype"):
        linear_logprob(torch.randn(2, 3).bfloat16(), torch.randn(7, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(("option", "value"), [
    ("temperature", 0.0), ("temperature", float("nan")), ("softcap", 0.0), ("softcap", -1.0),
])  # fmt: skip
def test_options_must_be_positive(option, value):
    with pytest.raises(ValueError, match=f"{option} must be > 0"):
        linear_logprob(
            torch.randn(2, 3), torch.randn(7, 3), torch.tensor([0, 1]), **{option: value}
        )
