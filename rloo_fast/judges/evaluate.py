"""One evaluation, from its options to its files: prompts -> texts -> verdicts -> figures."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..config.paths import user_path
from ..data.row_functions import load_row_function
from ..data.sources import has_one_split, load_prompts
from ..masking import learn, masked_values
from ..rewards import completion_text
from ..rollout.vllm.package import import_vllm
from .answers import Answers, fingerprint
from .arguments import REFERENCE, JudgeArguments
from .compare import Judge, JudgeError, compare
from .endpoint import OpenAIJudge
from .figures import summarize
from .local import RewardModelJudge
from .prompt import prompt_text
from .registry import JudgeSettings, judge_kind
from .results import read_samples, write_result, write_samples
from .rouge import mean_rouge
from .texts import check_source, generate, is_file, read_texts

TEXTS_FOLLOW_FROM = (
    "model_name_or_path", "against", "max_new_tokens", "temperature", "seed", "dtype", "use_vllm",
)  # fmt: skip


def evaluate(a: JudgeArguments, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one evaluation and return what result.json holds.

    The judge is made before any text is generated. Texts that an earlier try left in output_dir are
    used again if they follow from the same settings, and so are the judge's answers to the same
    questions; `say` is called with a line about either.
    """
    learn(dataclasses.asdict(a))
    source = a.completions or a.model_name_or_path
    assert source is not None
    kind = judge_kind(a.judge or "")
    for name in (source, *([a.against] if a.against != REFERENCE else [])):
        check_source(name)
    prompts, references = load_rows(a, needs_references=kind.needs_references)
    folder = user_path(str(a.output_dir))
    answers = Answers(folder / "answers.jsonl")
    judge = kind.make(judge_settings(a, prompts, references, answers))
    folder.mkdir(parents=True, exist_ok=True)
    samples, made_with = folder / "samples.jsonl", _made_with(a, prompts)
    earlier = _earlier_texts(samples, made_with, a, say)
    texts = texts_of(source, a, prompts, earlier and earlier[0])
    others = references
    if a.against != REFERENCE:
        others = texts_of(a.against, a, prompts, earlier and earlier[1])
    assert others is not None
    # first without verdicts: should the judge fail, the texts are kept
    write_samples(samples, prompts, texts, others, made_with)
    rows = [] if judge is None else _judged(judge, a, say, samples, prompts, texts, others)
    write_samples(samples, prompts, texts, others, made_with, rows)
    figures = {
        **summarize(rows),
        "rouge": mean_rouge(texts, references) if references is not None else None,
        "mean_words": _mean_words(texts),
        "mean_words_against": _mean_words(others),
    }
    result = {
        "settings": masked_values(dataclasses.asdict(a)),
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


def load_rows(a: JudgeArguments, needs_references: bool) -> tuple[list[Any], list[str] | None]:
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
        if a.against == REFERENCE or needs_references:
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


def judge_settings(
    a: JudgeArguments, prompts: list[Any], references: list[str] | None, answers: Answers
) -> JudgeSettings:
    """What the judge is made from; no references where the texts are compared with these."""
    of_prompt = None
    if references is not None and a.against != REFERENCE:
        of_prompt = defaultdict(list)
        for prompt, reference in zip(prompts, references, strict=True):
            of_prompt[prompt_text(prompt)].append(reference)
    assert not isinstance(a.judge_kwargs, str)  # its JSON is read by now
    return JudgeSettings(
        model=a.judge_model,
        base_url=a.judge_base_url,
        prompt=a.judge_prompt,
        marker=a.judge_marker,
        request=a.judge_kwargs,
        concurrency=a.judge_concurrency,
        retries=a.judge_retries,
        timeout_s=a.judge_timeout_s,
        label=a.judge_label,
        position=a.judge_position,
        dtype=a.dtype,
        trust_remote_code=a.trust_remote_code,
        batch_size=a.batch_size,
        references=of_prompt,
        answers=answers,
    )


def _made_with(a: JudgeArguments, prompts: list[Any]) -> str:
    """The fingerprint of all that a model's texts follow from; other weights are other files."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for source in (a.model_name_or_path, a.against)
        if source is not None and Path(source).is_dir()
        for path in sorted(Path(source).iterdir())
        if path.is_file() and path.suffix != ".jsonl"  # logs, and our own files
    ]
    return fingerprint([getattr(a, name) for name in TEXTS_FOLLOW_FROM], files, prompts)


def _earlier_texts(
    samples: Path, made_with: str, a: JudgeArguments, say: Callable[[str], None]
) -> tuple[list[str], list[str]] | None:
    by_model = a.model_name_or_path or not (a.against == REFERENCE or is_file(a.against))
    if not by_model or not samples.exists():
        return None
    earlier = read_samples(samples, made_with)
    if earlier is None:
        say(f"{samples} is of other prompts, models or settings: texts are made anew.")
    else:
        say(f"{samples} has these models' texts for these prompts already: they are judged.")
    return earlier


def texts_of(
    source: str, a: JudgeArguments, prompts: list[Any], earlier: list[str] | None
) -> list[str]:
    """From a .jsonl file; else the earlier ones, or by a model."""
    if is_file(source):
        return read_texts(source, prompts)
    if earlier is not None:
        return earlier
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


def _judged(
    judge: Judge, a: JudgeArguments, say: Callable[[str], None], samples: Path, *pairs: Any
) -> list[Any]:
    """The judgements of all pairs.

    Where the judge fails, or Ctrl-C ends it, the message says how many answers are kept in
    answers.jsonl or, without any, that the texts are.
    """
    if isinstance(judge, RewardModelJudge) and torch.cuda.is_available():
        judge.to("cuda")  # only now: generating needed the memory
    answers = judge.answers if isinstance(judge, OpenAIJudge) else Answers()
    if answers.num_found:
        say(f"{answers.path} has {answers.num_found} answers: the same is not asked again.")
    try:
        return compare(judge, *pairs, seed=a.seed, both_orders=a.both_orders)
    except (JudgeError, KeyboardInterrupt) as error:
        kept = f"the texts are kept in {samples}"
        if answers.num_used:
            asked_for = len(pairs[0]) * (1 + a.both_orders)
            kept = f"{answers.num_used} of {asked_for} answers are kept in {answers.path}"
        kept += ": the same command goes on from there"
        if isinstance(error, KeyboardInterrupt):
            say(f"{kept}.")
            raise
        raise JudgeError(f"{error} ({kept})") from error


def _mean_words(texts: Sequence[str]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)
