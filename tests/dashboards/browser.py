"""A real headless Chromium, and pages that complain of every error on their consoles."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# On a busy machine a first paint may take long; waiting for a condition costs nothing when it comes soon.
PATIENCE_MILLISECONDS = 60_000
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}


def require_chromium() -> None:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is missing where all tests have to run: apt install chromium")
        pytest.skip("Chromium is not installed (apt install chromium)")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Errors(list[str]):
    """What went wrong on a page; an attack that worked is one of them."""

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.append(f"console: {message.text}") if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: (self.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("requestfailed", lambda request: None if "/live/" in request.url else self.append(f"request failed: {request.url}"))


@contextmanager
def page_in(browser: Browser, *, allow: str = "", **options: Any) -> Iterator[Page]:
    """A page in a context of its own; on leaving, nothing must have gone wrong on it save for what `allow` matches."""
    errors = Errors()
    context = browser.new_context(**{"viewport": DESK, **options})
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    page = context.new_page()
    errors.watch(page)
    try:
        yield page
    finally:
        context.close()
    assert [error for error in errors if not (allow and re.search(allow, error))] == []


def picture(page: Page, name: str) -> None:
    """Keep a screenshot where SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
