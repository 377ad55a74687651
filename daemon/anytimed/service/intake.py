"""Takes in what senders offer to an inbox: durable before it is answered, and refused while too much waits.

In order: `submit` admits an offer or says why not, from any thread; one thread stores what came together with a single
fsync, leaves out what was stored before, and answers; then the reader is asked to look, at most a few times a second.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import ChainMap, deque
from collections.abc import Callable
from concurrent.futures import Future

from anytimed.contracts import AnytimedError, Json
from anytimed.data.inbox import Inbox
from anytimed.data.inbox_lines import made
from anytimed.data.inbox_log import InboxLog
from anytimed.service.inbox_file import InboxFile
from anytimed.service.offer import Declined, Offer, Offered
from anytimed.service.remembered import forget, recalled, request_of, unknown
from anytimed.urls import told

log = logging.getLogger("anytimed")

DISCOVER_S = 0.25
FULL_AGAIN_S, TROUBLE_AGAIN_S = 1, 5
_Asked = tuple[Offer, "Future[Json]"]
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Intake:
    """The daemon's side of one inbox. `arrived` is called after something was stored, `crashed` with an error that
    nobody foresaw."""

    def __init__(
        self,
        name: str,
        inbox: InboxLog,
        settings: Inbox.Settings,
        arrived: Callable[[], None],
        crashed: Callable[[BaseException], None],
    ) -> None:
        self.settings = settings
        self._name, self._inbox, self._arrived, self._crashed = name, inbox, arrived, crashed
        self._file = InboxFile(inbox)
        self._known: dict[bytes, bytes] | None = None
        self._changed = threading.Condition()
        self._queue: deque[_Asked] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"inbox-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Bytes that are stored and not yet read."""
        return self._inbox.waiting

    def admit(self, size: int) -> None:
        """Raises Declined while there is no room for so many bytes."""
        most = self.settings.max_bytes
        if size > most:
            raise Declined(413, f"the request takes {size} bytes, the inbox {self._name!r} has max_bytes = {most}")
        if self.waiting + self._queued_bytes + size > most:
            raise Declined(
                429,
                f"the inbox {self._name!r} is full: {self.waiting} bytes wait to be read, the most is max_bytes = "
                f"{most}; send it again later",
                again_s=FULL_AGAIN_S,
            )

    def submit(self, offer: Offer) -> Future[Json]:
        """The answer, once the offer is durable; the future raises Declined where it could not be made so. Raises
        Declined at once where there is no room for it, or the daemon stops."""
        answer: Future[Json] = Future()
        with self._changed:
            if self._closed:
                raise stopping()
            self.admit(offer.stored_bytes)
            self._queue.append((offer, answer))
            self._queued_bytes += offer.stored_bytes
            self._changed.notify()
        return answer

    def close(self, timeout_s: float = 10.0) -> None:
        """Take nothing more; what was admitted is stored and answered first."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asked, due = -DISCOVER_S, False
        try:
            while True:
                group = self._next(asked + DISCOVER_S - time.monotonic() if due else None)
                if group:
                    due = self._store(group) or due
                if due and (self._closed or time.monotonic() >= asked + DISCOVER_S):
                    self._arrived()
                    asked, due = time.monotonic(), False
                if self._closed and not group:
                    return
        except BaseException as error:  # noqa: BLE001 - the loop raises it, so that it ends the run and is seen
            self._crashed(error)
        finally:
            self._file.close()

    def _next(self, wait_s: float | None) -> list[_Asked]:
        """What came together; nothing after `wait_s`, or once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, wait_s)
            group = list(self._queue)
            self._queue.clear()
        return [(offer, answer) for offer, answer in group if self._awaited(offer, answer)]

    def _awaited(self, offer: Offer, answer: Future[Json]) -> bool:
        """Whether somebody still waits for the answer; from here on it cannot be cancelled."""
        if answer.set_running_or_notify_cancel():
            return True
        with self._changed:
            self._queued_bytes -= offer.stored_bytes
        return False

    def _store(self, group: list[_Asked]) -> bool:
        """Store and answer; whether anything is new."""
        try:
            stored = self._append(group)
        except (OSError, AnytimedError) as error:
            log.warning("source %s: nothing was taken in: %s", self._name, error)
            for _, answer in group:
                answer.set_exception(self._trouble(error))
            return False
        finally:
            with self._changed:
                self._queued_bytes -= sum(offer.stored_bytes for offer, _ in group)
        for (offer, answer), taken in zip(group, stored, strict=True):
            if isinstance(taken, Declined):
                answer.set_exception(taken)
            else:
                answer.set_result(self._told(offer, taken))
        return any(isinstance(taken, int) and taken > 0 for taken in stored)

    def _append(self, group: list[_Asked]) -> list[int | Declined]:
        """Make a group durable: of each offer how many of its records are new, or why it is declined."""
        synced, number = self._file.prepare(self.settings.segment_bytes)
        if self._known is None:
            self._known = recalled(self._inbox, self.settings.remembered_ids)
        new: dict[bytes, bytes] = {}
        known = ChainMap(new, self._known)
        lines: list[bytes] = []
        stored: list[int | Declined] = []
        for offer, _ in group:
            try:
                fresh = unknown(offer, known)
            except Declined as why:
                stored.append(why)
                continue
            lines += _lines(offer, fresh, number + len(lines), synced)
            stored.append(len(fresh))
        if lines:
            self._file.append(b"".join(lines), len(lines))
        self._known.update(new)
        forget(self._known, self.settings.remembered_ids)
        return stored

    def _told(self, offer: Offer, stored: int) -> Json:
        return {
            "source": self._name,
            "records": len(offer.records),
            "repeated": len(offer.records) - stored,
            "bytes": offer.size,
            "waiting_bytes": self.waiting,
        }

    def _trouble(self, error: Exception) -> Declined:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            why = f"no room on the disk for the inbox in {self._inbox.folder}: {error.strerror}; nothing was taken"
            return Declined(507, why, again_s=TROUBLE_AGAIN_S)
        why = f"the inbox {self._name!r} could not be written, nothing was taken: {told(str(error))}"
        return Declined(503, why, again_s=TROUBLE_AGAIN_S)


def stopping() -> Declined:
    return Declined(503, "the daemon is stopping; send it again once it runs", again_s=TROUBLE_AGAIN_S)


def _lines(offer: Offer, fresh: tuple[Offered, ...], number: int, synced: int) -> list[bytes]:
    last, request = len(fresh) - 1, request_of(offer)
    return [
        made(number + i, last - i, record.text, id=record.id, synced=synced, request=None if last - i else request)
        for i, record in enumerate(fresh)
    ]
