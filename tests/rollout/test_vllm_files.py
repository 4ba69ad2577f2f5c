"""The directory that vLLM starts from: one per configuration, whole or not used."""

from __future__ import annotations

from pathlib import Path

from rloo_fast.rollout.vllm.files import saved_configuration
from tests.support.tiny import make_model


def saved(tmp_path: Path, cache: Path, **sizes) -> Path:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return saved_configuration(make_model(**sizes), None, str(cache), str(scratch))


def test_equal_configurations_have_one_directory(tmp_path):
    cache = tmp_path / "cache"
    first = saved(tmp_path, cache)
    assert (first / "config.json").is_file()
    assert first == saved(tmp_path, cache)
    assert first != saved(tmp_path, cache, intermediate_size=48)
    assert len(list((cache / "rloo_fast").iterdir())) == 2  # nothing half made is left


def test_a_damaged_one_is_not_used(tmp_path):
    cache = tmp_path / "cache"
    kept = saved(tmp_path, cache)
    (kept / "config.json").write_text("{}")
    other = saved(tmp_path, cache)
    assert other != kept
    assert (other / "config.json").read_text() != "{}"


def test_where_no_cache_can_be_written_the_scratch_folder_serves(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert saved(tmp_path, tmp_path / "cache").is_relative_to(tmp_path / "scratch")
