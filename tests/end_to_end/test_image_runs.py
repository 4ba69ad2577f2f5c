"""Whole runs with images: options that go together, resuming, what is saved, what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.reports import completions
from tests.support.paths import SUPPORT
from tests.support.vision import make_processor, make_vision_model, picture

pytestmark = pytest.mark.slow
CHAT = [{"role": "user", "content": "w1 w2"}]


def rows(number: int = 8) -> Dataset:
    """Every third row without an image, every third with two."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"w{i} w3"}],
                "images": [picture(9 * i + j, 16 + 8 * j) for j in range(i % 3)],
                "n": i,
            }
            for i in range(1, number + 1)
        ]
    )


def words(completions, images, n, prompts, **kwargs):
    """Of different words; the images are those of the row, and stand in its prompt."""
    for shown, number, messages in zip(images, n, prompts, strict=True):
        parts = [part for part in messages[0]["content"] if part["type"] == "image"]
        assert len(shown) == len(parts) == number % 3
        for image, part in zip(shown, parts, strict=True):
            assert image.tobytes() == part["image"].tobytes()
    return [float(len(set(c[0]["content"].split()))) for c in completions]


def lengths(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def make_trainer(
    out, family="llava", *, model=None, data=None, reward=words, processing_class=None,
    peft_config=None, **settings,
):  # fmt: skip
    args = RLOOConfig(
        str(out), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        **{"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "optim": "sgd",
           "gradient_checkpointing": False, **settings},
    )  # fmt: skip
    trainer = RLOOTrainer(
        make_vision_model(family) if model is None else model, reward, args,
        train_dataset=rows() if data is None else data, peft_config=peft_config,
        processing_class=processing_class or make_processor(family),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def largest_difference(one, two) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    """Saved between two steps of one generation batch, whose images are in the checkpoint."""
    settings = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert resumed.state.global_step == 4
    assert largest_difference(weights(whole), weights(resumed)) == 0
    start = dict(make_vision_model("llava").named_parameters())
    moved = [n for n, p in weights(whole).items() if not torch.equal(p, start[n])]
    assert any("vision_tower" in name for name in moved)


def test_what_is_saved_is_loaded_with_its_processor(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert largest_difference(weights(trainer), dict(model.named_parameters())) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert processor.chat_template == make_processor("llava").chat_template
    by_name = make_trainer(tmp_path / "again", model=str(tmp_path / "saved"))
    by_name.train()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_adapters_and_recomputed_layers(family, tmp_path):
    """The sampler's log-probs are the policy's, or the run would have stopped."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for recompute in (False, True):
        trainer = make_trainer(
            tmp_path, family, peft_config=lora, gradient_checkpointing=recompute, beta=0.1
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert all(log["sampling/logp_diff_max"] < 1e-4 for log in logs)
        assert any(log["grad_norm"] > 0 for log in logs)


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamic_sampling": True},
        {"max_staleness": 2, "rollout_engine": f"{SUPPORT}/copied_engine.py:SeeingCopiedEngine"},
        {"rollout_engine": f"{SUPPORT}/copied_engine.py:SeeingCopiedEngine"},
    ],
    ids=["dynamic", "ahead", "an engine with a processor"],
)
def test_completions_belong_to_the_images_they_were_sampled_for(settings, tmp_path):
    """At a learning rate of 0 the sampler's log-probs are the policy's, however old they are."""
    trainer = make_trainer(tmp_path, learning_rate=0.0, max_steps=4, **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    found = [log["sampling/logp_diff_max"] for log in logs if "sampling/logp_diff_max" in log]
    assert found  # steps whose tokens are all old have none
    assert max(found) < 1e-4


def test_recomputed_layers_have_the_same_gradients(tmp_path):
    runs = []
    for recompute in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=recompute, learning_rate=0.1)
        trainer.train()
        runs.append(weights(trainer))
    assert largest_difference(*runs) < 1e-6


def test_tables_of_samples_have_no_bytes_of_images(tmp_path, capsys):
    trainer = make_trainer(tmp_path, log_completions=True, log_completions_csv=True)
    trainer.train()
    written = (tmp_path / "completions.csv").read_text()
    for text in (capsys.readouterr().out, written):
        assert "[image]" in text
        assert "PIL" not in text


@pytest.mark.parametrize("log_multimodal", [True, False])
def test_trackers_get_the_images_of_prompts(log_multimodal, tmp_path, monkeypatch):
    tables = []
    tracker = SimpleNamespace(
        Table=lambda dataframe: dataframe,
        Image=lambda image: image.size,
        log=lambda logged: tables.append(logged["completions"]),
    )
    monkeypatch.setattr(completions, "_active_tracker", lambda name: tracker)
    trainer = make_trainer(tmp_path, log_completions=True, log_multimodal=log_multimodal)
    trainer.recorder.report_to = ["wandb"]
    trainer.collector.shows_images = True
    trainer.train()
    assert len(tables) == 2
    for table in tables:
        assert ("image" in table) == log_multimodal
        if log_multimodal:
            shown = [text.count("[image]") for text in table["prompt"]]
            assert [len(images) for images in table["image"]] == shown


def test_evaluation_with_images(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="no")
    metrics = trainer.evaluate(rows(3))
    assert metrics["eval_reward"] > 0


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("by_processor", [True, False])
def test_text_alone(family, by_processor, tmp_path):
    """A dataset without images, with the processor or its tokenizer."""
    processor = make_processor(family)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    trainer = make_trainer(
        tmp_path, family, data=rows().remove_columns("images"), reward=lengths,
        processing_class=processor if by_processor else tokenizer,
    )  # fmt: skip
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if log["step"] == 2 and "loss" in log]
    assert log["sampling/logp_diff_max"] < 1e-4


BOTH = Dataset.from_list(
    [
        {"prompt": CHAT, "image": picture(1), "images": []},
        {"prompt": CHAT, "image": picture(1), "images": [picture(2)]},
    ]
)
NO_IMAGE = Dataset.from_dict({"prompt": ["w1"], "image": [3]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processing_class": make_processor("llava").tokenizer}, "is a tokenizer: pass"),
        ({"processing_class": make_processor("qwen2_5_vl")}, "makes image_grid_thw, which Llava"),
        ({"use_vllm": True, "vllm_lora": "adapter"}, "not offered with vllm_lora='adapter' yet"),
        ({"torch_compile": True}, "are not offered with torch_compile=True yet"),
        ({"data": BOTH, "reward": lengths}, r"row 1 .counted.*both 'image' and 'images'"),
        ({"data": NO_IMAGE, "reward": lengths}, r"row 0 .counted from 0.: its image 0 must be a"),
    ],
    ids=["tokenizer", "another processor", "lora apart", "compiled", "both", "no image"],
)  # fmt: skip
def test_what_is_refused(given, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, **given)
