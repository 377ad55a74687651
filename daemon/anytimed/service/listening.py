"""The client's side of `GET /events`: what a daemon says, as it comes, over restarts of the daemon too."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from anytimed.contracts import AnytimedError, Json
from anytimed.service.bulletin import PING_S
from anytimed.service.control import UnixConnection
from anytimed.storage.strangers import parse

AGAIN_S = 2.0
MESSAGE_BYTES = 16 << 20
EVENT_KEYS = {"kind", "time", "what", "id", "told", "step", "tokens"}
"""What every event has; earlier versions wrote some without an id."""


def messages(socket: Path, kinds: Iterable[str], after: str | None = None) -> Iterator[tuple[str, Json]]:
    """Kind and data of each message, until the daemon ends or goes silent. Raises OSError where none listens,
    AnytimedError where it says no."""
    connection = UnixConnection(socket, 2 * PING_S)
    since = f"&after={quote(after)}" if after else ""
    try:
        connection.request("GET", f"/events?kinds={','.join(kinds)}{since}")
        response = connection.getresponse()
        if response.status != 200:
            told = response.read(MESSAGE_BYTES).decode(errors="replace")
            raise AnytimedError(f"{socket}: {told[:200] or response.status}")
        kind = ""
        while line := response.readline(MESSAGE_BYTES):
            name, _, value = line.rstrip(b"\n").partition(b": ")
            if name == b"event":
                kind = value.decode(errors="replace")
            elif name == b"data" and isinstance(data := parse(value, str(socket)), dict):
                yield kind, data
    except (http.client.HTTPException, TimeoutError):
        return  # it was ended in the middle of a message
    finally:
        connection.close()


def events_on_disk(metrics: Path) -> Iterator[Json]:
    """The events in metrics.jsonl, oldest first; lines that are none are passed over."""
    try:
        with metrics.open("rb") as file:
            for line in file:
                if b'"kind":"event"' not in line:
                    continue
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # cut by a crash
                if isinstance(event, dict) and event.keys() >= EVENT_KEYS:
                    yield event
    except FileNotFoundError:
        return


def again(say: Callable[[str], None], listen: Callable[[], Iterator[Json]]) -> Iterator[Json]:
    """What `listen` yields, over and over; `say` is told once that no daemon answers, and once that one does again."""
    silent = False
    while True:
        try:
            for item in listen():
                if silent:
                    say("the daemon answers again")
                    silent = False
                yield item
        except OSError:
            pass
        if not silent:
            say("no daemon answers; waiting for one")
            silent = True
        time.sleep(AGAIN_S)
