"""Publishing: from the spool to latest.json.

`Publisher.publish` uploads a spooled export: immutable files first, the manifest create-only and last (the commit
point), then the pointers, which never move back. `repair` finishes at a start what a crash left between manifest and
pointer. `retain` takes the manifest away first, and the data at a later call, once no pull can be reading it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable

from anytimed.contracts import CorruptError, Refused

from .checkpoint_files import ExportContent
from .manifest import CHECKPOINTS, MANIFEST_BYTES, MANIFEST_NAME, POINTER_BYTES, CheckpointId, Manifest, Pointer
from .retention import Published, retirable
from .spool import ExportFailed, ExportRefused, Spool, SpoolItem
from .store import MissingKey, Store

__all__ = ["ExportContent", "ExportFailed", "ExportRefused", "Publisher", "Spool", "SpoolItem"]

log = logging.getLogger(__name__)

_RETIRED = "retired.json"
"""The note that a checkpoint's manifest is gone since a moment, and its data goes after the grace period."""


class Publisher:
    """The writer's side of a published prefix. Calls come from one thread; only the holder of the prefix may
    publish."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._known: dict[str, Manifest] = {}

    def publish(
        self,
        item: SpoolItem,
        progress: Callable[[int, int], None] | None = None,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Upload an export and make it the latest; repeating it after a failure is safe.

        `progress(done, total)` in bytes. `check` is called right before the commit point and raises if the prefix is no
        longer ours. Raises StoreError, Refused where another writer published other bytes under this id.
        """
        key = f"{CHECKPOINTS}/{item.id}/{MANIFEST_NAME}"
        if not self._published(key, item):
            self._store.delete(f"{CHECKPOINTS}/{item.id}/{_RETIRED}")
            done = 0
            for entry in item.manifest.files:
                self._store.put_file(item.path / entry.name, f"{CHECKPOINTS}/{item.id}/{entry.name}")
                done += entry.size
                if progress is not None:
                    progress(done, item.manifest.total_bytes)
            check()
            # Refused, and yet nothing there: it was taken away in between, which only another writer does.
            if not self._store.create(key, item.data) and not self._published(key, item):
                raise Refused(
                    f"{self._store.url}/{key}: refused as existing, then not there: another writer is at work"
                )
        self._known[item.id] = item.manifest
        pointer = Pointer.to(item.manifest, item.data)
        self._advance("latest.json", pointer, _newer)
        if pointer.evaluation is not None:
            self._advance("best.json", pointer, _better)

    def repair(self) -> None:
        """Finish what a crash interrupted: latest.json names the highest manifest that there is."""
        self._store.sweep(older_than_s=3600.0, now_s=self._clock())
        latest = self._pointer("latest.json")
        ids = self._ids()
        if latest is not None and latest.id not in ids:
            log.warning("%s: latest.json names %s, which is not there", self._store.url, latest.id)
            latest = None
        for ident in ids:
            if latest is not None and latest.order >= CheckpointId.parse(ident).order:
                return
            data = self._manifest_bytes(ident)
            manifest = self._known.get(ident)
            if data is not None and manifest is not None:
                self._store.replace("latest.json", Pointer.to(manifest, data).to_bytes())
                return

    def latest_term(self) -> int:
        """The highest term that anything under the prefix bears, unfinished uploads included; 0 if there is nothing."""
        found = [CheckpointId.parse(ident).term for ident in self._folders()]
        latest = self._pointer("latest.json")
        return max([*found, latest.order[0] if latest else 0], default=0)

    def retain(
        self, *, keep: int, keep_every_s: float | None = None, longest_pull_s: float = 3600.0, grace_s: float = 3600.0
    ) -> list[str]:
        """Delete what may go; ids whose manifest was taken away now.

        Keeps the newest `keep`, one per `keep_every_s`, all younger than `longest_pull_s`, and what latest.json or
        best.json name. Data follows its manifest `grace_s` later, at a later call; so does data that never got a
        manifest.
        """
        now_s = self._clock()
        folders = self._folders()
        ids = [ident for ident, names in folders.items() if MANIFEST_NAME in names]
        named = {p.id for p in map(self._pointer, ("latest.json", "best.json")) if p is not None}
        published = []
        for ident in ids:
            # An unreadable manifest is neither counted nor deleted: a person, or a newer anytimed, may want it.
            if self._manifest_bytes(ident, cached=True) is not None or ident in self._known:
                manifest = self._known[ident]
                published.append(Published(ident, manifest.order, manifest.created_s))
        going = retirable(
            published, now_s=now_s, keep=keep, keep_every_s=keep_every_s, longest_pull_s=longest_pull_s, named=named
        )
        for ident in going:
            # The note comes first: after a crash between the two, the next call takes the manifest away again.
            self._store.replace(f"{CHECKPOINTS}/{ident}/{_RETIRED}", json.dumps({"retired_s": now_s}).encode())
            self._store.delete(f"{CHECKPOINTS}/{ident}/{MANIFEST_NAME}")
            self._known.pop(ident, None)
        for ident, names in folders.items():
            if MANIFEST_NAME in names or ident in named:
                continue
            since_s = self._retired_since(ident) if _RETIRED in names else None
            if since_s is None:
                self._store.replace(f"{CHECKPOINTS}/{ident}/{_RETIRED}", json.dumps({"retired_s": now_s}).encode())
            elif now_s - since_s >= grace_s:
                for name in [*(n for n in names if n != _RETIRED), _RETIRED]:
                    self._store.delete(f"{CHECKPOINTS}/{ident}/{name}")
        return going

    # --- within ---

    def _published(self, key: str, item: SpoolItem) -> bool:
        """Whether the manifest stands there with our bytes. Raises Refused on others."""
        try:
            found = self._store.read(key, MANIFEST_BYTES)
        except MissingKey:
            return False
        if found != item.data:
            raise Refused(
                f"{self._store.url}/{key}: another writer published other bytes under our id {item.id}; "
                "two daemons must not share a prefix: give this run a URL of its own"
            )
        return True

    def _advance(self, name: str, pointer: Pointer, goes_before: Callable[[Pointer, Pointer], bool]) -> None:
        standing = self._pointer(name)
        if standing is None or goes_before(pointer, standing):
            self._store.replace(name, pointer.to_bytes())

    def _pointer(self, name: str) -> Pointer | None:
        try:
            return Pointer.from_bytes(self._store.read(name, POINTER_BYTES), f"{self._store.url}/{name}")
        except MissingKey:
            return None
        except CorruptError as error:
            log.warning("%s; it is written anew", error)
            return None

    def _folders(self) -> dict[str, list[str]]:
        """File names by checkpoint id, unfinished and retired ones included; foreign folders are left alone."""
        found: dict[str, list[str]] = {}
        for key in self._store.list(CHECKPOINTS):
            parts = key.split("/")
            if len(parts) == 3:
                with contextlib.suppress(ValueError):
                    found.setdefault(str(CheckpointId.parse(parts[1])), []).append(parts[2])
        return found

    def _ids(self) -> list[str]:
        """Ids that have a manifest, newest first."""
        ids = [ident for ident, names in self._folders().items() if MANIFEST_NAME in names]
        return sorted(ids, key=lambda ident: CheckpointId.parse(ident).order, reverse=True)

    def _manifest_bytes(self, ident: str, *, cached: bool = False) -> bytes | None:
        """The stored manifest, remembered in `_known`; None where it is gone, unreadable, or (`cached`) known
        already."""
        if cached and ident in self._known:
            return None
        key = f"{CHECKPOINTS}/{ident}/{MANIFEST_NAME}"
        try:
            data = self._store.read(key, MANIFEST_BYTES)
            self._known[ident] = Manifest.from_bytes(data, f"{self._store.url}/{key}")
        except (MissingKey, CorruptError, Refused) as error:
            log.warning("%s", error)
            return None
        return data

    def _retired_since(self, ident: str) -> float | None:
        try:
            return float(json.loads(self._store.read(f"{CHECKPOINTS}/{ident}/{_RETIRED}", POINTER_BYTES))["retired_s"])
        except (MissingKey, CorruptError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return None


def _newer(pointer: Pointer, standing: Pointer) -> bool:
    return pointer.order > standing.order


def _better(pointer: Pointer, standing: Pointer) -> bool:
    """Losses are compared at equal hold-out only; on another one the newer checkpoint takes the place."""
    new, old = pointer.evaluation, standing.evaluation
    if new is None or old is None or new.holdout != old.holdout:
        return new is not None and _newer(pointer, standing)
    return new.loss_x < old.loss_x
