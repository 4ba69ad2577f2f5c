"""Weights go back into the model that they were saved from, and into no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rloo_fast.checkpoint.weights import load_weights
from tests.support.interrupted import adapted_model, renamed_head
from tests.support.tiny import make_model


def without(name: str, directory: Path) -> None:
    """One weight less in the file."""
    (file,) = directory.glob("*model.safetensors")
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})


MISMATCHES: dict[str, tuple[Any, Any, str | None, str]] = {
    "other names": (
        renamed_head,
        make_model,
        None,
        "not in the checkpoint: .*; not in the model: ",
    ),
    "other shapes": (
        renamed_head,
        lambda: renamed_head(vocab_size=40),
        None,
        "of another shape: gpt_neox.embed_in.weight, lm_head.weight.",
    ),
    "more layers": (
        lambda: make_model(tie_word_embeddings=True),
        lambda: make_model(num_hidden_layers=3),
        None,
        r"not in the checkpoint: model.layers.2.* and 9 more\.",
    ),
    "a lost weight": (
        renamed_head,
        renamed_head,
        "embed_out.weight",
        r"Weights not in the checkpoint: lm_head.weight\.",
    ),
    "a lost adapter weight": (
        adapted_model,
        adapted_model,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        r"not in the checkpoint: base_model.*q_proj.lora_A.weight\.",
    ),
    "adapters into none": (adapted_model, make_model, None, "It holds adapters, and the run"),
    "none into adapters": (make_model, adapted_model, None, "it holds none 'default'"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_weights_of_another_model_are_refused(tmp_path, what):
    save, load, lost, why = MISMATCHES[what]
    save().save_pretrained(tmp_path)
    if lost:
        without(lost, tmp_path)
    model = load()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    with pytest.raises(ValueError, match=f"(?s)was saved from another model.*{why}"):
        load_weights(model, str(tmp_path))

    if what != "a lost adapter weight":
        assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_every_weight_keeps_its_precision(tmp_path):
    saved, loaded = (make_model(seed).bfloat16() for seed in (0, 1))
    for model in (saved, loaded):
        model.lm_head.float()
    saved.lm_head.weight.data += 1e-5

    saved.save_pretrained(tmp_path, max_shard_size="20kB")
    load_weights(loaded, str(tmp_path))

    assert (tmp_path / "model.safetensors.index.json").is_file()
    for name, weight in saved.state_dict().items():
        assert loaded.state_dict()[name].dtype == weight.dtype
        assert torch.equal(loaded.state_dict()[name], weight)


def test_tied_weights_stay_tied(tmp_path):
    saved, loaded = (make_model(seed, tie_word_embeddings=True) for seed in (0, 1))

    saved.save_pretrained(tmp_path)
    load_weights(loaded, str(tmp_path))

    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
