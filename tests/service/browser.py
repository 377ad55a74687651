"""Debian's Chromium, driven by Playwright, and a way for it to a daemon's socket.

Everything that the page asks for and everything that it complains about is recorded."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from anytimed.service.control import _short

FLAGS = ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium")
    assert found is not None, "no chromium: apt-get install chromium"
    # Root has no sandbox to give in a container; only our own page is opened.
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        try:
            yield browser
        finally:
            browser.close()


def until(page: Page, expression: str, seconds: float = 30) -> None:
    """Until it is true in the page. Playwright's own way evaluates a text there, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never true: {expression}"
        page.wait_for_timeout(30)


@dataclass
class Visit:
    """A page, the hosts and addresses that it asked, and its complaints."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextlib.contextmanager
def visiting(browser: Browser, url: str, *, width: int = 1280, height: int = 900, **context: Any) -> Iterator[Visit]:
    """`url` in a window of its own, once it is drawn."""
    window = browser.new_context(viewport={"width": width, "height": height}, locale="en-GB", **context)
    try:
        page = window.new_page()
        visit = Visit(page)
        page.on("request", lambda request: visit.requests.append(request.url))
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        page.on("console", lambda said: visit.complaints.append(f"{said.type}: {said.text} {said.location.get('url')}"))
        page.goto(url)
        until(page, "performance.getEntriesByName('rendered').length > 0")
        yield visit
    finally:
        window.close()


@contextlib.contextmanager
def bridged(path: Path) -> Iterator[str]:
    """A loopback address behind which the socket at `path` answers, also one that comes later."""
    listener = socket.create_server(("127.0.0.1", 0))
    alive: set[socket.socket] = set()

    def pour(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        daemon = socket.socket(socket.AF_UNIX)
        alive.update((client, daemon))
        try:
            with _short(path) as address:
                daemon.connect(address)
        except OSError:
            client.close()
            return
        threading.Thread(target=pour, args=(client, daemon), daemon=True).start()
        pour(daemon, client)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for end in alive:
            end.close()
