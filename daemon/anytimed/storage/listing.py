"""What lies under a prefix, by the id of a checkpoint or a commit: folders of plain names, finished or not.

What is named otherwise is passed over: it is not ours to judge.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence

from anytimed.contracts import CorruptError

from .manifest import CHECKPOINTS, MANIFEST_BYTES, MANIFEST_NAME, CheckpointId, Manifest
from .store import Store


def folders(store: Store, top: str) -> dict[CheckpointId, list[str]]:
    """File names by id of what lies in `top`, unfinished and retired ones included. Raises StoreError."""
    found: dict[CheckpointId, list[str]] = {}
    for key in store.list(top):
        parts = key.split("/")
        if len(parts) == 3:
            with contextlib.suppress(ValueError):
                found.setdefault(CheckpointId.parse(parts[1]), []).append(parts[2])
    return found


def finished(found: Mapping[CheckpointId, Sequence[str]], manifest: str = MANIFEST_NAME) -> list[CheckpointId]:
    """The ids that have a manifest of that name, newest first."""
    return sorted((ident for ident, names in found.items() if manifest in names), key=lambda i: i.order, reverse=True)


def published_ids(store: Store) -> list[str]:
    """Ids of the published checkpoints, newest first. Raises StoreError."""
    return [str(ident) for ident in finished(folders(store, CHECKPOINTS))]


def manifest_key(ident: CheckpointId | str) -> str:
    """Where a published checkpoint's manifest stands."""
    return f"{CHECKPOINTS}/{ident}/{MANIFEST_NAME}"


def read_published(store: Store, ident: str, sha256: str | None = None) -> tuple[Manifest, bytes]:
    """A published manifest and its bytes. `sha256`: what they have to be.

    Raises MissingKey, CorruptError, NewerFormat, StoreError."""
    where = f"{store.url}/{manifest_key(ident)}"
    data = store.read(manifest_key(ident), MANIFEST_BYTES)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptError(f"{where}: not the bytes with SHA-256 {sha256} that the pointer names")
    manifest = Manifest.from_bytes(data, where)
    if manifest.id != ident:
        raise CorruptError(f"{where}: says that it is {manifest.id}")
    return manifest, data
