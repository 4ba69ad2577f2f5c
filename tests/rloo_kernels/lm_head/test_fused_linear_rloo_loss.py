"""fused_linear_rloo_loss against its parts and against the formulas in float64; its edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rloo_kernels import fused_linear_rloo_loss, linear_logprob, rloo_objective

from tests.support.kernel_helpers import (  # noqa: F401
    DTYPES,
    NAMES,
    NAN,
    Watch,
    assert_error_at_most_twice,
    bounds,
    nan_in_new_memory,
    plain_head,
)
from tests.support.kernel_losses import (
    HEAD,
    LENGTHS,
    LOSSES,
    NEEDS,
    TOKENS,
    D,
    V,
    assert_objective,
    fused,
    gradients,
    leaves_of,
    make_head,
    make_loss,
    objective_reference,
    reference_log_probs,
)

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
losses = pytest.mark.parametrize("name", list(LOSSES))
masks = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
needs = pytest.mark.parametrize("need", list(NEEDS))
BUDGETS = [1, 4, 7, 64]  # rows to a piece: one; less than a group, and one; everything


def composed(hidden, weight, ids, cu_seqlens=None, bias=None, head=HEAD, **loss):
    """The same from linear_logprob and rloo_objective, the rows flattened where they are padded."""
    shape, mask = ids.shape, loss.get("mask")
    logps, entropy = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]), weight, ids.reshape(-1), bias=bias,
        mask=None if mask is None else mask.reshape(-1), return_entropy=True, **head,
    )  # fmt: skip
    logps, entropy = logps.view(shape), entropy.view(shape)
    found = rloo_objective(logps, cu_seqlens, entropy=entropy, **loss)
    return found._replace(logps=logps, entropy=entropy)


def close(got, want, rtol=1e-9, atol=1e-10):
    if got is None or want is None:
        assert got is want
        return
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


# --- the same numbers


@masks
@needs
@losses
def test_equals_its_parts_in_loss_gradients_and_all_fields(name, need, masked):
    inputs = make_head()
    loss = make_loss(name, reference_log_probs(inputs), masked)
    ids, cu = inputs[2], bounds(LENGTHS)
    one, two = leaves_of(inputs, need), leaves_of(inputs, need)
    want = composed(two[0], two[1], ids, cu, two[2], **loss)
    want_grads = gradients(want, two)
    for rows in BUDGETS:
        found = fused(one[0], one[1], ids, cu, one[2], rows, **HEAD, **loss)
        assert_objective(found, want._asdict())
        assert found.loss.requires_grad == any(NEEDS[need])
        for got, exact in zip(gradients(found, one), want_grads, strict=True):
            close(got, exact)


@masks
@losses
def test_equals_the_formulas_under_autograd(name, masked):
    """Advantages and the KL in the reward are constants, on-policy the ratio is exp(l - l)."""
    inputs = make_head()
    loss = make_loss(name, reference_log_probs(inputs), masked)
    one, two = leaves_of(inputs, "all"), leaves_of(inputs, "all")
    logps, entropy = plain_head(two[0], two[1], inputs[2], two[2], **HEAD)
    want = objective_reference(logps, LENGTHS, **loss, entropy=entropy.detach())
    found = fused(one[0], one[1], inputs[2], bounds(LENGTHS), one[2], 4, **HEAD, **loss)
    assert_objective(found, want)
    exact = torch.autograd.grad(want["loss"], two)
    for got, x in zip(gradients(found, one), exact, strict=True):
        close(got, x)


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("name", ["ratio", "ratio-per-token", "k3"])
def test_gradcheck(name, rows):
    """Where the loss is a differentiable function of the log-probs alone."""
    inputs = make_head()
    logps = reference_log_probs(inputs)
    loss = make_loss(name if name in LOSSES else "advantages-corrected-k3", logps)
    loss |= {"epsilon_low": 0.9, "epsilon_high": 9.0, "old_logps": logps + 0.1}

    def function(*leaves):
        hidden, weight, bias = leaves
        return fused(hidden, weight, inputs[2], bounds(LENGTHS), bias, rows, **HEAD, **loss).loss

    assert torch.autograd.gradcheck(function, leaves_of(inputs, "all"), fast_mode=True)


@pytest.mark.parametrize("need", ["all", "frozen-head"])
@losses
def test_padded_rows_equal_packed_ones(name, need):
    inputs = make_head()
    loss = make_loss(name, reference_log_probs(inputs))
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]

    def padded(x, fill=NAN):
        out = x.new_full((*valid.shape, *x.shape[1:]), fill)
        out[valid] = x
        return out

    one, two = leaves_of(inputs, need), leaves_of(inputs, need)
    hidden, ids = padded(two[0]), padded(inputs[2], -100)
    per_token = {key: padded(x) if isinstance(x, torch.Tensor) and x.shape == (TOKENS,) else x
                 for key, x in loss.items()}  # fmt: skip
    packed = fused(one[0], one[1], inputs[2], bounds(LENGTHS), one[2], 4, **HEAD, **loss)
    found = fused(hidden, two[1], ids, None, two[2], 4, **HEAD, **per_token, mask=valid)
    fields = packed._asdict()
    for key in ("coefficients", "logps", "entropy"):
        assert (getattr(found, key)[~valid] == 0).all()
        close(getattr(found, key)[valid], fields.pop(key))
    assert_objective(found, fields)
    for got, want in zip(gradients(found, two), gradients(packed, one), strict=True):
        close(got, want)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("need", ["all", "frozen-head"])
@pytest.mark.parametrize("name", ["rloo", "rloo-kl", "rloo-kl-normalized", "ratio", "grpo"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_error_is_at_most_twice_that_of_torch(dtype, name, need, rows):
    """As exact as the parts in plain torch, given the same old and reference log-probs."""
    inputs = make_head(dtype, size=24, vocab_size=503)
    # far from the clip's edges, where rounding alone would decide about the gradient
    loss = make_loss(name, reference_log_probs(inputs)) | {"epsilon_low": 0.9, "epsilon_high": 99.0}
    loss = {key: x.float() if isinstance(x, torch.Tensor) else x for key, x in loss.items()}

    def run(function, dtype):
        cast = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        leaves = leaves_of(cast, need)
        found = function(leaves[0], leaves[1], cast[2], leaves[2])
        grads = gradients(found, leaves)
        named = {"loss": found.loss.detach()}
        named |= {n: g for n, g in zip("XWb", grads, strict=True) if g is not None}
        return named

    def plain(hidden, weight, ids, bias):
        logps, _ = plain_head(hidden, weight, ids, bias, **HEAD)
        return rloo_objective(logps, bounds(LENGTHS), **loss)

    def ours(hidden, weight, ids, bias):
        return fused(hidden, weight, ids, bounds(LENGTHS), bias, rows, **HEAD, **loss)

    # a gradient near 1 is off by up to eps / 4 by its last rounding alone, in either of the two
    atol = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    assert_error_at_most_twice(run(ours, dtype), run(plain, dtype), run(plain, torch.double), atol)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=6), st.sampled_from(list(LOSSES)),
       st.integers(1, 12), st.integers(0, 99))  # fmt: skip
def test_neither_the_budget_nor_the_order_of_groups_matters(groups, name, rows, seed):
    """Two groups of three rows of any lengths, in both orders, in pieces of any size."""
    inputs = make_head(num_rows=sum(groups), seed=seed)
    random = torch.Generator().manual_seed(seed)
    give, options = LOSSES[name]
    loss = {
        key: torch.randn(6 if key in ("rewards", "advantages") else sum(groups),
                         generator=random, dtype=torch.double) - 2 * key.endswith("logps")
        for key in give
    }  # fmt: skip
    options = options | {"num_generations": 3 if "rewards" in give else 0}
    half = sum(groups[:3])
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    tokens = torch.cat([torch.arange(half, sum(groups)), torch.arange(half)])

    def moved(x):
        return x[order] if len(x) == 6 and x is loss.get("rewards", loss.get("advantages")) \
            else x[tokens]  # fmt: skip

    whole = leaves_of(inputs, "all")
    parts = leaves_of(inputs, "all")
    want = fused(whole[0], whole[1], inputs[2], bounds(groups), whole[2], 1000, **loss, **options)
    found = fused(
        parts[0][tokens], parts[1], inputs[2][tokens], bounds(groups[3:] + groups[:3]), parts[2],
        rows, **{key: moved(x) for key, x in loss.items()}, **options,
    )  # fmt: skip
    close(found.loss, want.loss)
    for got, exact in zip(gradients(found, parts), gradients(want, whole), strict=True):
        close(got, exact, rtol=1e-8, atol=1e-9)


# --- autograd


def test_tied_weights_sum_both_gradients():
    table = make_head()[1]
    tokens, ids = torch.randint(V, (TOKENS,)), torch.randint(V, (TOKENS,))
    rewards = {"rewards": torch.arange(9.0), "num_generations": 3}
    grads = []
    for function, options in ((fused, {"rows": 4}), (fused, {}), (composed, {"head": {}})):
        leaf = table.clone().requires_grad_()
        function(leaf[tokens], leaf, ids, bounds(LENGTHS), **rewards, **options).loss.backward()
        grads.append(leaf.grad)
    close(grads[0], grads[2])
    close(grads[1], grads[2])


@pytest.mark.parametrize("factor", [1.0, 3.0, -0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_backward_scales_and_repeats(dtype, factor):
    inputs = make_head(dtype)
    loss = {"rewards": torch.arange(9.0), "num_generations": 3}
    leaves = leaves_of(inputs, "all")
    found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), leaves[2], **loss)
    base = torch.autograd.grad(found.loss, leaves, retain_graph=True)
    for _ in range(2):
        got = torch.autograd.grad(factor * found.loss, leaves, retain_graph=True)
        for g, b in zip(got, base, strict=True):
            assert g.dtype == dtype
            torch.testing.assert_close(g, (b.float() * factor).to(dtype), rtol=1e-6, atol=0)


def test_backward_after_a_change_of_grad_in_place_is_right_or_refused():
    """Clipping scales .grad in place; what the graph holds must not be scaled with it unseen."""
    inputs = make_head()
    leaves = leaves_of(inputs, "all")
    found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), leaves[2],
                  advantages=torch.arange(9.0))  # fmt: skip
    found.loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.mul_(0.5)
    try:
        found.loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        for x, want in zip(leaves, first, strict=True):
            close(x.grad, 1.5 * want)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("name", ["rloo", "rloo-kl", "ratio"])
def test_inputs_in_float64_beside_fp32_hidden_states(name, rows):
    """Rewards often come in float64: they change no dtype and no result."""
    inputs = make_head(torch.float32)
    loss = make_loss(name, reference_log_probs(inputs))
    results = []
    for dtype in (torch.float32, torch.float64):
        given = {key: x.to(dtype) if isinstance(x, torch.Tensor) else x for key, x in loss.items()}
        leaves = leaves_of(inputs, "all")
        found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), leaves[2], rows, **given)
        assert {x.dtype for x in found} == {torch.float32}
        results.append([found.loss.detach(), *gradients(found, leaves)])
    for got, want in zip(*results, strict=True):
        close(got, want, rtol=1e-4, atol=1e-5)


def test_only_the_loss_is_differentiable_and_only_in_the_head_s_inputs():
    inputs = make_head()
    sizes = {"rewards": 9, "old_logps": TOKENS, "ref_logps": TOKENS}
    given = {name: torch.zeros(n, dtype=torch.double, requires_grad=True)
             for name, n in sizes.items()}  # fmt: skip
    leaves = leaves_of(inputs, "all")
    found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), leaves[2], **given,
                  num_generations=3, beta=0.1)  # fmt: skip
    assert [name for name, x in found._asdict().items() if x.requires_grad] == ["loss"]
    found.loss.backward()
    assert all(x.grad is None for x in given.values())


def test_a_derivative_of_the_gradient_is_refused():
    """The gradients are constants of the graph: an error, not a wrong number."""
    inputs = make_head()
    leaves = leaves_of(inputs, "all")
    found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), leaves[2],
                  advantages=torch.ones(9))  # fmt: skip
    scale = torch.ones((), dtype=torch.double, requires_grad=True)

    def differentiate_twice():
        grads = torch.autograd.grad(found.loss * scale, leaves, create_graph=True)
        grads[1].square().sum().backward()

    with pytest.raises(RuntimeError, match=r"no autograd formula|once_differentiable"):
        differentiate_twice()


def test_no_gradient_is_made_under_no_grad():
    inputs = make_head(bias=False)
    leaves = leaves_of(inputs, "all")
    with torch.no_grad(), Watch() as watch:
        found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), advantages=torch.ones(9))
    assert not found.loss.requires_grad
    assert watch.flops == 2 * TOKENS * D * V


@pytest.mark.parametrize("rows", [4, 64])
def test_autocast_does_not_change_the_products(rows):
    inputs = make_head(torch.float32)
    results = []
    for enabled in (False, True):
        leaves = leaves_of(inputs, "all")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), leaves[2], rows,
                          rewards=torch.arange(9.0), num_generations=3)  # fmt: skip
            (found.loss * 2).backward()
        results.append([found.loss.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- edges


@needs
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_no_tokens(beta, padded, need):
    hidden, weight, ids, bias = leaves = make_head(num_rows=0)
    hidden, weight, bias = leaves_of(leaves, need)
    shape, cu = ((2, 0), None) if padded else ((0,), torch.zeros(3, dtype=torch.long))
    found = fused(hidden.view(*shape, D), weight, ids.view(shape), cu, bias,
                  rewards=torch.tensor([1.0, 2.0]), ref_logps=torch.zeros(shape),
                  num_generations=2, beta=beta)  # fmt: skip
    assert found.num_tokens.tolist() == [0, 0]
    for g in gradients(found, (hidden, weight, bias)):
        assert g is None or (g == 0).all()


@needs
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("name", ["rloo", "rloo-kl", "rloo-kl-normalized", "ratio", "grpo"])
def test_all_rows_masked(name, rows, need):
    inputs = make_head()
    inputs[0][:], inputs[2][:] = NAN, -100
    loss = make_loss(name, torch.zeros(TOKENS)) | {"mask": torch.zeros(TOKENS)}
    leaves = leaves_of(inputs, need)
    found = fused(leaves[0], leaves[1], inputs[2], bounds(LENGTHS), leaves[2], rows, **loss)
    assert found.loss.isfinite()
    assert (found.logps == 0).all()
    for x, g in zip(leaves, gradients(found, leaves), strict=True):
        assert g is None or (g.shape == x.shape and (g == 0).all())


@pytest.mark.parametrize("change", [
    {"ids": torch.tensor([0, 1, 2, V])}, {"ids": torch.tensor([0, 1, 2, -1])},
], ids=str)  # fmt: skip
def test_token_ids_out_of_range(change):
    hidden, weight, _, _ = make_head(num_rows=4)
    with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 11\)"):
        fused(hidden, weight, change["ids"], bounds([2, 2]), advantages=torch.ones(2))


@pytest.mark.parametrize("cu", [[0, 2, 3], [0, 2, 5], [1, 2, 4], [0, 5, 4]], ids=str)
@pytest.mark.parametrize("old", [False, True], ids=["", "ratio"])
def test_cu_seqlens_that_do_not_fit(cu, old):
    hidden, weight, ids, _ = make_head(num_rows=4)
    given = {"advantages": torch.ones(2), "old_logps": torch.zeros(4) if old else None}
    with pytest.raises(ValueError, match="cu_seqlens"):
        fused(hidden.requires_grad_(), weight, ids, torch.tensor(cu), **given)


@pytest.mark.parametrize(("change", "message"), [
    ({"advantages": None}, "exactly one of"),
    ({"cu_seqlens": None}, r"per-token tensors must be \(R, T\)"),
    ({"token_ids": torch.zeros(3, dtype=torch.long)}, r"token_ids must be an integer tensor"),
    ({"bias": torch.zeros(3)}, r"bias must be \(11,\)"),
    ({"weight": torch.zeros(V, 3)}, "with the same D"),
    ({"hidden": torch.zeros(4, D).half()}, "must have the same dtype"),
    ({"temperature": 0.0}, "temperature must be > 0"), ({"softcap": 0.0}, "softcap must be > 0"),
    ({"kl": "k2"}, "kl must be one of"), ({"old_logps": torch.ones(3)}, r"old_logps must be \(4,"),
], ids=str)  # fmt: skip
def test_arguments_that_do_not_fit(change, message):
    given = {
        "hidden": torch.zeros(4, D), "weight": torch.zeros(V, D), "cu_seqlens": bounds([2, 2]),
        "token_ids": torch.zeros(4, dtype=torch.long), "advantages": torch.zeros(2), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fused_linear_rloo_loss(**given)
