"""The README.md of a trained model: front matter for the Hub, a quick start that runs, figures."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..masking import masked
from .card_code import quick_start
from .citations import method, papers
from .example_prompt import Prompt
from .hub_ids import is_hub_id
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


def model_card_text(
    *,
    model_name: str,
    base_model: str | None,
    dataset_name: str | None,
    tags: Sequence[str],
    is_peft: bool,
    merged_adapter: str | None,
    prompt: Prompt,
    template_kwargs: Mapping[str, Any],
    loss: str,
    advantage: str,
    hub_model_id: str | None,
    local_path: str | None,
    command: str | None,
    world_size: int,
    versions: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    curves: str | None,
    tracker_urls: Mapping[str, str],
) -> str:
    """Markdown with YAML front matter that `huggingface_hub.ModelCard` loads.

    base_model, dataset_name: in the front matter where they are Hub ids, in the text always.
    merged_adapter: what was merged into the base before training. prompt, template_kwargs: see
    `card_code.quick_start`. command: printed as it is; None: not known. metrics: the rows of
    metrics.jsonl. curves: a picture beside the card. Secrets are masked wherever they stand.
    ValueError if there is neither a hub_model_id nor a local_path: the quick start must load one.
    """
    loads_from = hub_model_id or local_path
    if not loads_from:
        raise ValueError(
            "A model card needs hub_model_id or local_path for its quick start, got neither."
        )
    base_id = base_model if is_hub_id(base_model) else None
    dataset_id = dataset_name if is_hub_id(dataset_name) else None
    front_matter = ModelCardData(
        base_model=base_id,
        datasets=[dataset_id] if dataset_id else None,
        library_name="peft" if is_peft else "transformers",
        model_name=model_name,
        pipeline_tag="text-generation",
        tags=_tags([loss, advantage, *tags], base_id, is_peft, tracker_urls),
    )
    kind = "LoRA adapter" if is_peft else "model"
    from_base = f" from {_link(base_model, base_id)}" if base_model else ""
    if merged_adapter:
        from_base += f" with the adapter {_link_if_hub(merged_adapter)} merged into it"
    on_data = f" on {_link(dataset_name, dataset_id, 'datasets/')}" if dataset_name else ""
    sections = [
        f"---\n{front_matter.to_yaml()}\n---",
        f"# {model_name}",
        f"A {kind} trained{from_base}{on_data} with `rloo_fast`, by {method(loss, advantage)}.",
        "## Quick start",
    ]
    if is_peft and merged_adapter:
        sections.append(
            "This adapter belongs on top of the base model plus the adapter merged into it: on the "
            "base model alone it gives another model than the one that was trained."
        )
    code = quick_start(loads_from, prompt, template_kwargs, is_peft, base_model, merged_adapter)
    sections += [_fenced("python", code), "## Training"]
    sections += [f"![Curves of the run]({curves})"] if curves else []
    sections += [f"[Curves in {name}]({url})" for name, url in tracker_urls.items()]
    sections += _metrics_table(metrics)
    if command is not None:
        where = f", on {world_size} processes" if world_size > 1 else ""
        sections += [f"The command{where}:", _fenced("bash", command)]
    sections += [
        "Versions:",
        "\n".join(f"- {name}: {version}" for name, version in versions.items()),
        "## Citation",
        _fenced("bibtex", "\n\n".join(p.bibtex for p in papers(loss, advantage))),
    ]
    return masked("\n\n".join(sections)) + "\n"


def write_model_card(path: str | Path, **card: Any) -> None:
    """Write `model_card_text(**card)` to the file `path`, whole or not at all."""
    write_atomically(Path(path), model_card_text(**card).encode())


def _link(name: str, hub_id: str | None, kind: str = "") -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})" if hub_id else f"`{name}`"


def _link_if_hub(name: str) -> str:
    return _link(name, name if is_hub_id(name) else None)


def _tags(
    tags: Sequence[str], base_id: str | None, is_peft: bool, tracker_urls: Mapping[str, str]
) -> list[str]:
    ours = ["rloo_fast", "generated_from_trainer"]
    if is_peft:
        ours += ["lora"] + ([f"base_model:adapter:{base_id}"] if base_id else [])
    if "trackio" in tracker_urls:  # the Hub shows such a Space under "Training metrics"
        ours.append(f"trackio:{tracker_urls['trackio']}")
    return list(dict.fromkeys([*ours, *tags]))


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
    """A block of code, in a fence longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
