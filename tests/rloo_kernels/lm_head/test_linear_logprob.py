"""linear_logprob against float64, against what plain torch loses, and its cost as it claims it."""

import pytest
import torch
from rloo_kernels import linear_logprob

from tests.support.kernel_helpers import (  # noqa: F401
    DTYPES,
    NAMES,
    Watch,
    assert_error_at_most_twice,
    nan_in_new_memory,
    plain_head,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
NEEDS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


def ours(hidden, weight, ids, **kwargs):
    return linear_logprob(hidden, weight, ids, return_entropy=True, **kwargs)


def make(num_rows, vocab_size, dtype=torch.float32, size=24, scale=1.0, bias=False, seed=0):
    """(hidden, weight, ids, bias or None); logits of std `scale`."""
    torch.manual_seed(seed)
    hidden = torch.randn(num_rows, size).to(dtype)
    weight = (torch.randn(vocab_size, size) * scale / size**0.5).to(dtype)
    ids = torch.randint(vocab_size, (num_rows,))
    return hidden, weight, ids, torch.randn(vocab_size).to(dtype) if bias else None


def run(function, hidden, weight, ids, bias, upstream=None, need=(1, 1, 1), **kwargs):
    """Log-prob, entropy and the gradients of sum upstream[0] log-prob + upstream[1] entropy."""
    upstream = torch.ones(1, len(ids)) if upstream is None else upstream
    leaves = [None if x is None else x.detach().clone().requires_grad_(bool(w))
              for x, w in zip((hidden, weight, bias), need, strict=True)]  # fmt: skip
    found = function(leaves[0], leaves[1], ids, bias=leaves[2], **kwargs)
    sum((u.to(x.dtype) * x).sum() for u, x in zip(upstream, found, strict=False)).backward()
    out = {"log-prob": found[0].detach(), "entropy": found[1].detach()}
    for name, leaf, wanted in zip(("hidden", "weight", "bias"), leaves, need, strict=True):
        if leaf is not None:
            assert (leaf.grad is not None) == bool(wanted), name
            if wanted:
                out[name] = leaf.grad
    return out


def assert_as_exact_as_torch(inputs, chunk_bytes=None, upstream=None, need=(1, 1, 1), **kwargs):
    torch.manual_seed(1)
    upstream = torch.randn(1, len(inputs[0])) if upstream is None else upstream
    in_double = [x if x is None or not x.is_floating_point() else x.double() for x in inputs]
    args = {"upstream": upstream, "need": need, **kwargs}
    assert_error_at_most_twice(
        run(ours, *inputs, chunk_bytes=chunk_bytes, **args),
        run(plain_head, *inputs, **args),
        run(plain_head, *in_double, **args),
    )


def assert_same(got, want, rtol=1e-5, atol=1e-6):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


through = pytest.mark.parametrize("through_entropy", [False, True], ids=["", "entropy"])


@through
@pytest.mark.parametrize("pieces", [False, True], ids=["one-piece", "pieces"])
@pytest.mark.parametrize("shape", [(1, 7), (127, 7), (1, 5003), (127, 5003)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_error_is_at_most_twice_that_of_torch(dtype, shape, pieces, through_entropy):
    chunk_bytes = 4 * shape[1] * 40 if pieces else None  # 40 rows at a time
    upstream = torch.randn(1 + through_entropy, shape[0])
    assert_as_exact_as_torch(make(*shape, dtype), chunk_bytes, upstream)


@pytest.mark.parametrize("need", [(1, 1, 1), (1, 0, 0)], ids=["all", "frozen-head"])
@pytest.mark.parametrize("vocab_size", [50304, 50257, 151936, 152064])
def test_vocabularies_of_models(vocab_size, need):
    inputs = make(3, vocab_size, torch.bfloat16, size=8)
    assert_as_exact_as_torch(inputs, chunk_bytes=2 * 2 * vocab_size, need=need)


@through
@pytest.mark.parametrize("temperature", [1e-2, 0.7, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_temperature(dtype, temperature, through_entropy):
    upstream = torch.randn(1 + through_entropy, 37)
    assert_as_exact_as_torch(make(37, 251, dtype), None, upstream, temperature=temperature)


@through
@pytest.mark.parametrize("chunk_bytes", [None, 4 * 251 * 5], ids=["one-piece", "pieces"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_softcap_scale_and_bias_together(dtype, chunk_bytes, through_entropy):
    upstream = torch.randn(1 + through_entropy, 37)
    options = {"softcap": 2.0, "logit_scale": 1.7, "temperature": 0.8}
    assert_as_exact_as_torch(make(37, 251, dtype, bias=True), chunk_bytes, upstream, **options)


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_logits_of_ten_thousand(dtype, temperature):
    if (dtype, temperature) == (torch.float16, 1e-2):
        temperature = 0.1  # at 0.01 the gradient itself is beyond fp16
    assert_as_exact_as_torch(make(31, 251, dtype, scale=3e3), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_offset_of_all_logits_costs_no_digits(temperature):
    """A bias of 10^4 on every token changes no probability."""
    hidden, weight, ids, _ = make(31, 251)
    # multiples of 1/64, so that adding 10^4 is exact
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    biases = torch.full((251,), 1e4), torch.zeros(251)
    far, near = (run(ours, hidden, weight, ids, b, temperature=temperature) for b in biases)
    assert_same(far, near, rtol=0, atol=3e-6)


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 101 * 2], ids=["one-piece", "pieces"])
def test_almost_certain_tokens_keep_their_digits(chunk_bytes):
    """p_y -> 1: log p and dL/dh ~ 1 - p_y are right to fp32's precision."""
    hidden = torch.tensor([[2.0], [8.0], [14.0], [20.0], [40.0]])
    weight = torch.zeros(101, 1)
    weight[3] = 1.0
    for need in ((1, 1, 0), (1, 0, 0)):
        got = run(ours, hidden, weight, torch.full((5,), 3), None, need=(*need[:2], 1),
                  chunk_bytes=chunk_bytes)  # fmt: skip
        rest = 100 * (-hidden.double()[:, 0]).exp()
        torch.testing.assert_close(got["log-prob"].double(), -rest.log1p(), rtol=2e-6, atol=0)
        want = (rest / (1 + rest))[:, None]  # only the token's own weight is not 0
        torch.testing.assert_close(got["hidden"].double(), want, rtol=2e-6, atol=0)


@through
@pytest.mark.parametrize("chunk_bytes", [None, 4 * 11 * 2], ids=["one-piece", "pieces"])
def test_impossible_tokens(chunk_bytes, through_entropy):
    hidden, weight, _, bias = make(5, 11, bias=True)
    ids, upstream = torch.full((5,), 3), torch.randn(1 + through_entropy, 5)
    low = bias.clone()
    bias[::2], low[::2] = -torch.inf, -1e30
    got = run(ours, hidden, weight, ids, bias, upstream, chunk_bytes=chunk_bytes)
    assert_same(got, run(plain_head, hidden, weight, ids, low, upstream))


@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1, 7)], ids=["no-row", "one-row"])
def test_no_row_and_one_row(shape, need):
    inputs = make(*shape, bias=True)
    assert_same(run(ours, *inputs, need=need), run(plain_head, *inputs, need=need))


@through
@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_gradients_go_only_to_what_requires_them(rows, need, through_entropy):
    """Whatever is asked for and however many pieces: the same numbers."""
    inputs, upstream = make(10, 23, bias=True), torch.randn(1 + through_entropy, 10)
    options = {"temperature": 0.7, "softcap": 3.0, "logit_scale": 0.5}
    got = run(ours, *inputs, upstream, need, chunk_bytes=4 * 23 * rows, **options)
    assert_same(got, run(plain_head, *inputs, upstream, need, **options))


def test_tied_weights_sum_both_gradients():
    """hidden = E[tokens] and weight = E: the embedding's gradient is that of both uses."""
    torch.manual_seed(0)
    table, tokens, ids = torch.randn(23, 8).double(), torch.randint(23, (10,)), torch.arange(10)
    gradients = []
    for function, options in ((plain_head, {}), (ours, {}), (ours, {"chunk_bytes": 8 * 23 * 3})):
        leaf = table.clone().requires_grad_()
        function(torch.tanh(leaf[tokens]), leaf, ids, **options)[0].sum().backward()
        gradients.append(leaf.grad)
    for got in gradients[1:]:
        torch.testing.assert_close(got, gradients[0])
    same = table.clone().requires_grad_()  # the very same tensor twice
    linear_logprob(same, same, torch.arange(23)).sum().backward()
    want = table.clone().requires_grad_()
    plain_head(want, want, torch.arange(23))[0].sum().backward()
    torch.testing.assert_close(same.grad, want.grad)


MASKS = {"some": [1, 0, 1, 1, 0], "first": [1, 0, 0, 0, 0], "all": [1] * 5, "none": [0] * 5}


@through
@pytest.mark.parametrize("need", [(1, 1, 1), (1, 0, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 4 * 7 * 2], ids=["one-piece", "pieces"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_masked_rows_are_not_looked_at(mask, chunk_bytes, need, through_entropy):
    keep = torch.tensor(MASKS[mask]).bool()
    hidden, weight, ids, bias = make(5, 7, bias=True)
    hidden[~keep], ids[~keep] = torch.nan, -100
    upstream = torch.randn(1 + through_entropy, 5)
    got = run(ours, hidden, weight, ids, bias, upstream, need, mask=keep, chunk_bytes=chunk_bytes)
    want = run(plain_head, hidden[keep], weight, ids[keep], bias, upstream[:, keep], need)
    for name in {"log-prob", "entropy", "hidden"} & want.keys():
        full = torch.zeros((5, *want[name].shape[1:]))
        full[keep] = want[name]
        want[name] = full
    assert_same(got, want)


@pytest.mark.parametrize("return_entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", [
    {}, {"softcap": 0.9}, {"temperature": 2.0, "softcap": 1.1, "logit_scale": -0.4},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows", [2, 64], ids=["pieces", "one-piece"])
def test_gradcheck(rows, options, masked, return_entropy):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((5, 3), (7, 3), (7,))
    )
    ids = torch.tensor([0, 6, 2, 2, 5])
    mask = torch.tensor([True, True, False, True, True]) if masked else None
    keywords = {"chunk_bytes": 8 * 7 * rows, "return_entropy": return_entropy, "mask": mask}

    def function(h, w, b):
        return linear_logprob(h, w, ids, bias=b, **keywords, **options)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    frozen = weight.detach(), bias.detach()
    assert torch.autograd.gradcheck(lambda h: function(h, *frozen), (hidden,))


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, ids, _ = make(4, 9)
    assert not linear_logprob(hidden, weight, ids).requires_grad
    with torch.no_grad():
        assert not linear_logprob(hidden.requires_grad_(), weight, ids).requires_grad


def flops(hidden_grad, weight_grad, rows, through_entropy=False, mask=None):
    """FLOPs of forward and of backward, in units of N D V."""
    hidden, weight, ids, _ = make(12, 31)
    hidden.requires_grad_(hidden_grad)
    weight.requires_grad_(weight_grad)
    with Watch() as forward:
        logps, entropy = ours(hidden, weight, ids, chunk_bytes=4 * 31 * rows, mask=mask)
    with Watch() as backward:
        if hidden_grad or weight_grad:
            (logps + entropy if through_entropy else logps).sum().backward()
    return [count / (12 * 24 * 31) for count in (forward.flops, backward.flops)]


@pytest.mark.parametrize(("hidden_grad", "weight_grad", "rows", "through_entropy", "want"), [
    (False, False, 12, False, [2, 0]), (False, False, 3, False, [2, 0]),
    (True, True, 12, False, [2, 4]), (True, True, 3, False, [2, 6]),
    (True, False, 12, False, [4, 0]), (True, False, 3, False, [4, 0]),
    (False, True, 12, False, [2, 2]), (False, True, 3, False, [2, 4]),
    (True, True, 12, True, [2, 6]), (True, True, 3, True, [2, 6]),
    (True, False, 12, True, [4, 4]), (True, False, 3, True, [4, 4]),
], ids=str)  # fmt: skip
def test_flops_are_those_of_the_docstring(hidden_grad, weight_grad, rows, through_entropy, want):
    assert flops(hidden_grad, weight_grad, rows, through_entropy) == want


@pytest.mark.parametrize(("weight_grad", "rows", "want"), [
    (True, 12, [1, 2]), (True, 3, [1, 3]), (False, 12, [2, 0]),
], ids=str)  # fmt: skip
def test_masked_rows_are_not_run(weight_grad, rows, want):
    assert flops(True, weight_grad, rows, mask=torch.arange(12) % 2 == 0) == want


@pytest.mark.parametrize("need", [(1, 1), (1, 0), (0, 0)], ids=["all", "frozen-head", "no-grad"])
def test_the_logits_of_all_rows_never_exist(need):
    """Neither in one tensor nor in several alive together."""
    hidden, weight, ids, _ = make(200, 500, size=4)
    leaves = [x.requires_grad_(bool(w)) for x, w in zip((hidden, weight), need, strict=True)]
    with Watch() as watch:
        logps, _ = ours(*leaves, ids, chunk_bytes=4 * 500 * 20)
        if any(need):
            logps.sum().backward()
    assert watch.largest == 20 * 500  # of 200 * 500
    assert watch.peak < 4 * 200 * 500 / 2


@pytest.mark.parametrize("need", [(1, 1, 1), (1, 0, 0)], ids=["all", "frozen-head"])
@pytest.mark.parametrize("rows", [3, 64])
@through
def test_a_second_backward_repeats_the_first(rows, need, through_entropy):
    hidden, weight, ids, bias = make(10, 23, bias=True)
    leaves = [x.requires_grad_() for x, w in zip((hidden, weight, bias), need, strict=True) if w]
    logps, entropy = ours(hidden, weight, ids, bias=bias, softcap=2.0, chunk_bytes=4 * 23 * rows)
    loss = (logps + through_entropy * entropy).sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen-head"])
def test_a_derivative_of_the_gradient_is_refused(frozen):
    """The backward of this op is not differentiable: an error, not a wrong number."""
    hidden, weight, ids, _ = make(3, 7)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    upstream = torch.randn(3, requires_grad=True)
    loss = (upstream * linear_logprob(hidden, weight, ids)).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


def test_non_contiguous_inputs():
    hidden, weight, ids, bias = make(10, 23, bias=True)
    strided = (hidden.T.contiguous().T, weight.T.contiguous().T, ids.expand(2, -1).T[:, 0], bias)
    for rows in (3, 10):
        got = run(ours, *strided, chunk_bytes=4 * 23 * rows)
        assert_same(got, run(plain_head, hidden, weight, ids, bias))


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 23 * 3], ids=["one-piece", "pieces"])
def test_autocast_does_not_change_the_products(chunk_bytes):
    inputs = make(10, 23, bias=True)
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
    logps = linear_logprob(hidden, weight, ids, chunk_bytes=2 * vocab_size * rows)
    (logps * upstream).sum().backward()
    d = torch.nn.functional.one_hot(ids, vocab_size).double() - 1 / vocab_size
    d = d * upstream[:, None].double()
    return weight.grad, d, hidden, rows


def test_weight_gradient_is_rounded_once_not_once_per_piece():
    got, d, hidden, rows = many_pieces()
    exact = d.T @ hidden.double()
    # half a unit in the last place of bf16, and fp32's own rounding of a sum of 4096
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()
    in_bf16 = torch.zeros_like(got)  # what summing the pieces in bf16 would give
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
    (((3, 3), (7, 3), None), r"token_ids must be an integer tensor of shape \(3,\)"),
], ids=["D", "three-dimensional", "bias", "ids"])  # fmt: skip
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
