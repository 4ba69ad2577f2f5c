"""metrics.jsonl: strict, whole after a kill, and cut back by a resume."""

import json
import logging
import math
import os

import numpy as np
import pytest
import torch

from rloo_fast.reports import metrics_file
from rloo_fast.reports.metrics_file import MetricsWriter, read_metrics, write_atomically


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, {"reward": step / 3, "learning_rate": 1e-6})
        if step % 4 == 0:
            writer.write(step, {"eval_reward": step / 7})


@pytest.mark.parametrize("killed_at", [4, 5, 7])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, killed_at):
    write_steps(MetricsWriter(tmp_path / "whole"), range(1, 10))
    write_steps(MetricsWriter(tmp_path / "resumed"), range(1, killed_at + 1))
    with open(tmp_path / "resumed/metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "rew')
    write_steps(MetricsWriter(tmp_path / "resumed", resume_step=4), range(5, 10))
    files = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "resumed")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 11


def test_a_resume_that_cannot_rewrite_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write_steps(MetricsWriter(tmp_path), range(1, 10))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(tmp_path, resume_step=4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "metrics.jsonl": before
    }


def test_a_new_run_keeps_the_former_file_beside_its_own(tmp_path):
    for value in (1.0, 2.0, 3.0):
        MetricsWriter(tmp_path).write(1, {"reward": value})
    names = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    assert [json.loads((tmp_path / name).read_text())["reward"] for name in names] == [1, 2, 3]


def test_lines_are_strict_json(tmp_path):
    metrics = {"loss": math.nan, "grad_norm": math.inf, "kl": np.float32(0.5), "n": torch.tensor(3)}
    MetricsWriter(tmp_path).write(2, metrics | {"step": 99})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 2, "loss": null, "grad_norm": null, "kl": 0.5, "n": 3}\n'


class FullDisk:
    """A file that takes `room` bytes of each write, then is full; counts its writes."""

    room, writes = 0, 0

    def __init__(self, path, mode, buffering):
        self.file = open(path, mode, buffering=buffering)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        FullDisk.writes += 1
        if not self.room:
            raise OSError(28, "No space left on device")
        return self.file.write(data[: self.room])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 9], ids=["raises", "writes a part"])
def test_a_full_disk_is_reported_once_and_stops_nothing(tmp_path, monkeypatch, caplog, room):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"reward": 0.1})
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(FullDisk, "writes", 0)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(metrics_file, "open", FullDisk, raising=False)
        writer.write(2, {"reward": 0.2})
        writer.write(3, {"reward": 0.3})
    assert FullDisk.writes == 2
    (warning,) = caplog.messages
    assert "No space left on device" in warning
    writer.write(4, {"reward": 0.4})  # there is room again
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]


def test_read_metrics_leaves_out_a_cut_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kl": null}\n{"step": 2, "k')
    assert read_metrics(tmp_path) == [{"step": 1, "kl": None}]


def test_read_metrics_names_a_damaged_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a JSON object"):
        read_metrics(tmp_path)


def test_write_atomically_replaces_the_whole_file_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a longer old text")
    with open(path, "rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"a longer old text"  # who was reading the old file still does
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
