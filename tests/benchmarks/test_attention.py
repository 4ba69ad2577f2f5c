"""The attention benchmark: its reference, its gate, its providers and what it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import sys
from functools import partial

import pytest
import torch

from benchmarks.attention import providers as attention_providers
from benchmarks.attention import run as attention
from benchmarks.attention.providers import PROVIDERS, Call, Case, Plan
from benchmarks.common import harness, memory
from benchmarks.common.models import attended_pairs
from rloo_fast.batching.segments import make_segments
from rloo_fast.policy.attention import flash as attention_flash
from tests.benchmarks.test_loss import DESIGN_KEYS

SHORT = Case("short", 2, 4, heads=4, kv_heads=2, head_dim=16, dtype="float32", device="cpu")
SIZES = ["--shape", "short", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--no-memory"]
RUNS_ON_A_CPU = ["shared_prefix", "packed", "padded", "concatenated"]
KINDS = [(None, None), (5, None), (26, None), (None, 1.5), (9, 1.5)]
kinds = pytest.mark.parametrize(("window", "softcap"), KINDS, ids=str)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The command run end to end: (exit status, JSON, stdout)."""
    path = tmp_path_factory.mktemp("attention") / "attention.json"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = attention.main([*SIZES, "--runs", "2", "--json", str(path)])
    return status, json.loads(path.read_text()), out.getvalue()


def run(case=SHORT, names=RUNS_ON_A_CPU):
    rows = attention.run_case(case, list(names), runs=1, warmup=0, measure_memory=False)
    return {row.provider: row for row in rows}


# What is written


def test_every_provider_has_figures_or_a_reason(written):
    status, content, _ = written
    assert status == 0
    dtypes = ("float32", "bfloat16")
    rows = {(row["dtype"], row["provider"]): row for row in content["rows"]}
    assert [*rows] == [*itertools.product(dtypes, PROVIDERS)]
    for (dtype, provider), row in rows.items():
        assert list(row)[: len(DESIGN_KEYS)] == DESIGN_KEYS
        assert row["shape"] == "short P=2 K=4 prompt=24 H=4/2 d=16"
        if provider not in RUNS_ON_A_CPU:
            assert row["skipped"]
            assert row["seconds_median"] is row["error_vs_reference"] is None
            continue
        assert row["skipped"] is None
        assert row["runs"] == 2
        assert row["seconds_median"] > 0
        assert row["tokens"] == sum(n - 1 for n in SHORT.shape.lengths())
        assert 0 < row["error_vs_reference"] < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]


def test_notes_tell_the_tokens_each_layout_runs(written):
    lengths = [n - 1 for n in SHORT.shape.lengths()]
    notes = {row["provider"]: row["note"] for row in written[1]["rows"] if not row["skipped"]}
    assert notes == {
        "shared_prefix": f"{2 * 24 + sum(lengths)} tokens, sdpa",
        "packed": f"{8 * 24 + sum(lengths)} tokens, sdpa",
        "padded": f"{8 * (24 + max(lengths))} tokens",
        "concatenated": f"{2 * 24 + 8 * max(lengths)} tokens",
    }


def test_the_table_compares_with_padded(written):
    *_, out = written
    assert json.loads(out.splitlines()[0])["torch"] == torch.__version__
    header, *lines = out.split("cpu float32\n")[1].splitlines()[: len(PROVIDERS) + 1]
    assert "x padded" in header
    assert [line.split()[0] for line in lines] == [*PROVIDERS]
    assert lines[list(PROVIDERS).index("padded")].split()[4] == "1.00"


# The reference and the providers


def naive(case):
    """Output at completion tokens and gradients, query by query over the shared-prefix row."""
    q, k, v, grad = (x.double() for x in case.tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group, out = case.heads // case.kv_heads, torch.zeros_like(q)
    sequences = [([], prompt) for prompt in case.prompts] + case.rows
    for seen, own in sequences:
        for position, i in enumerate(own):
            keys = [*seen, *own[: position + 1]]
            keys = keys[-case.window :] if case.window else keys
            for h in range(case.heads):
                scores = k[keys, h // group] @ q[i, h] / case.head_dim**0.5
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                out[i, h] = scores.softmax(0) @ v[keys, h // group]
    grads = torch.autograd.grad(out, leaves, grad)
    completions = [i for _, own in case.rows for i in own]
    names = ("grad_q", "grad_k", "grad_v")
    return {"out": out[completions], **dict(zip(names, grads, strict=True))}


@kinds
@pytest.mark.parametrize("score_bytes", [8 * 4 * 30 * 7, 64 << 20], ids=["pieces", "whole"])
def test_the_reference_is_attention(monkeypatch, window, softcap, score_bytes):
    monkeypatch.setattr(attention_providers, "SCORE_BYTES", score_bytes)
    case = dataclasses.replace(SHORT, num_prompts=1, window=window, softcap=softcap)
    errors = attention_providers.reference(case).errors(naive(case))
    assert list(errors) == ["out", "grad_q", "grad_k", "grad_v"]
    assert max(errors.values()) < 1e-12


@kinds
@pytest.mark.parametrize("sizes", [(3, 3, 4, 1), (1, 2, 4, 4)], ids=str)
def test_all_providers_pass_the_gate(window, softcap, sizes):
    names = ("num_prompts", "num_generations", "heads", "kv_heads")
    changes = dict(zip(names, sizes, strict=True))
    rows = run(dataclasses.replace(SHORT, window=window, softcap=softcap, **changes))
    reasons = {name: row.skipped for name, row in rows.items() if row.skipped}
    assert reasons == ({} if softcap is None else {"concatenated": "SDPA has no soft-cap"})
    assert max(row.error_vs_reference or 0 for row in rows.values()) < 1e-6


def test_padding_takes_no_part_in_a_result():
    """What stands at padding changes nothing."""
    for name in ("padded", "concatenated"):
        calls = [Call(name, SHORT) for _ in range(2)]
        for leaf in calls[1].leaves:
            leaf.data[~calls[1].real] = 7.0
        first, second = (call.results() for call in calls)
        for result, value in first.items():
            assert torch.equal(value, second[result]), (name, result)


def test_a_call_returns_nothing_but_what_it_computes():
    out, *grads = Call("packed", SHORT)()
    assert not out.requires_grad
    assert [g.shape[1] for g in grads] == [4, 2, 2]


@pytest.mark.parametrize("window", [None, 1, 10, 25, 1000])
def test_flops_count_the_visible_pairs(window):
    case = dataclasses.replace(SHORT, window=window)
    pairs = sum(int(case.visible(0, len(p), len(p)).sum()) for p in case.prompts)
    for prompt, own in case.rows:
        pairs += int(case.visible(len(prompt), len(own), len(prompt) + len(own)).sum())
    assert case.flops() == 14 * 4 * 16 * pairs
    if window in (None, 1000):
        assert pairs == attended_pairs(24, 2, case.shape.lengths())


# The gate


def altered(change):
    """shared_prefix with `change` made to attention's (q, k, v, segments, scale, window, cap)."""
    return partial(attention_providers.ours, attend=change)


def scaled_gradient(q, k, v, *rest):
    out = attention_providers.chosen(q, k, v, *rest)
    return out + 0.001 * (out - out.detach())


def not_a_number(q, k, v, *rest):
    return attention_providers.chosen(q, k, v, *rest) * float("nan")


def half_a_prompt(q, k, v, segments, *rest):
    """The prompts' first halves are forgotten: each is a segment that nothing continues."""
    lengths, parents = [], []
    for n, parent in zip(segments.bounds.diff().tolist(), segments.parents.tolist(), strict=True):
        if parent < 0:
            number = len(lengths) + 1
            lengths += [n // 2, n - n // 2]
            parents += [-1, -1]
        else:
            lengths.append(n)
            parents.append(number)
    return attention_providers.chosen(q, k, v, make_segments(lengths, parents, "cpu"), *rest)


def sees_its_neighbours(q, k, v, segments, *rest):
    """Each completion continues the one before it."""
    before = torch.arange(-1, len(segments.parents) - 1, dtype=torch.int32)
    parents = torch.where(segments.parents < 0, -1, before)
    return attention_providers.chosen(q, k, v, segments._replace(parents=parents), *rest)


def another_window(q, k, v, segments, scale, window, softcap):
    return attention_providers.chosen(q, k, v, segments, scale, window + 1, softcap)


def prompts_without_gradient(q, k, v, segments, *rest):
    own = segments.bounds[1]
    k, v = (torch.cat([x[:, :, :own].detach(), x[:, :, own:]], 2) for x in (k, v))
    return attention_providers.chosen(q, k, v, segments, *rest)


PLANTED = [
    scaled_gradient, not_a_number, half_a_prompt, sees_its_neighbours, another_window,
    prompts_without_gradient,
]  # fmt: skip


@pytest.mark.parametrize(("planted", "dtype"), [
    (planted, dtype) for planted in PLANTED for dtype in ("float32", "bfloat16")
    if (planted, dtype) != (scaled_gradient, "bfloat16")  # 0.1 % is below its rounding
], ids=lambda x: getattr(x, "__name__", x))  # fmt: skip
def test_a_wrong_provider_is_refused_without_figures(monkeypatch, planted, dtype):
    monkeypatch.setitem(PROVIDERS, "planted", altered(planted))
    window = 20 if planted is another_window else None
    case = dataclasses.replace(SHORT, window=window, dtype=dtype)
    rows = run(case, ["planted", "shared_prefix"])
    assert str(rows["planted"].skipped).startswith("wrong: error of ")
    assert rows["planted"].seconds_median is rows["planted"].tokens is None
    assert rows["shared_prefix"].seconds_median > 0


def test_an_output_that_is_not_written_is_refused(monkeypatch):
    def reads_unwritten(q, k, v, *rest):
        out = attention_providers.chosen(q, k, v, *rest)
        return out + torch.empty(1 << 24)[-1] * 1e-30

    monkeypatch.setitem(PROVIDERS, "planted", altered(reads_unwritten))
    assert str(run(names=["planted"])["planted"].skipped).startswith("wrong: error of ")


def test_a_provider_that_raises_gets_its_reason_and_others_their_figures(monkeypatch):
    def raising(case):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PROVIDERS, "planted", raising)
    rows = run(names=["planted", "packed"])
    assert rows["planted"].skipped == "failed: RuntimeError: no such kernel"
    assert rows["packed"].seconds_median > 0


@pytest.mark.parametrize(("provider", "status"), [("shared_prefix", 1), ("concatenated", 0)])
def test_only_a_wrong_provider_of_ours_fails_the_command(monkeypatch, provider, status):
    def zeros(case):
        right = PROVIDERS["padded"](case)
        return Plan(right.index, lambda *x: 0 * right.forward(*x))

    monkeypatch.setitem(PROVIDERS, provider, zeros)
    assert attention.main([*SIZES, "--dtype", "float32", "--runs", "1"]) == status


# A GPU's part, without one


@pytest.mark.parametrize(
    ("dtype", "dim", "softcap", "runs"),
    [
        ("bfloat16", 64, None, ["shared_flex", "shared_sdpa"]),
        ("bfloat16", 64, 5.0, ["shared_sdpa"]),
        ("float32", 64, None, ["shared_sdpa"]),
        ("bfloat16", 8, None, ["shared_sdpa"]),
    ],
)
def test_every_backend_that_is_not_picked_runs_where_it_can(monkeypatch, dtype, dim, softcap, runs):
    monkeypatch.setattr(attention_flash, "flash_package", lambda: None)
    monkeypatch.setattr(attention_flash, "triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    case = dataclasses.replace(SHORT, dtype=dtype, head_dim=dim, softcap=softcap, device="cuda")
    forced = [name for name in PROVIDERS if name.startswith("shared_") and name != "shared_prefix"]
    reasons = {name: attention_providers.unavailable(name, case) for name in forced}
    assert [name for name, reason in reasons.items() if reason is None] == runs
    picked = [name for name, why in reasons.items() if why == "it is what shared_prefix runs"]
    assert len(picked) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_forced_backend_is_the_one_that_runs(monkeypatch):
    """FlexAttention's forward runs on a CPU too; varlen is replaced by what returns its queries."""
    calls, flex = [], attention_flash.flex_attention

    def counted(*args, **kwargs):
        calls.append("flex")
        return flex(*args, **kwargs)

    monkeypatch.setattr(attention_flash, "flex_attention", counted)
    monkeypatch.setattr(attention_flash, "tree_attention", lambda q, *args, **kwargs: q)
    leaves = [x.detach() for x in Call("shared_sdpa", SHORT).leaves]
    out = {n: PROVIDERS[n](SHORT).forward(*leaves) for n in PROVIDERS if n.startswith("shared_")}
    torch.testing.assert_close(out["shared_flex"], out["shared_prefix"], rtol=0, atol=3e-6)
    assert calls == ["flex"]
    assert torch.equal(out["shared_varlen"], leaves[0])
    assert torch.equal(out["shared_sdpa"], out["shared_prefix"])


def test_floors_are_flops_over_the_measured_rate(monkeypatch):
    monkeypatch.setattr(harness, "cuda_gemm_flops_per_s", lambda *args: 1e12)
    rows = run(names=["shared_prefix", "shared_varlen"])
    line = attention.add_floors(list(rows.values()), SHORT)
    assert rows["shared_prefix"].floor_seconds == SHORT.flops() / 1e12
    assert rows["shared_varlen"].floor_seconds is None
    assert line.endswith("GFLOP needed, dense GEMM 1 TFLOP/s")


# Memory and arguments


def test_memory_is_that_of_one_call_and_its_case_travels_as_json(monkeypatch):
    asked = []

    def here(target, arguments):
        module, function = target.split(":")
        call = getattr(sys.modules[module], function)(**json.loads(json.dumps(arguments)))
        asked.append(call.case)
        return memory.measure(call)

    monkeypatch.setattr(memory, "cpu_peak_extra_mib", here)
    rows = attention.run_case(SHORT, ["packed", "padded"], runs=1, warmup=0)
    assert asked == [SHORT, SHORT]
    assert all(row.peak_extra_mem_mib is not None for row in rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--providers", "padded,magic"], "got magic"),
        (["--dtype", "int8"], "got int8"),
        (["--heads", "6", "--kv-heads", "4"], "--kv-heads must divide --heads, got 4 and 6"),
        (["--window", "0"], "--window must be > 0, got 0"),
        (["--softcap", "nan"], "--softcap must be > 0, got nan"),
        (["--runs", "0"], "--runs must be > 0, got 0"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        attention.main(arguments)
    assert sentence in capsys.readouterr().err
