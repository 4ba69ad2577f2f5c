"""The version and the address of the project are the same wherever they are written."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
REPOSITORY = PROJECT["urls"]["Repository"]


def test_the_citation_has_the_version_and_repository_of_the_package():
    assert CITATION["version"] == PROJECT["version"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["repository-code"] == REPOSITORY


def test_the_citation_has_what_its_format_asks_for():
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()


def test_the_changelog_has_this_version_below_the_next():
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] in sections[:2]


def test_addresses_within_the_repository_lead_to_files():
    pages = re.findall(
        rf"{re.escape(REPOSITORY)}/blob/main/(\S+)", "\n".join(PROJECT["urls"].values())
    )
    assert len(pages) == 2
    assert all((ROOT / page).is_file() for page in pages)
