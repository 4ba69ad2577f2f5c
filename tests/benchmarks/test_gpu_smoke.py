"""The smoke test of the CUDA side, on the CPU: its parts, and what it makes of parts that fail."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from benchmarks.gpu_smoke import part, run
from benchmarks.gpu_smoke.device import Host, HostAsGpu, HostPool
from benchmarks.gpu_smoke.limits import LIMITS, Limit, judged
from benchmarks.gpu_smoke.run import Part
from benchmarks.gpu_smoke.shapes import checksum
from tests.support.paths import ROOT

# a part of each kind, as a process of its own; what they write is what `part.py` writes
PARTS = """
import json, os, signal, sys, time
name, result = sys.argv[1], sys.argv[sys.argv.index("--json") + 1]
def write(status, reason=None, **figures):
    with open(result, "w") as file:
        json.dump({"status": status, "reason": reason, "figures": figures}, file)
print("said by", name, flush=True)
if name == "room":
    write("stopped", "without a word", tensors_changed=0)
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "ddp":
    write("stopped", "without a word", replicas_differ=0)
    time.sleep(60)
if name == "start":
    write("failed", "OutOfMemoryError: CUDA out of memory")
    sys.exit(1)
if name == "rollout":
    write("skipped", "no sleep mode here")
if name == "sampler_check":
    write("ok", noise=0.2, stale_step=0.01)
if name == "training":
    write("ok", steps_missing=0, largest_logp_diff=float("nan"))
if name == "allocator":
    write("ok", replays_wrong=0, freed_share=None, unheard_of=3)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """main() with parts that crash, hang, run out of memory, miss a limit, lack a package."""
    (tmp_path / "planted.py").write_text(PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["allocator", "room", "ddp", "start", "rollout", "sampler_check", "training"]
    parts = [Part(name, 2 if name == "ddp" else 30, module="planted") for name in names]
    parts.append(Part("allocator_expandable", 30, ("no_such", "json"), module="planted"))
    monkeypatch.setattr(run, "PARTS", tuple(parts))
    code = run.main(["--dry", "--engine", "hf", "--out", str(tmp_path / "out"), "--parts",
                     ",".join([*names, "allocator_expandable"])])  # fmt: skip
    return code, json.loads((tmp_path / "out/gpu_smoke.json").read_text())


def test_a_part_that_fails_leaves_the_others_results(planted):
    code, found = planted
    assert code == 1
    parts = found["parts"]
    assert {name: row["status"] for name, row in parts.items()} == {
        "allocator": "ok", "room": "failed", "ddp": "failed", "start": "failed",
        "rollout": "skipped", "sampler_check": "failed", "training": "failed",
        "allocator_expandable": "skipped",
    }  # fmt: skip
    assert parts["room"]["reason"] == "ended by SIGSEGV\nsaid by room"
    assert parts["ddp"]["reason"] == "stopped after 2 s\nsaid by ddp"
    assert parts["start"]["reason"].startswith("OutOfMemoryError: CUDA out of memory\nsaid by")
    assert parts["rollout"]["reason"] == "no sleep mode here"
    assert parts["sampler_check"]["reason"] == "outside their limits: noise"
    assert parts["allocator_expandable"]["reason"] == "not installed: no_such"
    # what was measured before the end is kept
    assert parts["room"]["figures"]["tensors_changed"]["pass"] is True
    assert parts["ddp"]["figures"]["replicas_differ"]["value"] == 0
    assert parts["training"]["figures"]["largest_logp_diff"]["value"] == "nan"
    assert {"torch", "triton", "peers", "commit", "driver", "gpu", "cpu"} <= found["env"].keys()
    assert found["env"]["peers"]["transformers"]


def test_figures_beside_their_limits():
    rows = judged("room", {"out_gb_per_s": 39.9, "back_gb_per_s": None, "moved_gib": 3.0})
    assert [row["pass"] for row in rows.values()] == [False, None, None]
    assert rows["out_gb_per_s"]["limit"] == ">= 40"
    assert not Limit(0, 0, "").holds(math.nan)
    assert not Limit(None, 0.3, "").holds(0.31)
    assert Limit(0.9, 1.1, "").holds(1.1)
    assert "pass" not in judged("allocator", {"unheard_of": 3})["unheard_of"]


def test_the_limits_are_of_the_parts_and_the_page_tells_them():
    assert [*part.MODULES] == [*LIMITS] == [p.name for p in run.PARTS]
    assert sum(p.limit_s for p in run.PARTS) == 1200
    told = re.findall(r"^ +(\d+) s   (\w+)", str(run.__doc__), re.MULTILINE)
    assert [(name, int(seconds)) for seconds, name in told] == [
        (p.name, p.limit_s) for p in run.PARTS
    ]
    page = (ROOT / "benchmarks/README.md").read_text()
    for name, limits in LIMITS.items():
        for figure, limit in limits.items():
            if str(limit) != "-":
                assert f"| {name} | {figure} | {limit} |" in page


@pytest.mark.parametrize(
    "name", ["allocator", "room", "ddp", "rollout", "sampler_check", "transfer"]
)
def test_a_part_runs_on_a_cpu(tmp_path, name):
    result = tmp_path / "result.json"
    command = [name, "--json", str(result), "--folder", str(tmp_path), "--engine", "hf", "--dry"]
    threads = torch.get_num_threads()
    try:
        assert part.main(command) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(result.read_text())
    assert found["status"] == "ok"
    rows = judged(name, found["figures"])
    assert [figure for figure, row in rows.items() if row.get("pass") is False] == []
    on_a_gpu_alone = {
        "freed_share", "leaked_gib", "unattributed_gib", "unaccounted_gib", "out_gb_per_s",
        "back_gb_per_s", "counted_over_allocated", "other_process_seen", "seeds_share",
        "tokens_per_s_without_seeds",
    }  # fmt: skip
    measured = {figure for figure, row in rows.items() if row["value"] is not None}
    assert LIMITS[name].keys() - on_a_gpu_alone <= measured


@pytest.mark.slow
def test_a_run_that_is_killed_is_resumed(tmp_path):
    assert run.main(["--dry", "--engine", "hf", "--parts", "training", "--out", str(tmp_path)]) == 0
    row = json.loads((tmp_path / "gpu_smoke.json").read_text())["parts"]["training"]
    assert row["status"] == "ok"
    assert row["figures"]["steps_missing"]["value"] == 0
    assert row["figures"]["last_step"]["value"] == 8


def test_without_vllm_its_own_parts_are_skipped(tmp_path):
    result = tmp_path / "result.json"
    command = ["start", "--json", str(result), "--folder", str(tmp_path), "--engine", "hf", "--dry"]
    assert part.main(command) == 0
    assert json.loads(result.read_text())["status"] == "skipped"


def test_a_part_writes_its_error_and_what_it_had_measured(tmp_path, monkeypatch):
    from benchmarks.gpu_smoke import room

    def fails(smoke):
        smoke.record(moved_gib=1.0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(room, "run", fails)
    result = tmp_path / "result.json"
    command = ["room", "--json", str(result), "--folder", str(tmp_path), "--dry"]
    assert part.main(command) == 1
    found = json.loads(result.read_text())
    assert found["status"] == "failed"
    assert found["reason"] == "OutOfMemoryError: CUDA out of memory"
    assert found["figures"] == {"moved_gib": 1.0}


def test_a_bit_that_is_lost_on_the_way_to_the_host_is_seen(tmp_path, monkeypatch):
    copy, count = HostAsGpu.copy, iter(range(10**9))

    def broken(self, source, target):
        copy(self, source, target)
        if next(count) == 3:
            target[0] ^= 1

    monkeypatch.setattr(HostAsGpu, "copy", broken)
    result = tmp_path / "result.json"
    assert part.main(["room", "--json", str(result), "--folder", str(tmp_path), "--dry"]) == 0
    assert json.loads(result.read_text())["figures"]["tensors_changed"] == 1


@pytest.mark.parametrize(
    ("fault", "figure"),
    [
        ("moved", "addresses_changed"),
        ("weights", "weights_lost"),
        ("trainer", "trainer_tensors_changed"),
        ("graph", "replays_wrong"),
    ],
)
def test_a_fault_of_the_allocator_is_seen(tmp_path, monkeypatch, fault, figure):
    """Planted in the stand-in: what a broken sleep mode would do."""
    wake, made = HostPool.wake_up, {"empty": [], "randn": []}

    def watched(name):
        function = getattr(torch, name)

        def call(*args, **kwargs):
            made[name].append(tensor := function(*args, **kwargs))
            return tensor

        monkeypatch.setattr(torch, name, call)

    def broken(self, tags):
        wake(self, tags)
        if tags != ["weights"]:  # once a cycle: twice would undo it
            return
        weight = next(tensor for tensor in made["empty"] if tensor.dtype is torch.float32)
        of_trainer = made["randn"][0]
        if fault == "weights":
            weight.view(torch.int32)[3] ^= 1
        if fault == "trainer":
            of_trainer.view(torch.int32)[5] ^= 1
        if fault == "moved":
            weight.data = weight.data.clone()

    watched("empty")
    watched("randn")
    monkeypatch.setattr(HostPool, "wake_up", broken)
    if fault == "graph":
        monkeypatch.setattr(Host, "capture", lambda self, work: lambda: None)
    result = tmp_path / "result.json"
    command = ["allocator", "--json", str(result), "--folder", str(tmp_path), "--dry"]
    assert part.main(command) == 0
    assert judged("allocator", json.loads(result.read_text())["figures"])[figure]["pass"] is False


def test_a_checksum_follows_every_bit_and_the_order():
    words = torch.arange(100, dtype=torch.int64)
    values = torch.cat([words.view(torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint8)])
    before = checksum(values)
    assert checksum(values.clone()) == before
    for place in (0, 7, 13, 799, 800, 802):
        flipped = values.clone()
        flipped[place] ^= 128
        assert checksum(flipped) != before
    exchanged = values.clone()
    exchanged[:8], exchanged[8:16] = values[8:16], values[:8]
    assert checksum(exchanged) != before
