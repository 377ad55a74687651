"""What a store can be relied on for: asked of the store itself, at every start.

`probe` creates an object twice with different bytes (the second must be refused), replaces it with the version it had
before the last replacement (must be refused), and looks for it in a listing right after the write. Some S3 servers
accept If-None-Match and If-Match and ignore both: there the lease is advisory, and `Ability.told` says so.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass

from .store import MissingKey, Store, StoreError

PROBES = "_probe"
"""The folder of a prefix that probes write in; nothing stays there."""


@dataclass(frozen=True, slots=True)
class Ability:
    """Which conditions a store enforces. `lists_at_once`: a listing shows what was written just before."""

    create_only: bool
    compare_and_swap: bool
    lists_at_once: bool

    @property
    def fences(self) -> bool:
        """Whether the store itself keeps two writers apart."""
        return self.create_only and self.compare_and_swap

    @property
    def told(self) -> str:
        """One line for a person."""
        missing = [
            what
            for what, there in (
                ("create-only writes (If-None-Match)", self.create_only),
                ("compare-and-swap (If-Match)", self.compare_and_swap),
                ("listings that show the last write", self.lists_at_once),
            )
            if not there
        ]
        if not missing:
            return "enforces create-only and compare-and-swap"
        return f"does not enforce {', '.join(missing)}: two writers are kept apart by reading back only"


def probe(store: Store, run_id: str) -> Ability:
    """Ask the store, and note the answer in `store.advisory`; one object is written and removed. Raises StoreError
    where the store does not answer or may not be written."""
    for key in store.list(PROBES):  # what a killed probe of this run left
        if key.startswith(f"{PROBES}/{run_id[:12]}-"):
            store.delete(key)
    key = f"{PROBES}/{run_id[:12]}-{secrets.token_hex(6)}"
    try:
        if not store.create_unlooked(key, b"first"):
            raise StoreError(f"{store.url}/{key}: a new object was refused as existing; the store cannot be used")
        create_only = not store.create_unlooked(key, b"second")
        lists_at_once = key in store.list(PROBES)
        _, before = store.read_versioned(key, 100)
        swapped = store.swap(key, b"third", before)
        stale = not store.advisory and store.swap(key, b"fourth", before)
    except MissingKey as error:
        raise StoreError(f"{error} right after it was written: the store cannot be used") from None
    finally:
        with contextlib.suppress(StoreError):
            store.delete(key)
    compare_and_swap = swapped is not None and not stale and not store.advisory
    store.advisory = not compare_and_swap
    return Ability(create_only, compare_and_swap, lists_at_once)
