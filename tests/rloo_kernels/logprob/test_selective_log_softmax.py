"""selective_log_softmax against float64, and against what plain torch loses in the same place."""

import pytest
import torch
from rloo_kernels import selective_log_softmax
from rloo_kernels.logprob import rows_torch

from tests.support.kernel_helpers import (  # noqa: F401
    DTYPES,
    NAMES,
    assert_error_at_most_twice,
    nan_in_new_memory,
    plain_logprobs,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
VOCABULARIES = [50304, 50257, 151936, 152064]  # pythia, gpt2, Qwen2.5 small and large


def ours(logits, ids, temperature=1.0, **kwargs):
    return selective_log_softmax(
        logits, ids, temperature=temperature, return_entropy=True, **kwargs
    )


def in_fp32(logits, ids, temperature=1.0):
    return plain_logprobs(logits.float(), ids, temperature)


def run(function, logits, ids, upstream, **kwargs):
    """Log-probs, entropies, dL/dlogits of L = sum upstream[0] log-prob + upstream[1] entropy."""
    leaf = logits.detach().clone().requires_grad_()
    found = function(leaf, ids, **kwargs)
    loss = sum((u.to(x.dtype) * x).sum() for u, x in zip(upstream, found, strict=False))
    loss.backward()
    logps, entropy = (x.detach() for x in found)
    return {"log-prob": logps, "entropy": entropy, "gradient": leaf.grad}


def assert_as_exact_as_torch(logits, ids, temperature=1.0, through_entropy=False):
    upstream = torch.randn(1 + through_entropy, *ids.shape)
    got, torch_s = (run(f, logits, ids, upstream, temperature=temperature) for f in (ours, in_fp32))
    exact = run(plain_logprobs, logits.double(), ids, upstream, temperature=temperature)
    assert_error_at_most_twice(got, torch_s, exact)


def assert_same(got, want, rtol=1e-5, atol=1e-6):
    for name in want:
        torch.testing.assert_close(got[name].to(want[name].dtype), want[name], rtol=rtol, atol=atol)


through = pytest.mark.parametrize("through_entropy", [False, True], ids=["", "entropy"])


@through
@pytest.mark.parametrize("temperature", [1e-2, 0.7, 10.0])
@pytest.mark.parametrize("shape", [(1, 7), (127, 7), (1, 5003), (127, 5003)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_error_is_at_most_twice_that_of_torch(dtype, shape, temperature, through_entropy):
    torch.manual_seed(shape[0])
    logits = (3 * torch.randn(shape)).to(dtype)
    ids = torch.randint(shape[1], shape[:1])
    assert_as_exact_as_torch(logits, ids, temperature, through_entropy)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=NAMES[:2])
def test_vocabularies_of_models(dtype, vocab_size):
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, vocab_size)).to(dtype)
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    assert_as_exact_as_torch(logits, ids, through_entropy=True)


@through
@pytest.mark.parametrize("temperature", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_logits_of_ten_thousand(dtype, temperature, through_entropy):
    torch.manual_seed(0)
    logits = (torch.rand(31, 503) * 2e4 - 1e4).to(dtype)
    ids = torch.randint(503, (31,))
    assert_as_exact_as_torch(logits, ids, temperature, through_entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_close_logits_far_from_zero(dtype):
    """What must cancel is the offset of 1e4: log-probs are those of the differences."""
    torch.manual_seed(0)
    logits = (1e4 + 64 * torch.randint(0, 3, (31, 503))).to(dtype)
    assert_as_exact_as_torch(logits, torch.randint(503, (31,)), temperature=100.0)


@through
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_almost_certain_tokens_keep_their_digits(temperature, through_entropy):
    """p_y -> 1: log p, the entropy and dL/dz_y are ~ 1 - p_y, and right to fp32's precision."""
    logits = torch.zeros(5, 101)
    logits[:, 3] = torch.tensor([2.0, 8.0, 14.0, 20.0, 40.0])
    ids = torch.full((5,), 3)
    upstream = torch.ones(1 + through_entropy, 5)
    got = run(ours, logits, ids, upstream, temperature=temperature)
    x = logits.double()[:, 3] / temperature  # the other logits are 0, 100 of them
    rest = 100 * (-x).exp()
    logps, others = -rest.log1p(), rest / (1 + rest)  # others = 1 - p_y
    entropy = -logps + others * x
    slope = others - through_entropy * (1 - others) * (logps + entropy)
    want = {"log-prob": logps, "entropy": entropy}
    assert_same(got, want, rtol=2e-6, atol=0)
    torch.testing.assert_close(
        got["gradient"][:, 3].double(), slope / temperature, rtol=2e-6, atol=0
    )


@through
def test_impossible_tokens_have_entropy_without_nan(through_entropy):
    torch.manual_seed(0)
    logits = torch.randn(4, 11)
    logits[:, ::2] = -torch.inf
    ids = torch.full((4,), 3)
    upstream = torch.randn(1 + through_entropy, 4)
    got, possible = run(ours, logits, ids, upstream), logits[:, 1::2].double()
    want = run(plain_logprobs, possible, torch.full((4,), 1), upstream)
    gradient = torch.zeros(4, 11).double()
    gradient[:, 1::2] = want["gradient"]
    assert_same(got, {**want, "gradient": gradient})


def test_a_token_of_probability_zero_has_log_prob_minus_infinity():
    logits = torch.randn(2, 5)
    logits[:, 1] = -torch.inf
    found = run(ours, logits, torch.tensor([1, 2]), torch.ones(1, 2))
    assert found["log-prob"][0] == -torch.inf
    assert found["log-prob"][1].isfinite()
    assert found["gradient"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 7), (0, 3, 7), (3, 0, 7), (2, 0, 3, 7)], ids=str)
def test_an_empty_batch(shape):
    logits = torch.empty(shape, requires_grad=True)
    logps, entropy = ours(logits, torch.empty(shape[:-1], dtype=torch.long))
    (logps + entropy).sum().backward()
    assert (logps.shape, entropy.shape, logits.grad.shape) == (shape[:-1], shape[:-1], shape)


def test_a_single_row_without_a_batch_dimension():
    torch.manual_seed(0)
    logits, ids, upstream = torch.randn(7), torch.tensor(4), torch.randn(2)
    assert_same(run(ours, logits, ids, upstream), run(plain_logprobs, logits, ids, upstream))


def layouts(x):
    """name -> a tensor equal to x (3, 4, V) with other strides."""
    wide = torch.full((3, 4, 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    rows = torch.full((3, 5, x.shape[-1]), torch.nan)
    rows[:, :4] = x
    return {
        "vocabulary-first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every-other": wide[..., ::2],
        "shifted": rows[:, :4],  # logits[:, :-1], as trainers write it
        "expanded": x[:1].expand(3, 4, -1),
    }


@pytest.mark.parametrize(("layout", "inplace"), [
    (name, inplace) for name in layouts(torch.zeros(3, 4, 2)) for inplace in (False, True)
    if not inplace or name != "expanded"  # one element of memory cannot hold three gradients
])  # fmt: skip
def test_leading_dimensions_and_strides(layout, inplace):
    torch.manual_seed(0)
    base, ids, upstream = torch.randn(3, 4, 11), torch.randint(11, (4, 3)).T, torch.randn(2, 3, 4)
    options = {"inplace_backward": inplace}
    got = run(lambda x, y: ours(layouts(x * 1.0)[layout], y, **options), base, ids, upstream)
    want = run(lambda x, y: plain_logprobs(layouts(x)[layout], y), base, ids, upstream)
    assert_same(got, want)


def test_an_inplace_backward_of_expanded_logits_is_refused():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    expanded = (logits * 1.0).expand(3, -1, -1)
    with pytest.raises(ValueError, match="the logits are expanded"):
        selective_log_softmax(expanded, torch.randint(5, (3, 2)), inplace_backward=True)


def test_outputs_are_fp32_whatever_the_logits():
    for dtype in DTYPES:
        logps, entropy = ours(torch.randn(2, 5).to(dtype), torch.tensor([0, 1]))
        assert (logps.dtype, entropy.dtype) == (torch.float32, torch.float32)


@through
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_blocks_do_not_change_the_result(monkeypatch, rows, through_entropy):
    torch.manual_seed(0)
    logits, ids, upstream = torch.randn(10, 23), torch.randint(23, (10,)), torch.randn(2, 10)
    upstream = upstream[: 1 + through_entropy]
    whole = run(ours, logits, ids, upstream, temperature=0.7)
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 4 * 23 * rows)
    assert_same(run(ours, logits, ids, upstream, temperature=0.7), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("return_entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("rows", [1, 3])
def test_gradcheck(monkeypatch, rows, return_entropy, masked):
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 4 * 6 * rows)
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    ids, mask = torch.tensor([0, 5, 2, 2]), torch.tensor([True, False, True, True])
    options = {"temperature": 0.6, "mask": mask if masked else None}
    assert torch.autograd.gradcheck(
        lambda x: selective_log_softmax(x, ids, return_entropy=return_entropy, **options),
        (logits,),
    )


def test_a_gradient_through_the_entropy_alone():
    torch.manual_seed(0)
    logits, ids, weights = torch.randn(4, 9), torch.randint(9, (4,)), torch.randn(4)
    upstream = torch.stack([torch.zeros(4), weights])
    want = run(plain_logprobs, logits, ids, upstream)["gradient"]
    leaf = logits.clone().requires_grad_()
    (ours(leaf, ids)[1] * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-6)


@through
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_masked_rows_give_zero_whatever_they_hold(inplace, through_entropy):
    torch.manual_seed(0)
    logits, mask = torch.randn(5, 7), torch.tensor([True, False, True, False, True])
    logits[1], logits[3] = torch.nan, torch.inf
    ids = torch.tensor([0, -100, 6, 10**6, 2])
    upstream = torch.randn(1 + through_entropy, 5)
    got = run(ours, logits, ids, upstream, mask=mask, inplace_backward=inplace)
    assert all((x[~mask] == 0).all() for x in got.values())
    kept = run(plain_logprobs, logits[mask], ids[mask], upstream[:, mask])
    assert_same({name: x[mask] for name, x in got.items()}, kept)


def test_all_rows_masked():
    logits, ids = torch.full((3, 7), torch.nan), torch.full((3,), -100)
    got = run(ours, logits, ids, torch.ones(2, 3), mask=torch.zeros(3, dtype=torch.bool))
    assert all((x == 0).all() for x in got.values())


@through
def test_a_second_backward_repeats_the_first(through_entropy):
    logits = torch.randn(4, 9, requires_grad=True)
    logps, entropy = ours(logits, torch.tensor([1, 2, 3, 4]))
    loss = (logps + through_entropy * entropy).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@through
def test_inplace_backward_writes_the_gradient_over_the_logits(through_entropy):
    torch.manual_seed(0)
    base, ids = torch.randn(6, 9), torch.randint(9, (6,))
    upstream = torch.randn(1 + through_entropy, 6)
    want = run(plain_logprobs, base, ids, upstream, temperature=0.8)["gradient"]
    leaf = base.clone().requires_grad_()
    logits = leaf * 1.0
    found = ours(logits, ids, temperature=0.8, inplace_backward=True)
    sum((u * x).sum() for u, x in zip(upstream, found, strict=False)).backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.detach(), want, rtol=1e-5, atol=1e-6)


def test_a_second_backward_after_an_inplace_one_is_refused():
    logits = torch.randn(4, 9, requires_grad=True) * 1.0
    logps = selective_log_softmax(logits, torch.tensor([1, 2, 3, 4]), inplace_backward=True)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_the_logits_stay_as_they_are_otherwise():
    logits = torch.randn(4, 9)
    before = logits.clone()
    run(ours, logits, torch.tensor([1, 2, 3, 4]), torch.ones(2, 4))
    leaf = logits.requires_grad_()
    selective_log_softmax(leaf, torch.tensor([1, 2, 3, 4])).sum().backward()
    assert torch.equal(leaf.detach(), before)


def test_a_derivative_of_the_gradient_is_refused():
    """The backward of this op is not differentiable: an error, not a wrong number."""
    logits = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    upstream = torch.ones(2, dtype=torch.double, requires_grad=True)
    loss = (upstream * selective_log_softmax(logits, torch.tensor([0, 1]))).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_other_integer_types(dtype):
    logits, ids = torch.randn(3, 5), torch.tensor([4, 0, 2])
    got = selective_log_softmax(logits, ids.to(dtype))
    assert torch.equal(got, selective_log_softmax(logits, ids))


@pytest.mark.parametrize("bad", [-1, 5])
def test_token_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 5\)"):
        selective_log_softmax(torch.randn(2, 5), torch.tensor([0, bad]))


@pytest.mark.parametrize("ids", [torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]),
                                 torch.tensor([True, False])], ids=str)  # fmt: skip
def test_token_ids_of_a_wrong_shape_or_type(ids):
    with pytest.raises(ValueError, match=r"token_ids must be an integer tensor of shape \(2,\)"):
        selective_log_softmax(torch.randn(2, 5), ids)


def test_a_mask_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"mask must be \(2,\), got \(1,\)"):
        selective_log_softmax(torch.randn(2, 5), torch.tensor([0, 1]), mask=torch.ones(1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        selective_log_softmax(torch.randn(2, 5), torch.tensor([0, 1]), temperature=temperature)
