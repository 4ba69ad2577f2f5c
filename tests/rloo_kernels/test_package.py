"""The package stands alone: what it imports, in which order, and without what it works."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import rloo_kernels

from tests.support.paths import python_path

PACKAGE = Path(rloo_kernels.__file__).parent
BLOCKED = ("triton", "transformers", "accelerate", "vllm", "rloo_fast")
ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # importing one of them raises ImportError
import torch
from rloo_kernels import fused_linear_rloo_loss, linear_logprob, selective_log_softmax
hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
ids = torch.tensor([0, 4, 2, 1])
loss = fused_linear_rloo_loss(
    hidden, weight, ids, torch.tensor([0, 1, 4]), rewards=torch.tensor([1.0, 0.0]),
    num_generations=2,
).loss
(loss + linear_logprob(hidden, weight, ids).sum()).backward()
assert hidden.grad.isfinite().all()
torch.testing.assert_close(
    selective_log_softmax(hidden @ weight.T, ids), linear_logprob(hidden, weight, ids)
)
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """Module -> the modules that it imports, those imported inside functions included."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    found[name].add(inner if inner in files else base)
    return found


def test_the_ops_run_where_only_torch_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={"PYTHONPATH": python_path(str(PACKAGE.parent)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_every_module_imports_only_what_the_readme_lists_above_it():
    """So there is no circle; imports inside functions count."""
    table = (PACKAGE.parent / "README.md").read_text().split("## Files")[1].split("##")[0]
    files = [name for line in table.splitlines() if line.startswith("| `")
             for name in re.findall("`([a-z_0-9/]+[.]py)`", line.split("|")[1])]  # fmt: skip
    order = [module_name(PACKAGE / name) for name in files]
    graph = {name: found for name, found in imports().items() if name in order}
    assert sorted(files) == sorted(
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.stem != "__init__"
    )
    assert "rloo_kernels.lm_head.piece_triton" in graph["rloo_kernels.lm_head.piece"]  # a lazy one
    for i, name in enumerate(order):
        ours = {x for x in graph[name] if x.startswith("rloo_kernels")}
        assert ours <= set(order[:i]), f"{name} imports {sorted(ours - set(order[:i]))}"


def test_only_kernel_files_import_triton():
    """All others work without it; `dispatch` asks whether it is there."""
    users = {
        name for name, found in imports().items() if any(x.startswith("triton") for x in found)
    }
    kernels = {module_name(path) for path in PACKAGE.rglob("*_triton.py")}
    assert users <= kernels | {"rloo_kernels.dispatch"}


def test_nothing_of_the_trainer_is_imported():
    roots = {x.split(".")[0] for found in imports().values() for x in found}
    assert not roots & {"rloo_fast", "transformers", "accelerate", "vllm"}
