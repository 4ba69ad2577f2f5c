"""Models from directories and hub ids whose every weight was in the files, whole and finite.

transformers starts what is missing at random, with a table in the log.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config.paths import user_path
from ..distributed.pickles import foreign_object

LFS_POINTER = b"version https://git-lfs"


def load_whole(auto: Any, name: str, what: str, **kwargs: Any) -> Any:
    """auto.from_pretrained(name, **kwargs) with every weight as the files have it.

    `what` the model is for, as messages say it. With ignore_mismatched_sizes=True, weights of
    another shape start at random, as transformers offers. Raises ValueError that names the file or
    the weights; out of memory and libraries that are not installed stay errors of their own.
    """
    model, found = load_with_info(auto, name, what, **kwargs)
    check_whole(model, found, name, what, may_differ=bool(kwargs.get("ignore_mismatched_sizes")))
    return model


def load_with_info(
    auto: Any, name: str, what: str, **kwargs: Any
) -> tuple[Any, dict[str, Collection[Any]]]:
    """The model, and transformers' loading info; weights of another shape are among it."""
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        return auto.from_pretrained(name, **kwargs)
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # readers of a dozen formats, each with errors of its own
        why = damage(user_path(name)) or f"{_text(error)}."
        raise ValueError(f"{what} {name!r} cannot be loaded: {why}") from error


def check_whole(
    model: Any, found: dict[str, Collection[Any]], name: str, what: str, *, may_differ: bool
) -> None:
    """Raise ValueError for weights that are missing, of another shape, integers or not finite."""
    differing = [] if may_differ else [key for key, *_ in found.get("mismatched_keys", ())]
    directory = user_path(name)
    lists = {
        "lack {} (missing weights would start at random)": found["missing_keys"],
        "have another shape for {}": differing,
        "hold integers for {}": _read_from_integers(model, directory),
        "hold a NaN or an infinity in {}": not_finite(model),
    }
    if wrong := [verb.format(some(names)) for verb, names in lists.items() if names]:
        raise ValueError(
            f"{what} {name!r}: its files {', and '.join(wrong)}. Give a whole directory, or load "
            "the model yourself and pass it as an object."
        )
    generation = directory / "generation_config.json"  # if damaged, transformers makes up another
    if generation.exists() and (why := _damage_of(generation)):
        raise ValueError(f"{what} {name!r}: {generation.name} {why}. Mend it, or delete it.")


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity; one pass over them.

    Of a model split by ZeRO-3, those of this process' parts.
    """
    found = []
    for name, parameter in model.named_parameters():
        part: Any = getattr(parameter, "ds_tensor", parameter)
        if part.is_floating_point() and part.itemsize > 1 and part.numel() and not part.is_meta:
            low, high = torch.aminmax(part)  # no tensor of that size is made; a NaN is both
            if not (low.isfinite() and high.isfinite()):
                found.append(name)
    return found


def _read_from_integers(model: Any, directory: Path) -> list[str]:
    """Parameters of floating-point numbers whose file says that it holds integers."""
    if getattr(model, "is_quantized", False):
        return []
    expected = {name for name, p in model.named_parameters() if p.is_floating_point()}
    found = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            dtypes = {n: file.get_slice(n).get_dtype() for n in expected.intersection(file.keys())}
        found += [n for n, dtype in dtypes.items() if dtype.startswith(("I", "U", "BOOL"))]
    return found


def some(names: Collection[str]) -> str:
    """The first three."""
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + f" and {more} more" * (more > 0)


# What is wrong with a directory that could not be loaded


def damage(directory: Path) -> str | None:
    """A sentence about the first damaged file of a model or an adapter; None: all can be read."""
    if not directory.is_dir():
        return None
    for path in sorted(directory.iterdir()):
        if why := _damage_of(path):
            return f"{path.name} {why}: get the directory again."
    return None


def _damage_of(path: Path) -> str | None:
    read = {".json": _read_json, ".safetensors": _read_safetensors, ".bin": foreign_object}
    if path.suffix not in read:
        return None
    try:
        if not path.is_file():
            return "is no file"
        with path.open("rb") as file:
            beginning = file.read(len(LFS_POINTER))
        if not beginning:
            return "is empty"
        if beginning == LFS_POINTER:
            return "is a pointer of Git LFS, not the file it stands for (git lfs pull)"
        return read[path.suffix](path)
    except Exception as error:
        return f"is damaged ({_text(error)})"


def _read_json(path: Path) -> str | None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not path.name.endswith(".index.json"):
        return None
    for name in sorted(set(content["weight_map"].values())):
        if Path(name).name != name:
            return f"names {name!r}, which is no file beside it"
        if not path.with_name(name).is_file():
            return f"names {name!r}, which is missing"
    return None


def _read_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"is damaged, or was cut ({_text(error).removeprefix('SafetensorError: ')})"


def _text(error: BaseException) -> str:
    """On one line: of errors for users all of it, of others kind and first sentence."""
    text = " ".join(str(error).split()).rstrip(".: ")
    if type(error) in (OSError, ValueError):
        return text
    return f"{type(error).__name__}: {text.split('. ')[0]:.200}" if text else type(error).__name__
