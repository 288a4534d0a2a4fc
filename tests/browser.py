"""A real browser for tests of pages: Chromium without a window, told what to do over its DevTools protocol
(https://chromedevtools.github.io/devtools-protocol). Tests skip where there is none."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_PATIENCE = 120.0


class Browser:
    """One tab. What it complained of and asked for since it was opened is in `complaints` and `requests`."""

    def __init__(self, address: str) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        self._loaded = False
        self._loop.run_until_complete(self._connect(address))

    def open(self, path: Path, *, width: int = 1200, height: int = 900) -> None:
        """Show a file, and wait until all of it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", **size)
        self._loaded = False
        self.tell("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + _PATIENCE
        while not self._loaded:
            assert time.monotonic() < end, f"{path} was not loaded in {_PATIENCE} s"
            self.tell("Runtime.evaluate", expression="1")
            time.sleep(0.05)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def look(self, *, dark: bool = False, printed: bool = False) -> None:
        """Have the page think that it is shown so."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", media="print" if printed else "", features=[scheme])

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Of the whole page, as a PNG."""
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.tell("Page.printToPDF", printBackground=False)["data"]))

    def tell(self, method: str, **params: Any) -> Any:
        """A command of the protocol; its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._tell(method, params), _PATIENCE))

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        self._tab: str | None = None
        target = await self._tell("Target.createTarget", {"url": "about:blank"})
        attached = await self._tell("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        self._tab = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._tell(f"{domain}.enable", {})

    async def _tell(self, method: str, params: dict[str, Any]) -> Any:
        number = next(self._numbers)
        session = {"sessionId": self._tab} if self._tab else {}
        await self._socket.send_json({"id": number, "method": method, "params": params, **session})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(str(params))


@contextmanager
def browser() -> Iterator[Browser]:
    """A tab of a browser of its own, without a past. Needs CHROMIUM."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        port_file = Path(profile) / "DevToolsActivePort"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        started = [CHROMIUM, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + _PATIENCE
            while not port_file.exists() or port_file.read_text().count("\n") < 1:
                assert process.poll() is None, "the browser ended at once"
                assert time.monotonic() < end, "the browser did not start"
                time.sleep(0.1)
            port, path = port_file.read_text().split("\n")[:2]
            tab = Browser(f"ws://127.0.0.1:{port}{path}")
            try:
                yield tab
            finally:
                tab.close()
        finally:
            process.terminate()
            process.wait(30)
