"""A real Chromium without a window, driven over the pipe of its DevTools protocol: navigate, click, type, ask."""

import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
WORDS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1000,800")
DEADLINE_S = 60


class Tab:
    """One page. `events` are what the browser has told unasked, each with `method` and `params`."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader, self.writer = reader, writer
        self.events: list[dict[str, Any]] = []
        self._number, self._rest, self._session = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params} | self._session
        os.write(self.writer, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE_S
        while True:
            message = self._message(deadline)
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def _message(self, deadline: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as ready:
            ready.register(self.reader, selectors.EVENT_READ)
            while b"\0" not in self._rest:
                assert ready.select(max(0.0, deadline - time.monotonic())), "the browser does not answer"
                got = os.read(self.reader, 2**16)
                assert got, "the browser has ended"
                self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """Of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The expression's value once it is true."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} does not become true"
            time.sleep(0.02)
        return found

    def open(self, url: str) -> None:
        """Go there, and wait for the page."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of an element, which must lie open there."""
        x, y, hit = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}), b = e.getBoundingClientRect();"
            "const at = [b.x + b.width / 2, b.y + b.height / 2];"
            "return [...at, document.elementFromPoint(...at) === e]; })()"
        )
        assert hit, f"{selector} is covered or outside of the window"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Over what stands in a field."""
        self.click(selector)
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def troubles(self) -> list[str]:
        """What the page threw, and what its console said of errors."""
        thrown = [each["params"] for each in self.events if each["method"] == "Runtime.exceptionThrown"]
        logged = [each["params"]["entry"] for each in self.events if each["method"] == "Log.entryAdded"]
        return [str(each) for each in [*thrown, *(entry for entry in logged if entry["level"] == "error")]]

    def fetched(self) -> list[str]:
        """Addresses that the page asked for."""
        asked = [each for each in self.events if each["method"] == "Network.requestWillBeSent"]
        return [each["params"]["request"]["url"] for each in asked]


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A browser with one page while the block lasts; `profile` is its folder."""
    # The protocol's pipes are the descriptors 3 and 4, by definition.
    shell = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
    words = [BROWSER, *WORDS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["sh", "-c", shell, "sh", *words], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdin and process.stdout
        try:
            yield Tab(process.stdout.fileno(), process.stdin.fileno())
        finally:
            process.stdin.close()  # a browser whose pipe ends closes itself
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
