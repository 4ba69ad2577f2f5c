"""The built wheel, installed away from the checkout: the command works, and so do the kernels with
torch alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.commands import tiny_llama
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

SOURCES = (
    "rloo_fast", "kernels", "pyproject.toml", "editable_backend.py", "README.md", "LICENSE",
)  # fmt: skip
KERNELS = """
from importlib.util import find_spec
import torch, rloo_kernels
assert not any(map(find_spec, ("transformers", "accelerate", "datasets", "packaging", "triton")))
hidden = torch.randn(4, 3, requires_grad=True)
rloo_kernels.linear_logprob(hidden, torch.randn(5, 3), torch.tensor([0, 4, 2, 1])).sum().backward()
assert hidden.grad.isfinite().all()
print(rloo_kernels.__file__)
"""


def outside(folder: Path, *command: str | Path) -> str:
    """What the command prints, run in `folder` with nothing of the checkout on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def environment(folder: Path, wheel: Path, packages: Path) -> Path:
    """The bin/ of a new environment with the wheel, which sees `packages` after it."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    # the wheel first: what pip cannot see it takes for missing, and leaves alone
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    outside(folder, sys.executable, "-m", "pip", "--python", python, *install, wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return python.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out]
    outside(source, sys.executable, "-m", "pip", *build, ".")
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    packages = Path(sysconfig.get_paths()["purelib"])
    return environment(tmp_path_factory.mktemp("installed") / "env", wheel, packages)


@pytest.fixture(scope="module")
def torch_alone(wheel, tmp_path_factory):
    """An environment in which torch and what torch requires can be imported, and nothing else."""
    packages, wanted, seen = tmp_path_factory.mktemp("torch"), ["torch"], set()
    while wanted:
        name = wanted.pop()
        if name in seen or name in ("triton", "setuptools"):
            continue
        seen.add(name)
        found = distribution(name)
        needs = map(Requirement, found.requires or ())
        wanted += [r.name for r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            target = packages / top
            if not target.exists():
                target.symlink_to(Path(str(found.locate_file(top))))
    return environment(tmp_path_factory.mktemp("alone") / "env", wheel, packages)


def test_every_file_of_the_packages_is_in_it(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    packages = {"rloo_fast": ROOT / "rloo_fast", "rloo_kernels": ROOT / "kernels" / "rloo_kernels"}
    expected = {
        f"{name}/{path.relative_to(root).as_posix()}"
        for name, root in packages.items()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"rloo_fast/py.typed", "rloo_kernels/py.typed"} < expected
    assert expected - inside == set()
    assert {name.split("/")[0] for name in inside if "dist-info" not in name} == {*packages}


def test_the_command_checks_the_machine_and_trains(installed, tmp_path):
    where = outside(
        tmp_path, installed / "python", "-c", "import rloo_fast as r; print(r.__file__)"
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "torch" in outside(tmp_path, installed / "rloo-fast", "doctor")
    tiny_llama(tmp_path / "model")
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(
        "def f(completions, answer, **kwargs):\n"
        "    return [float(a in c) for c, a in zip(completions, answer)]\n"
    )
    outside(
        tmp_path, installed / "rloo-fast", "train", "--model_name_or_path", "model",
        "--dataset_name", "p.jsonl", "--reward_funcs", "r.py:f", "--output_dir", "out",
        "--max_steps", "5", "--max_completion_length", "4", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "1", "--use_cpu", "--report_to", "none",
    )  # fmt: skip
    state = json.loads(next((tmp_path / "out").glob("**/trainer_state.json")).read_text())
    assert state["global_step"] == 5


def test_the_kernels_need_torch_alone(torch_alone, tmp_path):
    where = outside(tmp_path, torch_alone / "python", "-c", KERNELS)
    assert Path(where.strip()).is_relative_to(torch_alone.parent)


def test_an_editable_install_is_paths_that_type_checkers_follow(tmp_path):
    """Not setuptools' import hook, which nothing but an import sees."""
    code = f"import editable_backend as b; print(b.build_editable({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    name = done.stdout.split()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        names = wheel.namelist()
        (paths,) = (wheel.read(n).decode().splitlines() for n in names if n.endswith(".pth"))
        record = next(n for n in names if n.endswith("RECORD"))
        assert {line.split(",")[0] for line in wheel.read(record).decode().splitlines()} == {*names}
    assert not [n for n in names if n.endswith(".py")]
    found = {package.parent.name for path in paths for package in Path(path).glob("*/py.typed")}
    assert found == {"rloo_fast", "rloo_kernels"}
