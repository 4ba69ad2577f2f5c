"""A model directory that is not whole is refused, by the name of the file or of the weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rloo_fast.cli.train import load_named_tokenizer
from rloo_fast.judges.texts import _tokenizer
from rloo_fast.models.loading import load_policy
from rloo_fast.models.pretrained import load_whole
from rloo_fast.models.tokenizer import load_tokenizer
from rloo_fast.rewards.models import _load_tokenizer, load_reward_model
from tests.support.damage import plant
from tests.support.tiny import make_model, make_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def put_in_front(weights: dict[str, torch.Tensor]) -> None:
    for name in [*weights]:
        weights[f"policy.{name}"] = weights.pop(name)


def split(directory: Path, second: str) -> None:
    """Into two files, of which the second is lost."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({n: weights[n] for n in names[:5]}, directory / "one.safetensors", {"format": "pt"})
    index = {n: "one.safetensors" if i < 5 else second for i, n in enumerate(names)}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))


# what is wrong with the weights, and what is said of it
INCOMPLETE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one is missing": (
        lambda d: change(d, lambda w: w.pop(UP)),
        rf"its files lack {UP} \(missing weights would start at random\). Give a whole",
    ),
    "other names": (lambda d: change(d, put_in_front), "files lack .* and 24 more"),
    "more layers wanted": (
        lambda d: change_config(d, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"files lack model\.layers\.2\.",
    ),
    "another shape": (
        lambda d: change(d, lambda w: w.update({UP: torch.ones(2, 2)})),
        f"have another shape for {UP}",
    ),
    "integers": (
        lambda d: change(d, lambda w: w.update({UP: w[UP].view(torch.int32)})),
        f"hold integers for {UP}",
    ),
    "a NaN": (
        lambda d: change(d, lambda w: w[UP].view(-1)[3:4].fill_(torch.nan)),
        f"hold a NaN or an infinity in {UP}",
    ),
    "an infinity": (
        lambda d: change(d, lambda w: w[UP].view(-1)[:1].fill_(-torch.inf)),
        f"hold a NaN or an infinity in {UP}",
    ),
    "a shard is missing": (
        lambda d: split(d, "two.safetensors"),
        r"index.json names 'two.safetensors', which is missing: get the directory again",
    ),
    "a shard elsewhere": (
        lambda d: split(d, "../two.safetensors"),
        "which is no file beside it",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_weights_that_are_not_whole_are_refused(directory, case):
    damage, said = INCOMPLETE[case]
    damage(directory)
    with pytest.raises(ValueError, match=f"model '{directory}'.*{said}"):
        load_policy(str(directory))


def header(content: bytes, length: int) -> bytes:
    return struct.pack("<Q", length) + content[8:]


# of every file, and the end of what is said: the beginning is its name
DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty": ("model.safetensors", lambda b: b"", "is empty"),
    "cut": ("model.safetensors", lambda b: b[: len(b) // 2], "is damaged, or was cut"),
    "7 bytes": ("model.safetensors", lambda b: b[:7], "is damaged, or was cut"),
    "header of 2^60": ("model.safetensors", lambda b: header(b, 2**60), "header too large"),
    "header of 2^64": ("model.safetensors", lambda b: header(b, 2**64 - 1), "header too large"),
    "no such type": (
        "model.safetensors",
        lambda b: b.replace(b'"F32"', b'"X32"', 1),
        "unknown variant `X32`",
    ),
    "git lfs": (
        "model.safetensors",
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a pointer of Git LFS",
    ),
    "config cut": ("config.json", lambda b: b[: len(b) // 2], "is damaged"),
    "config empty": ("config.json", lambda b: b"", "is empty"),
    "generation cut": ("generation_config.json", lambda b: b[:9], "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(directory, case):
    name, damage, said = DAMAGED[case]
    path = directory / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{name} .*{said}"):
        load_policy(str(directory))


def test_pickled_weights_run_nothing(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    plant(directory / "pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds io.open, which is no data"):
        load_policy(str(directory))
    assert not (tmp_path / "ran").exists()


def test_tied_weights_and_pickled_ones_are_whole(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_policy(str(tmp_path))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert load_policy(str(tmp_path)).get_parameter(UP).equal(loaded.get_parameter(UP))


def test_who_asks_for_other_shapes_gets_them(directory):
    change(directory, lambda w: w.update({UP: torch.ones(2, 2)}))
    load_policy(str(directory), model_init_kwargs={"ignore_mismatched_sizes": True})


def test_a_model_object_is_its_users_affair(directory):
    change(directory, lambda w: w.pop(UP))
    load_policy(AutoModelForCausalLM.from_pretrained(directory))


def test_what_the_model_has_no_place_for_is_left_out(directory):
    change(directory, lambda w: w.update({"model.mtp.weight": torch.ones(2, 2)}))
    load_whole(AutoModelForCausalLM, str(directory), "model")


def test_a_reward_model_with_a_nan_is_refused(tmp_path):
    from transformers import AutoModelForSequenceClassification

    make_model().save_pretrained(tmp_path)
    scores: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    scores.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    load_reward_model(str(tmp_path))
    change(tmp_path, lambda w: w[UP].view(-1)[3:4].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"reward model '.*hold a NaN or an infinity in {UP}"):
        load_reward_model(str(tmp_path))


def test_a_damaged_tokenizer_is_named_by_all_who_load_one(directory):
    make_tokenizer().save_pretrained(directory)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded .*tokenizer.json is damag"):
        load_tokenizer(None, load_policy(str(directory)))
    with pytest.raises(ValueError, match=r"No tokenizer found .*tokenizer.json is damaged"):
        _load_tokenizer("it", str(directory), {})
    with pytest.raises(ValueError, match=r"no tokenizer could be .*tokenizer.json is damaged"):
        _tokenizer([str(directory)], False)
    script: Any = SimpleNamespace(tokenizer_name_or_path=str(directory))
    config: Any = SimpleNamespace(trust_remote_code=False)
    with pytest.raises(ValueError, match=r"tokenizer '.*tokenizer.json is damaged"):
        load_named_tokenizer(script, config)
