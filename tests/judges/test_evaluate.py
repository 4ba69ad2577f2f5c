"""`rloo-fast eval judge` from its options to its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rloo_fast.judges.prompt import DEFAULT
from rloo_fast.judges.texts import generate
from tests.support.judge_runs import (
    KEY,
    Dying,
    judge_by,
    longer,
    result,
    rows_file,
    run,
    saved,
    serving,
    texts_file,
    tiny_llama,
)


def test_model_against_references_by_a_server(folder, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = rows_file()

    def echoing_its_key(body, headers, number):
        if "w3 w2" in body["messages"][0]["content"]:
            return 200, f"Your key is {headers['Authorization']}.", {}
        return longer(body, headers, number)

    with serving(echoing_its_key) as url:
        run("--model_name_or_path", saved("model", tiny_llama()), "--max_new_tokens", "6",
            "--judge", "openai", "--judge_base_url", url, "--judge_model", "some-judge",
            "--num_prompts", "10")  # fmt: skip
    found, samples = result()
    lengths = [(len(s["completion"].strip()), len(s["against"].strip())) for s in samples]
    assert all(ours != theirs for ours, theirs in lengths)
    expected = [ours > theirs for ours, theirs in lengths]
    texts = generate("model", [row["prompt"] for row in rows[:10]], max_new_tokens=6)
    assert [sample["completion"] for sample in samples] == texts
    assert [sample["against"] for sample in samples] == [r["completion"] for r in rows[:10]]
    better = [sample["judgements"][0]["better"] for sample in samples]
    wanted = ["completion" if won else "against" for won in expected]
    assert better == [*wanted[:3], None, *wanted[4:]]
    figures = found["figures"]
    del expected[3]
    assert figures["win_rate"] == sum(expected) / 9
    assert 0 < figures["win_rate"] < 1
    assert (figures["num_decided"], figures["no_verdict"]) == (9, {"unreadable": 1})
    assert found["settings"]["judge_model"] == "some-judge"
    assert found["judge_prompt"] == DEFAULT
    line = f"| {100 * figures['win_rate']:.1f} |"
    assert line in capsys.readouterr().out
    assert line in (folder / "out" / "result.md").read_text()
    for path in (folder / "out").iterdir():
        assert KEY not in path.read_text()


def test_rouge_against_references_is_a_mean_and_no_win_rate(capsys):
    rows = rows_file()
    texts_file("a.jsonl", [row["completion"] for row in rows[:6]] + ["x"] * 6, rows)
    run("--completions", "a.jsonl", "--judge", "rouge")
    found, _ = result()
    assert found["figures"]["win_rate"] is None
    # the text of one word has no pair of words, so no ROUGE-2
    assert found["figures"]["rouge"] == {"rouge1": 0.5, "rouge2": 5 / 12, "rougeL": 0.5}
    assert "| 50.0 / 41.7 / 50.0 |" in capsys.readouterr().out


def test_no_file_has_a_secret_of_the_options(tmp_path, monkeypatch, capsys):
    secrets = {name: f"pL4nt-{name}-0a1b2c3d4e5f" for name in ("key", "field", "header", "said")}
    monkeypatch.setenv("OPENAI_API_KEY", secrets["key"])
    rows = rows_file()
    texts_file("a.jsonl", ["x"] * 12, rows)
    request = {"api_key": secrets["field"], "extra_headers": {"X-Own": secrets["header"]}}

    def repeating(body, headers, number):
        assert body["api_key"] == secrets["field"]
        return 200, f"{headers['Authorization']} {body['extra_headers']}", {}

    with serving(repeating) as url:
        judge_by(url, "--judge_kwargs", json.dumps(request))
    files = {path: path.read_text() for path in tmp_path.glob("out/*")}
    assert {path.name for path in files} == {
        "answers.jsonl", "result.json", "result.md", "samples.jsonl",
    }  # fmt: skip
    written = "".join(files.values()) + "".join(capsys.readouterr())
    assert "unreadable" in written
    assert [name for name, secret in secrets.items() if secret in written] == []


def test_texts_survive_a_judge_that_is_not_there(capsys):
    rows = rows_file()
    texts_file("a.jsonl", ["x"] * 12, rows)
    with serving(longer) as url:
        pass  # nobody listens there any more
    run("--completions", "a.jsonl", "--judge", "openai", "--judge_base_url", url,
        "--judge_model", "some-judge", status=2)  # fmt: skip
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "the judge cannot be reached" in error
    assert "Connection refused" in error
    with open("out/samples.jsonl") as file:
        assert len(file.readlines()) == 12


def test_texts_are_made_anew_only_by_another_model_or_setting(capsys):
    model = ("--model_name_or_path", saved("model", tiny_llama()), "--max_new_tokens", "6")
    rows_file()
    with serving(Dying(lives=5)) as url:
        judge_by(url, texts=model, status=2)
    samples = Path("out/samples.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    made = [line["completion"] for line in lines]

    def kept_when_run(*argv):
        """Whether a text that no model wrote is still there."""
        marked = [{**line, "completion": "kept"} for line in lines]
        samples.write_text("".join(json.dumps(line) + "\n" for line in marked))
        judge_by(url, *argv, texts=model, status=2)
        texts = [json.loads(line)["completion"] for line in samples.read_text().splitlines()]
        said = capsys.readouterr().out
        assert ("they are judged" in said) == (texts == ["kept"] * 12)
        assert ("texts are made anew" in said) == (texts != ["kept"] * 12)
        return texts

    Path("model/metrics.jsonl").write_text("{}")  # a log is no weight
    assert kept_when_run() == kept_when_run("--judge_marker", "So:") == ["kept"] * 12
    assert kept_when_run("--seed", "1") == made
    assert len(kept_when_run("--num_prompts", "3")) == 3
    other = tiny_llama()
    torch.nn.init.normal_(other.lm_head.weight)
    saved("model", other)
    assert made != kept_when_run() != ["kept"] * 12


def test_conversations_have_their_messages_as_prompts_and_references(folder):
    row = {
        "prompt": [{"role": "user", "content": "w1"}],
        "completion": [{"role": "assistant", "content": "w2 w3"}],
    }
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "a.jsonl").write_text(json.dumps({**row, "completion": "w2"}) + "\n")
    (folder / "mine.py").write_text(
        "def shorter(prompts, pairs):\n"
        "    assert prompts[0][0]['content'] == 'w1'\n"
        "    return [int(len(b) < len(a)) for a, b in pairs]\n"
    )
    run("--completions", "a.jsonl", "--judge", "mine.py:shorter")
    found, [sample] = result()
    assert (sample["completion"], sample["against"]) == ("w2", "w2 w3")
    assert found["figures"]["win_rate"] == 1.0
