"""What a machine cannot do is refused when the configuration is made."""

from __future__ import annotations

import importlib.util

import pytest

from rloo_fast import RLOOConfig


def test_fp16_on_a_cpu_says_what_to_write(tmp_path):
    with pytest.raises(ValueError, match="fp16=True needs a GPU, and this run is on a CPU"):
        RLOOConfig(str(tmp_path), fp16=True, use_cpu=True)


def test_liger_without_triton_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "triton" else real(name, *rest),
    )
    with pytest.raises(ImportError, match="needs Triton, which is not installed here"):
        RLOOConfig(str(tmp_path), use_liger_kernel=True)
