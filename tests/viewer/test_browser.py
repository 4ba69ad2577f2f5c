"""The page in a real browser: what people do with it, and what texts of models cannot."""

from __future__ import annotations

import os
import re
import time

import numpy as np
import pytest
import torch

from benchmarks.viewer.made_runs import lock
from rloo_fast.records import CompletionTexts
from rloo_fast.reports.view_format import OF_TOKENS
from rloo_fast.reports.view_rows import KeptBatch, step_summary, view_table
from rloo_fast.viewer.report import report
from tests.support.browser import browser
from tests.viewer.conftest import EVIL, make, opened, served

pytestmark = pytest.mark.slow

VIEWS = ("overview", "completions", "health", "time")
TIMEOUT_MS = 15_000
REWARDS = "[...document.querySelectorAll('.card .reward')].map(e => parseFloat(e.textContent))"
expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect
expect.set_options(timeout=TIMEOUT_MS)  # what is drawn a moment later is waited for


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "second"
    make(folder, seed=1, config={"beta": 0.0}).end()
    return folder


class Page:
    """A page that fails its test on an error in its script or a request to elsewhere."""

    def __init__(self, chromium, width=1280, height=860, **settings):
        self.context = chromium.new_context(
            viewport={"width": width, "height": height}, reduced_motion="reduce", **settings
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.errors, self.requests = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _said(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, address):
        self.page.goto(address)
        self.drawn()
        return self.page

    def drawn(self):
        self.page.wait_for_selector("main[data-drawn]")

    def close(self, origin):
        self.context.close()
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith(origin)] == []


@pytest.fixture
def look(chromium, finished):
    """Opens an address of the finished run's page."""
    pages = []
    with served(finished) as server:

        def open_at(hash="", **settings):
            pages.append(Page(chromium, **settings))
            return pages[-1].open(server.address + hash)

        yield open_at
        for page in pages:
            page.close(server.address)


def until(page, expression):
    """Until it is true; wait_for_function is one more script that the page may not run."""
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(30)


def test_curves_are_there_when_it_opens(look):
    page = look()
    page.wait_for_selector("canvas")
    chart = page.locator("figure", has_text="Reward").first
    assert re.match(
        r"Chart Reward\. first: from \S+ to \S+, between", chart.get_attribute("aria-label")
    )
    expect(page.locator(".status")).to_have_text("finished", use_inner_text=True)
    expect(page.locator("#runs")).to_contain_text("step 6 of 6", use_inner_text=True)
    assert page.title() == "first · rloo-fast"
    page.get_by_role("searchbox").fill("metric_3")
    page.keyboard.press("Enter")
    page.wait_for_selector("details.more[open] figure")
    expect(page.locator("details.more figure")).to_have_count(11)


def test_zooming_one_chart_zooms_all(look):
    page = look()
    page.wait_for_selector("canvas")
    box = page.locator(".u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60, steps=4)
    page.mouse.up()
    button = page.get_by_role("button", name="Whole run")
    until(page, "!document.getElementById('unzoom').disabled")
    button.click()
    assert button.is_disabled()


@pytest.mark.parametrize("shade", ["", "&shade=logp"])
def test_texts_of_models_are_shown_and_never_run(look, shade):
    page = look(f"#completions?step=3{shade}")
    page.wait_for_selector(".card")
    cards = page.locator(".group").first.locator(".card > .text")
    if shade:
        until(page, "document.querySelectorAll('.group .tokens').length >= 4")
    assert cards.evaluate_all("all => all.map(one => one.textContent)") == [*EVIL]
    assert page.title() == "first · rloo-fast"
    expect(page.locator("main script, main img, main svg")).to_have_count(0)


def test_filters_and_sorting_leave_what_was_asked_for(look):
    page = look("#completions?step=4")
    page.wait_for_selector(".card")
    expect(page.locator(".card")).to_have_count(16)
    page.get_by_role("searchbox").fill("answer 8 of")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.card').length === 4")
    page.get_by_label("sort").select_option("-reward")
    until(page, "location.hash.includes('sort=-reward')")
    until(page, f"(r => r.length === 4 && r.every((x, i) => !i || r[i - 1] >= x))({REWARDS})")
    rewards = page.evaluate(REWARDS)
    page.get_by_label("reward to").fill(str(rewards[-1]))
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.card').length === 1")
    expect(page.locator(".count")).to_contain_text("1 of 16 completions", use_inner_text=True)
    page.get_by_role("button", name="search all steps").click()
    page.wait_for_selector("text=the newest first")
    expect(page.locator(".card")).to_have_count(4)


def test_an_address_leads_to_a_group_and_to_a_completion(look):
    page = look("#completions?step=5&group=3")
    page.wait_for_selector(".group.chosen")
    assert page.locator(".group.chosen").get_attribute("data-group") == "3"
    page = look("#completions?step=5&group=0&sample=1")
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    expect(dialog).to_contain_text("Step 5 · group 1 · sample 2", use_inner_text=True)
    expect(dialog).to_contain_text(EVIL[1], use_inner_text=True)
    page.get_by_role("button", name="log-prob").click()
    spans = dialog.locator(".token")
    assert "".join(spans.evaluate_all("all => all.map(s => s.textContent)")) == EVIL[1]
    assert any(spans.evaluate_all("all => all.map(s => s.style.backgroundColor)"))
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("text=group 1 · sample 3")
    until(page, "location.hash.endsWith('group=0&sample=2')")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    until(page, "location.hash.endsWith('group=0')")


def test_turns_and_tool_calls_are_folded(chromium, tmp_path):
    made = make(tmp_path / "chat", steps=1)
    call = {"function": {"name": "add", "arguments": '{"a": "<script>"}'}}
    said = [
        {"role": "assistant", "content": "<think>a long thought</think>", "tool_calls": [call]},
        {"role": "tool", "content": "42<img src=x>"},
        {"role": "assistant", "content": "It is 42."},
    ]
    prompts = [[{"role": "user", "content": "6 x 7?"}]] * 2
    texts = CompletionTexts(prompts, [said] * 2, {"f": [0.0, 1.0]}, {"tries": [3, 4]})
    zeros = dict.fromkeys(("reward", "score", "advantage", "kl", "length", "truncated"))
    rows = {name: torch.zeros(2) for name in zeros}
    nothing = np.full(1, np.nan, np.float16)
    tokens = {"text": ["x"], **dict.fromkeys(OF_TOKENS, nothing)}
    batch = KeptBatch(texts, rows, {0: tokens, 1: tokens}, 2)
    made.view.write(2, view_table(batch), step_summary(batch))
    with served(tmp_path / "chat") as server:
        tab = Page(chromium)
        page = tab.open(f"{server.address}#completions?step=2&group=0&sample=1")
        dialog = page.get_by_role("dialog")
        dialog.locator("details", has_text="tool call").wait_for()
        assert dialog.locator("details").evaluate_all("all => all.some((one) => one.open)") is False
        expect(dialog).to_contain_text("It is 42.", use_inner_text=True)
        expect(dialog.locator("details", has_text="think")).to_contain_text(
            "a long thought", use_inner_text=True
        )
        dialog.locator("summary", has_text="tool call").click()
        expect(dialog.locator("details[open]")).to_contain_text("<script>", use_inner_text=True)
        expect(dialog).to_contain_text("tries\n4", use_inner_text=True)
        tab.close(server.address)


def test_a_damaged_file_is_said_and_mended(chromium, tmp_path):
    make(tmp_path / "run", steps=2)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    with served(tmp_path / "run") as server:
        tab = Page(chromium)
        page = tab.open(server.address)
        path.write_text("not json\n" + whole)
        page.wait_for_selector("text=line 1: expected a JSON object")
        path.write_text(whole)
        page.wait_for_selector("#notice", state="hidden")
        tab.context.close()


def test_a_prompt_is_followed_over_the_run(look):
    page = look("#completions?step=2")
    page.locator(".group").nth(1).get_by_role("button", name="over the run").click()
    page.wait_for_selector("text=One prompt in 1 steps")
    expect(page.locator(".card")).to_have_count(4)
    page.get_by_role("button", name="← Back to the step").click()
    page.wait_for_selector(".steps")


def test_keys_lead_everywhere(look):
    page = look()
    for key, view in zip("1234", VIEWS, strict=True):
        page.keyboard.press(key)
        page.wait_for_selector(f"main[data-view={view}]")
    page.keyboard.press("2")
    page.wait_for_selector(".steps")
    page.keyboard.press("[")
    until(page, "location.hash.includes('step=5')")
    page.wait_for_selector("output:text-is('5')")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("dialog.help")
    page.keyboard.press("Escape")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_fits_and_has_names(look, width, view):
    page = look(f"#{view}", width=width)
    page.wait_for_selector("canvas, .card")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, select, figure, dialog")]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.placeholder
          || e.labels?.[0]?.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert nameless == []


def test_two_runs_are_compared(chromium, finished, other):
    with served(finished, other) as server:
        tab = Page(chromium)
        page = tab.open(server.address)
        page.wait_for_selector("canvas")
        label = page.locator("figure", has_text="Reward").first.get_attribute("aria-label")
        assert "first: from" in label
        assert "second: from" in label
        table = page.get_by_role("region", name="Settings that differ")
        expect(table.locator("tbody tr")).to_have_text(["beta\t0.05\t0"], use_inner_text=True)
        page.get_by_role("button", name=re.compile("second")).click()
        until(page, "document.querySelectorAll('.run[aria-pressed=false]').length === 1")
        page.wait_for_selector("dl.figures")
        page.goto(f"{server.address}#health?run=1")
        page.wait_for_selector("main[data-view=health]")
        assert page.get_by_role("combobox", name="run").input_value() == "1"
        tab.close(server.address)


def test_runs_of_one_label_are_a_band(chromium, finished, other):
    with served(finished, other, labels=["both", "both"]) as server:
        tab = Page(chromium)
        page = tab.open(server.address)
        page.wait_for_selector("canvas")
        label = page.locator("figure", has_text="Reward").first.get_attribute("aria-label")
        assert "both, mean of 2: from" in label
        tab.close(server.address)


def test_a_live_run_is_followed(chromium, tmp_path):
    made = make(tmp_path / "live", steps=2)
    lock(tmp_path / "live", os.getpid())
    with served(tmp_path / "live") as server:
        curves, newest = Page(chromium), Page(chromium)
        page, latest = curves.open(server.address), newest.open(f"{server.address}#completions")
        page.wait_for_selector(".status.running")
        latest.locator("#follow").check()
        for step in (3, 4):
            made.step(step)
        page.wait_for_selector("text=step 4")
        latest.wait_for_selector("output:text-is('4')")
        (tmp_path / "live" / ".rloo_lock").write_text("")
        made.end()
        page.wait_for_selector(".status.finished")
        curves.close(server.address)
        newest.close(server.address)


def test_a_server_that_ended_is_said(chromium, finished):
    with served(finished) as server:
        tab = Page(chromium)
        page = tab.open(server.address)
        page.route("**/api/**", lambda route: route.abort())
        page.wait_for_selector("text=The server has ended")
        page.unroute_all()
        page.wait_for_selector("text=The server has ended", state="hidden")
        tab.context.close()


def test_a_report_opens_from_disk_without_a_network(chromium, finished, other, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report(opened(finished, other), 20))
    tab = Page(chromium, offline=True, color_scheme="dark")
    page = tab.open(path.as_uri())
    page.wait_for_selector("canvas")
    page.wait_for_selector("text=Settings that differ")
    for key in "234":
        page.keyboard.press(key)
        page.wait_for_selector("canvas, .card")
    page.goto(f"{path.as_uri()}#completions?run=0&step=6&group=0&sample=0&shade=kl")
    page.get_by_role("dialog").wait_for()
    expect(page.get_by_role("dialog")).to_contain_text(EVIL[0], use_inner_text=True)
    assert "hacked" not in page.title()
    tab.close("file://")


def test_a_large_step_is_drawn_as_far_as_it_is_seen(chromium, tmp_path):
    make(tmp_path, steps=1, num_prompts=64, num_generations=8, say=lambda *place: f"{place} " * 40)
    with served(tmp_path) as server:
        tab = Page(chromium)
        page = tab.open(f"{server.address}#completions")
        page.wait_for_selector(".card")
        assert 0 < page.locator(".card").count() < 256
        for place in np.linspace(0, 1, 6)[1:]:
            page.evaluate(f"scrollTo(0, {place} * document.body.scrollHeight)")
            page.wait_for_timeout(60)
        page.wait_for_selector("[data-group='63'] .card")
        assert page.locator(".card").count() < 256
        tab.close(server.address)
