"""A report is one file that loads nothing from elsewhere, and no text of a model ends its data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from rloo_fast import cli
from rloo_fast.viewer.pages import ASSETS, MODULES
from rloo_fast.viewer.report import as_json, one_script, report
from tests.viewer.conftest import EVIL, make, opened


@pytest.fixture(scope="module")
def page(finished):
    return report(opened(finished), 20)


class Tags(HTMLParser):
    """Elements as a browser finds them, and what scripts and styles say."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.last = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.last = tag, dict(attrs)

    def handle_data(self, data):
        if self.last and self.last[0] in ("script", "style") and data.strip():
            self.texts.append((*self.last, data))


def test_texts_of_models_are_data_and_make_no_element(page):
    found = Tags(page)
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 3
    assert not {"img", "svg", "textarea"} & {*names}
    (data,) = (text for tag, attrs, text in found.texts if attrs.get("id") == "report")
    assert not set("<>&\u2028\u2029") & set(data)
    rows = json.loads(data)["completions?run=0&step=6"]["rows"]
    assert [row["completion"] for row in rows[:4]] == [*EVIL]


def test_nothing_is_loaded_from_elsewhere(page):
    found = Tags(page)
    linked = [a for _, attrs in found.tags for a in ("src", "href") if a in attrs]
    assert linked == ["href"]  # to the content
    assert "url(" not in page
    (policy,) = (a["content"] for t, a in found.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_only_its_own_scripts_and_styles_may_run(page):
    found = Tags(page)
    (policy,) = (a["content"] for t, a in found.tags if a.get("http-equiv"))
    for tag, attrs, text in found.texts:
        if attrs.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy, tag


def test_the_modules_make_one_script():
    script = one_script()
    assert not re.findall(r"^\s*(?:import|export)\b", script, re.MULTILINE)
    names = [
        name
        for module in MODULES
        for name in re.findall(
            r"^(?:export )?(?:async )?(?:function|const|let|class) (\w+)",
            ASSETS[module].read_text(),
            re.MULTILINE,
        )
    ]
    assert len(names) > 50
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_a_module_comes_after_those_that_it_imports():
    for number, name in enumerate(MODULES):
        wanted = re.findall(r'from "\./(\w+\.js)"', ASSETS[name].read_text())
        assert {*wanted} <= {*MODULES[:number]}, name


def test_steps_are_kept_evenly_as_far_as_there_is_room(tmp_path):
    make(tmp_path, steps=9)
    runs = opened(tmp_path)

    def steps(max_mib):
        data = report(runs, max_mib).partition('id="report">')[2].partition("</script>")[0]
        return json.loads(data)["report"]["steps"]["0"]

    assert steps(20) == list(range(1, 10))
    one = len(report(runs, 0)) / 2**20
    some = steps((len(report(runs, 20)) / 2**20 - one) * 4 / 9)
    assert 2 < len(some) < 9
    assert {1, 9} <= {*some}
    assert steps(0) == [9]


def test_json_that_no_page_can_read_as_anything_else():
    text = as_json({"a": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}
    with pytest.raises(ValueError):
        as_json(float("nan"))


# The command


def test_the_command_writes_the_file(finished, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    assert cli.main(["view", str(finished / "metrics.jsonl"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")


def test_the_command_is_there_before_torch_could_be():
    code = "import sys, rloo_fast.cli.view; print(sorted({'torch', 'pandas'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is no directory"),
        (["{run}", "{run}"], "one run is given more than once"),
        (["{run}", "--labels", "a,b"], "2 labels for 1 directories"),
        (["{run}", "--out", "report.pdf"], "end its name in .html"),
        (["{run}", "--out", "r.html", "--max_mib", "nan"], "--max_mib must be from 0"),
        (["{run}", "--port", "99999"], "--port must be from 0 to 65535"),
        ([], "RUN_DIR"),
    ],
)
def test_a_mistake_is_a_sentence(finished, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["view", *(word.format(run=finished) for word in words)]) == 2
    assert said in capsys.readouterr().err
