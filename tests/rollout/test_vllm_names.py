"""Every name of vLLM's that rloo_fast uses, looked for in the installed vLLM: what a newer one has
renamed or dropped is listed, also where only a GPU or a server would find out.

What is passed is read from rloo_fast itself: an engine's arguments as it starts one, requests from
the source of the server's client.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from rloo_fast.records import Sampling
from rloo_fast.rollout.vllm import colocate as rollout_vllm
from rloo_fast.rollout.vllm import fit as vllm_fit
from rloo_fast.rollout.vllm import model as vllm_model
from rloo_fast.rollout.vllm import package as vllm_package
from rloo_fast.rollout.vllm import sender as vllm_sender
from rloo_fast.rollout.vllm import server as vllm_server
from tests.support.paths import ROOT as PROJECT
from tests.support.tiny import make_model, make_tokenizer, require_vllm

require_vllm()
pytestmark = pytest.mark.vllm

SAMPLING = Sampling(
    temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, max_new_tokens=4,
    stop_token_ids=(1,), stop_strings=("w",),
)  # fmt: skip

# object of vLLM -> what is used of it; a tuple: a call with these arguments
USED = {
    "vllm": ["LLM", "SamplingParams", "sampling_params", "envs", "__version__"],
    "vllm.LLM": [
        ("sleep", "level"), ("wake_up", "tags"), ("apply_model", "func"), "reset_prefix_cache",
    ],
    "vllm.sampling_params": ["StructuredOutputsParams", "RequestOutputKind"],
    "vllm.sampling_params.RequestOutputKind": ["FINAL_ONLY"],
    "vllm.v1.engine.llm_engine.LLMEngine": [
        ("add_request", "request_id", "prompt", "params"), "step", "abort_request",
    ],
    "vllm.v1.engine.core_client.InprocClient": ["shutdown"],
    "vllm.outputs.CompletionOutput": ["token_ids", "logprobs", "finish_reason"],
    "vllm.outputs.RequestOutput": [("__init__", "request_id", "outputs")],
    "vllm.logprobs.Logprob": ["logprob"],
    "vllm.platforms": ["current_platform"],
    "vllm.platforms.current_platform": ["is_cpu"],
    "vllm.model_executor.layers.utils": [
        ("dispatch_cpu_unquantized_gemm", "layer", "remove_weight"),
    ],
    "vllm.config.VllmConfig": ["model_config"],
    "vllm.config.ModelConfig": [
        "quantization", "logprobs_mode", "generation_config", "enable_sleep_mode", "max_model_len",
    ],
    "vllm.distributed.weight_transfer": ["WeightTransferEngineFactory"],
    "vllm.distributed.weight_transfer.WeightTransferEngineFactory": ["register_engine"],
    "vllm.model_executor.layers.fused_moe.oracle.unquantized.UnquantizedMoeBackend": [
        "CPU", *vllm_model.PLAIN_EXPERTS,
    ],
}  # fmt: skip
ENVIRONMENT = (
    "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_SERVER_DEV_MODE",
    "VLLM_MLA_DISABLE", "VLLM_CACHE_ROOT",
)  # fmt: skip
# words that rloo_fast looks for in vLLM's objects -> the file that writes them there
WRITTEN = {
    "unquantized_backend": "model_executor/layers/fused_moe/unquantized_fused_moe_method.py",
    "self.W_UK_T": "model_executor/layers/attention/mla_attention.py",
    "self.model_config": "distributed/weight_transfer/base.py",
    "self.model ": "distributed/weight_transfer/base.py",
    "vllm.general_plugins": "plugins/__init__.py",
}


def resolve(path: str) -> Any:
    """The object at `path`; its longest importable part is a module."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for name in parts[size:]:
            found = getattr(found, name)
        return found
    raise AttributeError(path)


def declared(thing: Any) -> set[str]:
    names = set(getattr(thing, "__annotations__", ()))
    return names | ({field.name for field in fields(thing)} if is_dataclass(thing) else set())


def missing_objects(used: dict[str, list[Any]]) -> Iterator[str]:
    for path, names in used.items():
        try:
            thing = resolve(path)
        except AttributeError:
            yield path
            continue
        for name in names:
            name, *arguments = (name,) if isinstance(name, str) else name
            if name not in declared(thing) and not hasattr(thing, name):  # or made on first use
                yield f"{path}.{name}"
                continue
            if arguments:
                takes = inspect.signature(getattr(thing, name)).parameters
                yield from (f"{path}.{name}({a}=)" for a in arguments if a not in takes)


def missing_words(written: dict[str, str]) -> Iterator[str]:
    for word, path in written.items():
        file = ROOT / path
        if not file.is_file() or word not in file.read_text():
            yield f"{word} in {path}"


ROOT = Path(importlib.import_module("vllm").__file__ or "").parent


# --- arguments of an engine


class Started(BaseException):
    """In place of a vLLM that starts."""


def arguments_of_llm(monkeypatch, tmp_path, on_cpu: bool) -> dict[str, Any]:
    def start(**settings):
        raise Started(settings)

    fake = SimpleNamespace(LLM=start, envs=SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path)))
    monkeypatch.setattr(rollout_vllm, "import_vllm", lambda: fake)
    monkeypatch.setattr(rollout_vllm, "runs_on_cpu", lambda: on_cpu)
    several = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(rollout_vllm, "dist", several)
    with pytest.raises(Started) as started:
        rollout_vllm.VLLMEngine(
            make_model(), dtype=torch.float32, sleeps=True, tokenizer=make_tokenizer()
        )
    return started.value.args[0]


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "GPU"])
def test_arguments_of_llm(on_cpu, monkeypatch, tmp_path):
    from vllm import LLM
    from vllm.config.kernel import MoEBackend
    from vllm.config.model import LogprobsMode
    from vllm.config.parallel import DistributedExecutorBackend
    from vllm.engine.arg_utils import EngineArgs

    given = arguments_of_llm(monkeypatch, tmp_path, on_cpu)
    known = {field.name for field in fields(EngineArgs)} | set(inspect.signature(LLM).parameters)
    assert len(given) > 15
    assert sorted(given.keys() - known) == []
    values = {
        "logprobs_mode": LogprobsMode,
        "moe_backend": MoEBackend,
        "distributed_executor_backend": DistributedExecutorBackend,
    }
    for name, allowed in values.items():
        assert given.get(name) in (None, *get_args(allowed)), name


def test_sampling_params_take_what_is_asked_for():
    engine: Any = object.__new__(rollout_vllm.VLLMEngine)
    engine._vllm, engine.regex = resolve("vllm"), "a+"
    made = engine._params(SAMPLING, 3, 1)
    expected = {**rollout_vllm.sampling_fields(SAMPLING), "seed": 3}
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.structured_outputs.regex == "a+"


# --- requests to a server


class Request(NamedTuple):
    method: str  # get or post
    path: str
    names: tuple[str, ...]  # of its query and body


def requests() -> list[Request]:
    """Those in the sources of the server's client."""
    found = []
    sources = map(inspect.getsource, (vllm_server, vllm_sender, vllm_fit))
    for node in (node for text in sources for node in ast.walk(ast.parse(text))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        method = {"_by_main_process": "post"}.get(node.func.attr, node.func.attr)
        if method not in ("get", "post") or not node.args:
            continue
        text = re.sub(r"{.*?}", "0", ast.unparse(node.args[0]).removeprefix("f").strip("'\""))
        if text.startswith("/"):
            parts = urlsplit(text)
            names = [*parse_qs(parts.query), *(k.arg for k in node.keywords if k.arg)]
            found.append(Request(method, parts.path, tuple(names)))
    return found


def handlers() -> dict[tuple[str, str], str]:
    """(method, path) -> source of vLLM's function that answers."""
    found = {}
    for file in (ROOT / "entrypoints").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for route in node.decorator_list:
                if isinstance(route, ast.Call) and isinstance(route.func, ast.Attribute):
                    path = route.args[0] if route.args else None
                    if isinstance(path, ast.Constant):
                        found[route.func.attr, path.value] = ast.unparse(node)
    return found


def missing_endpoints(asked: list[Request]) -> Iterator[str]:
    answered = handlers()
    for method, path, names in asked:
        if path in ("/openapi.json", "/v1/completions"):  # FastAPI's own; a model has the fields
            continue
        source = answered.get((method, path))
        if source is None:
            yield f"{method.upper()} {path}"
            continue
        yield from (
            f"{method.upper()} {path}: {n}" for n in names if not re.search(rf"\b{n}\b", source)
        )


def test_fields_of_requests_and_answers():
    from vllm.entrypoints.openai.completion.protocol import (
        CompletionLogProbs,
        CompletionRequest,
        CompletionResponse,
        CompletionResponseChoice,
    )

    engine: Any = object.__new__(vllm_server.VLLMServer)
    engine._fields, engine._sends_adapter = set(), False
    sent = engine._request_fields(SAMPLING, 1).keys() | vllm_server.RESERVED
    assert sorted(sent - CompletionRequest.model_fields.keys()) == []
    assert "choices" in CompletionResponse.model_fields
    choice = {"token_ids", "finish_reason", "logprobs"}
    assert choice <= CompletionResponseChoice.model_fields.keys()
    assert "token_logprobs" in CompletionLogProbs.model_fields
    assert ("post", "/v1/completions") in handlers()


def test_options_of_the_servers_command():
    from vllm.engine.arg_utils import EngineArgs

    options = {*re.findall(r"--([a-z-]+)", vllm_server.COMMAND), "enable-sleep-mode"}
    options |= {"max-model-len", "dtype", "quantization"}  # in errors and in docs/rollouts.md
    known = {field.name.replace("_", "-") for field in fields(EngineArgs)}
    assert len(options) == 7
    assert sorted(options - known) == []


def test_the_plugin_is_a_whole_engine():
    from rloo_fast.rollout.vllm.plugin import PulledWeights

    assert sorted(PulledWeights.__abstractmethods__) == []
    base = PulledWeights.__mro__[1]
    for name in base.__abstractmethods__:
        assert list(inspect.signature(getattr(PulledWeights, name)).parameters) == list(
            inspect.signature(getattr(base, name)).parameters
        ), name


# --- the rest, and that the search finds


def test_nothing_that_is_used_is_missing():
    from vllm import envs
    from vllm.v1.engine import FINISH_REASON_STRINGS

    gone = [*missing_objects(USED), *missing_words(WRITTEN), *missing_endpoints(requests())]
    gone += sorted(set(ENVIRONMENT) - envs.environment_variables.keys())
    gone += sorted(rollout_vllm.REASONS.keys() - set(FINISH_REASON_STRINGS))
    assert gone == []


def test_the_extra_names_the_versions_that_this_was_held_against():
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    [need] = [Requirement(text) for text in extras["optional-dependencies"]["vllm"]]
    oldest, beyond = sorted(spec.version for spec in need.specifier)
    assert {spec.operator for spec in need.specifier} == {">=", "<"}
    assert oldest == vllm_package.OLDEST
    assert Version(resolve("vllm").__version__) in need.specifier, f"try vLLM {beyond}"


def test_what_is_missing_is_named():
    assert list(missing_objects({"vllm.LLM": ["awake", ("sleep", "depth")], "vllm.Gone": []})) == [
        "vllm.LLM.awake", "vllm.LLM.sleep(depth=)", "vllm.Gone",
    ]  # fmt: skip
    assert list(missing_words({"no such word": "envs.py", "a": "gone.py"})) == [
        "no such word in envs.py", "a in gone.py",
    ]  # fmt: skip
    asked = requests()
    paths = {request.path for request in asked}
    assert {"/sleep", "/wake_up", "/update_weights", "/health"} <= paths
    assert vllm_server.COMPLETIONS == "/v1/completions"
    assert ("update_info",) in [request.names for request in asked]
    found = missing_endpoints([Request("get", "/sleep", ()), Request("post", "/sleep", ("deep",))])
    assert list(found) == ["GET /sleep", "POST /sleep: deep"]
