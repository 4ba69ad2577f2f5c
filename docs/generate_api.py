"""Writes docs/api.md: the public names with their signatures and docstrings.

    python docs/generate_api.py

Signatures are the source's, docstrings are quoted as they are. A test fails while the page is not
what this script would write.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

from rloo_fast.config.fields import OWN_PARTS
from rloo_fast.config.names_2024 import Names2024

PAGE = Path(__file__).with_name("api.md")
WIDTH = 92
LONGEST_DEFAULT = 60  # characters of a default value; longer ones, such as a judge's prompt: ...

INTRODUCTION = """\
# API reference

The public names, with their docstrings as they stand in the source. This page is written by
`python docs/generate_api.py`; change the docstring, not the page.
"""

# (heading, what it is for, module, names; None: all of __all__ that is defined nowhere above)
PARTS: list[tuple[str, str, str, list[str] | None]] = [
    (
        "rloo_fast",
        "The trainer. What `rloo_kernels` exports can be imported from here as well.",
        "rloo_fast",
        ["RLOOTrainer", "RLOOConfig"],
    ),
    (
        "rloo_kernels",
        "The loss as ops; needs torch alone. [Only the loss](fused-loss.md) has an example.",
        "rloo_kernels",
        None,
    ),
    (
        "rloo_fast.rewards",
        "For reward functions and reward models outside a run, see [Rewards](rewards.md).",
        "rloo_fast.rewards",
        ["load_reward_functions", "load_reward_model", "completion_text"],
    ),
    (
        "rloo_fast.sandbox",
        "Running what a model wrote, see [The sandbox](sandbox.md).",
        "rloo_fast.sandbox",
        None,
    ),
    (
        "rloo_fast.judges",
        "How often texts are preferred, see [Judging](judging.md).",
        "rloo_fast.judges",
        None,
    ),
]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for heading, purpose, module_name, chosen in PARTS:
        module = importlib.import_module(module_name)
        parts.append(f"## {heading}\n\n{purpose}\n")
        for name in chosen or module.__all__:
            parts.append(entry(name, getattr(module, name)))
    return "\n".join(parts)


def entry(name: str, value: Any) -> str:
    """A heading, the signature, the docstring; fields of a configuration, methods of a class."""
    parts = [f"### {name}\n"]
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        shown = repr(value) if isinstance(value, str) else annotation(value)
        if isinstance(value, dict):
            shown = "{" + ", ".join(f"{key!r}: {type(value[key]).__name__}(...)" for key in value)
            shown += "}"
        return "\n".join([*parts, f"```text\n{name} = {shown}\n```\n"])
    if name == "RLOOConfig":
        return "\n".join([*parts, text(value), fields(value)])
    if not (inspect.isclass(value) and issubclass(value, BaseException)):
        shown = record(value) if is_record(value) else head(name, value)
        parts.append(f"```python\n{shown}\n```\n")
    parts.append(text(value))
    if inspect.isclass(value):
        parts += [method(name, *item) for item in public_methods(value)]
    return "\n".join(parts)


def head(name: str, value: Any) -> str:
    """`def name(...) -> ...`, one parameter per line where it does not fit; of a class without."""
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    items, kinds = [], [parameter.kind for parameter in parameters]
    for i, parameter in enumerate(parameters):
        if parameter.name == "self":
            continue
        first_keyword = (
            parameter.kind is parameter.KEYWORD_ONLY and kinds.index(parameter.kind) == i
        )
        if first_keyword and parameter.VAR_POSITIONAL not in kinds:
            items.append("*")
        items.append(argument(parameter))
    result = ""
    if not inspect.isclass(value) and signature.return_annotation is not signature.empty:
        result = f" -> {annotation(signature.return_annotation)}"
    start = name if inspect.isclass(value) else f"def {name}"
    line = f"{start}({', '.join(items)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{start}(\n" + "".join(f"    {item},\n" for item in items) + f"){result}"


def is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or hasattr(value, "_fields")


def record(value: type) -> str:
    """The fields of a dataclass or named tuple with the comments that stand behind them."""
    source = textwrap.dedent(inspect.getsource(value))
    lines, (definition,) = source.splitlines(), ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    shown = [f"class {value.__name__}:"]
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            shown += lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(shown)


def argument(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    shown = stars.get(parameter.kind, "") + parameter.name
    typed = parameter.annotation is not parameter.empty
    if typed:
        shown += f": {annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        default = repr(parameter.default)
        default = default if len(default) <= LONGEST_DEFAULT else "..."
        shown += f" = {default}" if typed else f"={default}"
    return shown


def annotation(value: Any) -> str:
    """As in the source; most modules keep their annotations as strings."""
    if isinstance(value, str):
        return value
    shown = getattr(value, "__forward_arg__", None) or inspect.formatannotation(value)
    return shown.replace("collections.abc.", "").replace("typing.", "")


def text(value: Any) -> str:
    """The docstring, verbatim: its tables and equations are plain text. Not what it inherits."""
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    generated = inspect.isclass(value) and (own or "").startswith(f"{value.__name__}(")
    if not own or generated:  # a dataclass or named tuple without one: its signature says it all
        return ""
    return f"```text\n{inspect.cleandoc(own)}\n```\n"


def public_methods(owner: type) -> list[tuple[str, Any]]:
    """Methods with a docstring that the class itself defines, in the order of the source."""
    return [
        (name, value)
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and value.__doc__ and not name.startswith("_")
    ]


def method(owner: str, name: str, value: Any) -> str:
    return f"#### {owner}.{name}\n\n```python\n{head(name, value)}\n```\n\n{text(value)}"


def fields(config: type) -> str:
    """What RLOOConfig adds to transformers' TrainingArguments, or gives another default."""
    known = {f.name: f for f in dataclasses.fields(config) if f.init}
    # not Field.type, which transformers' HfArgumentParser overwrites
    own, old = (
        [
            (known[name], kind)
            for part in parts
            for name, kind in part.__annotations__.items()
            if name in known
        ]
        for parts in (OWN_PARTS, (Names2024,))
    )
    return (
        "Fields of its own, of TRL's, and those of transformers that have another default:\n\n"
        f"{table(own)}\nNames of TRL's 2024 trainer:\n\n{table(old)}"
    )


def table(some: list[tuple[dataclasses.Field, str]]) -> str:
    lines = ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for field, kind in some:
        help_text = field.metadata.get("help", "").replace("%%", "%")
        cells = [f"`{field.name}`", f"`{annotation(kind)}`", f"`{field.default!r}`"]
        lines.append(" | ".join(["", *[c.replace("|", r"\|") for c in (*cells, help_text)], ""]))
    return "\n".join(line.strip() for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(PAGE.read_text(encoding='utf-8').splitlines())} lines")
