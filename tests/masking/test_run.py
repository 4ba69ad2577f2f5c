"""Runs with secrets planted wherever one may be given: every byte that they leave is searched."""

from __future__ import annotations

import base64
import copy
import dataclasses
import html
import json
import logging
import pickle
import zipfile
from urllib.parse import quote

import pytest
import torch

from rloo_fast import RLOOConfig, cli
from rloo_fast.masking import known
from tests.support.commands import tiny_llama

ODD = "/+é'\"\\x"  # what URLs, JSON, repr and shells escape
SECRETS = {
    "api_key": f"pL4nt-api-0a1b2c3d4e5f6g7h{ODD}",
    "header": f"pL4nt-header-1a2b3c4d5e6f7g8h{ODD}",
    "cookie": "pL4nt-cookie-9z8y7x6w5v4u",
    "password in a URL": "pL4nt-pw-0q1w2e3r",
    "token in a query": "pL4nt-query-1a2s3d4f",
    "nested": f"pL4nt-nested-2b3c4d5e6f7g8h9i{ODD}",
    "hub_token": "hf_" + "aB3dE5gH7jK9" * 3,
    "token of model_init_kwargs": "hf_" + "zY8xW6vU4tS2" * 3,
    "environment": f"pL4nt-env-3c4d5e6f7g8h9i0j{ODD}",
    "password of a proxy": "pL4nt-proxy-1q2w3e4r",
    "in an error": f"pL4nt-raised-4d5e6f7g8h9i0j1k{ODD}",
    "unfinished": "pL4nt-cut-5e6f7g8h9i0j1k2l",
}
REWARDS = """
import logging, os, sys

def score(completions, api_key, headers, url, nested, log_extra, trainer_state, fail=False, **kw):
    print("asked with", api_key, headers)
    print(url, file=sys.stderr)
    logging.getLogger("rloo_fast.mine").warning("nested is %s", nested)
    log_extra("said", [f"{api_key} {url}" for _ in completions])
    if fail and trainer_state.global_step == 1:
        raise ValueError(f"401 for {api_key!r} at {url}: {headers} {os.environ['SOME_API_KEY']}")
    return [float(len(text)) for text in completions]

class Remote:
    def __init__(self, password):
        raise ValueError(f"cannot log in with {password}")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "_met", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("SOME_API_KEY", SECRETS["environment"])
    monkeypatch.setenv("all_proxy", f"http://me:{SECRETS['password of a proxy']}@localhost:1")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "run/board")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    tiny_llama("model")
    rows = [{"prompt": f"w{row} w{row + 1}"} for row in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "recipe.yaml").write_text(
        f"hub_token: {SECRETS['hub_token']}\n"
        f"model_init_kwargs: {{token: {SECRETS['token of model_init_kwargs']}}}\n"
    )
    return tmp_path


def arguments(**more):
    url = f"https://me:{SECRETS['password in a URL']}@h/v1?token={SECRETS['token in a query']}&n=3"
    headers = {"X-Own": SECRETS["header"], "Cookie": SECRETS["cookie"], "Accept": "text/plain"}
    nested = [{"deep": {"client_secret": SECRETS["nested"]}}]
    return {"api_key": SECRETS["api_key"], "headers": headers, "url": url, "nested": nested, **more}


def train(out, kwargs, capsys, *more, reward="my_rewards.py:score"):
    """(exit status, what was printed) of a run of two steps with a checkpoint of each."""
    text = kwargs if isinstance(kwargs, str) else json.dumps({reward: kwargs})
    capsys.readouterr()
    status = cli.main([
        "train", "--config", "recipe.yaml", "--model_name_or_path", "model",
        "--dataset_name", "rows.jsonl", "--reward_funcs", reward, "--reward_kwargs", text,
        "--output_dir", out, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1",
        "--per_device_train_batch_size", "4", "--num_generations", "2", "--use_cpu",
        "--max_completion_length", "4", "--logging_steps", "1", "--report_to", "tensorboard",
        "--log_completions", "--log_completions_csv", *more,
    ])  # fmt: skip
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def spellings(secret):
    data = secret.encode()
    yield from (secret, repr(secret)[1:-1], repr(data)[2:-1], html.escape(secret), data.hex())
    yield from (quote(secret), quote(secret, safe=""), json.dumps(json.dumps(secret))[3:-3])
    yield from (json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
    for before in range(3):
        end = (before + len(data)) // 3 * 4
        yield base64.b64encode(bytes(before) + data).decode()[4:end]
    yield from (secret[: len(secret) // 2], secret[-len(secret) // 2 :])


def found_in(data: bytes) -> set[str]:
    return {
        name
        for name, secret in SECRETS.items()
        if any(spelling.encode() in data for spelling in spellings(secret))
    }


def everything_in(path) -> bytes:
    """The bytes of a file; of a pickle, what it unpickles to as well."""
    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data += b"".join(map(archive.read, archive.namelist()))
        loaded = torch.load(path, weights_only=False)
        data += repr(getattr(loaded, "__dict__", loaded)).encode()
    return data


def test_a_run_leaves_no_secret(folder, capsys):
    pytest.importorskip("tensorboard")
    status, printed = train("run/good", arguments(), capsys)
    assert status == 0
    assert "asked with <masked>" in printed
    failed, said = train("run/bad", arguments(fail=True), capsys)
    assert failed == 1
    assert "401 for '<masked>'" in said
    files = [path for path in folder.glob("run/**/*") if path.is_file()]
    names = {path.name for path in files}
    assert {"README.md", "training_args.bin", "completions.csv", "trainer_state.json"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert any(name.startswith("rloo-fast-") for name in names)  # the traceback
    assert {str(p): found for p in files if (found := found_in(everything_in(p)))} == {}
    assert found_in(printed.encode()) == found_in(said.encode()) == set()
    readme = (folder / "run/good/README.md").read_text()
    assert '"X-Own": "<masked>"' in readme
    assert '"Accept": "text/plain"' in readme

    saved = torch.load("run/good/training_args.bin", weights_only=False)
    assert isinstance(saved, RLOOConfig)
    assert saved.hub_token is None
    with pytest.raises(ValueError, match=r"'token'\] is '<masked>': a secret that was left out"):
        saved.settle()
    status, printed = train("run/good", arguments(), capsys, "--resume_from_checkpoint", "last",
                            "--max_steps", "3")  # fmt: skip
    assert status == 0
    assert (folder / "run/good/checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("kwargs", "more", "reward", "sentence"),
    [
        ({"password": SECRETS["in an error"]}, (), "my_rewards.py:Remote", "cannot log in with"),
        (f'{{"f": {{"api_key": "{SECRETS["unfinished"]}{"z" * 90}', (), "length", "a mapping"),
        (f"token={SECRETS['unfinished']}", (), "length", "expected a mapping"),
        (json.dumps({"length": f"api_key={SECRETS['unfinished']}"}), (), "length", "a dict of d"),
        ({}, ("--api_key", SECRETS["unfinished"]), "length", "unknown option --api_key"),
        ({}, ("--top_k", f"token={SECRETS['unfinished']}"), "length", "top_k: expected"),
        ({}, ("--dataset_name", f"https://me:{SECRETS['unfinished']}@h/x.jsonl"), "length", ""),
        ({}, ("--resume_from_checkpoint", f"/x?token={SECRETS['unfinished']}"), "length", ""),
        ({}, (SECRETS["hub_token"],), "length", ""),
    ],
)
def test_a_mistake_is_said_without_the_secret(folder, capsys, kwargs, more, reward, sentence):
    status, printed = train("run/none", kwargs, capsys, *more, reward=reward)
    assert status == 2
    assert sentence in printed
    assert found_in(printed.encode()) == set()


def test_an_error_that_nobody_catches_is_printed_without_secrets(folder, capsys, monkeypatch):
    from rloo_fast.cli.failures import print_masked

    try:
        raise KeyError(SECRETS["environment"])
    except KeyError as error:
        print_masked(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "KeyError" in printed
    assert found_in(printed.encode()) == set()


# --- the configuration


def config(tmp_path, **more):
    return RLOOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **more)


def test_a_configuration_shows_no_secret_and_keeps_it(folder):
    given = {"f.py:f": arguments()}
    args = config(folder, reward_kwargs=given, hub_token=SECRETS["hub_token"])
    shown = (repr(args), str(args), json.dumps(args.to_dict(), default=str), args.to_json_string(),
             str(args.to_sanitized_dict()))  # fmt: skip
    assert found_in("\n".join(shown).encode() + pickle.dumps(args)) == set()
    for same in (args, copy.copy(args), copy.deepcopy(args), dataclasses.replace(args)):
        assert same.reward_kwargs == given
        assert same.hub_token == SECRETS["hub_token"]


def test_a_subclass_shows_no_secret(folder):
    @dataclasses.dataclass
    class Mine(RLOOConfig):
        service_password: str = ""

    args = Mine(str(folder), use_cpu=True, service_password=SECRETS["api_key"])
    assert "service_password='<masked>'" in repr(args)
    assert found_in(repr(args).encode()) == set()


def test_what_was_masked_is_asked_for_again(folder):
    args = config(folder, reward_kwargs={"f.py:f": {"api_key": SECRETS["api_key"]}})
    sentence = r"reward_kwargs\['f.py:f'\]\['api_key'\] is '<masked>': .* Give it again"
    with pytest.raises(ValueError, match=sentence):
        RLOOConfig(**args.to_dict())
    loaded = pickle.loads(pickle.dumps(args))
    with pytest.raises(ValueError, match=sentence):
        loaded.settle()
    loaded.reward_kwargs = args.reward_kwargs
    loaded.settle()


def test_a_configuration_without_secrets_is_pickled_as_it_is(folder):
    args = config(folder, model_init_kwargs={"dtype": "float32"}, stop_token="eos", max_steps=3)
    loaded = pickle.loads(pickle.dumps(args))
    assert loaded.to_dict() == args.to_dict()
    loaded.settle()


def test_an_error_of_the_configuration_has_no_secret(folder):
    with pytest.raises(ValueError, match="must be a dict") as caught:
        config(folder, reward_kwargs=[{"api_key": SECRETS["api_key"]}])
    assert found_in(str(caught.value).encode()) == set()


def test_log_lines_have_no_secrets(folder, capsys):
    from rloo_fast.cli.train import _ToStderr

    record = logging.LogRecord("x", logging.INFO, "f", 1, "key %r", (SECRETS["environment"],), None)
    _ToStderr().emit(record)
    assert capsys.readouterr().err == "info: key '<masked>'\n"
