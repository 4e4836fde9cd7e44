"""Pages in a headless browser, as readers see them: on a phone and on a desk, light and dark."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (375, 1280)
SCHEMES = ("light", "dark")

FAULTS = Path(__file__).with_name("page_faults.js").read_text(encoding="utf-8")


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as session:
        chromium = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def find_faults(browser: Any, address: str) -> list[str]:
    """What is wrong with a page: messages of the console, requests to other places, overflow, contrast, missing alt."""
    found: list[str] = []
    origin = "/".join(address.split("/")[:3])
    for width, scheme in product(WIDTHS, SCHEMES):
        view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        view.on("console", lambda message, said=said: said.append(message.text) if message.type == "error" else None)
        view.on("pageerror", lambda error, said=said: said.append(str(error)))
        view.on("request", lambda request, asked=asked: asked.append(request.url))
        view.goto(address, wait_until="networkidle")
        said += [f"asks {url}" for url in asked if not url.startswith((origin, "data:", "blob:"))]
        found += [f"{address} at {width}, {scheme}: {fault}" for fault in (*said, *view.evaluate(FAULTS))]
        view.close()
    return found
