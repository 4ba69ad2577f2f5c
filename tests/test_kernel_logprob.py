"""selective_log_softmax against float64, and against what plain torch loses in the same place."""

import pytest
import torch
from rloo_kernels import logprob, selective_log_softmax

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]


def plain(logits, ids, temperature=1.0):
    """(log-probs, entropies) as torch alone computes them, in the dtype of `logits`."""
    logq = (logits / temperature).log_softmax(-1)
    p = logq.exp()
    entropy = -torch.where(p > 0, p * logq, 0.0).sum(-1)
    return logq.gather(-1, ids[..., None]).squeeze(-1), entropy


def gradient(function, logits, ids, upstream, **kwargs):
    """(log-probs, entropies, dL/dlogits) of L = sum upstream * log-prob."""
    leaf = logits.detach().clone().requires_grad_()
    logps, entropy = function(leaf, ids, **kwargs)
    (logps * upstream.to(logps.dtype)).sum().backward()
    return logps.detach(), entropy.detach(), leaf.grad


def ours(logits, ids, **kwargs):
    return selective_log_softmax(logits, ids, return_entropy=True, **kwargs)


def in_fp32(logits, ids, **kwargs):
    return plain(logits.float(), ids, **kwargs)


def in_fp64(logits, ids, **kwargs):
    return plain(logits.double(), ids, **kwargs)


def assert_as_exact_as_torch(logits, ids, temperature=1.0):
    upstream = torch.randn(len(ids))
    results = [gradient(f, logits, ids, upstream, temperature=temperature) for f in (ours, in_fp32)]
    exact = gradient(in_fp64, logits.double(), ids, upstream, temperature=temperature)
    for name, got, torch_s, want in zip(
        ("log-prob", "entropy", "gradient"), results[0], results[1], exact, strict=True
    ):
        assert got.isfinite().all(), name
        errors = [(x.double() - want).abs().max().item() for x in (got, torch_s)]
        scale = max(1.0, want.abs().max().item())
        assert errors[0] <= 2 * errors[1] + 1e-6 * scale, f"{name}: {errors}"


@pytest.mark.parametrize("temperature", [1e-2, 0.7, 10.0])
@pytest.mark.parametrize("shape", [(1, 7), (127, 7), (1, 5003), (127, 5003)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_error_is_at_most_twice_that_of_torch(dtype, shape, temperature):
    torch.manual_seed(shape[0])
    logits = (3 * torch.randn(shape)).to(dtype)
    assert_as_exact_as_torch(logits, torch.randint(shape[1], shape[:1]), temperature)


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_logits_of_ten_thousand(dtype, temperature):
    torch.manual_seed(0)
    logits = (torch.rand(31, 503) * 2e4 - 1e4).to(dtype)
    assert_as_exact_as_torch(logits, torch.randint(503, (31,)), temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_close_logits_far_from_zero(dtype):
    """What must cancel is the offset of 1e4: log-probs are those of the differences."""
    torch.manual_seed(0)
    logits = (1e4 + 64 * torch.randint(0, 3, (31, 503))).to(dtype)
    assert_as_exact_as_torch(logits, torch.randint(503, (31,)), temperature=100.0)


def test_almost_certain_tokens():
    """p_y -> 1: the log-prob is tiny, not rounded to 0 or above."""
    margin = torch.tensor([2.0, 8.0, 14.0, 20.0, 60.0])
    logits = torch.zeros(5, 101)
    logits[:, 3] = margin
    ids = torch.full((5,), 3)
    assert_as_exact_as_torch(logits, ids)
    assert (selective_log_softmax(logits, ids) <= 0).all()


def test_impossible_tokens_have_entropy_without_nan():
    logits = torch.randn(4, 11)
    logits[:, ::2] = -torch.inf
    ids = torch.full((4,), 3)
    assert_as_exact_as_torch(logits, ids)


def test_a_token_of_probability_zero_has_log_prob_minus_infinity():
    logits = torch.randn(2, 5)
    logits[:, 1] = -torch.inf
    logps = selective_log_softmax(logits, torch.tensor([1, 2]))
    assert logps[0] == -torch.inf
    assert logps[1].isfinite()


def test_no_rows():
    logits = torch.empty(0, 7, requires_grad=True)
    logps, entropy = ours(logits, torch.empty(0, dtype=torch.long))
    logps.sum().backward()
    assert (logps.shape, entropy.shape, logits.grad.shape) == ((0,), (0,), (0, 7))


def test_leading_dimensions_and_strides_of_a_batch():
    torch.manual_seed(0)
    logits = torch.randn(11, 3, 4).permute(1, 2, 0)  # (3, 4, V), not contiguous
    ids = torch.randint(11, (4, 3)).T
    upstream = torch.randn(3, 4)
    got = gradient(ours, logits, ids, upstream)
    want = gradient(plain, logits, ids, upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_outputs_are_fp32_whatever_the_logits():
    logits = torch.randn(2, 5, dtype=torch.bfloat16)
    logps, entropy = ours(logits, torch.tensor([0, 1]))
    assert (logps.dtype, entropy.dtype) == (torch.float32, torch.float32)


def test_pieces_do_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    logits, ids, upstream = torch.randn(10, 23), torch.randint(23, (10,)), torch.randn(10)
    whole = gradient(ours, logits, ids, upstream, temperature=0.7)
    monkeypatch.setattr(logprob, "chunk_rows", lambda num_rows, vocab_size: 3)
    pieces = gradient(ours, logits, ids, upstream, temperature=0.7)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 3])
def test_gradcheck(monkeypatch, size):
    monkeypatch.setattr(logprob, "chunk_rows", lambda num_rows, vocab_size: size)
    logits = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    ids = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(
        lambda x: selective_log_softmax(x, ids, temperature=0.6), (logits,)
    )


def test_entropy_carries_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    logps, entropy = ours(logits, torch.tensor([0, 1, 2]))
    assert (logps.requires_grad, entropy.requires_grad) == (True, False)


def test_masked_rows_give_zero_whatever_they_hold():
    torch.manual_seed(0)
    logits, mask = torch.randn(5, 7), torch.tensor([True, False, True, False, True])
    logits[1], logits[3] = torch.nan, torch.inf
    ids = torch.tensor([0, -100, 6, 10**6, 2])
    leaf = logits.clone().requires_grad_()
    logps, entropy = ours(leaf, ids, mask=mask)
    logps.sum().backward()
    assert (logps[~mask] == 0).all()
    assert (entropy[~mask] == 0).all()
    assert (leaf.grad[~mask] == 0).all()
    kept = gradient(plain, logits[mask], ids[mask], torch.ones(3))
    for a, b in zip((logps[mask], entropy[mask], leaf.grad[mask]), kept, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-6)


def test_a_second_backward_repeats_the_first():
    logits = torch.randn(4, 9, requires_grad=True)
    loss = selective_log_softmax(logits, torch.tensor([1, 2, 3, 4])).sum()
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    logits.grad = None
    loss.backward()
    assert torch.equal(logits.grad, first)


def test_inplace_backward_writes_the_gradient_over_the_logits():
    torch.manual_seed(0)
    base, ids, upstream = torch.randn(6, 9), torch.randint(9, (6,)), torch.randn(6)
    want = gradient(plain, base, ids, upstream, temperature=0.8)[2]
    leaf = base.clone().requires_grad_()
    logits = leaf * 1.0
    logps = selective_log_softmax(logits, ids, temperature=0.8, inplace_backward=True)
    (logps * upstream).sum().backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.detach(), want, rtol=1e-5, atol=1e-6)


def test_a_second_backward_after_an_inplace_one_is_refused():
    logits = torch.randn(4, 9, requires_grad=True) * 1.0
    logps = selective_log_softmax(logits, torch.tensor([1, 2, 3, 4]), inplace_backward=True)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_a_derivative_of_the_gradient_is_refused():
    """The backward of this op is not differentiable: an error, not a wrong number."""
    logits = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    upstream = torch.ones(2, dtype=torch.double, requires_grad=True)
    loss = (upstream * selective_log_softmax(logits, torch.tensor([0, 1]))).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_ids_of_other_integer_types():
    logits = torch.randn(3, 5)
    ids = torch.tensor([4, 0, 2])
    assert torch.equal(selective_log_softmax(logits, ids.int()), selective_log_softmax(logits, ids))


@pytest.mark.parametrize("bad", [-1, 5])
def test_token_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 5\)"):
        selective_log_softmax(torch.randn(2, 5), torch.tensor([0, bad]))


@pytest.mark.parametrize("ids", [torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0])], ids=str)
def test_token_ids_of_a_wrong_shape_or_type(ids):
    with pytest.raises(ValueError, match=r"token_ids must be an integer tensor of shape \(2,\)"):
        selective_log_softmax(torch.randn(2, 5), ids)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        selective_log_softmax(torch.randn(2, 5), torch.tensor([0, 1]), temperature=temperature)
