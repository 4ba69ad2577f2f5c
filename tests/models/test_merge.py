"""merge_adapter: exact sums, weights that can still be trained, and what is no adapter."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.models.merge import merge_adapter, merged_before, record_merged
from tests.support.tiny import make_model, make_tokenizer

TARGETS = ["q_proj", "down_proj"]
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def adapter(tmp_path):
    """An adapter of make_model() whose product is not 0, saved."""
    return save_adapter(tmp_path / "adapter", make_model())


def save_adapter(path, model, **config):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, **config))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(path))
    return str(path)


def float64_sum(adapter: str) -> torch.Tensor:
    """W + B A alpha / r of WEIGHT, without peft's arithmetic."""
    layer = PeftModel.from_pretrained(make_model(), adapter).get_submodule(
        "base_model.model." + WEIGHT.removesuffix(".weight")
    )
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer.weight.double() + b.double() @ a.double() * layer.scaling["default"]


def test_the_weights_become_the_sum_and_the_others_stay(adapter):
    merged, before = merge_adapter(make_model(), adapter), make_model().state_dict()
    after = merged.state_dict()
    assert after.keys() == before.keys()
    torch.testing.assert_close(after[WEIGHT].double(), float64_sum(adapter), atol=1e-6, rtol=0)
    changed = {name for name in after if not after[name].equal(before[name])}
    assert {name.split(".")[-2] for name in changed} == set(TARGETS)


def test_an_adapter_of_a_sum_brings_the_first_one_along(adapter, tmp_path):
    second = save_adapter(tmp_path / "second", merge_adapter(make_model(), adapter))
    by_hand = merge_adapter(merge_adapter(make_model(), adapter), second)
    record_merged(second, adapter)
    at_once = merge_adapter(make_model(), second)
    assert at_once.get_parameter(WEIGHT).equal(by_hand.get_parameter(WEIGHT))


def test_a_run_without_a_first_adapter_takes_the_record_of_an_earlier_one_away(tmp_path):
    record_merged(tmp_path, "first")
    assert merged_before(str(tmp_path)) == "first"
    record_merged(tmp_path, None)
    assert merged_before(str(tmp_path)) is None


def test_a_first_adapter_that_is_gone_is_told_with_its_record(adapter):
    record_merged(adapter, "./gone")
    with pytest.raises(ValueError, match=r"sum with the adapter './gone' \(rloo_adapter.json\): "):
        merge_adapter(make_model(), adapter)


@pytest.mark.parametrize("ways", [["adapter"], ["other", "adapter/../adapter"]], ids=str)
def test_adapters_that_come_before_themselves_are_refused(adapter, tmp_path, ways):
    """Of one that names itself, and of two that name each other, in other words for the same."""
    shutil.copytree(adapter, tmp_path / "other")
    names = [adapter, *(str(tmp_path / way) for way in ways)]
    for name, first in pairwise(names):
        record_merged(name, first)
    with pytest.raises(ValueError, match=r"has to be merged after it too: mend the file"):
        merge_adapter(make_model(), adapter)


def test_a_chain_may_be_long(adapter, tmp_path):
    """Longer than Python's stack: all of it is found, and its first one is what fails."""
    for i in range(1200):
        (tmp_path / f"a{i}").mkdir()
        record_merged(tmp_path / f"a{i}", str(tmp_path / f"a{i + 1}"))
    record_merged(adapter, str(tmp_path / "a0"))
    with pytest.raises(ValueError, match=r"a1199 was trained on .*a1200' .*is no adapter of this"):
        merge_adapter(make_model(), adapter)


def test_layers_that_the_model_has_not_are_no_part_of_its_adapter(tmp_path):
    deeper = save_adapter(tmp_path / "deeper", make_model(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"is no adapter of this model: .*layers\.2\."):
        merge_adapter(make_model(), deeper)


@pytest.mark.parametrize("record", ["[]", '{"merged_adapter": 7}', "[" * 100_000, "\xff", ""])
def test_a_damaged_record(adapter, tmp_path, record):
    (tmp_path / "adapter/rloo_adapter.json").write_bytes(record.encode("latin-1"))
    with pytest.raises(ValueError, match="expected an object with 'merged_adapter'"):
        merge_adapter(make_model(), adapter)


def test_the_merged_adapter_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match=r"is output_dir too, .* choose another output_dir"):
        RLOOConfig(str(tmp_path), merge_adapter=f"{tmp_path}/", use_cpu=True)


def test_bfloat16_weights_are_rounded_once(adapter):
    low = make_model().to(torch.bfloat16)
    exact = low.get_parameter(WEIGHT).double() + (
        float64_sum(adapter) - make_model().get_parameter(WEIGHT).double()
    )
    merged = merge_adapter(low, adapter).get_parameter(WEIGHT)
    assert merged.dtype == torch.bfloat16
    assert merged.equal(exact.float().to(torch.bfloat16))


def test_what_could_be_trained_still_can(adapter):
    model = make_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    merged = merge_adapter(model, adapter)
    frozen = [name for name, p in merged.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("named", [True, False], ids=["by name", "object"])
def test_policy_and_reference_start_from_the_sum(adapter, tmp_path, named):
    make_model().save_pretrained(tmp_path / "model")
    args = RLOOConfig(
        str(tmp_path / "out"), merge_adapter=adapter, max_completion_length=8, use_cpu=True,
        per_device_train_batch_size=4, report_to="none",
    )  # fmt: skip
    model = str(tmp_path / "model") if named else make_model()
    prompts = Dataset.from_dict({"prompt": ["w1", "w2"]})
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    trainer = RLOOTrainer(model, rewards, args, prompts, processing_class=make_tokenizer())  # pyright: ignore
    for part in (trainer.model, trainer.reference.model):  # pyright: ignore
        weight = part.get_parameter(WEIGHT).double()
        torch.testing.assert_close(weight, float64_sum(adapter), atol=1e-6, rtol=0)


def test_a_directory_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="the directory holds no adapter_config"):
        merge_adapter(make_model(), str(tmp_path))


@pytest.mark.parametrize(
    ("made_for", "sentence"),
    [
        ({"intermediate_size": 32}, "size mismatch"),
        ({"num_hidden_layers": 1}, "missing adapter keys"),
    ],
    ids=["other size", "fewer layers"],
)
def test_an_adapter_of_another_model(tmp_path, made_for, sentence):
    other = save_adapter(tmp_path / "other", make_model(**made_for))
    with pytest.raises(ValueError, match=f"is no adapter of this model: .*{sentence}"):
        merge_adapter(make_model(), other)


def test_an_adapter_of_modules_that_are_not_there(tmp_path):
    model = torch.nn.Sequential()
    model.gate = torch.nn.Linear(8, 8)
    path = str(tmp_path / "gate")
    get_peft_model(model, LoraConfig(target_modules=["gate"])).save_pretrained(path)  # pyright: ignore
    with pytest.raises(ValueError, match=r"is no adapter of this model: .*gate"):
        merge_adapter(make_model(), path)


def test_prompt_tuning_has_nothing_to_merge(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(make_model(), config).save_pretrained(str(tmp_path / "prompt"))
    with pytest.raises(ValueError, match="adds tokens to the prompt"):
        merge_adapter(make_model(), str(tmp_path / "prompt"))


def test_a_model_with_adapters_is_refused(adapter):
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="has adapters already: merge_and_unload them first"):
        merge_adapter(adapted, adapter)


def test_split_weights_are_refused(adapter):
    model = make_model()
    model.get_parameter(WEIGHT).ds_id = 0  # pyright: ignore
    with pytest.raises(ValueError, match="weights are split over processes"):
        merge_adapter(model, adapter)
