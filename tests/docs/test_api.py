"""docs/api.md is what docs/generate_api.py writes, and has every public name."""

from __future__ import annotations

import re
import runpy

import pytest
import rloo_kernels

import rloo_fast
from rloo_fast import judges
from rloo_fast.config.fields import OWN_PARTS
from rloo_fast.config.names_2024 import Names2024
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()


def test_the_page_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "generate_api.py"))["page"]()
    assert made == PAGE, "a docstring or field has changed: run `python docs/generate_api.py`"


@pytest.mark.parametrize("name", [*rloo_fast.__all__, *rloo_kernels.__all__, *judges.__all__])
def test_a_public_name_has_an_entry(name):
    assert f"\n### {name}\n" in PAGE


def test_its_table_has_our_fields_and_trl_s_and_none_of_transformers():
    own = PAGE.split("### RLOOConfig")[1].split("\n## ")[0]
    fields = {*re.findall(r"^\| `(\w+)` \|", own, re.MULTILINE)}
    assert {"num_generations", "beta", "layout", "kl_coef", "learning_rate"} <= fields
    assert not {"adam_beta1", "warmup_steps", "max_steps"} & fields
    parts = (*OWN_PARTS, Names2024)
    declared = {name for part in parts for name in part.__annotations__}
    assert declared - fields == {"_VALID_DICT_FIELDS", "_micro_steps_in_run"}
    assert fields <= declared
