"""_view/: tokens and their texts, what is kept of a step, and how much of a run."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.viewer.made_runs import MadeRun
from rloo_fast import masking
from rloo_fast.records import CompletionTexts
from rloo_fast.reports import view_files
from rloo_fast.reports.view_files import ViewWriter, to_drop
from rloo_fast.reports.view_format import FOLDER, RUN, SUMMARY, step_files
from rloo_fast.reports.view_rows import (
    KeptBatch,
    TokenPieces,
    chosen_groups,
    joined,
    step_summary,
    view_table,
)
from tests.support.tiny import make_tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every byte is a token, so that most characters are several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core: Any = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("text", ["plain", "a 猫 é 🙂🙂 z", " space first", "line\nline\u2028", ""])
def test_the_pieces_of_bytes_are_the_text(byte_tokenizer, text):
    ids = byte_tokenizer(text)["input_ids"]
    pieces = TokenPieces.of(byte_tokenizer)(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_that_is_cut_is_shown_broken(byte_tokenizer):
    ids = byte_tokenizer("a🙂")["input_ids"][:-1]
    pieces = TokenPieces.of(byte_tokenizer)(ids)
    assert pieces[0] == "a"
    assert "".join(pieces[1:]) == byte_tokenizer.decode(ids[1:])
    assert len(pieces) == len(ids)


def test_words_keep_their_spaces_and_special_tokens_are_shown():
    tokenizer = make_tokenizer()
    ids = tokenizer("w1 w2 w3 <eos>")["input_ids"]
    pieces = TokenPieces.of(tokenizer)(ids)
    assert pieces == ["w1", " w2", " w3", " <eos>"]


def test_of_a_large_step_whole_groups_are_kept_evenly():
    lengths = torch.full((64 * 4,), 100.0)
    assert chosen_groups(lengths, 4, 10**9) == list(range(64))
    some = chosen_groups(lengths, 4, 64 * 4 * 100 * 12 // 8)
    assert some == list(range(0, 64, 8))
    assert chosen_groups(lengths, 4, 1) == [0]


def test_what_is_dropped_leaves_the_run_evenly_covered():
    sizes = dict.fromkeys(range(1, 101), 10)
    assert to_drop(sizes, 1000) == []
    left = sorted({*sizes} - {*to_drop(sizes, 300)})
    assert sum(sizes[step] for step in left) <= 300
    assert left[-8:] == list(range(93, 101))
    assert all(step % 4 == 0 for step in left[:-8])
    assert sorted({*sizes} - {*to_drop(sizes, 1)}) == [100]


def texts_of(completions, prompts=None):
    number = len(completions)
    rewards = {"score": [float(i) for i in range(number)]}
    return CompletionTexts(prompts or ["p"] * number, completions, rewards, {})


def rows_of(number, **columns):
    zeros = dict.fromkeys(("reward", "score", "advantage", "kl", "length", "truncated"), 0.0)
    return {n: torch.tensor(columns.get(n, [v] * number)).double() for n, v in zeros.items()}


def tokens_of(pieces):
    nothing = np.full(len(pieces), np.nan, np.float16)
    return {"text": pieces, "logp": nothing - 1, "entropy": nothing, "kl": nothing} | {
        "sampler_diff": nothing
    }


def test_secrets_are_in_no_column_even_over_tokens(monkeypatch):
    secret = "hunter-2-hunter-2-hunter"
    monkeypatch.setenv("MY_API_KEY", secret)
    masking.learn(secret, "api_key")
    pieces = ["so ", secret[:9], secret[9:], " ends"]
    chat = [{"role": "assistant", "content": f"so {secret} ends"}]
    texts = texts_of([f"so {secret} ends", chat], ["p", f"tell {secret}"])
    tokens = {0: tokens_of(pieces), 1: tokens_of(pieces)}
    table = view_table(KeptBatch(texts, rows_of(2), tokens, 2))
    said = json.dumps(table.to_pylist(), default=str)
    assert secret not in said
    assert secret[:9] not in said
    assert table["token/text"][0].as_py()[1:] == ["", "", ""]


def test_half_a_character_is_written_as_it_is_spelled(tmp_path):
    batch = KeptBatch(texts_of(["a\ud800b"]), rows_of(1), {0: tokens_of(["a\ud800b"])}, 1)
    table = view_table(batch)
    ViewWriter(tmp_path, 1).write(1, table, {})
    assert pq.read_table(step_files(tmp_path)[1])["completion"].to_pylist() == ["a\\ud800b"]


def test_the_summary_counts_texts_that_answer_several_prompts():
    texts = texts_of(["same", "x", "same", "y", "z", "z"], ["a", "a", "b", "b", "c", "c"])
    rows = rows_of(6, reward=[0.0, 1.0, 1.0, 1.0, 0.5, float("nan")])
    summary = step_summary(KeptBatch(texts, rows, {}, 2))
    assert summary["frac_repeated"] == pytest.approx(2 / 6)
    assert summary["reward"][0] == 0.0
    assert summary["reward"][-1] == 1.0
    assert summary["num_groups"] == 3


def test_the_groups_of_a_steps_batches_are_numbered_on():
    first = texts_of(["a", "b"], ["p", "p"])
    second = texts_of(["c", "d"], ["q", "q"])._replace(extra={"seen": [1, 2]})
    whole = joined(
        [
            KeptBatch(first, rows_of(2, reward=[0.0, 1.0]), {1: tokens_of(["b"])}, 2),
            KeptBatch(second, rows_of(2, reward=[2.0, 4.0]), {0: tokens_of(["c"])}, 2),
        ]
    )
    rows = view_table(whole).select(["group", "sample", "prompt", "completion", "reward", "extra"])
    assert [tuple(row.values()) for row in rows.to_pylist()] == [
        (0, 1, "p", "b", 1.0, '{"seen": null}'),
        (1, 0, "q", "c", 2.0, '{"seen": 1}'),
    ]
    summary = step_summary(whole)
    assert (summary["num_rows"], summary["num_groups"], summary["reward"][-1]) == (4, 2, 4.0)


def run(folder, steps, **more):
    made = MadeRun(folder, max_steps=20, num_prompts=2, num_generations=2, num_tokens=8, **more)
    for step in steps:
        made.step(step)
    return made


def test_a_resumed_run_goes_on_from_its_step(tmp_path):
    run(tmp_path, range(1, 6))
    ViewWriter(tmp_path, 1, resume_step=3)
    assert list(step_files(tmp_path)) == [1, 2, 3]


def test_another_run_in_the_folder_keeps_the_former_one(tmp_path):
    run(tmp_path, [1, 2])
    ViewWriter(tmp_path, 1)
    assert list(step_files(tmp_path)) == []
    assert sorted(p.name for p in (tmp_path / f"{FOLDER}.1").glob("step-*")) == [
        "step-00000001.parquet", "step-00000002.parquet",
    ]  # fmt: skip


def test_a_run_takes_no_more_room_than_it_may(tmp_path):
    made = run(tmp_path, [1])
    most = made.view.max_bytes = 20 * step_files(tmp_path)[1].stat().st_size
    for step in range(2, 101):
        made.step(step)
    files = step_files(tmp_path)
    assert sum(path.stat().st_size for path in files.values()) <= most
    assert list(files)[-4:] == [97, 98, 99, 100]
    assert next(iter(files)) <= 16
    assert len(files) >= 8


def test_a_full_disk_costs_steps_and_not_the_run(tmp_path, monkeypatch, caplog):
    made = run(tmp_path, [1])

    def full(table, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(view_files.pq, "write_table", full)
    with caplog.at_level(logging.WARNING):
        made.step(2)
        made.step(3)
    assert [r.message.count("No space left") for r in caplog.records] == [1]
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == [RUN, "step-00000001.parquet"]


def test_a_file_says_what_it_holds(tmp_path):
    run(tmp_path, [7])
    metadata = pq.read_metadata(step_files(tmp_path)[7]).metadata
    about = json.loads(metadata[SUMMARY])
    assert (about["step"], about["num_rows"], about["sampled_after"]) == (7, 4, 6)
    names = pq.read_schema(step_files(tmp_path)[7]).names
    assert {"token/text", "token/logp", "token/kl", "reward/correct", "prompt_id"} <= {*names}
