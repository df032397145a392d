"""Run `smalti app` in another process, and drive its page with a browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 200.0  # limit for a server to start on a busy machine
ROOT = Path(__file__).parents[3]


class Server:
    """A running app with its address and log."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    @property
    def output(self) -> str:
        return self.log.read_text()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(command: list[str], folder: Path, port: int, **environment: str) -> Iterator[Server]:
    """Run a server on `port` in `folder`, which receives its log."""
    log = folder / "server.log"
    variables = {**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", **environment}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, text=True, env=variables)
    try:
        deadline = time.monotonic() + SECONDS
        while "Ctrl-C to stop" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Server(process, f"http://127.0.0.1:{port}/", log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def app(pipeline: Path, folder: Path, *keys: str, **environment: str) -> Iterator[Server]:
    """Run `smalti app` for a pipeline."""
    port = free_port()
    command = [sys.executable, "-m", "pipelines", "app", f"pipeline={pipeline}", f"port={port}", *keys]
    with running(command, folder, port, PYTHONPATH=str(ROOT), **environment) as server:
        yield server


class Driver:
    """A page in a browser; collects its errors and the URLs that it requests."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.problems: list[str] = []
        self.asked: set[str] = set()
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.asked.add(request.url))
        page.goto(url)
        page.wait_for_selector("#samples", state="attached")
        page.wait_for_selector('button:has-text("Sample")')

    def tab(self, name: str) -> None:
        """Open a tab; narrow pages move some into a menu."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if tab.count() and tab.first.is_visible():
            tab.first.click()
            return
        self.page.locator(".overflow-menu > button").first.click()
        self.page.locator(".overflow-dropdown button", has_text=name).click()

    def click(self, name: str) -> None:
        """Click a visible button by its name."""
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()

    def wait(self, selector: str) -> Any:
        self.page.wait_for_selector(selector, timeout=30_000)
        return self.page.locator(selector)

    def toast(self) -> str:
        """The text of the notification, which is then closed."""
        found = self.wait(".toast-body")
        text = str(found.first.inner_text())
        self.page.locator(".toast-close").first.click()
        self.page.wait_for_selector(".toast-body", state="detached")
        return " ".join(text.split())

    def pick(self, name: str, path: Path) -> None:
        """Choose a file in an upload field."""
        self.page.locator(f"#{name} input[type=file]").set_input_files(str(path))

    def number(self, label: str, value: float) -> None:
        """Set a visible number field."""
        field = self.page.get_by_label(label).locator("visible=true").first
        field.fill(str(value))
        field.press("Enter")
