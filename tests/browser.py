"""A real Chromium, steered by its own protocol over two pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

PATIENCE = 60.0
"""Seconds after which a browser that does not answer is ended."""


class Browser:
    """One page of a browser."""

    def __init__(self, told: int, heard: int) -> None:
        """Open an empty page; `told` is written to, `heard` read from."""
        self._told, self._heard, self._n = told, heard, 0
        self._rest = b""
        self.complaints: list[str] = []
        """What the page threw, logged as an error or was refused."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.sized(1440, 900)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser for something and wait for its answer."""
        self._n += 1
        asked: dict[str, Any] = {"id": self._n, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._told, json.dumps(asked).encode() + b"\0")
        while True:
            answer = self._answer()
            if answer.get("id") == self._n:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            said = answer.get("params", {})
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(said["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
                self.complaints.append(said["entry"]["text"])

    def _answer(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._heard, 1 << 20)
            assert data, "the browser is gone"
            self._rest += data
        one, self._rest = self._rest.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(one)
        return answer

    def sized(self, width: int, height: int, scheme: str = "light") -> None:
        """Give the page a size and a colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, text: str) -> Any:
        """Return what an expression of JavaScript is in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, text: str) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE / 2
        while not (found := self.evaluate(text)):
            assert time.monotonic() < end, f"never: {text}"
            time.sleep(0.02)
        return found

    def open(self, url: str) -> None:
        """Load a page anew."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.until("location.protocol !== 'about:' && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """Press a key, as somebody at the keyboard does."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        about: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0]))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Write text where the focus is."""
        self.call("Input.insertText", text=text)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at a place and let it go at another; a click if that is the same."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self) -> bytes:
        """Return what is to be seen, as the bytes of a PNG file."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium, its files in a folder; skip the test where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here")
    ours, theirs = os.pipe(), os.pipe()
    options = [
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
    ]
    if os.geteuid() == 0:  # its sandbox is not for root
        options.append("--no-sandbox")
    # The browser reads from file 3 and writes to file 4.
    reads, writes = (fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (ours[0], theirs[1]))
    become = f"import os, sys; os.dup2({reads}, 3); os.dup2({writes}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", become, path, *options, f"--user-data-dir={folder}"],
        pass_fds=(reads, writes),
        stderr=subprocess.DEVNULL,
    )
    for pipe in (ours[0], theirs[1], reads, writes):
        os.close(pipe)
    watch = Timer(PATIENCE, process.kill)
    watch.start()
    try:
        page = Browser(ours[1], theirs[0])
        yield page
        with suppress(AssertionError):
            page._session = None
            page.call("Browser.close")
    finally:
        watch.cancel()
        process.kill()
        process.wait()
        os.close(ours[1])
        os.close(theirs[0])
