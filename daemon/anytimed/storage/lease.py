"""lease.json: who may write under a published prefix.

`tend` is called again and again. Without the lease it looks at what stands there: nothing, one that was given up, or
one of an earlier process of this run is taken at once; another's is watched, and taken over once it stayed unchanged
for its whole time to live on *our* monotonic clock, by compare-and-swap and only with a higher term. One that changes
while it is watched is alive: refused. With the lease it renews it, if it still is the one that we wrote.

The lease is held until its time to live after the *begin* of the last successful renewal, so a process that was
stopped for longer finds it gone before it writes anything (`check`). A store that does not answer is another matter:
StoreError, and the lease runs out by itself.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, ClassVar

from pydantic import Field

from anytimed.contracts import CorruptError, Refused

from .manifest import Count, Stored
from .store import MissingKey, Store, StoreError

LEASE = "lease.json"
LEASE_BYTES = 1 << 16


def since_boot_s() -> float:
    """Seconds that go on while the machine sleeps, which `time.monotonic` does not count on Linux."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseFile(Stored):
    """What lease.json says. `renewed` counts, so that every renewal changes the bytes; `expires` is for people."""

    form: ClassVar[str] = "lease"

    run_id: Annotated[str, Field(max_length=200)]
    term: Count
    holder: Annotated[str, Field(max_length=200)]
    renewed: Count
    ttl_s: Annotated[float, Field(gt=0, le=86_400)]
    expires: Annotated[str, Field(max_length=100)]
    released: bool = False


class NotHeld(StoreError):
    """The lease is not ours now: nothing may be written; exports wait."""


class Lease:
    """The right to publish under a prefix. `tend` and `release` from one thread, `held` and `check` from any."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        term: int,
        *,
        ttl_s: float = 60.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = since_boot_s,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        """`ttl_s`: how long others have to see the lease unchanged before they may take it."""
        self._store, self._run_id, self._term, self.ttl_s = store, run_id, term, ttl_s
        self._clock, self._monotonic, self._pause = clock, monotonic, pause
        self._holder = secrets.token_hex(8)
        self._renewed = 0
        self._version: str | None = None
        self._watched: tuple[bytes, float] | None = None
        self._held_until = float("-inf")
        self._lock = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether we may write now."""
        with self._lock:
            return self._monotonic() < self._held_until

    def check(self) -> None:
        """Returns if the lease is held. Raises NotHeld."""
        if not self.held:
            raise NotHeld(f"{self._store.url}/{LEASE}: not ours now; nothing is written until it is, exports wait")

    def tend(self) -> bool:
        """Take, watch or renew; whether it is held. Raises Refused where another writer is alive or was first,
        StoreError."""
        if self._version is not None and self._renew():
            return True
        return self._acquire()

    def release(self) -> None:
        """Give it up, so that the next writer need not wait. Raises StoreError."""
        with self._lock:
            held, self._held_until = self._monotonic() < self._held_until, float("-inf")
        if held and self._version is not None:
            self._store.swap(LEASE, self._file(released=True), self._version)
            self._version = None

    # --- within ---

    def _renew(self) -> bool:
        began = self._monotonic()
        data = self._file()
        if self._version is not None:
            self._version = self._store.swap(LEASE, data, self._version)
        if self._version is not None:
            self._keep(began)
            return True
        with self._lock:
            self._held_until = float("-inf")
        return False

    def _acquire(self) -> bool:
        began = self._monotonic()
        try:
            found, version = self._store.read_versioned(LEASE, LEASE_BYTES)
        except MissingKey:
            found, version = b"", None
        except CorruptError:
            raise Refused(
                f"{self._store.url}/{LEASE}: too large for a lease; look at it, and delete it if no daemon writes here"
            ) from None
        if version is not None and not self._free(found):
            return False
        data = self._file()
        taken = self._store.swap(LEASE, data, version)
        self._watched = None
        if taken is None:  # somebody was quicker; who, and whether alive, the next look shows
            return False
        if self._store.advisory:
            # Two who looked at the same moment both wrote: after a pause the last one stands, and both can see it.
            self._pause(min(2.0, self.ttl_s / 10))
            if self._store.read(LEASE, LEASE_BYTES) != data:
                return False
        self._version = taken
        self._keep(began)
        return True

    def _free(self, found: bytes) -> bool:
        """Whether the lease that stands there may be taken now. Raises Refused."""
        where = f"{self._store.url}/{LEASE}"
        told = self._read(found, where)
        if told is not None and told.run_id == self._run_id:
            if told.holder == self._holder:
                return True  # our own write, whose answer was lost
            if told.term > self._term:
                raise Refused(f"{where}: a later process of this run (term {told.term}, ours is {self._term}) has it")
            if told.term < self._term:
                return True  # an earlier process of this run; the run's lock says that it is gone
        if told is not None and told.released and told.term < self._term:
            return True
        now = self._monotonic()
        if self._watched is None:
            self._watched = (found, now)
            return False
        if found != self._watched[0]:
            who = f"run {told.run_id}, term {told.term}" if told else "something that is no lease"
            raise Refused(
                f"{where}: another writer is alive here: {who}; give this run a prefix of its own, or stop the other"
            )
        if now - self._watched[1] < (told.ttl_s if told else self.ttl_s):
            return False
        if told is not None and told.term >= self._term:
            raise Refused(
                f"{where}: left by run {told.run_id} with term {told.term}, ours is {self._term}: start again, for a "
                "higher one"
            )
        return True

    def _read(self, found: bytes, where: str) -> LeaseFile | None:
        try:
            return LeaseFile.from_bytes(found, where)
        except CorruptError:
            return None  # garbled: it is watched like a stranger's

    def _file(self, *, released: bool = False) -> bytes:
        self._renewed += 1
        expires = datetime.fromtimestamp(self._clock() + self.ttl_s, UTC).isoformat(timespec="seconds")
        told = LeaseFile(
            run_id=self._run_id,
            term=self._term,
            holder=self._holder,
            renewed=self._renewed,
            ttl_s=self.ttl_s,
            expires=expires,
            released=released,
        )
        return told.to_bytes()

    def _keep(self, began: float) -> None:
        with self._lock:
            self._held_until = began + self.ttl_s


def lease_term(store: Store) -> int:
    """The term of the lease that stands under a prefix; 0 where there is none that can be read. Raises StoreError."""
    try:
        return LeaseFile.from_bytes(store.read(LEASE, LEASE_BYTES), f"{store.url}/{LEASE}").term
    except (MissingKey, CorruptError):
        return 0
