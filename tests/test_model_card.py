import os
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rloo_fast.model_card import model_card_text, write_model_card

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def card(**changes):
    fields = {
        "model_name": "qwen-math-rloo",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "dataset_name": "trl-lib/tldr",
        "tags": ["math"],
        "is_peft": False,
        "has_chat_template": False,
        "hub_model_id": "someone/qwen-math-rloo",
        "local_path": "runs/math",
        "command": "rloo-fast train --config math.yaml --stop_token eos",
        "versions": {"rloo_fast": "0.1.0", "transformers": "5.23.0"},
        "metrics": [],
        "tracker_urls": {},
    }
    return model_card_text(**(fields | changes))


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def body(text):
    return text.split("\n---\n", 1)[1]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# --- front matter ---------------------------------------------------------------------------------


def test_front_matter_of_a_full_model():
    assert front_matter(card()) == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["trl-lib/tldr"],
        "library_name": "transformers",
        "model_name": "qwen-math-rloo",
        "pipeline_tag": "text-generation",
        "tags": ["rloo", "rloo_fast", "generated_from_trainer", "math"],
    }


def test_front_matter_of_an_adapter():
    data = front_matter(card(is_peft=True))
    assert data["library_name"] == "peft"
    assert {"lora", "base_model:adapter:Qwen/Qwen2.5-0.5B"} < set(data["tags"])


def test_the_hub_reads_the_front_matter():
    data = ModelCard(card()).data
    assert (data.base_model, data.pipeline_tag) == ("Qwen/Qwen2.5-0.5B", "text-generation")


def test_a_tag_given_twice_appears_once():
    assert front_matter(card(tags=["rloo", "math", "math"]))["tags"].count("rloo") == 1


def test_a_trackio_space_becomes_a_tag_and_a_link():
    text = card(tracker_urls={"trackio": "https://someone.example/space"})
    assert "trackio:https://someone.example/space" in front_matter(text)["tags"]
    assert "[Curves in trackio](https://someone.example/space)" in body(text)


@pytest.mark.parametrize("base", ["/models/base", "./base", "a/b/c"])
@pytest.mark.parametrize("is_peft", [False, True])
def test_a_base_model_that_is_a_path_is_named_in_the_text_only(base, is_peft):
    text = card(base_model=base, is_peft=is_peft)
    data = front_matter(text)
    assert "base_model" not in data
    assert not any(tag.startswith("base_model:") for tag in data["tags"])
    assert f"trained from `{base}`" in body(text)


def test_a_directory_here_that_looks_like_a_hub_id_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "Qwen/Qwen2.5-0.5B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(card())


def test_a_dataset_that_is_no_hub_id_is_named_in_the_text_only():
    text = card(dataset_name="data/train.jsonl#v1")
    assert "datasets" not in front_matter(text)
    assert "on `data/train.jsonl#v1`" in body(text)


def test_without_base_and_dataset_there_is_no_none_anywhere():
    assert "None" not in card(base_model=None, dataset_name=None)


# --- quick start ----------------------------------------------------------------------------------


def test_the_quick_start_loads_the_hub_id():
    (code,) = blocks(card(), "python")
    assert 'model="someone/qwen-math-rloo"' in code


def test_the_quick_start_loads_the_local_path_without_a_hub_id():
    (code,) = blocks(card(hub_model_id=None), "python")
    assert 'model="runs/math"' in code


def test_a_card_without_anything_to_load_is_refused():
    with pytest.raises(ValueError, match="hub_model_id or local_path"):
        card(hub_model_id=None, local_path=None)


@pytest.fixture
def model():
    """A random model that says 128 ordinary words, and no special token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.suppress_tokens = [0, 1, 2]
    return model


@pytest.mark.parametrize("is_peft", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("is_chat", [False, True], ids=["plain", "chat"])
def test_the_quick_start_runs(model, tokenizer, tmp_path, capsys, is_peft, is_chat):
    path = tmp_path / "base"
    model.save_pretrained(path)
    if is_peft:
        path = tmp_path / "adapter"
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(path)
    tokenizer.chat_template = CHAT_TEMPLATE if is_chat else None
    tokenizer.save_pretrained(path)
    text = card(hub_model_id=None, local_path=str(path), is_peft=is_peft, has_chat_template=is_chat)
    (code,) = blocks(text, "python")
    assert ("role" in code) == is_chat
    exec(code, {})
    words = capsys.readouterr().out.split()
    assert len(words) == 128  # the new words, without the prompt
    assert set(words) < set(tokenizer.get_vocab())


# --- figures, command, versions, citation ---------------------------------------------------------


def table_rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in body(text).splitlines()
        if line.startswith("| `")
    ]


def test_the_table_has_first_and_last_logged_values():
    metrics = [
        {"step": 1, "reward": 0.1, "kl": 0.0, "rewards/accuracy/mean": 0.25, "step_time": 2.0},
        {"step": 10, "reward": 0.5, "kl": 0.01234567, "rewards/accuracy/mean": 0.5},
        {"step": 10, "eval_reward": 0.7},
        {"step": 20, "reward": 0.9, "kl": None, "rewards/accuracy/mean": 1.0},
    ]
    assert table_rows(card(metrics=metrics)) == [
        ["`reward`", "0.1 (1)", "0.9 (20)"],
        ["`rewards/accuracy/mean`", "0.25 (1)", "1 (20)"],
        ["`kl`", "0 (1)", "0.01235 (10)"],
        ["`eval_reward`", "0.7 (10)", "0.7 (10)"],
    ]


def test_without_metrics_there_is_no_table():
    assert "| metric |" not in card(metrics=[])


def test_the_command_is_printed_as_it_was():
    assert blocks(card(), "bash") == ["rloo-fast train --config math.yaml --stop_token eos\n"]


@pytest.mark.parametrize(
    "command",
    [
        "rloo-fast train --hub_token {} --beta 0.1",
        "rloo-fast train --hub-token={} --beta 0.1",
        "HF_TOKEN={} rloo-fast train --beta 0.1",
        "WANDB_API_KEY={} rloo-fast train --beta 0.1",
    ],
)
def test_secrets_in_the_command_are_masked(command):
    (shown,) = blocks(card(command=command.format("s3cret")), "bash")
    assert shown == command.format("<masked>") + "\n"


def test_a_bare_hub_token_is_masked():
    assert "hf_" not in card(command="rloo-fast train --x hf_" + "aB3" * 11)


def test_versions_are_listed():
    assert "- rloo_fast: 0.1.0\n- transformers: 5.23.0\n" in card()


def test_the_citation_is_a_balanced_bibtex_entry():
    (entry,) = blocks(card(), "bibtex")
    assert entry.startswith("@inproceedings{ahmadian2024back,")
    assert "arXiv:2402.14740" in entry
    assert (entry.count("{"), entry.count("\n  ")) == (entry.count("}"), 7)


# --- writing --------------------------------------------------------------------------------------


def test_write_model_card_replaces_the_file_whole(tmp_path, monkeypatch):
    fields = {
        "model_name": "m",
        "base_model": None,
        "dataset_name": None,
        "tags": [],
        "is_peft": False,
        "has_chat_template": False,
        "hub_model_id": "someone/m",
        "local_path": None,
        "command": "é",
        "versions": {},
        "metrics": [],
        "tracker_urls": {},
    }
    path = tmp_path / "README.md"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            write_model_card(path, **fields)
    assert path.read_text() == "old"
    write_model_card(path, **fields)
    assert path.read_text(encoding="utf-8") == model_card_text(**fields)
    assert list(tmp_path.iterdir()) == [path]
