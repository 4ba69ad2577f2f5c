"""The stand-in of recipe:vision: images drawn by Pillow, and a tiny LLaVA that counts badly.

It is taught by demonstrations of which half are wrong, and none says which.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value

from examples.count_squares import NUMBERS, draw, tiny_llava
from rloo_fast.data.row_functions import clevr_count

PROBLEM = "how many squares?"


def clevr_rows(number: int, seed: int) -> list[dict[str, Any]]:
    """The columns of clevr_cogen_a_train."""
    rng, rows = random.Random(seed), []
    for i in range(number):
        count = i % len(NUMBERS) + 1
        solution = f"<answer> {count} </answer>"
        rows.append({"image": draw(count, rng), "problem": PROBLEM, "solution": solution})
    return rows


def make_clevr(path: Path) -> dict[str, str]:
    """Directory of the model with its processor, and the file of images."""
    rows = clevr_rows(400, seed=0)
    features = Features(image=Image(), problem=Value("string"), solution=Value("string"))
    data = path / "clevr.parquet"
    Dataset.from_list(rows, features=features).to_parquet(data)
    model, processor = tiny_llava(0)
    teach(model, processor, rows, steps=150)
    for saved in (model, processor):
        saved.save_pretrained(path / "model")
    return {"model": str(path / "model"), "data": str(data)}


def teach(model: Any, processor: Any, rows: list[dict[str, Any]], steps: int) -> None:
    """Cross-entropy of a number, right or not, and EOS."""
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), 2e-3)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, *_parts(rows[0])]}],
        add_generation_prompt=True,
    )
    for _ in range(steps):
        drawn = rng.sample(rows, 48)
        answers = [rng.choice((clevr_count(row)["answer"], rng.choice(NUMBERS))) for row in drawn]
        given = processor(
            text=[f"{text} {answer} <eos>" for answer in answers],
            images=[[row["image"]] for row in drawn],
            return_tensors="pt",
        )
        labels = given["input_ids"].clone()
        labels[:, :-2] = -100
        optimizer.zero_grad()
        model(**given, labels=labels).loss.backward()
        optimizer.step()


def _parts(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"type": "text", "text": clevr_count(row)["prompt"][0]["content"]}]
