"""Models, servers and commands for the tests of judges."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rloo_fast import cli
from tests.support.tiny import make_tokenizer

KEY = "sk-loopback-0123456789"

TEXTS = re.compile(r'<summary id="\d">\n(.*?)\n</summary>', re.DOTALL)


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
    server.handle_error = lambda request, address: None  # a client that has gone is no news
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def longer(body, headers, number):
    first, second = TEXTS.findall(body["messages"][0]["content"])
    return 200, str(int(len(second) > len(first))), {}


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
