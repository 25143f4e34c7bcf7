"""Debian's chromium without a window, driven through a pipe (the DevTools protocol): for tests of the status page. Here and only here.

    with Browser() as browser:
        browser.open(url)
        browser.wait_for("document.title === 'x'")

`python -m tests.swarm.browser FILE.png [dark]` draws docs/swarm-page.png.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 60.0
"""For one answer, and for what is waited for: a browser starts in 1 s, and in ten on a machine that is busy."""

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def program() -> str | None:
    """The browser's path; None where there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name)) is not None), None)


class Browser:
    """One page. `complaints` is what its console and the browser said against it: errors, refusals by its policy, failed requests."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self.complaints: list[str] = []
        # Short: it has a socket in it, whose path may have 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="manta-page-", ignore_cleanup_errors=True)
        self._profile = Path(self._folder.name)
        self._size = width, height
        self._number = 0
        self._unread = b""
        self._session = ""

    def __enter__(self) -> Self:
        executable = program()
        assert executable is not None
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        # The browser reads its descriptor 3 and writes to 4: ours must be neither while they are put there.
        to_browser, from_browser = _moved(to_browser), _moved(from_browser)
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        arguments = [
            executable, "--headless", "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "--no-first-run",
            "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--hide-scrollbars", *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        try:
            with (self._profile / "stderr").open("wb") as stderr:
                self._process = subprocess.Popen(
                    ["bash", "-c", script, "browser", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=(to_browser, from_browser),
                    start_new_session=True,
                    env={**os.environ, "HOME": str(self._profile), "TMPDIR": str(self._profile)},
                )
        except BaseException:
            os.close(ours_out)
            os.close(ours_in)
            self._folder.cleanup()
            raise
        finally:
            os.close(to_browser)
            os.close(from_browser)
        self._out, self._in = ours_out, ours_in
        try:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
            width, height = self._size
            self.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def open(self, url: str) -> None:
        failed = self.ask("Page.navigate", url=url).get("errorText")
        assert not failed, failed
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def theme(self, name: str) -> None:
        """light or dark."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def value(self, expression: str) -> Any:
        """What the expression is in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Returns when it is true in the page."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.value(f"!!({expression})"):
            assert time.monotonic() < deadline, f"{expression} did not come true; {self.complaints}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    def screenshot(self) -> bytes:
        """All of the page, as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            said = self._next(deadline, method)
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said['error']}"
                return dict(said["result"])
            self._hear(said)

    def _hear(self, said: dict[str, Any]) -> None:
        about = said.get("params", {})
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(about["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if about["type"] in {"error", "warning", "assert"}:
                self.complaints.append(str(about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] in {"error", "warning"}:
                self.complaints.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def _next(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._unread:
            readable, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"the browser did not answer {waiting_for}"
            part = os.read(self._in, 1 << 16)
            assert part, f"the browser ended before it answered {waiting_for}: {self._last_words()}"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))

    def _last_words(self) -> str:
        return (self._profile / "stderr").read_text(errors="replace")[-2000:]

    def _end(self) -> None:
        os.close(self._out)
        os.close(self._in)
        # Its processes are one group of their own: none is left behind, whatever state it is in.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        finally:
            self._process.wait(timeout=PATIENCE_S)
            self._folder.cleanup()


def _moved(fd: int) -> int:
    """The same, as a descriptor beyond those that a shell can name by one digit."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return high


def main(file: str, theme: str = "light") -> None:
    from tests.swarm.page_server import PageServer

    with PageServer() as server, Browser() as browser:
        browser.theme(theme)
        browser.open(server.url)
        browser.wait_for("document.querySelectorAll('#models canvas').length")
        Path(file).write_bytes(browser.screenshot())


if __name__ == "__main__":
    main(*sys.argv[1:])
