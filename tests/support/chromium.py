"""Chromium controlled over a pipe by the DevTools protocol: for pages from a server, with uploads and input.

The protocol is documented at chromedevtools.github.io/devtools-protocol; `--remote-debugging-pipe` reads requests from
file descriptor 3 and writes answers to 4, each a JSON text that ends with a NUL.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.browser import chromium

WAIT_S = 90


class Tab:
    """A tab of a running browser; records the requests, script errors and console messages of its pages."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._number, self._rest = reading, writing, 0, b""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str, width: int, height: int = 900, scheme: str = "light") -> None:
        """Open a page on a screen of `width` pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """Evaluate an expression, and return its value; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + WAIT_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"), self.complaints)
            time.sleep(0.05)

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Set the files of a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def wait_for(self, *paths: Path) -> None:
        """Wait until downloads are written."""
        deadline = time.monotonic() + WAIT_S
        while not all(path.exists() and path.stat().st_size for path in paths):
            assert time.monotonic() < deadline, f"{paths} were not downloaded"
            time.sleep(0.05)

    def photograph(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._reading], [], [], WAIT_S)[0], "Chromium does not answer"
            read = os.read(self._reading, 1 << 20)
            assert read, "Chromium has ended"
            self._rest += read
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        values = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(values["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(str(values["args"]))
        return message


@contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """Run Chromium with its profile in `folder`, and open a page."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # Duplicates above 3 and 4, the numbers to which the shell below redirects them.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 64) for end in (to_read, from_write)]
    command = [
        *("bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash"),
        *chromium(folder),
        "--remote-debugging-pipe",
    ]

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=ends)
    for end in (to_read, from_write, *ends):
        os.close(end)
    try:
        yield Tab(from_read, to_write)
    finally:
        os.close(to_write)
        os.close(from_read)
        process.kill()
        process.wait()
