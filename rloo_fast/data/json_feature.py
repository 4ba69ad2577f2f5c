"""A column of JSON values that come back exactly as they went in.

datasets' own Json reads numbers with ujson, which rounds floats (1/3) and makes text of integers
of more than 64 bits, and takes a text that is JSON ("5") for the value that it spells.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow
from datasets.features.features import register_feature
from datasets.table import array_cast


@dataclass
class ExactJson:
    """A feature of datasets: stored as JSON text, written and read by Python's json."""

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pyarrow.string()
    _type: str = field(default="RLOOExactJson", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value)

    def decode_example(self, stored: str | None, token_per_repo_id: Any = None) -> Any:
        return None if stored is None else json.loads(stored)

    def cast_storage(self, storage: Any) -> Any:
        return array_cast(storage, self.pa_type)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # datasets calls it experimental
    register_feature(ExactJson, "RLOOExactJson")
