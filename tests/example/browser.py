"""A page in headless Chromium, driven through chromedriver's own protocol (W3C WebDriver), without further packages.

``python tests/example/browser.py PAGE OUT`` writes ``OUT-1280.png`` and ``OUT-390.png``, the whole page each, and says
what it found: errors on the console, requests to a network, whether the page is wider than the screen.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass(frozen=True)
class Seen:
    """What a page did when it was opened.

    Attributes:
        errors: on the console.
        requests: addresses that it asked for; itself, and those of the browser's own first tab, left out.
        wider: by how many pixels the page is wider than the screen.
        tables: how many of its tables are wider than the screen, and how many of those scroll in themselves.
    """

    errors: list[str]
    requests: list[str]
    wider: int
    tables: tuple[int, int]
    picture: bytes


def look(page: Path, width: int, height: int = 844) -> Seen:
    """Open a page on a screen of this size."""
    with _session(width, height) as ask:
        address = page.resolve().as_uri()
        ask("url", url=address)
        wider = ask("execute/sync", script="return document.documentElement.scrollWidth - innerWidth", args=[])
        wide = "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > innerWidth)"
        scrolls = f"{wide}.filter(t => t.parentElement.scrollWidth > t.parentElement.clientWidth)"
        tables = [ask("execute/sync", script=f"return {each}.length", args=[]) for each in (wide, scrolls)]
        shot = ask("goog/cdp/execute", cmd="Page.captureScreenshot", params={"captureBeyondViewport": True})
        console = [entry["message"] for entry in ask("se/log", type="browser")]
        events = [json.loads(entry["message"])["message"] for entry in ask("se/log", type="performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    requests = [url for url in asked if url != address and not url.startswith(("data:", "chrome:"))]
    return Seen(console, requests, int(wider), (tables[0], tables[1]), base64.b64decode(shot["data"]))


@contextmanager
def _session(width: int, height: int) -> Iterator[Any]:
    """A function that gives chromedriver a command."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            server = f"http://127.0.0.1:{_port(driver)}"
            screen = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1, "mobile": width < 600}}
            chrome = {"binary": BROWSER, "args": [*_FLAGS, f"--user-data-dir={profile}"], "mobileEmulation": screen}
            options = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            started = _post(f"{server}/session", {"capabilities": {"alwaysMatch": options}})
            session = f"{server}/session/{started['sessionId']}"
            yield lambda command, **body: _post(f"{session}/{command}", body)
            urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=60).close()
        finally:
            driver.terminate()
            driver.wait(60)
            time.sleep(0.2)  # the browser lets go of its profile


def _port(driver: subprocess.Popen[str]) -> str:
    assert driver.stdout is not None
    for line in driver.stdout:
        if "successfully on port" in line:
            return line.rstrip(".\n").rpartition(" ")[2]
    raise RuntimeError("chromedriver did not start")


def _post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]


def main() -> None:
    page, out = Path(sys.argv[1]), sys.argv[2]
    for width in (1280, 390):
        seen = look(page, width)
        Path(f"{out}-{width}.png").write_bytes(seen.picture)
        print(f"{width}: errors {seen.errors}, requests {seen.requests}, wider by {seen.wider}, tables {seen.tables}")


if __name__ == "__main__":
    main()
