"""Prompts, texts, verdicts, figures: one evaluation from its options to its files."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..data import has_one_split, load_prompts
from ..recipe_data import load_row_function
from ..rewards import completion_text, load_reward_model
from ..rollout.vllm import import_vllm
from .arguments import REFERENCE, JudgeArguments
from .compare import compare
from .endpoint import OpenAIJudge
from .figures import summarize
from .local import RewardModelJudge, load_function
from .prompt import prompt_text, read_template
from .results import write_result, write_samples
from .rouge import RougeJudge, mean_rouge
from .texts import check_source, generate, is_file, read_texts


def evaluate(a: JudgeArguments) -> dict[str, Any]:
    """Texts, verdicts, figures; what result.json holds. The judge is made before any text is."""
    source = a.completions or a.model_name_or_path
    assert source is not None
    for name in (source, *([a.against] if a.against != REFERENCE else [])):
        check_source(name)
    prompts, references = load_rows(a)
    judge = make_judge(a, prompts, references)
    folder = Path(str(a.output_dir)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    texts = texts_of(source, a, prompts)
    others = texts_of(a.against, a, prompts) if a.against != REFERENCE else references
    assert others is not None
    # first without verdicts: should the judge fail, the texts are kept
    write_samples(folder / "samples.jsonl", prompts, texts, others)
    rows = [] if judge is None else _judged(judge, a, prompts, texts, others)
    write_samples(folder / "samples.jsonl", prompts, texts, others, rows)
    figures = {
        **summarize(rows),
        "rouge": mean_rouge(texts, references) if references is not None else None,
        "mean_words": _mean_words(texts),
        "mean_words_against": _mean_words(others),
    }
    result = {
        "settings": dataclasses.asdict(a),
        "judge_prompt": getattr(judge, "template", None),
        "versions": _versions(a.use_vllm),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_prompts": len(prompts),
        "figures": figures,
    }
    write_result(folder, result)
    return result


def _versions(with_vllm: bool) -> dict[str, str]:
    versions = {name: version(name) for name in ("rloo-fast", "torch", "transformers", "datasets")}
    return {**versions, **({"vllm": import_vllm().__version__} if with_vllm else {})}


def load_rows(a: JudgeArguments) -> tuple[list[Any], list[str] | None]:
    """(prompts, references); None without a column of them, where none is needed."""
    assert a.dataset_name is not None
    default = "train" if has_one_split(a.dataset_name) else "validation"
    rows: Any = load_prompts(
        a.dataset_name,
        split=a.dataset_test_split or default,
        subset=a.dataset_subset,
        row_function=load_row_function(a.dataset_map) if a.dataset_map else None,
    )
    if a.num_prompts != -1:
        rows = rows.select(range(min(a.num_prompts, len(rows))))
    if a.reference_column not in rows.column_names:
        if a.against == REFERENCE or a.judge == "rouge":
            raise ValueError(
                f"dataset {a.dataset_name!r} has no column {a.reference_column!r} of references, "
                f"only {sorted(rows.column_names)}: name it with --reference_column."
            )
        return list(rows["prompt"]), None
    references = list(rows[a.reference_column])
    if None in references:
        raise ValueError(
            f"dataset {a.dataset_name!r}: row {references.index(None)} has no "
            f"{a.reference_column} (counted from 0)."
        )
    return list(rows["prompt"]), [completion_text(text) for text in references]


def make_judge(a: JudgeArguments, prompts: list[Any], references: list[str] | None) -> Any:
    """The judge of `--judge`; None for ROUGE against references: nothing is to be judged."""
    if a.judge == "openai":
        assert a.judge_base_url is not None
        assert a.judge_model is not None
        return OpenAIJudge(
            a.judge_base_url,
            a.judge_model,
            template=read_template(a.judge_prompt),
            marker=a.judge_marker,
            concurrency=a.judge_concurrency,
            retries=a.judge_retries,
            timeout_s=a.judge_timeout_s,
            request=a.judge_kwargs,  # pyright: ignore  # its JSON is read by now
        )
    if a.judge == "reward_model":
        assert a.judge_model is not None
        return RewardModelJudge(
            load_reward_model(
                a.judge_model,
                dtype=a.dtype,
                trust_remote_code=a.trust_remote_code,
                batch_size=a.batch_size,
                label=a.judge_label,
                position=a.judge_position,
            )
        )
    if a.judge != "rouge":
        assert a.judge is not None
        return load_function(a.judge)
    if a.against == REFERENCE:
        return None
    assert references is not None
    of_prompt = defaultdict(list)
    for prompt, reference in zip(prompts, references, strict=True):
        of_prompt[prompt_text(prompt)].append(reference)
    return RougeJudge(of_prompt)


def texts_of(source: str, a: JudgeArguments, prompts: list[Any]) -> list[str]:
    """From a .jsonl file, or by a model."""
    if is_file(source):
        return read_texts(source, prompts)
    return generate(
        source,
        prompts,
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        batch_size=a.batch_size,
        seed=a.seed,
        dtype=a.dtype,
        trust_remote_code=a.trust_remote_code,
        use_vllm=a.use_vllm,
    )


def _judged(judge: Any, a: JudgeArguments, *pairs: Any) -> list[Any]:
    if isinstance(judge, RewardModelJudge) and torch.cuda.is_available():
        judge.model.model.to("cuda")  # only now: generating needed the memory
    return compare(judge, *pairs, seed=a.seed, both_orders=a.both_orders)


def _mean_words(texts: Sequence[str]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)
