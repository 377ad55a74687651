"""The thread that keeps the right to publish: it asks the store what it enforces, then takes, watches and renews the
lease.

In order: `start`; each round probes (once), tends the lease, and posts what changed; the first time the lease is held
and every time it is held again, `on_held` wakes whoever waits to publish. A store that does not answer is degraded and
asked again; another writer ends the run. `check` is asked from the outbox's thread before every point that counts."""

from __future__ import annotations

import threading
from collections.abc import Callable

from anytimed.contracts import AnytimedError, Json, Refused
from anytimed.service.requests import Crashed, Leased, Request
from anytimed.storage.lease import Lease, NotHeld
from anytimed.storage.probe import Ability, probe
from anytimed.storage.store import Store, StoreError

ROUNDS = 3
"""How often the lease is renewed within its time to live: two may fail."""


class Keeper:
    """`require`: refuse to run on a store that does not enforce conditions."""

    def __init__(
        self, store: Store, run_id: str, term: int, post: Callable[[Request], None], *, ttl_s: float, require: bool
    ) -> None:
        # A request that takes longer than a round would let the lease run out behind its back.
        self._store = store.hurried(min(ttl_s / ROUNDS, 10.0))
        self._run_id, self._post, self._require = run_id, post, require
        self._lease = Lease(self._store, run_id, term, ttl_s=ttl_s)
        self._round_s = ttl_s / ROUNDS
        self._ability: Ability | None = None
        self._error: str | None = None
        self._told: tuple[bool, str | None] | None = None
        self._first = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self.on_held: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._thread.start()

    @property
    def held(self) -> bool:
        """Whether we may publish now."""
        return self._lease.held

    @property
    def fences(self) -> bool:
        """Whether the store itself keeps other writers out; False until it was asked."""
        return self._ability is not None and self._ability.fences

    def check(self) -> None:
        """Returns if we may publish. Raises NotHeld. The first round is waited for."""
        self._first.wait(2 * self._round_s)
        if self._error is not None and not self._lease.held:
            raise NotHeld(self._error)
        self._lease.check()

    def status(self) -> Json:
        """What the store enforces, and whether the lease is held."""
        ability = self._ability
        return {
            "conditions": ability.told if ability else "not asked yet",
            "enforced": ability.fences if ability else None,
            "lease": "held" if self._lease.held else "not held",
        }

    def close(self) -> None:
        """Give the lease up, so that the next writer need not wait for it; not at any price."""
        self._closing.set()
        self._first.set()
        if self._thread.ident is None:
            return
        self._thread.join(timeout=5)

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._round()
                self._first.set()
                self._closing.wait(self._round_s)
            if self._lease.held:
                self._lease.release()
        except Refused as error:
            self._error = str(error)
            self._first.set()
            self._post(Leased(error=str(error), refused=error))
        except AnytimedError:
            pass  # closing: the lease runs out by itself
        except BaseException as error:  # noqa: BLE001 - not handled here: the loop raises it
            self._post(Crashed(error))

    def _round(self) -> None:
        """Probe if that is still to do, tend, tell. Raises Refused."""
        held = False
        try:
            if self._ability is None:
                self._ability = probe(self._store, self._run_id)
                if self._require and not self._ability.fences:
                    raise Refused(
                        f"{self._store.url}: {self._ability.told}, and [exports] require_conditions = true: use "
                        "another store, or see that nobody else writes here and set it to false"
                    )
            held = self._lease.tend()
            self._error = None if held else "the lease of another writer stands there; it is watched, exports wait"
        except StoreError as error:
            self._error = f"{error}; training goes on, exports wait"
        told = (held, self._error)
        if told != self._told:
            self._told = told
            self._post(Leased(error=self._error))
            if held:
                self.on_held()
