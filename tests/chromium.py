"""A page in headless Chromium, controlled over the DevTools protocol through two pipes: no port, no package.

https://chromedevtools.github.io/devtools-protocol lists the methods and events.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATH = shutil.which("chromium") or shutil.which("google-chrome") or ""
needs_chromium = pytest.mark.skipif(not PATH, reason="no chromium: apt-get install --no-install-recommends chromium")


class Tab:
    """One tab. ``events`` holds the events that Chromium sent, as (method, params)."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._buffer, self._last_id = b"", 0
        self._session: dict[str, str] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Return a command's result; a protocol error raises ``AssertionError``."""
        self._last_id += 1
        self._out.write(json.dumps({"id": self._last_id, "method": method, "params": params, **self._session}).encode() + b"\0")
        self._out.flush()
        while (message := self._receive()).get("id") != self._last_id:
            self.events.append((message.get("method", ""), message.get("params", {})))
        assert "error" not in message, message
        return message["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._in.fileno(), 1 << 16)
            assert more, "chromium ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int = 1300, height: int = 900, dark: bool = False) -> None:
        """Open a page file and wait until it has loaded and been drawn."""
        if not self._session:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.send(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        )
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            message = self._receive()
            self.events.append((message.get("method", ""), message.get("params", {})))
        self.settle()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression (awaited, JSON-like); an exception in it raises ``AssertionError``."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait two frames, until everything requested has been drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        """Send a real mouse event of ``kind`` Moved, Pressed or Released at a point in the window."""
        button = {"button": "left", "buttons": int(kind != "Released")} if clicks else {}
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, clickCount=clicks, **button)

    def click(self, x: float, y: float, clicks: int = 1) -> None:
        """Click, or double-click with ``clicks=2``."""
        for count in range(1, clicks + 1):
            self.mouse("Pressed", x, y, count)
            self.mouse("Released", x, y, count)
        self.settle()

    def press(self, key: str) -> None:
        """Press and release a key in the focused element."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)
        self.settle()


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A browser with one tab and a fresh ``profile`` folder; it closes at the end of the block."""
    read_command, write_command = os.pipe()
    read_answer, write_answer = os.pipe()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
    ]
    # Chromium reads commands from descriptor 3 and answers on 4.
    wire = f'exec "$@" 3<&{read_command} 4>&{write_answer}'
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", wire, "bash", PATH, *flags], pass_fds=(read_command, write_answer), stdout=log, stderr=log
        )
    os.close(read_command)
    os.close(write_answer)
    try:
        yield Tab(write_command, read_answer)
    finally:
        process.terminate()
        process.wait()
