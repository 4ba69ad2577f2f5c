"""The README.md of a trained model: front matter for the Hub, a quick start that runs, figures."""

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .metrics_file import write_atomically

METRICS = (  # what the table shows, in this order, where it was logged
    "reward",
    "reward_std",
    "rewards/*/mean",
    "kl",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "throughput/completion_tokens_per_s",
    "eval_accuracy",
    "eval_reward",
    "eval_rewards/*/mean",
)
CITATION = r"""@inproceedings{ahmadian2024back,
  title     = {Back to Basics: Revisiting {REINFORCE}-Style Optimization for Learning from Human Feedback in {LLM}s},
  author    = {Ahmadian, Arash and Cremer, Chris and Gall{\'e}, Matthias and Fadaee, Marzieh and Kreutzer, Julia and Pietquin, Olivier and {\"U}st{\"u}n, Ahmet and Hooker, Sara},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics (Volume 1: Long Papers)},
  year      = {2024},
  pages     = {12248--12267},
  publisher = {Association for Computational Linguistics},
  note      = {arXiv:2402.14740}
}"""  # noqa: E501
# a value after hub_token, HF_TOKEN, WANDB_API_KEY, ... (not stop_token), or a bare Hub token
SECRET = re.compile(r"(?i)((?:hub|hf)[-_]token[= ]+|api[-_]key[= ]+)\S+|\bhf_[A-Za-z0-9]{16,}")


def model_card_text(
    *,
    model_name: str,
    base_model: str | None,
    dataset_name: str | None,
    tags: Sequence[str],
    is_peft: bool,
    has_chat_template: bool,
    hub_model_id: str | None,
    local_path: str | None,
    command: str,
    versions: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    tracker_urls: Mapping[str, str],
) -> str:
    """Markdown with YAML front matter that `huggingface_hub.ModelCard` loads.

    base_model, dataset_name: in the front matter where they are Hub ids, in the text always.
    metrics: the rows of metrics.jsonl. command: printed as it is, tokens and API keys masked.
    ValueError if there is neither a hub_model_id nor a local_path: the quick start must load one.
    """
    loads_from = hub_model_id or local_path
    if not loads_from:
        raise ValueError(
            "A model card needs hub_model_id or local_path for its quick start, got neither."
        )
    base_id = base_model if _is_hub_id(base_model) else None
    dataset_id = dataset_name if _is_hub_id(dataset_name) else None
    front_matter = ModelCardData(
        base_model=base_id,
        datasets=[dataset_id] if dataset_id else None,
        library_name="peft" if is_peft else "transformers",
        model_name=model_name,
        pipeline_tag="text-generation",
        tags=_tags(tags, base_id, is_peft, tracker_urls),
    )
    kind = "LoRA adapter" if is_peft else "model"
    from_base = f" from {_link(base_model, base_id)}" if base_model else ""
    on_data = f" on {_link(dataset_name, dataset_id, 'datasets/')}" if dataset_name else ""
    sections = [
        f"---\n{front_matter.to_yaml()}\n---",
        f"# {model_name}",
        f"A {kind} trained{from_base}{on_data} with `rloo_fast`, by REINFORCE Leave-One-Out"
        " ([RLOO](https://huggingface.co/papers/2402.14740)).",
        "## Quick start",
        _fenced("python", _quick_start(loads_from, is_peft, has_chat_template)),
        "## Training",
        *[f"[Curves in {name}]({url})" for name, url in tracker_urls.items()],
        *_metrics_table(metrics),
        "The command:",
        _fenced("bash", SECRET.sub(lambda m: f"{m[1] or ''}<masked>", command)),
        "Versions:",
        "\n".join(f"- {name}: {version}" for name, version in versions.items()),
        "## Citation",
        _fenced("bibtex", CITATION),
    ]
    return "\n\n".join(sections) + "\n"


def write_model_card(path: str | Path, **card: Any) -> None:
    """Write `model_card_text(**card)` to the file `path`, whole or not at all."""
    write_atomically(Path(path), model_card_text(**card).encode())


def _is_hub_id(name: str | None) -> bool:
    """A name that the Hub accepts and that is no path here: transformers loads the path first."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _link(name: str, hub_id: str | None, kind: str = "") -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})" if hub_id else f"`{name}`"


def _tags(
    tags: Sequence[str], base_id: str | None, is_peft: bool, tracker_urls: Mapping[str, str]
) -> list[str]:
    ours = ["rloo", "rloo_fast", "generated_from_trainer"]
    if is_peft:
        ours += ["lora"] + ([f"base_model:adapter:{base_id}"] if base_id else [])
    if "trackio" in tracker_urls:  # the Hub shows such a Space under "Training metrics"
        ours.append(f"trackio:{tracker_urls['trackio']}")
    return list(dict.fromkeys([*ours, *tags]))


def _quick_start(loads_from: str, is_peft: bool, has_chat_template: bool) -> str:
    name = json.dumps(loads_from)
    question = "What is the capital of France?" if has_chat_template else "The capital of France is"
    if is_peft:
        encode = (
            f'messages = [{{"role": "user", "content": "{question}"}}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ").to(model.device)"
            if has_chat_template
            else f'inputs = tokenizer("{question}", return_tensors="pt").to(model.device)'
        )
        return f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoPeftModelForCausalLM.from_pretrained(name, device_map="auto")
{encode}
output = model.generate(**inputs, max_new_tokens=128)
new_tokens = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(new_tokens, skip_special_tokens=True))"""
    prompt = (
        f'[{{"role": "user", "content": "{question}"}}]' if has_chat_template else f'"{question}"'
    )
    return f"""from transformers import pipeline

generator = pipeline("text-generation", model={name}, device_map="auto")
prompt = {prompt}
output = generator(prompt, max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])"""


def _metrics_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """First and last logged value of each of METRICS, with the steps that they belong to."""
    logged: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float):
                logged.setdefault(key, []).append((row["step"], value))
    lines = []
    for key in (key for pattern in METRICS for key in fnmatch.filter(logged, pattern)):
        (first_step, first), (last_step, last) = logged[key][0], logged[key][-1]
        name = key.replace("|", "\\|")
        lines.append(f"| `{name}` | {first:.4g} ({first_step}) | {last:.4g} ({last_step}) |")
    head = ["| metric | first (step) | last (step) |", "|---|---:|---:|"]
    return ["\n".join(head + lines)] if lines else []


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
