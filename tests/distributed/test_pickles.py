"""Whatever is in a pickled file, only data comes out of it."""

from __future__ import annotations

import io
import os
import pickle
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from rloo_fast.distributed.dcp_metadata import load
from rloo_fast.distributed.pickles import FORBID, FORCE, foreign_object, only_data
from tests.support.damage import Payload, plant

STATE: dict[str, Any] = {"weight": torch.arange(6.0), "lr": 0.5, "betas": (0.9, 0.99), "n": None}


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A torch.distributed.checkpoint."""
    dcp_save(STATE, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    return tmp_path / "optimizer_0"


def loaded(sharded: Path) -> dict[str, Any]:
    state = {name: torch.zeros(6) if name == "weight" else 7 for name in STATE}
    dcp_load(state, checkpoint_id=sharded, no_dist=True)
    return state


def test_an_honest_checkpoint_is_read_as_it_was_saved(sharded):
    assert foreign_object(sharded / ".metadata") is None
    with only_data():
        state = loaded(sharded)
    assert state.pop("weight").equal(STATE["weight"])
    assert state == {name: value for name, value in STATE.items() if name != "weight"}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_what_torch_distributed_checkpoint_would_run_is_not_run(sharded, tmp_path, name):
    plant(sharded / name, tmp_path / "ran")
    said = foreign_object(sharded / ".metadata")
    assert said is not None
    assert "open, which is no data and could run code" in said
    with pytest.raises(ValueError, match=r"holds io\.open, which is no data"), only_data():
        loaded(sharded)
    assert not (tmp_path / "ran").exists()
    with suppress(AttributeError, CheckpointException):  # torch's own loading runs it
        loaded(sharded)
    assert (tmp_path / "ran").exists()


def test_what_deepspeed_would_run_is_not_run(tmp_path):
    """It loads with weights_only=False."""
    path = tmp_path / "mp_rank_00_model_states.pt"
    plant(path, tmp_path / "ran")
    assert foreign_object(path) == "holds io.open, which is no data and could run code"
    with pytest.raises(ValueError, match=r"of the checkpoint holds io\.open"), only_data():
        torch.load(path, weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def old_format(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def protocol_4(path: Path, content: Any) -> None:
    torch.save(content, path, pickle_protocol=4)


@pytest.mark.parametrize("write", [torch.save, old_format, protocol_4, None])
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin"])
def test_every_format_of_torch_is_looked_into(tmp_path, name, write):
    path, payload = tmp_path / name, [1, Payload(tmp_path / "ran")]
    if write is None:
        path.write_bytes(pickle.dumps(payload))
    else:
        write(*((payload, path) if write is torch.save else (path, payload)))
    assert foreign_object(path)
    with pytest.raises(Exception, match=r"\w"), only_data():
        torch.load(path, weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04.", b"PK\x03\x04", b"\x80\x02" * 9])
@pytest.mark.parametrize("name", ["a.pt", ".metadata"])
def test_nonsense_is_said_to_be_so(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert foreign_object(tmp_path / name)


def test_classes_of_the_metadata_cannot_be_changed(tmp_path):
    """Pickle's BUILD sets attributes of whatever lies below it."""
    module = Metadata.__module__.encode()
    changing = b"\x80\x02c" + module + b"\nMetadata\nN}X\x06\x00\x00\x00markedK\x01s\x86b."
    assert pickle.loads(changing) is Metadata
    assert vars(Metadata)["marked"] == 1
    delattr(Metadata, "marked")
    with pytest.raises(pickle.UnpicklingError, match="a class that is changed"):
        load(io.BytesIO(changing))
    assert not hasattr(Metadata, "marked")


def test_files_named_elsewhere_are_refused(sharded):
    record = sharded / ".metadata"
    saved = pickle.loads(record.read_bytes())
    for place in saved.storage_data.values():
        place.relative_path = "../optimizer_0/" + place.relative_path
    record.write_bytes(pickle.dumps(saved))
    said = foreign_object(record)
    assert said is not None
    assert "which is no file beside it" in said


@pytest.mark.parametrize("before", [{}, {FORBID: "1"}, {FORCE: "0"}], ids=str)
def test_the_environment_is_as_before(tmp_path, monkeypatch, before):
    for name in (FORCE, FORBID):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    torch.save(Counter(a=1), tmp_path / "a.pt")
    with only_data():
        assert torch.load(tmp_path / "a.pt", weights_only=False) == {"a": 1}
    assert {name: os.environ[name] for name in (FORCE, FORBID) if name in os.environ} == before
