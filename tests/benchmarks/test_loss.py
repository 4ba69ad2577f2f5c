"""The benchmark harness: its JSON form, its gate, its clock and its memory figures."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch

from benchmarks.common import harness, memory
from benchmarks.loss import batches, providers
from benchmarks.loss import run as loss
from benchmarks.loss.providers import Provider
from benchmarks.loss.run import JOBS, Job, Shape

CPU = torch.device("cpu")
TINY = Shape("custom", 256, 32, 512)
DESIGN_KEYS = [
    "benchmark", "provider", "shape", "device", "dtype", "runs", "seconds_median", "seconds_min",
    "seconds_max", "peak_extra_mem_mib", "tokens", "error_vs_reference", "skipped",
]  # fmt: skip
ENV_KEYS = {"gpu", "cpu", "threads", "torch", "triton", "numpy", "python", "commit", "dirty"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`benchmarks.loss` run end to end on a tiny shape: (exit status, JSON, PNG)."""
    patch = pytest.MonkeyPatch()
    # the graph is captured whole as in a real run, but no C++ compiler is waited for
    quick = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    patch.setattr(providers, "_compiled", quick)
    patch.setattr(sys, "argv", ["pytest", "--json", "/somewhere/loss.json"])
    folder = tmp_path_factory.mktemp("loss")
    out, png = folder / "loss.json", folder / "loss.png"
    arguments = ["--shape", "256,32,512", "--runs", "2", "--no-memory"]
    status = loss.main([*arguments, "--json", str(out), "--plot", str(png)])
    patch.undo()
    return status, json.loads(out.read_text()), png


def run_with(planted: dict[str, Provider], **options) -> dict[str, harness.Row]:
    job = JOBS["linear"]
    known = {"eager": providers.LINEAR["eager"], **planted}
    job = Job(job.name, known, job.reference, job.gradients)
    options = {"runs": 1, "warmup": 0, "measure_memory": False, **options}
    rows = loss.run_job(job, TINY, torch.float32, CPU, list(known), **options)
    return {row.provider: row for row in rows}


def test_json_has_the_projects_form(written):
    _, content, _ = written
    assert list(content) == ["env", "rows"]
    assert ENV_KEYS.issubset(content["env"])
    assert all(list(row)[: len(DESIGN_KEYS)] == DESIGN_KEYS for row in content["rows"])


def test_every_provider_has_figures_or_a_reason(written):
    _, content, _ = written
    assert [row["provider"] for row in content["rows"]] == list(providers.LINEAR)
    for row in content["rows"]:
        figures = [row["seconds_median"], row["tokens"], row["error_vs_reference"]]
        if row["skipped"]:
            assert [*figures, row["runs"]] == [None, None, None, 0], row
        else:
            assert min(figures) > 0, row
            assert row["runs"] == 2, row


def test_our_providers_pass_the_gate(written):
    status, content, _ = written
    ours = {r["provider"]: r["skipped"] for r in content["rows"] if r["provider"][:4] == "ours"}
    assert status == 0
    gpu_only = ours.pop("ours_library")
    assert gpu_only == "its kernels need a GPU, not cpu"
    assert ours == {"ours": None, "ours_logprob": None}


def test_the_json_reads_back_as_rows(written, tmp_path):
    _, content, _ = written
    rows = [harness.Row(**row) for row in content["rows"]]
    harness.write_json(tmp_path / "again.json", content["env"], rows)
    assert harness.read_json(tmp_path / "again.json") == (content["env"], rows)


def test_the_plot_is_a_picture(written):
    from matplotlib import pyplot as plt

    pixels = plt.imread(written[2])
    assert pixels[..., :3].std() > 0.05


def test_the_command_names_no_folder(written):
    assert written[1]["env"]["command"].endswith(" --json loss.json")


@pytest.mark.parametrize("job_name", ["logits_forward", "logits_loss"])
def test_logits_providers_pass_the_gate(job_name):
    names = ["ours", "eager", "trl"]
    options = {"runs": 1, "warmup": 0, "measure_memory": False}
    rows = loss.run_job(JOBS[job_name], TINY, torch.float32, CPU, names, **options)
    wrong = {r.provider: r.skipped for r in rows if (r.skipped or "").startswith(("wrong", "fail"))}
    assert wrong == {}


def scaled_gradient(batch):
    """The right loss, its gradients 0.1 % too large."""
    out = providers.eager(batch)
    return out + 0.001 * (out - out.detach())


def reads_unwritten(batch):
    """Adds what memory happens to hold: 0 in fresh pages, unless they are poisoned."""
    unwritten = torch.empty(1 << 24)[-1]  # large enough to come from fresh pages
    return providers.eager(batch) + batch.leaves[0].sum() * unwritten


def not_a_number(batch):
    """A nan compares as neither too large nor small enough."""
    return providers.eager(batch) * float("nan")


def without_baseline(batch):
    """REINFORCE in place of RLOO: the reward itself weighs the log-probs."""
    hidden, weight = batch.leaves
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, batch.token_ids[:, None]).squeeze(1)
    return -(batch.rewards.repeat_interleave(64) * logps).sum() / len(batch.rewards)


@pytest.mark.parametrize(
    "planted", [scaled_gradient, reads_unwritten, not_a_number, without_baseline]
)
def test_a_wrong_provider_is_refused_without_figures(planted):
    row = run_with({"planted": Provider(planted)})["planted"]
    assert str(row.skipped).startswith("wrong: error of ")
    assert row.seconds_median is row.error_vs_reference is row.tokens is None


def test_a_provider_that_raises_gets_its_reason_and_others_their_figures():
    def raising(batch):
        raise RuntimeError("no such kernel")

    rows = run_with({"planted": Provider(raising)})
    assert rows["planted"].skipped == "failed: RuntimeError: no such kernel"
    assert rows["eager"].seconds_median is not None


def test_a_wrong_provider_of_ours_fails_the_command(monkeypatch):
    monkeypatch.setitem(providers.LINEAR, "ours", Provider(without_baseline))
    assert loss.main(["--shape", "256,32,512", "--providers", "ours", "--no-memory"]) == 1


def test_the_float64_reference_equals_autograd():
    batch = batches.linear_batch(256, 16, 300, torch.float64, CPU)
    hidden, weight = batch.leaves
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, batch.token_ids[:, None]).squeeze(1)
    loss_ = batches.rloo_loss_torch(logps, batch)
    grads = torch.autograd.grad(loss_, batch.leaves)
    outputs = {"loss": loss_, "grad_hidden": grads[0], "grad_weight": grads[1]}
    assert max(batches.linear_reference(batch).errors(outputs).values()) < 1e-7


def test_rounds_are_interleaved_and_begin_with_another_step_each_time():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = harness.time_interleaved(steps, CPU, runs=3, warmup=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert [len(s) for s in seconds.values()] == [3, 3, 3]


def test_the_clock_measures_the_step_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(harness.gc, "collect", lambda: now.append(now.pop() + 8.0))
    steps = {"quick": lambda: None, "slow": lambda: now.append(now.pop() + 0.5)}
    seconds = harness.time_interleaved(steps, CPU, runs=3)
    assert seconds == {"quick": [0.0] * 3, "slow": [0.5] * 3}


@pytest.mark.parametrize("malloc_keeps", [None, str(1 << 30)])
def test_memory_of_a_known_allocation_is_measured(tmp_path, monkeypatch, malloc_keeps):
    (tmp_path / "planted_step.py").write_text(
        "import torch\n"
        "def make(mib, rows):\n"
        "    torch.ones(4 * rows, 1 << 18)  # a higher peak, but an earlier one\n"
        "    x = torch.ones(rows, 1 << 18)  # inputs: before the baseline\n"
        "    return lambda: (x, [torch.full((1 << 18,), 2.0) for _ in range(mib)])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if malloc_keeps:  # the heap keeps what the warm-up freed: it must not serve the measured call
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", malloc_keeps)
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", malloc_keeps)
    measured = memory.cpu_peak_extra_mib("planted_step:make", {"mib": 64, "rows": 100})
    assert measured == pytest.approx(64, rel=0.25)


def test_memory_that_cannot_be_measured_says_why(tmp_path):
    with pytest.raises(memory.NotMeasured, match="No module named 'no_such_step'"):
        memory.cpu_peak_extra_mib("no_such_step:make", {})


def test_memory_of_a_provider_is_measured_in_a_process_of_its_own():
    row = run_with({}, measure_memory=True)["eager"]
    logits_mib = 4 * TINY.num_rows * TINY.vocab / 2**20
    assert row.peak_extra_mem_mib is not None
    assert logits_mib < row.peak_extra_mem_mib < 20 * logits_mib


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "gpt-9"], "N,D,V; got 'gpt-9'"),
        (["--shape", "100,8,16"], "rows must be a multiple of 256"),
        (["--providers", "ours,magic"], "got magic"),
        (["--dtype", "int8"], "got int8"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        loss.main(arguments)
    assert sentence in capsys.readouterr().err
