"""Signals become requests. Handlers post and return; the loop acts between steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

from anytimed.service.requests import Export, Mailbox, Reload, Request, Stop

MEANING: dict[signal.Signals, Callable[[], Request]] = {
    signal.SIGTERM: partial(Stop, "SIGTERM"),
    signal.SIGINT: partial(Stop, "SIGINT"),
    signal.SIGHUP: Reload,
    signal.SIGUSR1: Export,
}


@contextlib.contextmanager
def posted_to(mailbox: Mailbox) -> Iterator[None]:
    """Handle the signals of `MEANING` while inside; what was installed before comes back after. Main thread only."""

    def handler(number: int, frame: FrameType | None) -> None:
        mailbox.post(MEANING[signal.Signals(number)]())

    before = {number: signal.signal(number, handler) for number in MEANING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
