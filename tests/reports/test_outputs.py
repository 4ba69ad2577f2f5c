"""What a run leaves behind: completions.csv, samples in TensorBoard, curves, models that load."""

from __future__ import annotations

import ast
import csv
import logging
import math
import re
import sys
import time
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from rloo_fast import RLOOConfig, RLOOTrainer, cli
from rloo_fast.judges.texts import load
from rloo_fast.reports.completions import completions_dataframe, markdown_table
from rloo_fast.reports.completions_file import CompletionsWriter
from rloo_fast.reports.metric_names import is_user_metric
from rloo_fast.reports.metrics_file import read_metrics
from rloo_fast.reports.panels import eval_prefixes, present
from rloo_fast.reports.recorder import Recorder
from tests.support.no_curves import draw_curves
from tests.support.tiny import make_tokenizer

NASTY = ['say "hi", ok', "two\nlines\r\n", "猫 é 🙂", "a;b\tc,d", '",\n"', "' \\ \" \x00end", ""]


def table(step, completions=NASTY, **extra):
    n = len(completions)
    rewards = {"score": [0.1 * i for i in range(n)], "judge": [None] * (n - 1) + [2.0]}
    return completions_dataframe(["p"] * n, completions, rewards, [1.5] * n, step, extra)


# --- completions.csv


def test_texts_and_numbers_are_read_back_as_they_were(tmp_path):
    writer = CompletionsWriter(tmp_path)
    writer.write(table(1, tags=[["a", 'b"']] * len(NASTY)))
    writer.write(table(2, tags=[None] * len(NASTY)))
    frame = pd.read_csv(tmp_path / "completions.csv", lineterminator="\n")
    names = ["step", "prompt", "completion", "score", "judge", "tags", "advantage"]
    assert list(frame.columns) == names
    assert frame["completion"].fillna("").tolist() == NASTY * 2
    assert frame["step"].tolist() == [1] * len(NASTY) + [2] * len(NASTY)
    assert frame["score"].tolist() == [0.1 * i for i in range(len(NASTY))] * 2
    assert [str(frame[name].dtype) for name in ("judge", "advantage")] == ["float64"] * 2
    assert frame["judge"].count() == 2
    assert frame["tags"].dropna().unique().tolist() == ["['a', 'b\"']"]


def test_another_reader_finds_the_same_rows(tmp_path):
    CompletionsWriter(tmp_path).write(table(1))
    with open(tmp_path / "completions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["completion"] for row in rows] == NASTY
    assert rows[0]["judge"] == ""


def test_a_text_of_many_lines_is_read_in_one_pass(tmp_path):
    writer = CompletionsWriter(tmp_path)
    writer.write(pd.DataFrame({"step": [1, 2], "completion": ["\n" * 500_000, 'a "b"\n']}))
    whole = (tmp_path / "completions.csv").read_bytes()
    started = time.process_time()
    CompletionsWriter(tmp_path, resume_step=2).write(pd.DataFrame({"step": [3], "completion": [1]}))
    assert time.process_time() - started < 10
    assert (tmp_path / "completions.csv").read_bytes() == whole + b"3,1\n"


def written(run_dir, steps, resume_step=None):
    writer = CompletionsWriter(run_dir, resume_step)
    for step in steps:
        writer.write(table(step))
    return run_dir / "completions.csv"


@pytest.mark.parametrize("cut", [0, 1, 5, 17, 40, 60])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, cut):
    whole = written(tmp_path / "whole", range(1, 6)).read_bytes()
    killed = written(tmp_path / "killed", range(1, 4))
    killed.write_bytes(killed.read_bytes()[: -cut or None])  # within the last rows, if not at 0
    assert written(tmp_path / "killed", range(3, 6), resume_step=2).read_bytes() == whole


def test_a_file_cut_in_its_first_line_is_begun_again(tmp_path):
    (tmp_path / "completions.csv").write_bytes(b'"step","pro')
    path = written(tmp_path, [3], resume_step=2)
    assert pd.read_csv(path)["step"].unique().tolist() == [3]


def test_a_new_run_keeps_the_former_file_beside_its_own(tmp_path):
    for step in (1, 2):
        written(tmp_path, [step])
    names = ("completions.1.csv", "completions.csv")
    assert [pd.read_csv(tmp_path / n)["step"][0] for n in names] == [1, 2]


def test_a_column_that_comes_later_is_empty_before(tmp_path):
    writer = CompletionsWriter(tmp_path)
    for step, extra in enumerate([{}, {"note": ["x", "y,\n"]}, {}], start=1):
        writer.write(table(step, ["a", 'b"\n'], **extra))
    frame = pd.read_csv(tmp_path / "completions.csv")
    assert frame["note"].fillna("").tolist() == ["", "", "x", "y,\n", "", ""]
    assert frame["completion"].tolist() == ["a", 'b"\n'] * 3
    assert frame["advantage"].tolist() == [1.5] * 6
    with open(tmp_path / "completions.csv", newline="", encoding="utf-8") as file:
        assert {len(row) for row in csv.reader(file)} == {len(frame.columns)}


def test_a_file_that_is_not_ours_is_named(tmp_path):
    (tmp_path / "completions.csv").write_text("step;prompt\n1;x\n")
    with pytest.raises(ValueError, match=r"completions.csv: expected rows that begin with a step"):
        CompletionsWriter(tmp_path, resume_step=2)


def test_a_file_that_cannot_be_written_is_reported_once(tmp_path, caplog):
    writer = CompletionsWriter(tmp_path)
    (tmp_path / "completions.csv").mkdir()
    with caplog.at_level(logging.WARNING):
        writer.write(table(1))
        writer.write(table(2))
    assert len(caplog.messages) == 1
    assert "training goes on without it" in caplog.text


# --- the table as Markdown


def test_tensorboard_shows_texts_as_they_are():
    from tensorboard.plugin_util import markdown_to_safe_html

    texts = ["| *a* |\n<b>&amp;</b>", "# `x` [l](http://u) $y$ \\ ~~z~~ __w__", "![i](u)"]
    html = markdown_to_safe_html(markdown_table(table(1, texts)))
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert re.findall(r"<th[^>]*>(.*?)</th>", rows[0]) == [
        "Prompt", "Completion", "score", "judge", "Advantage",
    ]  # fmt: skip
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)[1] for row in rows[1:]]
    assert [unescape(re.sub("<br ?/?>", "\n", cell)) for cell in cells] == texts


# --- runs


def score(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


PROMPTS = [" ".join(f"w{(i * 7 + j) % 26}" for j in range(2 + i % 3)) for i in range(8)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A saved Llama: a tokenizer of our own saved with a Qwen2 is loaded as Qwen2's."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_trainer(model_dir, out, peft_config=None, eval_dataset=None, reward=score, **settings):
    standard = {
        "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 2,
        "learning_rate": 0.1, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "report_to": "none",
    }  # fmt: skip
    return RLOOTrainer(
        str(model_dir), reward, RLOOConfig(str(out), **{**standard, **settings}),
        Dataset.from_dict({"prompt": PROMPTS}), eval_dataset, peft_config=peft_config,
    )  # fmt: skip


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.setattr(Recorder, "draw_curves", draw_curves)


def test_a_resumed_run_writes_the_samples_of_an_uninterrupted_one(model_dir, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    sampled = {"log_completions_csv": True, "num_completions_to_print": 3}
    make_trainer(model_dir, tmp_path / "out", **settings, **sampled).train()
    whole = (tmp_path / "out/completions.csv").read_bytes()
    again = make_trainer(model_dir, tmp_path / "out", **settings, **sampled)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert (tmp_path / "out/completions.csv").read_bytes() == whole
    assert pd.read_csv(tmp_path / "out/completions.csv")["step"].tolist() == [
        1, 1, 1, 2, 2, 2, 3, 3, 3,
    ]  # fmt: skip


def test_samples_say_what_they_are_samples_of(model_dir, tmp_path, capsys):
    """Steps 1 and 2 share a generation batch of 8; an evaluation of 10 rows, in batches of 4, comes
    between them."""
    trainer = make_trainer(
        model_dir, tmp_path / "out", max_steps=3, steps_per_generation=2, log_completions=True,
        log_completions_csv=True, num_completions_to_print=3, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4, num_generations_eval=2,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:5]}),
    )  # fmt: skip
    trainer.train()
    frame = pd.read_csv(tmp_path / "out/completions.csv")
    names = ["step", "mode", "sampled_after_step", "num_rows"]
    assert list(frame.columns)[:6] == ["step", "mode", "sampled_after_step", "row", "num_rows",
                                       "prompt"]  # fmt: skip
    tables = frame.groupby(names, sort=False)
    assert {name: len(rows) for name, rows in tables} == {
        (1, "train", 0, 8): 3,
        (1, "eval", 1, 10): 3,
        (2, "eval", 2, 10): 3,
        (3, "train", 2, 8): 3,
        (3, "eval", 3, 10): 3,
    }
    assert (frame["row"] < frame["num_rows"]).all()
    assert set(frame["prompt"][frame["mode"] == "eval"]) <= {*PROMPTS[:5]}
    printed = capsys.readouterr().out
    for said in ("Step 1", "Evaluation after step 2", "3 of 8 completions", "3 of 10 completions"):
        assert f" {said} " in printed
    assert " Step 2 " not in printed  # whose completions are those of step 1


def test_tensorboard_gets_the_printed_samples(model_dir, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(
        model_dir, tmp_path / "out", report_to="tensorboard", log_completions=True,
        num_completions_to_print=2,
    )  # fmt: skip
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    events = board.Tensors("completions/text_summary")
    assert [event.step for event in events] == [1, 2]
    text = events[1].tensor_proto.string_val[0].decode()
    assert text.count("\n") == 3  # names, rule, two samples
    sampled = trainer.recorder.samples.table("train", 2)["completion"]
    assert sum(f"| {c} |" in text for c in sampled) >= 2


def test_a_run_draws_its_curves_and_the_card_shows_them(model_dir, tmp_path, curves):
    trainer = make_trainer(model_dir, tmp_path / "out")
    trainer.train()
    trainer.create_model_card()
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert "![Curves of the run](curves.png)" in (tmp_path / "out/README.md").read_text()


def judge(completion_ids, log_metric, **kwargs):
    log_metric("mine", 0.5)
    return score(completion_ids)


def test_a_run_logs_no_metric_that_is_taken_for_the_users(model_dir, tmp_path):
    """A new metric of ours needs no panel, but must be known as ours."""
    settings = {
        "beta": 0.1, "num_iterations": 2, "skip_memory_metrics": False,
        "eval_strategy": "steps", "eval_steps": 1,
        "truncated_importance_sampling": "token", "report_to": "none",
    }  # fmt: skip
    trainer = make_trainer(
        model_dir, tmp_path / "out", reward=judge, **settings,
        eval_dataset={"math": Dataset.from_dict({"prompt": PROMPTS[:2]})},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate(trainer.eval_dataset["math"])
    rows = read_metrics(tmp_path / "out")
    logged = present(rows)
    prefixes = eval_prefixes(logged)
    bare = {next((k.removeprefix(p) for p in prefixes if k.startswith(p)), k) for k in logged}
    assert {name for name in bare if is_user_metric(name)} == {"mine"}


def test_one_log_makes_no_curve(model_dir, tmp_path, curves):
    trainer = make_trainer(model_dir, tmp_path / "out", max_steps=1)
    trainer.train()
    trainer.create_model_card()
    assert not (tmp_path / "out/curves.png").exists()
    assert "curves" not in (tmp_path / "out/README.md").read_text()


def test_curves_that_cannot_be_drawn_are_one_warning(
    model_dir, tmp_path, curves, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as without matplotlib
    with caplog.at_level(logging.WARNING, logger="rloo_fast"):
        make_trainer(model_dir, tmp_path / "out").train()
    (warning,) = [line for line in caplog.messages if "curves.png" in line]
    assert "was not drawn" in warning
    assert "\n" not in warning


# --- saved models


def logits(model):
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def front_matter(path):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", path.read_text(), re.DOTALL)[1])


def run_quick_start(path, capsys):
    """Execute the card's Python as it stands; what it prints."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    capsys.readouterr()
    exec(code.replace("max_new_tokens=128", "max_new_tokens=8"), {})
    return capsys.readouterr().out


def test_a_saved_model_loads_and_is_the_trained_one(model_dir, tmp_path, capsys):
    trainer = make_trainer(model_dir, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(model_dir)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3")["input_ids"] == [9]
    card = (tmp_path / "out/README.md").read_text()
    assert 'prompt = "The capital of France is"' in card
    assert not [prompt for prompt in PROMPTS if prompt in card]  # the data may be private
    assert "The command" not in card  # no command started it
    run_quick_start(tmp_path / "out/README.md", capsys)


REWARD = """
def score(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]
"""


class Keep(TrainerCallback):
    """The logits of the model at the end of training."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        Keep.logits = logits(model)


def test_adapters_saved_by_the_command_load_and_are_the_trained_ones(
    model_dir, tmp_path, monkeypatch, capsys
):
    (tmp_path / "score.py").write_text(REWARD)
    Dataset.from_dict({"prompt": PROMPTS}).to_json(tmp_path / "prompts.jsonl")
    out = tmp_path / "out"
    original = RLOOTrainer.__init__

    def init(self, *args, callbacks=None, **kwargs):
        original(self, *args, callbacks=[*(callbacks or []), Keep()], **kwargs)

    monkeypatch.setattr(RLOOTrainer, "__init__", init)
    argv = [
        "train", "--model_name_or_path", str(model_dir), "--use_peft", "--lora_r", "4",
        "--dataset_name", str(tmp_path / "prompts.jsonl"), "--output_dir", str(out),
        "--reward_funcs", f"{tmp_path / 'score.py'}:score", "--use_cpu", "true",
        "--per_device_train_batch_size", "4", "--max_completion_length", "4", "--max_steps", "2",
        "--learning_rate", "0.1", "--report_to", "none", "--logging_steps", "1",
        "--save_steps", "1",
    ]  # fmt: skip
    assert cli.main(argv) == 0

    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained(out)), Keep.logits)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, out)
    assert torch.allclose(logits(loaded), Keep.logits)
    assert not torch.allclose(before, Keep.logits, atol=1e-3)
    assert torch.allclose(logits(loaded.merge_and_unload()), Keep.logits, atol=1e-5)
    assert not list(out.glob("**/model*.safetensors"))  # nothing but adapters

    for card in (out / "README.md", out / "checkpoint-2/README.md"):
        text = card.read_text()
        assert front_matter(card)["library_name"] == "peft"
        assert f"LoRA adapter trained from `{model_dir}` on `{tmp_path / 'prompts.jsonl'}`" in text
        assert "rloo-fast " + " ".join(argv) in text
        assert "- peft: " in text
        assert "None" not in text
    run_quick_start(out / "README.md", capsys)


def card_of_a_command(tmp_path, model_dir, *options):
    """The card that `rloo-fast train` writes after two steps on this data."""
    out = tmp_path / "out"
    (tmp_path / "score.py").write_text(REWARD)
    argv = [
        "train", "--model_name_or_path", str(model_dir), "--output_dir", str(out),
        "--reward_funcs", f"{tmp_path / 'score.py'}:score", "--use_cpu", "true",
        "--per_device_train_batch_size", "4", "--max_completion_length", "4", "--max_steps", "2",
        "--report_to", "none", "--save_strategy", "no", *options,
    ]  # fmt: skip
    assert cli.main(argv) == 0
    return out / "README.md"


def prompt_in(path):
    code = re.search(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)[1]
    (value,) = [node.value for node in ast.parse(code).body
                if isinstance(node, ast.Assign) and node.targets[0].id == "prompt"]  # fmt: skip
    return ast.literal_eval(value)


def test_the_card_of_a_builtin_task_has_a_prompt_of_it(model_dir, tmp_path, capsys):
    pytest.importorskip("reasoning_gym")
    options = ["--dataset_name", "reasoning_gym:spell_backward", "--dataset_size", "60"]
    card = card_of_a_command(tmp_path, model_dir, *options)
    assert prompt_in(card).startswith("Spell this word backward")
    run_quick_start(card, capsys)


def test_the_card_of_a_file_has_no_prompt_of_it_unless_one_is_given(model_dir, tmp_path, capsys):
    Dataset.from_dict({"prompt": PROMPTS}).to_json(tmp_path / "private.jsonl")
    data = ["--dataset_name", str(tmp_path / "private.jsonl")]
    card = card_of_a_command(tmp_path, model_dir, *data)
    assert prompt_in(card) == "The capital of France is"
    assert not [prompt for prompt in PROMPTS if prompt in card.read_text()]
    card = card_of_a_command(tmp_path, model_dir, *data, "--model_card_prompt", 'w1 "w2"\nw3')
    assert prompt_in(card) == 'w1 "w2"\nw3'
    run_quick_start(card, capsys)


def train_over_a_merged_adapter(model_dir, tmp_path, **settings):
    """(the first adapter's directory, the trainer of ours, saved in out/)."""
    first = tmp_path / "first"
    adapted = make_trainer(model_dir, first, LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted.train()
    adapted.save_model()
    trainer = make_trainer(
        model_dir, tmp_path / "out", LoraConfig(task_type="CAUSAL_LM", r=2),
        merge_adapter=str(first), **settings,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return first, trainer


def test_the_quick_start_over_a_merged_adapter_is_the_trained_model(model_dir, tmp_path, capsys):
    """Base + first adapter + ours: what the card's code builds must compute what was trained."""
    first, trainer = train_over_a_merged_adapter(model_dir, tmp_path)
    trainer.create_model_card()
    card = tmp_path / "out/README.md"
    assert f"with the adapter `{first}` merged into it" in card.read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    exec(code.replace("max_new_tokens=128", "max_new_tokens=2"), names)
    assert torch.allclose(logits(names["model"]), logits(trainer.model), atol=1e-5)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.allclose(logits(alone), logits(trainer.model), atol=1e-2)


def test_what_loads_an_adapter_finds_the_one_merged_before_it(model_dir, tmp_path):
    _, trainer = train_over_a_merged_adapter(
        model_dir, tmp_path, save_strategy="steps", save_steps=2
    )
    for folder in ("out", "out/checkpoint-2"):
        model, _ = load(str(tmp_path / folder), "auto", False)
        assert torch.allclose(logits(model), logits(trainer.model), atol=1e-5)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(task_type="CAUSAL_LM")])
def test_an_adapter_is_no_model_to_train(model_dir, tmp_path, peft_config):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"is an adapter: give .*{model_dir}.*with merge_adapter="):
        make_trainer(tmp_path / "adapter", tmp_path / "out", peft_config)


# --- rloo-fast plot


def metrics_of(run_dir, values):
    run_dir.mkdir(parents=True)
    lines = [f'{{"step": {i}, "reward": {v}}}\n' for i, v in enumerate(values, start=1)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    return str(run_dir)


def test_plot_writes_into_the_directory_of_a_single_run(tmp_path, capsys):
    run = metrics_of(tmp_path / "run", [0.1, 0.2])
    assert cli.main(["plot", run]) == 0
    assert Path(run, "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"The curves are in {Path(run, 'curves.png')}.\n"


def test_plot_takes_the_metrics_file_for_its_directory(tmp_path):
    run = metrics_of(tmp_path / "run", [0.1, 0.2])
    assert cli.main(["plot", f"{run}/metrics.jsonl"]) == 0
    assert Path(run, "curves.png").exists()


def test_plot_of_several_runs_goes_to_the_working_directory(tmp_path, monkeypatch):
    runs = [metrics_of(tmp_path / name, [0.1, 0.2]) for name in ("a", "b")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["plot", *runs, "--keys", "reward", "--labels", "one, two"]) == 0
    assert Path("curves.png").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--keys", "rewrad"], "No values of ['rewrad']; logged are ['reward']."),
        (["--labels", "a,b"], "2 labels for 1 directories"),
        (["--output", "/dev/null/curves.png"], "/dev/null"),
        (["--output", "curves.svg"], "output curves.svg: curves are written as a PNG"),
        (["--output", "/"], "output / is a directory: write /curves.png"),
    ],
)
def test_plot_says_what_is_wrong_in_a_line(tmp_path, capsys, options, sentence):
    assert cli.main(["plot", metrics_of(tmp_path / "run", [0.1, 0.2]), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_nan_is_never_written_as_a_number(tmp_path):
    CompletionsWriter(tmp_path).write(table(1, ["a"], note=[math.nan]))
    assert "nan" not in (tmp_path / "completions.csv").read_text()
