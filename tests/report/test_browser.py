"""The report as a person sees it, in Chromium: it draws, zooms, is readable, and loads nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.browser import complaints, open_browser, requested, set_dark
from tests.helpers.report_runs import page_of, write_lines, write_run

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Chrome"]:
    with open_browser(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.html, of one run; two.html, of two; million.html, of one with 20,000 logged steps."""
    folder = tmp_path_factory.mktemp("pages")
    one, two = write_run(folder / "one"), write_run(folder / "two", 60, lr=1e-3)
    write_run(folder / "long", 20_000)
    (folder / "one.html").write_text(page_of(one))
    (folder / "two.html").write_text(page_of(one, two))
    (folder / "long.html").write_text(page_of(folder / "long"))
    return folder


def show(browser: "Chrome", page: Path) -> None:
    complaints(browser), requested(browser)  # of the page before
    browser.get(page.as_uri())


def run(browser: "Chrome", script: str) -> Any:
    return browser.execute_script(script)


def inked(browser: "Chrome", chart: str) -> str:
    """The picture of a chart."""
    return run(
        browser,
        f"""
        return document.querySelector('[data-chart={chart}] canvas').toDataURL()""",
    )


def test_nothing_is_loaded_and_nothing_fails(browser: "Chrome", pages: Path):
    for name in ("one", "two", "long"):
        page = pages / f"{name}.html"
        show(browser, page)
        charts = run(
            browser,
            "return [...document.querySelectorAll('.chart')].map((each) => "
            "[each.dataset.chart, each.querySelectorAll('canvas').length])",
        )
        assert charts == [[key, 1] for key in (
            "loss", "val_bits_per_byte", "lr", "grad_norm", "tokens_per_second", "mfu",
            "memory_bytes",
        )]  # fmt: skip
        assert complaints(browser) == []
        assert requested(browser) == {page.as_uri()}
    # Not even a script that gets past the escaping could send something.
    browser.get((pages / "one.html").as_uri())
    run(
        browser,
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x'; document.body.append(i);"
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        "document.body.append(s);",
    )
    assert run(browser, "return window.hacked") is None
    said = complaints(browser)
    assert len(said) == 2
    assert all("Content Security Policy" in each for each in said)


def test_a_drag_zooms_every_chart(browser: "Chrome", pages: Path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    show(browser, pages / "one.html")
    before = {chart: inked(browser, chart) for chart in ("loss", "lr")}
    over = browser.find_element(By.CSS_SELECTOR, "[data-chart=loss] .u-over")
    drag = ActionChains(browser, duration=20).move_to_element_with_offset(over, -200, 0)
    drag.click_and_hold().move_by_offset(100, 0).release().perform()
    after = {chart: inked(browser, chart) for chart in ("loss", "lr")}
    assert before["loss"] != after["loss"]
    assert before["lr"] != after["lr"]
    # Half a chart's width from the left to a point 100 pixels further, of 1..100 steps.
    width = over.size["width"]
    left = 1 + 99 * (width / 2 - 200) / width
    ActionChains(browser, duration=20).move_to_element_with_offset(
        over, -width // 2 + 2, 0
    ).perform()
    places = [
        browser.find_element(By.CSS_SELECTOR, f"[data-chart={chart}] .readout span").text
        for chart in ("loss", "lr")
    ]
    assert abs(int(places[0].removeprefix("steps ")) - left) <= 2
    assert places[0] == places[1]
    readout = browser.find_element(By.CSS_SELECTOR, "[data-chart=loss] .readout").text
    assert "validation" in readout
    ActionChains(browser).double_click(over).perform()
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert {chart: inked(browser, chart) for chart in ("loss", "lr")} == before
    assert complaints(browser) == []


def test_controls(browser: "Chrome", pages: Path):
    show(browser, pages / "two.html")
    seen = {inked(browser, "loss")}
    for change in (
        "smoothing.value = 0.9", "log.checked = true", "marks.checked = false",
        "axis.value = 'tokens'", "axis.value = 'seconds'",
    ):  # fmt: skip
        name = change.split(".")[0]
        run(
            browser,
            f"""
            const each = document.getElementById('{name}');
            each.{change.partition(".")[2]};
            each.dispatchEvent(new Event('{"change" if name == "axis" else "input"}'));""",
        )
        seen.add(inked(browser, "loss"))
    run(browser, "document.querySelectorAll('#shown input')[1].click()")
    seen.add(inked(browser, "loss"))
    assert len(seen) == 7
    assert complaints(browser) == []


def test_a_finger_zooms(browser: "Chrome", pages: Path):
    show(browser, pages / "one.html")
    before = inked(browser, "loss")
    run(
        browser,
        """
        const over = document.querySelector('[data-chart=loss] .u-over');
        const { left, top } = over.getBoundingClientRect();
        const send = (kind, x) => {
          const place = { clientX: left + x, clientY: top + 50 };
          const changedTouches = [new Touch({ identifier: 1, target: over, ...place })];
          over.dispatchEvent(new TouchEvent(kind, { changedTouches, bubbles: true }));
        };
        send('touchstart', 100);
        send('touchmove', 150);
        send('touchmove', 250);
        send('touchend', 250);
        """,
    )
    assert inked(browser, "loss") != before


CONTRASTS = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = color.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const backOf = (node) => {
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return parse(getComputedStyle(document.body).backgroundColor);
};
document.querySelectorAll('details').forEach((each) => { each.open = true; });
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
  const one = light(parse(getComputedStyle(node).color)), other = light(backOf(node));
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  found.push([ratio, node.tagName + '.' + node.className + ' ' + node.textContent.slice(0, 30)]);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(browser: "Chrome", pages: Path, dark: bool):
    """WCAG 2.1 asks for 4.5 to 1."""
    set_dark(browser, dark)
    show(browser, pages / "two.html")
    back = run(browser, "return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, back[4:-1].split(","))) < 60) == dark
    found = run(browser, CONTRASTS)
    assert len(found) > 200
    assert [each for each in found if each[0] < 4.5] == []
    was = inked(browser, "loss")
    run(browser, "document.getElementById('theme').click()")
    assert run(browser, "return getComputedStyle(document.body).backgroundColor") != back
    assert inked(browser, "loss") != was
    set_dark(browser, False)


def test_it_fits_a_phone(browser: "Chrome", pages: Path):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for name in ("one", "two"):
            show(browser, pages / f"{name}.html")
            assert run(browser, "return document.documentElement.scrollWidth") <= 360
            widths = run(
                browser,
                "return [...document.querySelectorAll('.chart canvas')]"
                ".map((each) => each.getBoundingClientRect().right)",
            )
            assert len(widths) == 7
            assert max(widths) <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_hostile_content_is_text(browser: "Chrome", tmp_path: Path):
    evil = write_run(tmp_path / f"run{HOSTILE.replace('/', '')}")
    for row_file, key in (("samples.jsonl", "completion"), ("samples.jsonl", "prompt")):
        write_lines(
            evil / row_file, [{"step": 1, "prompt": "x", "completion": "y"} | {key: HOSTILE}]
        )
    status = {"status": "failed", "message": HOSTILE}
    (evil / "status.json").write_text(json.dumps(status))
    (evil / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "torch": "\u202e\x1b[2J"}))
    incident = evil / "incidents/step-00000041-spike.json"
    incident.write_text(json.dumps({
        "kind": HOSTILE, "time": HOSTILE, "windows": [{"shard": HOSTILE, "text": HOSTILE}],
    }))  # fmt: skip
    recipe = (evil / "recipe.toml").read_text()
    prompts = json.dumps([HOSTILE])
    assert "prompts = []" in recipe
    (evil / "recipe.toml").write_text(recipe.replace("prompts = []", f"prompts = {prompts}"))
    page = tmp_path / "evil.html"
    page.write_text(page_of(evil))
    show(browser, page)
    assert run(browser, "return window.hacked") is None
    assert run(browser, "return document.images.length") == 0
    assert run(browser, "return document.scripts.length") == 3
    text = run(browser, "return document.body.textContent")
    assert text.count(HOSTILE) >= 6
    assert "\x1b" not in text
    assert complaints(browser) == []
    assert requested(browser) == {page.as_uri()}


def test_hostile_names_are_text(browser: "Chrome", tmp_path: Path):
    """Two runs with one name are told apart by their paths, which have slashes."""
    name = "run<!--<script>"
    one = write_run(tmp_path / "x<" / "script><img src=x onerror='window.hacked=1'>" / name)
    page = tmp_path / "evil.html"
    page.write_text(page_of(one, write_run(tmp_path / name)))
    show(browser, page)
    assert complaints(browser) == []
    assert run(browser, "return [window.hacked, document.images.length]") == [None, 0]
    names = run(
        browser, "return [...document.querySelectorAll('#shown label')].map(e => e.innerText)"
    )
    assert names == [str(one), str(tmp_path / name)]
