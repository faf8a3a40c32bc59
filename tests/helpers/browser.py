"""Chromium without a window, for the pages that minigpt writes."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_browser(folder: Path) -> Iterator["Chrome"]:
    """Start Chromium; skip the test where there is none, unless MINIGPT_BROWSER=required.

    Args:
        folder: for its profile.
    """
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        assert os.environ.get("MINIGPT_BROWSER") != "required", "no chromium or chromedriver"
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={folder}", "--window-size=1280,1000",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver, env=os.environ | {"SE_OFFLINE": "true"})
    chrome = webdriver.Chrome(options, service)
    try:
        chrome.get("about:blank")  # away from the page for a new tab, which loads much
        yield chrome
    finally:
        chrome.quit()


def set_dark(browser: "Chrome", dark: bool) -> None:
    """The system's colour scheme, as a page sees it."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def complaints(browser: "Chrome") -> list[str]:
    """What the console has said since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser: "Chrome") -> set[str]:
    """The addresses that pages have asked for since the last call."""
    found = set()
    for entry in browser.get_log("performance"):
        message: dict[str, Any] = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.add(message["params"]["request"]["url"])
    return found
