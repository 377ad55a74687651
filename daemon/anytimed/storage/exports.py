"""Publishing: from the spool to latest.json.

`Publisher.publish` uploads a spooled export: immutable files first, read back and compared, the manifest create-only
and last (the commit point), then the pointers, by compare-and-swap and never back. `repair` finishes at a start what a
crash left between manifest and pointer. `retain` takes the manifest away first, and the data at a later call, once no
pull can be reading it. Whoever calls these holds the lease; `check` asks it again before each point that counts.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from anytimed.contracts import AnytimedError, CorruptError, Refused

from .checkpoint_files import ExportContent
from .lease import lease_term, since_boot_s
from .listing import folders, manifest_key, published_ids, read_published
from .manifest import (
    CHECKPOINTS,
    MANIFEST_BYTES,
    MANIFEST_NAME,
    POINTER_BYTES,
    CheckpointId,
    FileEntry,
    Manifest,
    Pointer,
)
from .retention import Published, retirable
from .spool import ExportFailed, ExportRefused, Spool, SpoolItem
from .store import MissingKey, Store, StoreError

__all__ = ["ExportContent", "ExportFailed", "ExportRefused", "Publisher", "Spool", "SpoolItem", "Superseded"]

log = logging.getLogger(__name__)

_RETIRED = "retired.json"
"""The note that a checkpoint's manifest is gone, and its data goes after the grace period."""
_SWAPS = 5
"""How often a pointer that moves under our hands is read again before this is an error."""


class Superseded(AnytimedError):
    """Something newer than all we can publish stands under the prefix; a restart takes a term above it."""


class Publisher:
    """The writer's side of a published prefix. Calls come from one thread; only the holder of the lease may publish.

    `monotonic` times the grace of retired data, so that a wall clock that jumps deletes nothing that is being pulled.
    `verify`: read every uploaded file back and compare its digest before a manifest names it.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = since_boot_s,
        verify: bool = True,
    ) -> None:
        self._store = store
        self._clock, self._monotonic = clock, monotonic
        self._verify = verify
        self._known: dict[str, Manifest] = {}
        self._uploaded: set[str] = set()
        self._retired_at: dict[str, float] = {}

    @property
    def url(self) -> str:
        """The prefix, without credentials."""
        return self._store.url

    def publish(
        self,
        item: SpoolItem,
        progress: Callable[[int, int], None] | None = None,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Upload an export and make it the latest; repeating it after a failure is safe, and sends no file twice that
        arrived.

        `progress(done, total)` in bytes. `check` is called before every point that counts and raises if the prefix is
        not ours. Raises StoreError, Refused where another writer published other bytes under this id, Superseded.
        """
        key = manifest_key(item.id)
        check()
        if not self._published(key, item):
            self._store.delete(f"{CHECKPOINTS}/{item.id}/{_RETIRED}")
            done = 0
            for entry in item.manifest.files:
                self._upload(item, entry)
                done += entry.size
                if progress is not None:
                    progress(done, item.manifest.total_bytes)
            check()
            # Refused, and yet nothing there: it was taken away in between, which only another writer does.
            if not self._store.create(key, item.data) and not self._published(key, item):
                raise Refused(
                    f"{self._store.url}/{key}: refused as existing, then not there: another writer is at work"
                )
        self._uploaded.clear()
        self._known[item.id] = item.manifest
        check()
        pointer = Pointer.to(item.manifest, item.data)
        standing = self._advance("latest.json", pointer, _newer)
        if standing.order > pointer.order and standing.id not in self._known:
            raise Superseded(
                f"{self._store.url}/latest.json: names {standing.id}, which counts as newer than {item.id}: another "
                "run published here while the store could not be asked. Restart: the next start takes a term above it"
            )
        if pointer.evaluation is not None:
            self._advance("best.json", pointer, _better)

    def repair(self, *, alone: bool = True) -> None:
        """Finish what a crash interrupted: latest.json names the highest manifest that there is, and what killed
        uploads left is removed. `alone`: the store keeps other writers out, so every unfinished upload is a dead one.
        """
        self._store.sweep(older_than_s=3600.0, now_s=self._clock())
        try:
            swept = self._store.sweep_uploads(CHECKPOINTS, 0.0 if alone else 86_400.0)
            if swept:
                log.info("%s: %d unfinished uploads were aborted", self._store.url, swept)
        except StoreError as error:  # not every key may list them, and not every server can
            log.warning("unfinished uploads are not swept: %s", error)
        latest = self.pointer("latest.json")
        ids = published_ids(self._store)
        if latest is not None and latest.id not in ids:
            log.warning("%s: latest.json names %s, which is not there", self._store.url, latest.id)
            latest = None
        for ident in ids:
            if latest is not None and latest.order >= CheckpointId.parse(ident).order:
                return
            data = self._manifest_bytes(ident)
            manifest = self._known.get(ident)
            if data is not None and manifest is not None:
                # One that names what is gone is replaced by something older: nobody can have it.
                self._advance(
                    "latest.json", Pointer.to(manifest, data), lambda new, old: old.id not in ids or _newer(new, old)
                )
                return

    def latest(self) -> Manifest | None:
        """The manifest of the newest checkpoint that can be read; None where nothing is published. Raises
        StoreError."""
        for ident in published_ids(self._store):
            if self._manifest_bytes(ident) is not None:
                return self._known[ident]
        return None

    def latest_term(self) -> int:
        """The highest term that anything under the prefix bears, lease and unfinished uploads included; 0 if there is
        nothing."""
        found = [ident.term for ident in folders(self._store, CHECKPOINTS)]
        latest = self.pointer("latest.json")
        return max([*found, latest.order[0] if latest else 0, lease_term(self._store)])

    def retain(
        self,
        *,
        keep: int,
        keep_every_s: float | None = None,
        longest_pull_s: float = 3600.0,
        grace_s: float = 3600.0,
        check: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Delete what may go; ids whose manifest was taken away now.

        Keeps the newest `keep`, one per `keep_every_s`, all younger than `longest_pull_s`, and what latest.json or
        best.json name. Data follows its manifest `grace_s` after this process first saw it gone, at a later call; so
        does data that never got a manifest.
        """
        check()
        found = {str(ident): names for ident, names in folders(self._store, CHECKPOINTS).items()}
        ids = [ident for ident, names in found.items() if MANIFEST_NAME in names]
        named = {p.id for p in map(self.pointer, ("latest.json", "best.json")) if p is not None}
        published = []
        for ident in ids:
            # An unreadable manifest is neither counted nor deleted: a person, or a newer anytimed, may want it.
            if self._manifest_bytes(ident, cached=True) is not None or ident in self._known:
                manifest = self._known[ident]
                published.append(Published(ident, manifest.order, manifest.created_s))
        going = retirable(
            published,
            now_s=self._clock(),
            keep=keep,
            keep_every_s=keep_every_s,
            longest_pull_s=longest_pull_s,
            named=named,
        )
        check()
        for ident in going:
            # The note comes first: after a crash between the two, the next call takes the manifest away again.
            self._note_retired(ident)
            self._store.delete(manifest_key(ident))
            self._known.pop(ident, None)
        self._delete_data(found, named, grace_s)
        return going

    def _delete_data(self, found: dict[str, list[str]], named: set[str], grace_s: float) -> None:
        now = self._monotonic()
        for ident, names in found.items():
            if MANIFEST_NAME in names or ident in named:
                continue
            if _RETIRED not in names:
                self._note_retired(ident)
            # By our own clock since we saw it, not by the note's: a wall clock that jumps must not end a pull.
            elif now - self._retired_at.setdefault(ident, now) >= grace_s:
                for name in [*(n for n in names if n != _RETIRED), _RETIRED]:
                    self._store.delete(f"{CHECKPOINTS}/{ident}/{name}")
                self._retired_at.pop(ident)

    def _note_retired(self, ident: str) -> None:
        told = json.dumps({"retired_s": self._clock()}).encode()
        self._store.replace(f"{CHECKPOINTS}/{ident}/{_RETIRED}", told)
        self._retired_at[ident] = self._monotonic()

    # --- within ---

    def _published(self, key: str, item: SpoolItem) -> bool:
        """Whether our manifest stands there. Raises Refused on another writer's, StoreError on nobody's."""
        try:
            found = self._store.read(key, MANIFEST_BYTES)
        except MissingKey:
            return False
        if found == item.data:
            return True
        try:
            Manifest.from_bytes(found, f"{self._store.url}/{key}")
        except CorruptError as error:
            # Nobody's manifest: the store kept other bytes than were sent. No reader took it for one.
            self._store.delete(key)
            raise StoreError(f"{error}: the store holds other bytes than were sent; it is sent again") from None
        raise Refused(
            f"{self._store.url}/{key}: another writer published other bytes under our id {item.id}; "
            "two daemons must not share a prefix: give this run a URL of its own"
        )

    def _upload(self, item: SpoolItem, entry: FileEntry) -> None:
        key = f"{CHECKPOINTS}/{item.id}/{entry.name}"
        if key in self._uploaded:
            return
        self._store.put_file(item.path / entry.name, key)
        if self._verify:
            found = self._store.digest(key, entry.size + 1)
            if found != entry.sha256:
                raise StoreError(
                    f"{self._store.url}/{key}: the store holds other bytes than were sent (SHA-256 {found}, expected "
                    f"{entry.sha256}); not published, it is sent again"
                )
        self._uploaded.add(key)

    def _advance(self, name: str, pointer: Pointer, goes_before: Callable[[Pointer, Pointer], bool]) -> Pointer:
        """Have `name` point there, unless what it points to stands before that; where it points now."""
        for _ in range(_SWAPS):
            try:
                data, version = self._store.read_versioned(name, POINTER_BYTES)
                standing: Pointer | None = Pointer.from_bytes(data, f"{self._store.url}/{name}")
            except MissingKey:
                standing, version = None, None
            except CorruptError as error:
                log.warning("%s; it is written anew", error)
                self._store.replace(name, pointer.to_bytes())
                return pointer
            if standing is not None and (standing.id == pointer.id or not goes_before(pointer, standing)):
                return standing
            if self._store.swap(name, pointer.to_bytes(), version):
                return pointer
        raise StoreError(
            f"{self._store.url}/{name}: changed {_SWAPS} times while it was replaced: who else writes here?"
        )

    def pointer(self, name: str) -> Pointer | None:
        """latest.json or best.json; None where it is missing or garbled. Raises StoreError."""
        try:
            return Pointer.from_bytes(self._store.read(name, POINTER_BYTES), f"{self._store.url}/{name}")
        except MissingKey:
            return None
        except CorruptError as error:
            log.warning("%s; it is written anew", error)
            return None

    def _manifest_bytes(self, ident: str, *, cached: bool = False) -> bytes | None:
        """The stored manifest, remembered in `_known`; None where it is gone, unreadable, or (`cached`) known
        already."""
        if cached and ident in self._known:
            return None
        try:
            self._known[ident], data = read_published(self._store, ident)
        except (MissingKey, CorruptError, Refused) as error:
            log.warning("%s", error)
            return None
        return data


def _newer(pointer: Pointer, standing: Pointer) -> bool:
    return pointer.order > standing.order


def _better(pointer: Pointer, standing: Pointer) -> bool:
    """Losses are compared at equal hold-out only; on another one the newer checkpoint takes the place."""
    new, old = pointer.evaluation, standing.evaluation
    if new is None or old is None or new.holdout != old.holdout:
        return new is not None and _newer(pointer, standing)
    return new.loss_x < old.loss_x
