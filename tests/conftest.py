"""What every test starts from."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from tests.support.tiny import make_model, make_tokenizer

TESTS = Path(__file__).parent

KINDS = {"unit", "kernels", "parity", "distributed", "vllm", "gpu", "run"}
# kind of a file whose tests have no mark of their own: that of the longest entry it begins with
KIND_OF = {
    "": "unit",
    "rloo_kernels": "kernels",
    "parity": "parity",
    "integrations": "parity",
    "rollout/test_vllm.py": "vllm",
    # whole runs, or processes of their own, in most tests
    **dict.fromkeys(
        (
            "benchmarks",
            "checkpoint",
            "cli/test_doctor",
            "config/test_effects",
            "data/test_skipping",
            "masking/test_run",
            "end_to_end",
            "examples",
            "judges/test_evaluate",
            "models/test_peft_methods",
            "objective/test_importance_sampling",
            "objective/test_stale_rows",
            "policy/test_compile",
            "policy/test_image_layouts",
            "policy/test_liger_layers",
            "reports/test_outputs",
            "reports/test_view_run",
            "rewards/test_code",
            "rewards/test_copies",
            "rewards/test_overlap",
            "rewards/test_processes",
            "rollout/test_hf_images",
            "rollout/test_registry",
            "sandbox/test_collected",
            "sandbox/test_sandbox",
            "rollout/test_vllm_servers",
            "step/test_ahead",
            "step/test_failures",
            "step/test_nonfinite",
            "step/test_termination",
            "step/test_update",
            "verifiers",
            "viewer/test_browser",
        ),
        "run",
    ),
}


def pytest_ignore_collect(collection_path, config):
    """With `-m unit`, files of another kind are not imported: no test in them is of this one."""
    if config.option.markexpr == "unit" and collection_path.name.startswith("test_"):
        return _kind_of(collection_path) != "unit" or None


def pytest_collection_finish():
    """Every train() begins with a garbage collection: spare it what was imported."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Each test is of a kind: as marked, or as its folder says; the rest is `unit` unless slow.

    Files with long tests come first, or at the end one worker would be left alone with some.
    """
    for item in items:
        if not KINDS & {mark.name for mark in item.iter_markers()}:
            kind = _kind_of(item.path)
            if kind != "unit" or not item.get_closest_marker("slow"):
                item.add_marker(kind)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _kind_of(path):
    name = path.relative_to(TESTS).as_posix()
    return KIND_OF[max((start for start in KIND_OF if name.startswith(start)), key=len)]


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_warning()  # which benchmarks turn down
    logging.getLogger("rloo_fast").setLevel(logging.INFO)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model_dir(tmp_path):
    """A saved tiny model with its tokenizer."""
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
