"""Chromium without a window, driven by its own protocol over two pipes: no other program and no port is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --no-first-run --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
    "--disable-dev-shm-usage --force-color-profile=srgb"
).split()


class Tab:
    """One tab, and what went wrong in it since the last page was opened."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._number = read, write, b"", 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": given}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return dict(found["result"])
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 20)
            if not more:
                raise RuntimeError("the browser has gone")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, page: Path, width: int, theme: str, height: int = 900) -> None:
        """Open a page at a width and in a theme."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        found = self.call("Page.navigate", url=page.resolve().as_uri())
        if found.get("errorText"):
            raise RuntimeError(f"{page}: {found['errorText']}")
        until = time.monotonic() + 60
        while self.run("document.readyState") != "complete":
            if time.monotonic() > until:
                raise RuntimeError(f"{page} is not read after a minute")
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """Return what an expression gives in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key and let it go."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        codes |= {"Home": 36, "End": 35}
        given = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self, out: Path, most: int = 5000) -> None:
        """Write a picture of the whole page, at most so many pixels high."""
        width, height = self.run("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, most), "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        out.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the console said, which scripts failed, and what the page asked of others than its own file."""
        self.call("Runtime.evaluate", expression="0")  # what is under way comes in before
        said = []
        for event in self.events:
            method, given = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                said.append(f"script: {json.dumps(given['exceptionDetails'])[:500]}")
            elif method == "Runtime.consoleAPICalled":
                said.append(f"console: {json.dumps(given['args'])[:500]}")
            elif method == "Log.entryAdded":
                said.append(f"log: {given['entry'].get('text', '')[:500]}")
            elif method == "Network.requestWillBeSent":
                url = given["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    said.append(f"request: {url[:200]}")
        files = {
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent" and e["params"]["request"]["url"].startswith("file:")
        }
        return said + ([f"several files: {sorted(files)}"] if len({f.partition("#")[0] for f in files}) > 1 else [])


def program() -> str | None:
    """The browser's program; None where there is none."""
    return os.environ.get("CHROMIUM") or next((p for name in PROGRAMS if (p := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[Tab]:
    """Start Chromium with a profile of its own and give a tab; both are gone afterwards."""
    found = program()
    if found is None:
        raise RuntimeError("no Chromium: apt-get install chromium, or name it in CHROMIUM")
    (there, to), (back, here) = os.pipe(), os.pipe()  # it reads from 3 and writes to 4
    line = f'exec "$@" 3<&{there} 4>&{here}'
    with tempfile.TemporaryDirectory() as profile:
        words = ["bash", "-c", line, "bash", found, *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            words,
            pass_fds=(there, here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(here)
        try:
            yield Tab(back, to)
        finally:
            os.close(to)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
            os.close(back)
            shutil.rmtree(profile, ignore_errors=True)
            Path(profile).mkdir(exist_ok=True)
