"""Judging pairs of texts: order, verdicts, figures, and `rloo-fast eval judge` from end to end."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from conftest import make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rloo_fast import cli
from rloo_fast.judges import (
    TIE,
    JudgeError,
    Judgement,
    OpenAIJudge,
    RewardModelJudge,
    RougeJudge,
    Verdict,
    compare,
    rouge,
    summarize,
    wilson,
)
from rloo_fast.judges.answers import Answers
from rloo_fast.judges.prompt import DEFAULT, fill, read_answer
from rloo_fast.judges.texts import generate
from rloo_fast.rewards import load_reward_model

KEY = "sk-loopback-0123456789"
TEXTS = re.compile(r'<summary id="\d">\n(.*?)\n</summary>', re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def tiny_llama(kind: Any = LlamaForCausalLM, **options):
    """Not conftest's Qwen2, in whose directory transformers would make a tokenizer of Qwen's."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        initializer_range=0.5, **options,
    )  # fmt: skip
    return kind(config)


def saved(name, model, with_tokenizer=True):
    model.save_pretrained(name)
    if with_tokenizer:
        make_tokenizer().save_pretrained(name)
    return name


@contextmanager
def serving(rule, port=0):
    """The address of a server that answers with `rule(question, headers, number of the request)`.

    It gives (status, answer of the model or other JSON, more headers).
    """
    count = iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            assert body["model"] == "some-judge"
            status, answer, more = rule(body, self.headers, next(count))
            if isinstance(answer, str):
                answer = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **more}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def longer(body, headers, number):
    first, second = TEXTS.findall(body["messages"][0]["content"])
    return 200, str(int(len(second) > len(first))), {}


def ask(rule, num_pairs=1, **options):
    """Verdicts of an OpenAIJudge over a server with this rule, and the questions it was asked."""
    asked = []

    def noting(body, headers, number):
        asked.append((body, dict(headers)))
        return rule(body, headers, number)

    with serving(noting) as url:
        judge = OpenAIJudge(url, "some-judge", **{"pause_s": 0.01, **options})
        return judge(["p"] * num_pairs, [("aa", "b")] * num_pairs), asked


def texts_with_lengths(lengths):
    return ["x" * length for length in lengths]


# --- order


def test_win_rate_is_that_of_the_rule_whatever_the_order():
    ours, theirs = texts_with_lengths([9, 9, 9, 1, 1, 9, 9, 1]), texts_with_lengths([5] * 8)
    for seed in range(3):
        with serving(longer) as url:
            rows = compare(OpenAIJudge(url, "some-judge"), ["p"] * 8, ours, theirs, seed=seed)
        figures = summarize(rows)
        assert figures["win_rate"] == 5 / 8
        assert (figures["num_wins"], figures["num_losses"]) == (5, 3)


def test_judge_that_takes_the_first_gets_half_and_is_found_out():
    rows = compare(lambda prompts, pairs: [0] * 100, ["p"] * 100, ["a"] * 100, ["b"] * 100)
    figures = summarize(rows)
    assert figures["win_rate"] == 0.5
    assert figures["first_won"] == 1.0


def test_order_follows_from_the_seed():
    def places(seed):
        rows = compare(lambda _, pairs: [0] * 64, ["p"] * 64, ["a"] * 64, ["b"] * 64, seed=seed)
        return [row[0].place for row in rows]

    assert places(1) == places(1) != places(2)
    assert sum(places(1)) == 32
    assert sum(places(1)[:32]) not in (0, 16, 32)  # drawn, not one after the other


def test_judge_sees_each_text_at_the_place_that_is_noted():
    seen = []

    def judge(prompts, pairs):
        seen.extend(pairs)
        return [1] * len(pairs)

    rows = compare(judge, ["p"] * 20, ["ours"] * 20, ["theirs"] * 20)
    assert [pair.index("ours") for pair in seen] == [row[0].place for row in rows]


def test_both_orders_count_a_disagreement_as_half():
    verdicts = iter([[0] * 4, [0] * 4])  # always the first: every pair disagrees with itself
    rows = compare(lambda *_: next(verdicts), ["p"] * 4, ["a"] * 4, ["b"] * 4, both_orders=True)
    figures = summarize(rows)
    assert [row[0].place + row[1].place for row in rows] == [1] * 4
    assert (figures["win_rate"], figures["num_split"], figures["num_asked"]) == (0.5, 4, 8)


def test_pair_without_a_verdict_in_one_order_is_not_decided():
    rows = [
        [Judgement(0, Verdict(0)), Judgement(1, Verdict(None, "unreadable"))],
        [Judgement(0, Verdict(0)), Judgement(1, Verdict(1))],
        [Judgement(0, Verdict(None, TIE)), Judgement(1, Verdict(0))],
    ]
    figures = summarize(rows)
    assert (figures["num_decided"], figures["win_rate"]) == (1, 1.0)
    assert (figures["num_ties"], figures["no_verdict"]) == (1, {"unreadable": 1})


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ([0], "one verdict per pair: got 1 for 2"),
        ([0, 2], "0, 1 or None, got 2"),
        ([0, 0.7], "0, 1 or None, got 0.7"),
        (7, "a list of 0, 1 or None, got int"),
    ],
    ids=["too-few", "no-index", "a-score", "no-list"],
)
def test_judge_that_breaks_its_contract_is_an_error(returned, sentence):
    with pytest.raises(JudgeError, match=sentence):
        compare(lambda prompts, pairs: returned, ["p"] * 2, ["a"] * 2, ["b"] * 2)


def test_judge_that_raises_is_named_with_its_line():
    def careless(prompts, pairs):
        raise OSError("no tape")

    sentence = r"the judge careless raised OSError: no tape \(test_judges.py, line \d+\)"
    with pytest.raises(JudgeError, match=sentence):
        compare(careless, ["p"], ["a"], ["b"])


def test_verdicts_may_be_tensor_items_and_none():
    verdicts = torch.tensor([1, 0])
    rows = compare(lambda *_: [*verdicts, None], ["p"] * 3, ["a"] * 3, ["b"] * 3)
    assert [row[0].verdict.index for row in rows] == [1, 0, None]
    assert summarize(rows)["no_verdict"] == {"none given": 1}


# --- figures


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(wins, n, low, high):
    assert wilson(wins / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_covers_95_of_100_experiments():
    generator = torch.Generator().manual_seed(0)
    rates = (torch.rand(4000, 200, generator=generator) < 0.33).double().mean(1).tolist()
    covered = [low <= 0.33 <= high for low, high in (wilson(rate, 200) for rate in rates)]
    assert sum(covered) / 4000 == pytest.approx(0.95, abs=0.015)


def test_figures_without_any_verdict():
    figures = summarize([[Judgement(0, Verdict(None, "unreadable"))]])
    assert figures["win_rate"] is figures["first_won"] is figures["win_rate_low"] is None
    assert figures["num_no_verdict"] == 1


def test_rouge_by_hand():
    # of 4 and 6 words 3 are shared (the, cat, sat); pairs: 3 and 5, shared (the cat), (cat sat)
    # in order: the cat sat
    scores = rouge("The cat sat down.", "the cat sat on the mat")
    assert scores == {"rouge1": 6 / 10, "rouge2": 4 / 8, "rougeL": 6 / 10}


def test_rouge_counts_repeats_once_and_keeps_order():
    assert rouge("a a a", "a b")["rouge1"] == 2 / 5
    assert rouge("d c b a", "a b c d") == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 2 / 8}
    assert rouge("a", "a a")["rougeL"] == 2 / 3  # one word is not matched twice
    # gaps may be on both sides: a c e g
    assert rouge("a x c y e g", "a c z e w g")["rougeL"] == 8 / 12


def test_rouge_of_empty_texts_is_zero():
    assert set(rouge("", "a").values()) == set(rouge("", "").values()) == {0.0}


def test_rouge_judge_takes_the_closest_of_a_prompts_references():
    judge = RougeJudge({"p": ["a b c", "x y"]})
    pairs = [("a b", "z"), ("z", "x y"), ("b", "c")]
    assert [v.index for v in judge(["p"] * 3, pairs)] == [0, 1, None]
    assert judge(["p"], [("b", "c")])[0].why == TIE


# --- questions and answers


def test_question_holds_the_texts_at_their_places():
    question = fill(DEFAULT, "the post", (" first {text1} ", "second"))
    assert TEXTS.findall(question) == ["first {text1}", "second"]
    assert "<post>\nthe post\n</post>" in question


def test_question_of_a_conversation():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert fill("{prompt}|{text0}|{text1}", prompt, ("a", "b")).startswith(
        "system: Be brief.\n\nuser: Hi|a|b"
    )
    assert fill("{prompt}", prompt[1:], ("a", "b")) == "Hi"


@pytest.mark.parametrize(
    ("answer", "index"),
    [("0", 0), (" 1.\n", 1), ("**1**", 1), ('"0"', 0), ("10", None), ("Summary 1", None),
     ("", None), ("-1", None), ("0 or 1", None)],
)  # fmt: skip
def test_answer_is_read_strictly(answer, index):
    assert read_answer(answer) == index


def test_answer_after_the_last_marker():
    assert read_answer("VERDICT: 0? No.\nVERDICT: 1", "VERDICT:") == 1
    assert read_answer("1", "VERDICT:") is None
    assert read_answer("VERDICT: the first", "VERDICT:") is None


# --- the endpoint


def test_request_has_the_key_the_model_and_the_extra_fields(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _, [(body, headers)] = ask(longer, request={"temperature": None, "max_tokens": 3})
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body.keys() == {"model", "messages", "max_tokens"}


def test_without_a_key_no_header_is_sent():
    _, [(body, headers)] = ask(longer)
    assert "Authorization" not in headers
    assert body["temperature"] == 0


def test_busy_server_is_asked_again():
    def busy_at_first(body, headers, number):
        return (429 if number < 2 else 503, {}, {}) if number < 3 else longer(body, headers, number)

    verdicts, asked = ask(busy_at_first)
    assert verdicts[0].index == 0
    assert len(asked) == 4


def test_retry_after_is_obeyed():
    def wait(body, headers, number):
        return longer(body, headers, number) if number else (429, {}, {"Retry-After": "0.4"})

    started = time.monotonic()
    ask(wait)
    assert time.monotonic() - started >= 0.4


def test_server_that_stays_busy_is_an_error_with_its_words():
    error = {"error": {"message": "quota exceeded"}}
    with pytest.raises(JudgeError, match=r"no answer in 3 attempts: 429 quota exceeded"):
        ask(lambda *_: (429, error, {}), retries=2)


def test_slow_answer_is_asked_for_again():
    def slow(body, headers, number):
        time.sleep(0.0 if number else 0.5)
        return longer(body, headers, number)

    verdicts, asked = ask(slow, timeout_s=0.2)
    assert verdicts[0].index == 0
    assert len(asked) == 2


def test_refused_key_is_an_error_at_once_and_is_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    error = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    with pytest.raises(JudgeError, match="refused: 401 Incorrect API key") as caught:
        ask(lambda *_: (401, error, {}), num_pairs=5)
    assert KEY not in str(caught.value)


def test_question_that_is_not_taken_is_no_verdict():
    def too_long(body, headers, number):
        return (400, {"detail": "too long"}, {}) if number == 2 else longer(body, headers, number)

    verdicts, _ = ask(too_long, num_pairs=4, concurrency=1)
    assert [v.index for v in verdicts] == [0, 0, None, 0]
    assert verdicts[2][1:] == ("refused", "400 too long")


def test_unreadable_answers_are_counted_and_kept():
    def rambling(body, headers, number):
        return (200, "Both are fine.", {}) if number % 2 else longer(body, headers, number)

    verdicts, _ = ask(rambling, num_pairs=6, concurrency=1)
    assert [v.index for v in verdicts] == [0, None] * 3
    assert verdicts[1] == (None, "unreadable", "Both are fine.")


def test_answer_that_is_no_chat_completion_is_an_error():
    with pytest.raises(JudgeError, match=r"not a chat completion: '\{\"hello\": 1\}'"):
        ask(lambda *_: (200, {"hello": 1}, {}))


def test_redirect_does_not_take_the_key_along(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    elsewhere = []

    def note(body, headers, number):
        elsewhere.append(headers)
        return longer(body, headers, number)

    with serving(note) as other:
        target = {"Location": f"{other}/chat/completions"}
        with pytest.raises(JudgeError, match="refused: 302"):
            ask(lambda *_: (302, {}, target))
    assert not elsewhere


def test_verdicts_keep_the_order_of_the_pairs_with_many_at_a_time():
    def uneven(body, headers, number):
        time.sleep(0.02 * (number % 3))
        return longer(body, headers, number)

    pairs = [("xx", "x") if row % 3 else ("x", "xx") for row in range(30)]
    with serving(uneven) as url:
        verdicts = OpenAIJudge(url, "some-judge", concurrency=8)(["p"] * 30, pairs)
    assert [v.index for v in verdicts] == [int(row % 3 == 0) for row in range(30)]


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "https://user:secret@host/v1", "https://host/v1?key=secret"]
)
def test_address_without_scheme_or_with_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="judge_base_url") as caught:
        OpenAIJudge(url, "m")
    assert "secret" not in str(caught.value)


# --- texts


def test_greedy_texts_do_not_depend_on_the_batch():
    prompts = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9"]
    together = generate(saved("model", tiny_llama()), prompts, max_new_tokens=8)
    alone = [generate("model", [p], max_new_tokens=8, seed=1)[0] for p in prompts]
    assert together == alone
    assert all(together)
    assert "<" not in "".join(together)  # no pad or EOS


def test_texts_of_adapters_are_those_of_base_and_adapters(tmp_path):
    saved("base", tiny_llama())
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_llama(), lora)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    saved("adapter", adapted, with_tokenizer=False)
    saved("sum", adapted.merge_and_unload())
    base, adapter, total = (
        generate(name, ["w1 w2 w3"], max_new_tokens=12) for name in ("base", "adapter", "sum")
    )
    assert adapter == total != base


# --- the command


def rows_file(path="rows.jsonl", num=12):
    """Prompts with references of growing length."""
    rows = [{"prompt": f"w{i} w2", "completion": " w7" * (1 + i) + "!"} for i in range(num)]
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def texts_file(path, texts, rows):
    with open(path, "w") as file:
        for row, text in zip(rows, texts, strict=True):
            file.write(json.dumps({"prompt": row["prompt"], "completion": text}) + "\n")
    return str(path)


def run(*argv, status=0):
    dataset = () if "--dataset_name" in argv else ("--dataset_name", "rows.jsonl")
    assert cli.main(["eval", "judge", *dataset, "--output_dir", "out", *argv]) == status


def result(folder="out"):
    with open(f"{folder}/result.json") as file:
        found = json.load(file)
    with open(f"{folder}/samples.jsonl") as file:
        return found, [json.loads(line) for line in file]


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


def test_earlier_texts_by_a_reward_model_in_both_orders(folder):
    saved("reward", tiny_llama(LlamaForSequenceClassification, num_labels=1))
    rows = rows_file()
    texts = [f" w{i + 3} w{i}" for i in range(11)] + [rows[11]["completion"]]
    texts_file("earlier.jsonl", texts, rows)
    run("--completions", "earlier.jsonl", "--judge", "reward_model", "--judge_model", "reward",
        "--both_orders", "--batch_size", "4")  # fmt: skip
    model = load_reward_model("reward")
    prompts = [row["prompt"] for row in rows]
    ours = model(prompts, texts)
    theirs = model(prompts, [row["completion"] for row in rows])
    wins = (ours > theirs)[:11].sum().item()
    found, _ = result()
    assert 0 < wins < 11
    assert found["figures"]["win_rate"] == pytest.approx(wins / 11)
    assert (found["figures"]["num_ties"], found["figures"]["num_decided"]) == (2, 11)
    assert found["figures"]["first_won"] == 0.5


def test_reward_model_that_reads_eos_finds_one_behind_every_text():
    saved("reward", tiny_llama(LlamaForSequenceClassification, num_labels=1))
    model = load_reward_model("reward", position="eos")
    [verdict] = RewardModelJudge(model)(["w1"], [(" w2", " w3 w4")])
    plain = load_reward_model("reward")
    assert verdict.answer is not None
    expected = plain(["w1", "w1"], [" w2 <eos>", " w3 w4 <eos>"]).tolist()
    assert [float(x) for x in verdict.answer.split()] == pytest.approx(expected, rel=1e-4)


def test_function_in_a_file_compares_two_sets_of_texts_without_references(folder):
    rows = rows_file()
    (folder / "mine.py").write_text(
        "def first_word(prompts, pairs):\n"
        "    return [None if a == b else int(b > a) for a, b in pairs]\n"
    )
    texts_file("a.jsonl", ["z"] * 9 + ["m"] * 3, rows)
    texts_file("b.jsonl", ["m"] * 12, rows)
    run("--completions", "a.jsonl", "--against", "b.jsonl", "--judge", "mine.py:first_word",
        "--reference_column", "none_there")  # fmt: skip
    found, _ = result()
    assert found["figures"]["win_rate"] == 1.0
    assert (found["figures"]["num_decided"], found["figures"]["num_no_verdict"]) == (9, 3)
    assert found["figures"]["rouge"] is None


def test_rouge_against_references_is_a_mean_and_no_win_rate(capsys):
    rows = rows_file()
    texts_file("a.jsonl", [row["completion"] for row in rows[:6]] + ["x"] * 6, rows)
    run("--completions", "a.jsonl", "--judge", "rouge")
    found, _ = result()
    assert found["figures"]["win_rate"] is None
    # the text of one word has no pair of words, so no ROUGE-2
    assert found["figures"]["rouge"] == {"rouge1": 0.5, "rouge2": 5 / 12, "rougeL": 0.5}
    assert "| 50.0 / 41.7 / 50.0 |" in capsys.readouterr().out


def test_samples_of_a_result_are_texts_of_the_next_and_results_share_a_table(capsys):
    rows = rows_file()
    texts_file("a.jsonl", [row["completion"] for row in rows[:9]] + ["w9"] * 3, rows)
    texts_file("b.jsonl", ["w9"] * 12, rows)
    run("--completions", "a.jsonl", "--judge", "rouge")
    argv = ("--completions", "out/samples.jsonl", "--against", "b.jsonl", "--judge", "rouge")
    run(*argv, "--output_dir", "second")
    found, _ = result("second")
    assert (found["figures"]["win_rate"], found["figures"]["num_ties"]) == (1.0, 3)
    capsys.readouterr()
    assert cli.main(["eval", "judge", "--table", "out", "second"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


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


def test_function_that_raises_is_one_sentence_and_the_texts_are_kept(folder, capsys):
    (folder / "mine.py").write_text("def f(prompts, pairs):\n    return [1 // 0]\n")
    texts_file("a.jsonl", ["x"] * 12, rows_file())
    run("--completions", "a.jsonl", "--judge", "mine.py:f", status=2)
    error = capsys.readouterr().err
    assert "the judge f raised ZeroDivisionError: " in error
    assert "(mine.py, line 2) (the texts are kept in out/samples.jsonl: the same comm" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("length", ["125", "5000"], ids=["for one prompt", "for any"])
def test_texts_that_do_not_fit_are_told_with_the_option_of_the_command(capsys, length):
    saved("model", tiny_llama(max_position_embeddings=128))
    with open("rows.jsonl", "w") as file:
        file.write(json.dumps({"prompt": "w1 w2 w3 w4 w5", "completion": "x"}) + "\n")
    run("--model_name_or_path", "model", "--judge", "rouge", "--max_new_tokens", length, status=2)
    error = capsys.readouterr().err
    assert "max_new_tokens" in error
    assert "max_completion_length" not in error


# --- answers outlive a judge that fails


class Dying:
    """`longer`, until it has answered `lives` questions; then 503."""

    def __init__(self, lives=10**6):
        self.lives = lives
        self.answered = []

    def __call__(self, body, headers, number):
        if len(self.answered) == self.lives:
            return 503, {"detail": "gone"}, {}
        self.answered.append(TEXTS.findall(body["messages"][0]["content"]))
        return longer(body, headers, number)


def judge_by(url, *argv, status=0, texts=("--completions", "a.jsonl")):
    run(*texts, "--judge", "openai", "--judge_base_url", url, "--judge_model", "some-judge",
        "--judge_retries", "0", "--judge_concurrency", "1", *argv, status=status)  # fmt: skip


def judged_in_part(rule, *argv):
    """12 pairs in a.jsonl and rows.jsonl, of which the server judges some; its address."""
    rows = rows_file()
    texts_file("a.jsonl", [f"{'x' * (5 * i % 23)}{i}" for i in range(12)], rows)
    with serving(rule) as url:
        judge_by(url, *argv, status=2)
    return url


def again(url, rule, *argv, **options):
    with serving(rule, urlsplit(url).port):
        judge_by(url, *argv, **options)


def test_judge_that_died_is_asked_the_rest_and_the_result_is_that_of_one_that_did_not(capsys):
    first, second, whole = Dying(lives=17), Dying(), Dying()
    url = judged_in_part(first, "--both_orders")
    error = capsys.readouterr().err
    assert "503 gone (17 of 24 answers are kept in out/answers.jsonl: the same command" in error
    judge_by(url, "--both_orders", status=2)  # nobody listens
    assert "give another judge_base_url. (17 of 24 answers" in capsys.readouterr().err
    again(url, second, "--both_orders")
    assert "out/answers.jsonl has 17 answers" in capsys.readouterr().out
    again(url, whole, "--both_orders", "--output_dir", "whole")
    assert len(second.answered) == 7
    assert first.answered + second.answered == whole.answered
    (found, samples), (expected, expected_samples) = result(), result("whole")
    assert samples == expected_samples
    assert found["figures"] == expected["figures"]
    assert 0 < found["figures"]["win_rate"] < 1


@pytest.mark.parametrize(
    "argv", [("--judge_prompt", "p.txt"), ("--judge_kwargs", '{"max_tokens": 5}')]
)
def test_another_template_or_request_is_another_question(argv):
    url = judged_in_part(Dying(lives=5))
    Path("p.txt").write_text(DEFAULT + " So?")
    second = Dying()
    again(url, second, *argv)
    assert len(second.answered) == 12


def test_another_text_is_asked_for():
    first, second = Dying(lives=5), Dying()
    url = judged_in_part(first)
    text = Path("a.jsonl").read_text()
    Path("a.jsonl").write_text(text.replace('"xxxxx1"', '"new"'))
    again(url, second)
    assert len(second.answered) == 8
    assert any("new" in pair for pair in second.answered)


def test_answer_that_is_kept_is_read_with_the_marker_of_now():
    url = judged_in_part(Dying(lives=11))
    second = Dying()
    again(url, second, "--judge_marker", "VERDICT:")
    assert len(second.answered) == 1
    found, _ = result()
    assert found["figures"]["no_verdict"] == {"unreadable": 12}


def test_cut_last_line_is_asked_for_again():
    url = judged_in_part(Dying(lives=5))
    kept = Path("out/answers.jsonl")
    kept.write_bytes(kept.read_bytes()[:-3])
    second = Dying()
    again(url, second)
    assert len(second.answered) == 8
    assert Answers(kept).num_found == 12


def test_damaged_line_is_named():
    Path("answers.jsonl").write_text('{"question": "q", "answer": "1"}\n{"question": "q"}\n')
    with pytest.raises(ValueError, match="line 2: expected an object with 'question' and 'answer'"):
        Answers(Path("answers.jsonl"))


def test_question_asked_twice_has_two_answers():
    for answer in ("0", "1"):
        Answers(Path("answers.jsonl")).add("q", answer)
    answers = Answers(Path("answers.jsonl"))
    assert [answers.take(question) for question in "pqqq"] == [None, "0", "1", None]


def test_answer_is_that_of_one_address_and_model():
    def answer(url, model="some-judge"):
        judge = OpenAIJudge(url, model, answers=Answers(Path("answers.jsonl")))
        return judge(["p"], [("a", "bb")])[0].index

    with serving(longer) as url:
        answer(url)
    assert answer(url) == 1  # nobody listens: it is the one that is kept
    for other in ((url, "other-judge"), (url.replace("127.0.0.1", "localhost"),)):
        with pytest.raises(JudgeError, match="cannot be reached"):
            answer(*other)


def test_refused_question_does_not_stop_a_judge_that_has_answered_others():
    class TooLong(Dying):
        def __call__(self, body, headers, number):
            if "w5 w2" in body["messages"][0]["content"]:
                return 400, {"detail": "too long"}, {}
            return super().__call__(body, headers, number)

    url = judged_in_part(TooLong(lives=5))  # the sixth is not taken, the seventh finds it gone
    again(url, TooLong())
    found, _ = result()
    assert found["figures"]["no_verdict"] == {"refused": 1}
    assert found["figures"]["num_decided"] == 11


def test_interrupt_says_what_is_kept(capsys):
    first, second = Dying(), Dying()
    main_thread = threading.get_ident()

    def interrupting(body, headers, number):
        if number == 5:
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.3)
            return 503, {}, {}
        return first(body, headers, number)

    texts_file("a.jsonl", [f"x{i}" for i in range(12)], rows_file())
    # shells start what runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(interrupting) as url:
            judge_by(url, status=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "5 of 12 answers are kept in out/answers.jsonl" in capsys.readouterr().out
    again(url, second)
    assert len(second.answered) == 7


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


TEXTS_FROM = ("--completions", "a.jsonl")
ROUGE = (*TEXTS_FROM, "--judge", "rouge")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--judge", "rouge"), "one of --model_name_or_path and --completions"),
        ((*TEXTS_FROM, "--judge", "gpt"), "got 'gpt'"),
        ((*TEXTS_FROM, "--judge", "openai"), "--judge openai needs --judge_base_url"),
        ((*ROUGE, "--judge_model", "m"), "--judge_model is not read by --judge rouge"),
        ((*ROUGE, "--num_prompts", "0"), "--num_prompts must be >= 1"),
        ((*ROUGE, "--reference_column", "summary"), "no column 'summary' of references"),
        ((*ROUGE, "--against", "none.jsonl"), "texts none.jsonl: there is no such file"),
        ((*ROUGE, "--against", "./nowhere"), "there is no such directory"),
        (("--completions", "short.jsonl", "--judge", "rouge"), "no line for the prompt 'w5 w2'"),
        (("--completions", "bad.jsonl", "--judge", "rouge"), "bad.jsonl, line 2: expected an obj"),
        ((*TEXTS_FROM, "--judge", "nowhere.py:f"), "could not be loaded: FileNotFoundError"),
        ((*TEXTS_FROM, "--judge", "json:nothing"), "there is no function 'nothing' there"),
        ((*ROUGE, "--judge_promt", "x"), "did you mean --judge_prompt?"),
        ((*ROUGE, "--zzz", "x"), "`rloo-fast eval judge --help` lists every one"),
        ((*ROUGE, "--output_dir", "done"), "done holds a result already"),
        (
            (*TEXTS_FROM, "--judge", "openai", "--judge_model", "m", "--judge_base_url",
             "http://h/v1", "--judge_prompt", "p.txt"),
            "{text0}, {text1} is not there",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(folder, capsys, argv, sentence):
    rows = rows_file()
    texts_file("a.jsonl", ["x"] * 12, rows)
    texts_file("short.jsonl", ["x"] * 5, rows[:5])
    (folder / "bad.jsonl").write_text('{"prompt": "w0 w2", "completion": "x"}\n{"prompt": "p"}\n')
    (folder / "p.txt").write_text("Which? {prompt}")
    (folder / "done").mkdir()
    (folder / "done" / "result.json").write_text("{}")
    run(*argv, status=2)
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_several_texts_of_one_prompt_are_used_in_order(folder):
    rows = [{"prompt": "w1", "completion": text} for text in ("a", "b")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--completions", "rows.jsonl", "--judge", "rouge")
    _, samples = result()
    assert [sample["completion"] for sample in samples] == ["a", "b"]


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
    run(*TEXTS_FROM, "--judge", "mine.py:shorter")
    found, [sample] = result()
    assert (sample["completion"], sample["against"]) == ("w2", "w2 w3")
    assert found["figures"]["win_rate"] == 1.0


def test_help_names_every_option(capsys):
    assert cli.main(["eval", "judge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("judge_base_url", "both_orders", "table"))
    assert max(map(len, shown.splitlines())) <= 120
