"""A model given compiled is trained as the model it was made of."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rloo_fast.models.loading import load_policy
from tests.support.tiny import make_model

LORA = LoraConfig(r=2, target_modules=["q_proj"])


def compiled(module):
    return torch.compile(module, backend="eager")


def with_compiled_layers():
    model = make_model()
    model.model = compiled(model.model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


def compiled_in_place():
    model = make_model()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (lambda: compiled(make_model()), make_model),
        (with_compiled_layers, make_model),
        (compiled_in_place, make_model),
        (lambda: get_peft_model(compiled(make_model()), LORA), None),
        (lambda: compiled(get_peft_model(make_model(), LORA)), None),
    ],
    ids=["whole", "layers", "in place", "inside adapters", "around adapters"],
)
def test_a_compiled_model_is_taken_as_the_model_inside(given, plain, caplog):
    wanted = plain() if plain else get_peft_model(make_model(), LORA)
    loaded = load_policy(given())
    assert type(loaded) is type(wanted)
    assert loaded.state_dict().keys() == wanted.state_dict().keys()
    assert all(module._compiled_call_impl is None for module in loaded.modules())
    assert "torch_compile=True" in caplog.text
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, wanted(input_ids=ids).logits)


def test_a_model_that_is_not_compiled_is_left_alone(caplog):
    model = make_model()
    assert load_policy(model) is model
    assert not caplog.text
