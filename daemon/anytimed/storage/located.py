"""A checkpoint by the name that a person gives it: `WHERE` or `WHERE@ID`.

WHERE is a pulled folder (`current` or a version of it), one version's folder, any folder with a model in Hugging Face's
form, a commit's folder, or a published prefix, of which the newest is taken. ID is a checkpoint's id, or best. `locate`
gives a folder to read, pulled where it has to be; `describe` the manifest alone. Needs no torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from anytimed.contracts import ConfigError
from anytimed.urls import told

from .commit import MANIFEST as COMMIT
from .manifest import MANIFEST_BYTES, MANIFEST_NAME, CheckpointId, Manifest
from .partial import Progress
from .pull import WAITING_S, named, newest, pull
from .store import Store


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint's folder. name: as it was asked for, without credentials; manifest: None where the folder has none,
    as another tool's model."""

    name: str
    folder: Path
    manifest: Manifest | None

    @property
    def label(self) -> str:
        """The id, or the name where there is none."""
        return self.manifest.id if self.manifest else self.name


def split(name: str) -> tuple[str, str | None]:
    """WHERE and ID. A URL may have an @ of its own; after the last one stands an id, or it is none of ours."""
    where, at, ident = name.rpartition("@")
    if at and where:
        if ident == "best":
            return where, ident
        with contextlib.suppress(ValueError):
            return where, str(CheckpointId.parse(ident))
    return name, None


def locate(name: str, scratch: Path, *, progress: Progress | None = None) -> Located:
    """The folder of a checkpoint; one that is published is pulled into `scratch`, which nothing else may use. Raises as
    `pull`."""
    where, ident = split(name)
    folder = _local(Path(where), ident)
    if folder is None:
        pulled = pull(where, scratch, checkpoint=ident, progress=progress)
        return Located(told(name), pulled.path, pulled.manifest)
    return Located(told(name), folder, _manifest(folder))


def describe(name: str) -> Manifest:
    """The manifest of a checkpoint, and nothing else of it. Raises ConfigError where there is none, MissingKey,
    CorruptError, StoreError."""
    where, ident = split(name)
    folder = _local(Path(where), ident)
    if folder is None:
        store = Store(where, deadline_s=WAITING_S)
        return newest(store) if ident is None else named(store, ident)
    manifest = _manifest(folder)
    if manifest is None:
        raise ConfigError(f"{folder}: no {MANIFEST_NAME}; expected a checkpoint that `anytimed pull` brought, or a URL")
    return manifest


def published_at(name: str) -> str | None:
    """The prefix that a name asks for; None where it names a local folder."""
    return split(name)[0] if _local(*_where(name)) is None else None


def versions_beside(name: str) -> list[Manifest]:
    """The manifests of all versions in the folder where a local checkpoint lies. Raises CorruptError."""
    folder = _local(*_where(name))
    found = [_manifest(beside) for beside in folder.parent.iterdir() if beside.is_dir()] if folder is not None else []
    return [manifest for manifest in found if manifest is not None]


def _where(name: str) -> tuple[Path, str | None]:
    where, ident = split(name)
    return Path(where), ident


def _local(path: Path, ident: str | None) -> Path | None:
    """The folder of a checkpoint that lies here; None where it has to be pulled."""
    if ident is not None:
        version = path / "versions" / ident
        return version if (version / "config.json").is_file() else None
    marks = (path / "config.json", path / COMMIT, path / "current" / "config.json")
    found = next((mark.parent for mark in marks if mark.is_file()), None)
    # By the name that never changes: `current` may be flipped while its files are read.
    return found.resolve() if found is not None else None


def _manifest(folder: Path) -> Manifest | None:
    try:
        with (folder / MANIFEST_NAME).open("rb") as file:
            data = file.read(MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    return Manifest.from_bytes(data, str(folder / MANIFEST_NAME))
