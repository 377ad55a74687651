"""The reader's side: take the newest checkpoint, verified, from wherever it is published.

`pull` asks latest.json, else the manifests that are there, which checkpoint is the newest; checks the manifest as a
stranger's; and has `target` bring it into place, from where an earlier pull of it was cut off. A checkpoint that is
retired meanwhile: latest.json is read again. Wrong bytes: once more, then the previous good one, and the answer says
so. What is in place is never exchanged for something older unless that was asked for. Needs no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anytimed.contracts import ConfigError, CorruptError, Refused

from .listing import published_ids, read_published
from .manifest import POINTER_BYTES, CheckpointId, Manifest, Pointer
from .partial import Progress
from .ranges import Budget
from .store import MissingKey, Store
from .target import Target

log = logging.getLogger(__name__)

_LOOKS = 12
"""How often one pull asks which checkpoint is the newest before it gives up."""
WAITING_S = 20.0
"""Budget of one request, retries included: whoever pulls is waiting. Ranges of files have a budget of their own."""
_TRIES = 2
"""How often a checkpoint is tried whose bytes are wrong or missing: one bad transfer is likely, the same twice is
not."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """A verified checkpoint in place. `path` is versions/<id>, which never changes; `fell_back`: the newest was bad."""

    path: Path
    manifest: Manifest
    fell_back: bool


def latest(url: str, storage_options: Mapping[str, Any] | None = None) -> Manifest:
    """The newest published checkpoint. Raises MissingKey where nothing is published, CorruptError, StoreError."""
    return newest(Store(url, storage_options, deadline_s=WAITING_S))


def newest(store: Store, *, past_damage: bool = False) -> Manifest:
    """`latest` of an open store. `past_damage`: where a manifest is damaged, the newest one before it that is not."""
    passed_over: set[str] = set()
    damage: CorruptError | None = None
    while True:
        try:
            ident, sha256 = _newest(store, passed_over)
        except MissingKey:
            raise damage or MissingKey(f"{store.url}: no checkpoint is published here") from None
        try:
            return read_published(store, ident, sha256)[0]
        except MissingKey:
            pass
        except CorruptError as error:
            if not past_damage:
                raise
            damage = error
        passed_over.add(ident)


def named(store: Store, checkpoint: str) -> Manifest:
    """The manifest of a checkpoint by its id, or "best". Raises ConfigError, MissingKey, CorruptError, StoreError."""
    return read_published(store, *_asked(store, checkpoint))[0]


def list_checkpoints(url: str, storage_options: Mapping[str, Any] | None = None) -> list[Manifest]:
    """All published checkpoints, newest first; those whose manifest cannot be read are logged and left out."""
    store = Store(url, storage_options, deadline_s=WAITING_S)
    found = []
    for ident in published_ids(store):
        try:
            found.append(read_published(store, ident)[0])
        except (MissingKey, CorruptError) as error:
            log.warning("%s", error)
    return found


def pull(
    url: str,
    to: str | Path,
    *,
    checkpoint: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    max_bytes: int = 4 << 40,
) -> Pulled:
    """Bring a checkpoint into the folder `to` and point `to`/current at it.

    `checkpoint`: an id, or "best" for the best held-out loss; None for the newest. `progress(done, total)` in bytes,
    told first what an earlier pull had left: whatever ends a pull, the next one of that checkpoint goes on from there.
    `max_bytes`: refuse what is larger. Already there and whole: nothing is downloaded. Raises MissingKey where
    nothing is published, CorruptError where no good checkpoint is to be had, Refused where `to` holds a newer one of
    another run, NewerFormat, ConfigError on a bad id, AnytimedError on a local failure such as a full disk,
    StoreError.
    """
    store = Store(url, storage_options, deadline_s=WAITING_S)
    return bring(store, Target(Path(to)), checkpoint=checkpoint, progress=progress, max_bytes=max_bytes)


def bring(
    store: Store,
    target: Target,
    *,
    checkpoint: str | None = None,
    progress: Progress | None = None,
    max_bytes: int = 4 << 40,
) -> Pulled:
    """`pull` from an open store into a folder."""
    budget = Budget()
    bad: dict[str, str] = {}
    gone: set[str] = set()
    tried: dict[str, int] = {}
    for _ in range(_LOOKS):
        try:
            ident, sha256 = _newest(store, gone | set(bad)) if checkpoint is None else _asked(store, checkpoint)
        except MissingKey:
            if not bad:
                raise
            break
        try:
            manifest, data = read_published(store, ident, sha256)
        except (MissingKey, CorruptError) as error:
            if _again(tried, ident, error):
                continue
            if checkpoint is not None:
                raise
            if isinstance(error, MissingKey):
                gone.add(ident)  # latest.json names what is no longer there: no fault of a checkpoint
            else:
                bad[ident] = str(error)
            continue
        if manifest.total_bytes > max_bytes:
            raise CorruptError(f"{store.url}: {ident} has {manifest.total_bytes} bytes, allowed are {max_bytes}")
        fell_back = any(CheckpointId.parse(worse).order > manifest.order for worse in bad)
        standing = target.current() if checkpoint is None else None
        if standing is not None and _keeps(target, standing, manifest, store.url, fell_back):
            return Pulled(target.version(standing), standing, fell_back)
        try:
            path = target.take(store, manifest, data, asked=checkpoint is not None, budget=budget, progress=progress)
        except (MissingKey, CorruptError) as error:
            if _again(tried, ident, error):
                continue
            target.tidy()
            if checkpoint is not None:
                raise
            bad[ident] = str(error)
            continue
        if fell_back:
            log.warning("%s: %s: bad; took the older %s", store.url, ", ".join(bad), ident)
        return Pulled(path, manifest, fell_back)
    standing = target.current() if checkpoint is None else None
    if bad and standing is not None and target.whole(standing):
        log.warning("%s: %s: bad; kept %s", store.url, ", ".join(bad), standing.id)
        return Pulled(target.version(standing), standing, True)
    told = "; ".join(bad.values()) or f"asked {_LOOKS} times, each time it was gone"
    raise CorruptError(f"{store.url}: no good checkpoint to be had: {told}. {target.path} was not changed")


def _again(tried: dict[str, int], ident: str, error: Exception) -> bool:
    """Count a failed try; whether to look and try once more."""
    tried[ident] = tried.get(ident, 0) + 1
    log.warning("%s: %s", ident, error)
    return tried[ident] < _TRIES


def _keeps(target: Target, standing: Manifest, offered: Manifest, url: str, fell_back: bool) -> bool:
    """Whether what is in place stays, because the offer is older. Raises Refused on another run's, CorruptError."""
    if standing.run_id != offered.run_id and offered.order <= standing.order and not fell_back:
        raise Refused(
            f"{target.path}: holds {standing.id} of run {standing.run_id}; at {url} the newest is {offered.id} of run "
            f"{offered.run_id}, not newer: pull into another folder, or name the checkpoint to go back to"
        )
    if offered.order >= standing.order:
        return False
    if not target.whole(standing):
        raise CorruptError(
            f"{target.version(standing)}: damaged, and {url} has only older ones; name the checkpoint to go back to"
        )
    log.warning("%s: %s is newer than %s at %s and stays", target.path, standing.id, offered.id, url)
    return True


# --- which one --------------------------------------------------------------------------------------------------------


def _newest(store: Store, passed_over: AbstractSet[str]) -> tuple[str, str | None]:
    """The id that latest.json names, with its manifest's digest, else the highest that has a manifest."""
    pointer = _pointed(store, "latest.json")
    if pointer is not None and pointer.id not in passed_over:
        return pointer.id, pointer.manifest_sha256
    for ident in published_ids(store):
        if ident not in passed_over:
            return ident, None
    raise MissingKey(f"{store.url}: no checkpoint is published here")


def _asked(store: Store, checkpoint: str) -> tuple[str, str | None]:
    if checkpoint != "best":
        try:
            return str(CheckpointId.parse(checkpoint)), None
        except ValueError as error:
            raise ConfigError(f"checkpoint: {error}, or 'best'") from error
    pointer = _pointed(store, "best.json")
    if pointer is None:
        raise MissingKey(f"{store.url}: no best.json; no checkpoint was evaluated yet")
    return pointer.id, pointer.manifest_sha256


def _pointed(store: Store, name: str) -> Pointer | None:
    """latest.json or best.json; None where it is missing or garbled."""
    try:
        return Pointer.from_bytes(store.read(name, POINTER_BYTES), f"{store.url}/{name}")
    except MissingKey:
        return None
    except CorruptError as error:
        log.warning("%s; looking at the manifests instead", error)
        return None
