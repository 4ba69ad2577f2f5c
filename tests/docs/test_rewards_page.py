"""What docs/rewards.md shows runs, and gives what it says."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rloo_fast import RLOOConfig
from rloo_fast.cli.arguments import TrainArguments, build
from rloo_fast.cli.input import read_yaml
from rloo_fast.cli.options import options_of
from rloo_fast.rewards import BUILTINS, load_reward_functions
from tests.rewards.test_models import encoder_tokenizer, make_decoder, make_encoder, saved

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
PYTHON, YAML = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "yaml"))
OPTIONS = options_of(TrainArguments, RLOOConfig)


def title(code: str) -> str:
    """Its first definition, or the first line."""
    return (re.findall(r"(?:def|class) (\w+)", code) or code.splitlines())[0]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The two reward models of the page, in the current directory."""
    monkeypatch.chdir(tmp_path)
    encoder = make_encoder()
    encoder.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    saved(tmp_path / "models" / "sentiment", encoder, encoder_tokenizer())
    saved(tmp_path / "models" / "tldr", make_decoder())


@pytest.mark.parametrize("code", PYTHON, ids=title)
def test_an_example_gives_what_its_comments_say(code, models):
    pairs: list = []
    checked = re.sub(r"^(\S.*?)  # -> (.*)$", r"pairs.append((\1, \2))", code, flags=re.MULTILINE)
    exec(checked, {"pairs": pairs})
    assert pairs or "JUDGE" in code  # which has a test of its own
    for got, said in pairs:
        assert got == said


@pytest.mark.parametrize("code", PYTHON, ids=title)
def test_an_example_has_ten_lines(code):
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10


@pytest.mark.parametrize("text", YAML, ids=lambda text: text.splitlines()[0])
def test_a_recipe_is_understood(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    given = read_yaml(tmp_path / "recipe.yaml", OPTIONS)
    needed = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": str(tmp_path)}
    script, config = build({**needed, "use_cpu": True, "bf16": False, **given})
    names = [name for name in script.reward_funcs or [] if name in BUILTINS]
    kwargs = {name: a for name, a in (config.reward_kwargs or {}).items() if name in names}
    if names:
        loaded = load_reward_functions(
            names, reward_kwargs=kwargs, weights=config.reward_weights,
            execute_model_code=config.execute_model_code,
        )  # fmt: skip
        assert loaded.names == names


class Judge(BaseHTTPRequestHandler):
    """Scores a text by its number of characters."""

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        body = json.dumps({"score": len(text)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        return


def test_the_judge_asks_its_server():
    (code,) = [code for code in PYTHON if "JUDGE" in code]
    names: dict = {}
    exec(code, names)
    server = HTTPServer(("127.0.0.1", 0), Judge)
    names["JUDGE"] = f"http://127.0.0.1:{server.server_port}/score"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        scores = asyncio.run(names["judge"](prompts=["ab", "c"], completions=["cd", ""]))
    finally:
        server.shutdown()
        server.server_close()
    assert scores == [4, 1]


def test_the_table_has_every_builtin_and_no_other():
    table = PAGE.split("## Those that come with it")[1].split("## Examples")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(BUILTINS)


def test_the_settings_it_names_are_there():
    named = re.findall(r"`((?:reward_|rollout_|overlap_|execute_)\w+)", PAGE)
    assert {*named} <= {*OPTIONS}
    assert len({*named}) > 10
