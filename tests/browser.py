"""A headless Chromium, controlled over a pipe with the DevTools protocol: tests pages as rendered."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

MINUS = "\N{MINUS SIGN}"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Browser:
    """One tab. `requests` lists the URLs that it has requested."""

    def __init__(self, read, write):
        self._read, self._write, self._number, self._session = read, write, 0, None
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Network.enable")
        self.send("Page.enable")

    def send(self, method: str, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.absolute().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Sets the window size and the preferred color scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str):
        """Returns the value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Writes the whole page as a PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self):
        data = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "the browser has exited"
            data += byte
        message = json.loads(data)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message


@contextmanager
def open_browser(profile: Path):
    """Yields a `Browser`; skips the test if none is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    flags += ["--remote-debugging-pipe", "--disable-background-networking", f"--user-data-dir={profile}"]
    # Chromium reads from descriptor 3 and writes to 4.
    shell = f'exec "$0" "$@" 3<&{their_in} 4>&{their_out}'
    with subprocess.Popen(
        ["bash", "-c", shell, program, *flags],
        pass_fds=(their_in, their_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(their_in)
        os.close(their_out)
        with os.fdopen(our_in, "rb") as read, os.fdopen(our_out, "wb") as write:
            try:
                browser = Browser(read, write)
                yield browser
                browser._session = None
                browser.send("Browser.close")
            finally:
                process.terminate()
                process.wait(30)


def cells(browser, selector):
    """Returns the visible text of each row's cells."""
    rows = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return browser.evaluate(f"{rows}.map(row => [...row.cells].map(cell => cell.innerText.trim()))")


def percent(value, sign=""):
    """Formats a share the way the pages do."""
    return "n/a" if value is None else f"{100 * value:{sign}.1f}%".replace("-", MINUS)
