"""The spool: exports built on the local disk, waiting for the store.

`build` writes the checkpoint's files, digested from memory, and its manifest into a folder of spool/, whole or not at
all. What is not fit to be served (not finite, or refused by the gate) is built into quarantine/exports/ instead, for a
person to look at; the newest few stay. `pending` finds the others again after a restart.

All of it runs beside training: bytes are hashed once, while they are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from anytimed.contracts import AnytimedError, CorruptError

from . import tensors
from .checkpoint_files import ExportContent, model_card, write_weights
from .durable import digest_of, fsync_folder, write_new
from .manifest import MANIFEST_NAME, CheckpointId, FileEntry, Manifest, base_name
from .run_directory import RunDirectory

log = logging.getLogger(__name__)


_KEPT_ASIDE = 2
SEAL = "manifest.sha256"
"""The digest of the manifest's bytes, in the spool only: what waits there must not rot into something else."""


class ExportRefused(AnytimedError):
    """The weights are not fit to be served; they are kept aside, the previous checkpoint stays the latest."""


class ExportFailed(AnytimedError):
    """This export was not built; nothing of it is left, and training may go on."""


@dataclass(frozen=True, slots=True)
class SpoolItem:
    """A complete export on the local disk. `data`: the manifest's bytes."""

    path: Path
    manifest: Manifest
    data: bytes = field(repr=False)

    @property
    def id(self) -> str:
        return self.manifest.id


class Spool:
    """Exports that wait for the store, in the run's spool/; they survive a restart."""

    def __init__(
        self, run: RunDirectory, *, max_shard_bytes: int = 5 << 30, clock: Callable[[], float] = time.time
    ) -> None:
        self._run = run
        self._max_shard_bytes = max_shard_bytes
        self._clock = clock
        self._seq = 0
        self._trusted: set[str] = set()

    @property
    def term(self) -> int:
        """The term of what this process builds; what waits may bear a lower one."""
        return self._run.term

    def build(self, content: ExportContent) -> SpoolItem:
        """Write an export into the spool. Raises ExportRefused where the gate refused it or x is not finite: it is kept
        aside then; ExportFailed (disk): nothing is left then."""
        reason = content.refused or _not_finite(content)
        if reason is None:
            return self._build(content, self._run.spool)
        try:
            item = self._build(replace(content, flags=[*content.flags, reason]), self._run.refused_exports)
            self._tidy_aside()
            kept = f"kept in {item.path}"
        except ExportFailed as error:
            kept = f"not kept: {error}"
        raise ExportRefused(
            f"step {content.step}: {reason}; not published, {kept}. The previous checkpoint stays the latest"
        )

    def _build(self, content: ExportContent, folder: Path) -> SpoolItem:
        self._seq += 1
        ident = str(CheckpointId(self._run.term, self._seq, content.step))
        attempt = folder / f".tmp-{ident}-{secrets.token_hex(4)}"
        final = folder / ident
        try:
            attempt.mkdir(0o700)
            item = self._fill(attempt, final, content)
            attempt.rename(final)
            try:
                fsync_folder(folder)
            except OSError:
                final.rename(attempt)  # it is told as not built, so it must not be found either
                raise
        except OSError as error:
            shutil.rmtree(attempt, ignore_errors=True)
            raise ExportFailed(
                f"{final}: export not built: {error.strerror or error}; the next one may succeed"
            ) from error
        except BaseException:
            shutil.rmtree(attempt, ignore_errors=True)
            raise
        self._trusted.add(item.id)
        return item

    def pending(self) -> list[SpoolItem]:
        """Complete exports, oldest first. What an earlier process built is checked once; a damaged one is dropped."""
        found = []
        for path in self._run.spool.iterdir():
            try:
                CheckpointId.parse(path.name)
            except ValueError:
                continue  # not ours to judge
            try:
                item = self._read(path)
            except (FileNotFoundError, CorruptError) as error:
                log.error("%s: a spooled export is damaged and is dropped: %s", path, error)
                self._remove(path)
                continue
            found.append(item)
        return sorted(found, key=lambda item: item.manifest.order)

    def discard(self, item: SpoolItem) -> None:
        """Forget an export that is no longer wanted."""
        self._remove(item.path)

    def serve(self, item: SpoolItem, keep: str | None = None) -> Path | None:
        """It is published: keep it here for the gate to compare with, and of those before only `keep`; where. None
        where the disk would not have it; then it is forgotten."""
        place = self._run.served / item.id
        try:
            item.path.rename(place)
            fsync_folder(self._run.served)
        except OSError as error:
            log.warning("%s: cannot be kept for the gate: %s", item.path, error.strerror)
            self._remove(item.path)
            return None
        for other in self._run.served.iterdir():
            if other.name not in (item.id, keep):
                self._remove(other)
        return place

    def served(self, ident: str) -> Path | None:
        """Where the published export of that id is kept; None where it is not."""
        place = self._run.served / ident
        return place if (place / MANIFEST_NAME).is_file() else None

    def coalesce(self) -> list[SpoolItem]:
        """What waits, with all but the newest forgotten: a store that was slow gets the newest export, not a queue."""
        pending = self.pending()
        for item in pending[:-1]:
            self._remove(item.path)
        return pending[-1:]

    # --- within ---

    def _tidy_aside(self) -> None:
        folder = self._run.refused_exports
        for path in sorted(p for p in folder.iterdir() if not p.name.startswith("."))[:-_KEPT_ASIDE]:
            self._remove(path)

    def _fill(self, folder: Path, final: Path, content: ExportContent) -> SpoolItem:
        evaluation, flags = content.evaluation, list(content.flags)
        if evaluation and not all(map(math.isfinite, (evaluation.loss_x, evaluation.loss_y, evaluation.loss_z))):
            evaluation = None
            flags.append("evaluation not finite")
        try:
            files = write_weights(folder, content.tensors, self._max_shard_bytes)
            card = model_card(content, evaluation, final.name)
            small = {"config.json": json.dumps(content.config, indent=2).encode() + b"\n", "README.md": card.encode()}
            for name, data in {**content.files, **small}.items():
                size, sha256 = write_new(folder / base_name(name), data)
                files.append(FileEntry(name=name, size=size, sha256=sha256))
            now_s = self._clock()
            manifest = Manifest(
                id=final.name,
                run_id=self._run.run_id,
                term=self._run.term,
                seq=self._seq,
                step=content.step,
                tokens=content.tokens,
                created=datetime.fromtimestamp(now_s, UTC).isoformat(timespec="seconds"),
                created_s=now_s,
                files=files,
                optimizer=content.optimizer,
                evaluation=evaluation,
                config_digest=content.config_digest,
                parent=content.parent,
                interventions=list(content.interventions),
                lineage=content.lineage,
                flags=flags,
                sequence_length=content.sequence_length,
            )
            data = manifest.to_bytes()
        except ValueError as error:
            raise ExportRefused(f"step {content.step}: the export cannot be described: {error}") from error
        write_new(folder / MANIFEST_NAME, data)
        write_new(folder / SEAL, hashlib.sha256(data).hexdigest().encode())
        fsync_folder(folder)
        return SpoolItem(final, manifest, data)

    def _read(self, path: Path) -> SpoolItem:
        data = (path / MANIFEST_NAME).read_bytes()
        if (path / SEAL).read_bytes() != hashlib.sha256(data).hexdigest().encode():
            raise CorruptError(f"{path / MANIFEST_NAME}: not the bytes that were written")
        manifest = Manifest.from_bytes(data, str(path / MANIFEST_NAME))
        if manifest.id != path.name:
            raise CorruptError(f"{path}: the manifest says {manifest.id}")
        for entry in manifest.files if manifest.id not in self._trusted else []:
            if digest_of(path / entry.name) != (entry.size, entry.sha256):
                raise CorruptError(f"{path / entry.name}: not the {entry.size} bytes with SHA-256 {entry.sha256}")
        self._trusted.add(manifest.id)
        return SpoolItem(path, manifest, data)

    def _remove(self, path: Path) -> None:
        gone = path.with_name(f".del-{path.name}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)  # what stays is swept at the next start


def _not_finite(content: ExportContent) -> str | None:
    """Where x is NaN or Inf first, or None."""
    for name, tensor in content.tensors.items():
        at = tensors.non_finite(tensor)
        if at is not None:
            return f"x is not finite: {name} {tensor.dtype} {tensor.shape}, first at flat index {at}"
    return None
