import ast
import os
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from rloo_kernels.loss.advantages import BY_GROUP
from transformers import LlamaConfig, LlamaForCausalLM

from rloo_fast.objective.losses import ADVANTAGES, LOSSES
from rloo_fast.reports.example_prompt import general_prompt
from rloo_fast.reports.model_card import model_card_text, write_model_card
from tests.support.tiny import without_deepspeeds

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "hi".'},
]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


FIELDS = {
    "model_name": "qwen-math-rloo",
    "base_model": "Qwen/Qwen2.5-0.5B",
    "dataset_name": "trl-lib/tldr",
    "tags": ["math"],
    "is_peft": False,
    "merged_adapter": None,
    "prompt": "How many apples are left?",
    "template_kwargs": {},
    "loss": "rloo",
    "advantage": "rloo",
    "hub_model_id": "someone/qwen-math-rloo",
    "local_path": "runs/math",
    "command": "rloo-fast train --config math.yaml --stop_token eos",
    "world_size": 1,
    "versions": {"rloo_fast": "0.1.0", "transformers": "5.23.0"},
    "metrics": [],
    "curves": None,
    "tracker_urls": {},
}


def card(**changes):
    return model_card_text(**(FIELDS | changes))


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
        "tags": ["rloo_fast", "generated_from_trainer", "rloo", "math"],
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
@pytest.mark.parametrize("kind", ["plain", "chat", "chat with kwargs"])
def test_the_quick_start_runs(model, tokenizer, tmp_path, capsys, is_peft, kind):
    is_chat = kind != "plain"
    path = tmp_path / "base"
    model.save_pretrained(path)
    if is_peft:
        path = tmp_path / "adapter"
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(path)
    tokenizer.chat_template = CHAT_TEMPLATE if is_chat else None
    tokenizer.save_pretrained(path)
    prompt = MESSAGES if is_chat else "w1 w2"
    text = card(
        hub_model_id=None, local_path=str(path), is_peft=is_peft, prompt=prompt,
        template_kwargs={"enable_thinking": False} if kind == "chat with kwargs" else {},
    )  # fmt: skip
    (code,) = blocks(text, "python")
    assert ("role" in code) == is_chat
    exec(code, {})
    words = without_deepspeeds(capsys.readouterr().out).split()
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


def test_without_a_command_there_is_no_block_for_it():
    text = card(command=None)
    assert blocks(text, "bash") == []
    assert "The command" not in text
    assert "None" not in text


def test_the_command_says_on_how_many_processes():
    assert "The command, on 8 processes:" in card(world_size=8)
    assert "The command:" in card()


def test_the_curves_are_shown_where_there_are_some():
    assert "![Curves of the run](curves.png)" in card(curves="curves.png")
    assert "![" not in card()


# --- what ran


@pytest.mark.parametrize(
    ("loss", "advantage", "sentence", "cited", "tags"),
    [
        ("rloo", "rloo", "by REINFORCE Leave-One-Out ([RLOO](", ["2402.14740"], {"rloo"}),
        (
            "dapo", "grpo", "the GRPO-style loss `dapo` ([DAPO](", ["2503.14476", "2402.03300"],
            {"dapo", "grpo"},
        ),
        ("grpo", "grpo", "the GRPO-style loss `grpo` ([GRPO](", ["2402.03300"], {"grpo"}),
        (
            "dr_grpo", "dr_grpo", "on the advantage `dr_grpo` ([Dr. GRPO](", ["2503.20783"],
            {"dr_grpo"},
        ),
        (
            "reinforce_pp", "rloo", "by the loss `reinforce_pp` ([REINFORCE++](",
            ["2501.03262", "2402.14740"], {"reinforce_pp", "rloo"},
        ),
    ],
)  # fmt: skip
def test_the_card_names_and_cites_the_method_that_ran(loss, advantage, sentence, cited, tags):
    text = card(loss=loss, advantage=advantage)
    assert sentence in body(text)
    (entries,) = blocks(text, "bibtex")
    assert re.findall(r"arXiv:(\S+?)\}", entries) == cited
    methods = {*LOSSES, *BY_GROUP}
    assert methods & set(front_matter(text)["tags"]) == tags


def test_the_table_has_every_advantage_that_the_kernels_make():
    assert set(ADVANTAGES) == set(BY_GROUP)


CITED = dict.fromkeys(row.paper for row in LOSSES.values())


@pytest.mark.parametrize("paper", CITED, ids=lambda paper: paper.name)
def test_a_citation_is_a_balanced_bibtex_entry(paper):
    entry = paper.bibtex
    assert re.match(r"@(misc|inproceedings)\{[a-z0-9]+,\n", entry)
    assert f"arXiv:{paper.arxiv}" in entry
    assert entry.count("{") == entry.count("}")
    assert re.findall(r"^  (\w+)", entry, re.MULTILINE)[:2] == ["title", "author"]


# --- the quick start's prompt


def test_plain_prompts_of_a_chat_model_stay_plain():
    (code,) = blocks(card(prompt=general_prompt(is_chat=False)), "python")
    assert 'prompt = "The capital of France is"\n' in code
    assert "role" not in code


def test_conversations_are_one_message():
    (code,) = blocks(card(prompt=general_prompt(is_chat=True)), "python")
    assert '{"role": "user", "content": "What is the capital of France?"}' in code


LONG = 'SUBREDDIT: r/x\nTITLE: it\'s "this"\n\n' + "many words, " * 40 + "\tend  \n"
PROMPTS = [
    'a "quote" and \'s', "```\ncode\n```", "\\n {x} 猫 🙂", "\r\n\u2028x",
    '"' * 3 + "'" * 3, LONG, "x" * 500,
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("is_chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("is_peft", [False, True], ids=["full", "adapter"])
def test_any_prompt_is_code_that_says_the_same(prompt, is_chat, is_peft):
    shown = [{"role": "user", "content": prompt}] if is_chat else prompt
    (code,) = fenced(card(prompt=shown, is_peft=is_peft), "python")
    (value,) = [node.value for node in ast.parse(code).body
                if isinstance(node, ast.Assign) and node.targets[0].id == "prompt"]  # fmt: skip
    assert ast.literal_eval(value) == shown
    longest = max(map(len, code.splitlines()))
    assert longest <= 104 or "🙂" in prompt  # a long prompt is several lines


def fenced(text, language):
    """Blocks as Markdown finds them: a fence is closed by one that is as long."""
    pattern = rf"^(`{{3,}}){language}\n(.*?)^\1$"
    return [m[2] for m in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)]


def test_a_path_with_any_character_is_loaded():
    (code,) = blocks(card(hub_model_id=None, local_path='runs/🙂 "a"'), "python")
    (path,) = [node.value for call in ast.walk(ast.parse(code)) if isinstance(call, ast.Call)
               for keyword in call.keywords if keyword.arg == "model"
               for node in [keyword.value]]  # fmt: skip
    assert path == 'runs/🙂 "a"'


def test_a_command_with_a_fence_in_it_stays_one_block():
    command = "rloo-fast train --model_card_prompt 'Write\n```\ncode\n```'"
    assert fenced(card(command=command), "bash") == [command + "\n"]


@pytest.mark.parametrize("is_peft", [False, True], ids=["full", "adapter"])
def test_the_chat_template_is_given_what_it_was_in_training(is_peft):
    given = {
        "enable_thinking": False,
        "documents": [{"text": "private"}],
        "chat_template": "x" * 99,
    }
    (code,) = blocks(card(prompt=MESSAGES, template_kwargs=given, is_peft=is_peft), "python")
    assert "{'enable_thinking': False}" in code
    assert "private" not in code
    assert "xxx" not in code
    ast.parse(code)
    (plain,) = blocks(card(template_kwargs=given, is_peft=is_peft), "python")
    assert "enable_thinking" not in plain  # there is no template


# --- adapters over a merged adapter


def test_an_adapter_over_a_merged_one_says_so_and_loads_both():
    text = card(is_peft=True, merged_adapter="someone/sft-adapter")
    merged = "[someone/sft-adapter](https://huggingface.co/someone/sft-adapter)"
    assert f"with the adapter {merged} merged into it" in body(text)
    assert "on top of the base model plus the adapter" in body(text)
    (code,) = blocks(text, "python")
    assert 'base, merged = "Qwen/Qwen2.5-0.5B", "someone/sft-adapter"\n' in code


def test_a_whole_model_over_a_merged_adapter_loads_as_it_is():
    text = card(merged_adapter="./sft")
    assert "with the adapter `./sft` merged into it" in body(text)
    assert "on top of" not in text
    assert "PeftModel" not in text


# --- writing --------------------------------------------------------------------------------------


def test_write_model_card_replaces_the_file_whole(tmp_path, monkeypatch):
    fields = FIELDS | {"command": "é"}
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


# --- `python -m tests.reports.test_model_card` prints a card of each kind

LOGS = [
    {"step": 10, "reward": 0.21, "kl": 0.0, "rewards/accuracy/mean": 0.21},
    {"step": 200, "reward": 0.84, "kl": 0.018, "rewards/accuracy/mean": 0.84},
    {"step": 200, "eval_accuracy": 0.81},
]
KINDS = {
    "a full base model": {},
    "a full chat model": {"prompt": MESSAGES, "base_model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "LoRA adapters": {"is_peft": True, "hub_model_id": None, "local_path": "runs/lora"},
    "LoRA adapters over a merged adapter": {
        "is_peft": True, "merged_adapter": "someone/sft-adapter", "base_model": "./models/pythia",
    },
    "GRPO's loss and advantage": {"loss": "dapo", "advantage": "grpo", "world_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_accepts_a_card_of_each_kind(kind):
    loaded = ModelCard(card(**KINDS[kind], metrics=LOGS, curves="curves.png"))
    data = loaded.data.to_dict()
    assert (data["pipeline_tag"], "None" in str(loaded)) == ("text-generation", False)
    assert data["library_name"] == ("peft" if KINDS[kind].get("is_peft") else "transformers")


if __name__ == "__main__":
    for kind, changes in KINDS.items():
        print(f"{'=' * 20} {kind}\n\n{card(**changes, metrics=LOGS, curves='curves.png')}")
