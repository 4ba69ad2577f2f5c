"""Every link of every page leads somewhere: to a file or folder, and to a heading of it."""

from __future__ import annotations

import re

import pytest

from tests.support.pages import PAGES, Link, anchors, links, name_of
from tests.support.paths import ROOT

LINKS = list(links())


def test_there_are_pages_and_links():
    names = {name_of(page) for page in PAGES}
    assert {"README.md", "docs/index.md", "kernels/README.md", "CONTRIBUTING.md"} <= names
    assert len(LINKS) > 100


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_a_link_leads_to_a_file_and_a_heading(link: Link):
    path, _, anchor = link.target.partition("#")
    target = (link.page.parent / path).resolve() if path else link.page
    assert target.is_relative_to(ROOT)
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.read_text())


def test_anchors_are_github_s():
    page = (
        "# The `loss`: a & b\n\n```bash\n# no heading\n```\n"
        "## Log-probs\n## Log-probs\n### x_y [z](u)\n"
    )
    assert anchors(page) == {"the-loss-a--b", "log-probs", "log-probs-1", "x_y-z"}


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent == ROOT / "docs"], ids=name_of)
def test_the_index_has_every_page_of_the_documentation(page):
    if page.name != "index.md":
        assert f"]({page.name})" in (ROOT / "docs" / "index.md").read_text()


PATHS = sorted(
    {
        (name_of(page), path)
        for page in PAGES
        if page.name != "CHANGELOG.md"  # which tells of files that were
        for path in re.findall(
            r"`((?:rloo_fast|kernels|tests|benchmarks|docs|examples)/[\w/.]*)`", page.read_text()
        )
    }
)


@pytest.mark.parametrize(("page", "path"), PATHS, ids=lambda value: value)
def test_a_path_that_is_named_exists(page, path):
    assert (ROOT / path).exists()
