"""Commits: the resumable state, all of one step boundary under one manifest.

`write` follows "A commit" of the reliability page: enough space? a new folder under a temporary name; tensors and
state written, digested from memory and fsynced; MANIFEST.json last; still the owner? rename: this is the commit
point. Whatever fails before it leaves the commits as they were. `newest` finds the highest (term, seq) whose every
digest matches, and puts damaged ones into quarantine with the reason. `retain` deletes what K newer verified commits
have made superfluous.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from anytimed.contracts import AnytimedError, CorruptError, HostTensor, Json, Refused, Snapshot

from . import tensors
from .durable import digest_of, fsync_folder, make_folders, write_durably, write_new
from .manifest import MANIFEST_BYTES, CommitManifest, FileEntry, base_name
from .retention import superseded
from .run_directory import RunDirectory
from .strangers import read_json

log = logging.getLogger(__name__)

_NAME = re.compile(r"([0-9]{6,12})-([0-9]{10,15})")
_MANIFEST = "MANIFEST.json"
_STATE = "state.json"
_STATE_BYTES = 256 << 20
_SPARE_BYTES = 16 << 20
_TEMPORARY_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EINTR})
"""What says something about this process, nothing about the commit that it tried to read."""


class CommitFailed(AnytimedError):
    """This commit was not made; the earlier ones stand, and training may go on."""


class _Damaged(CorruptError):
    """One file of a commit is not what the manifest says."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}")
        self.path, self.expected, self.found = path, expected, found


@dataclass(frozen=True, slots=True)
class Rejected:
    """A commit that did not verify. `path` is where it lay, `moved_to` where it is kept for a person."""

    path: Path
    expected: str
    found: str
    moved_to: Path | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit on the disk, with the manifest that was read from it."""

    path: Path
    manifest: CommitManifest

    @property
    def state(self) -> Json:
        """The JSON that was committed beside the tensors. Raises CorruptError."""
        return read_json(self.path / _STATE, _STATE_BYTES)

    @property
    def tensor_files(self) -> list[Path]:
        """One safetensors file a rank, by rank."""
        return sorted(self.path / f.name for f in self.manifest.files if f.name.startswith("rank-"))

    def verify(self) -> None:
        """Read every file and compare. Raises CorruptError naming path, expected and found; AnytimedError where this
        process cannot read for now. A file that the manifest does not name is passed over: nothing reads it."""
        for entry in self.manifest.files:
            path = self.path / entry.name
            try:
                size = path.stat().st_size
                found = digest_of(path) if size == entry.size else (size, "")
            except OSError as error:
                raise _unreadable(path, error, f"{entry.size} bytes") from error
            if found[0] != entry.size:
                raise _Damaged(path, f"{entry.size} bytes", f"{found[0]} bytes")
            if found[1] != entry.sha256:
                raise _Damaged(path, f"SHA-256 {entry.sha256}", found[1])


class Commits:
    """The commits of a run that this process owns. One `write` at a time; `retain` between writes."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        clock: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """`free_bytes` answers how much can still be written under a path."""
        self._run = run
        self._clock = clock
        self._free_bytes = free_bytes
        self._verified: set[tuple[int, int]] = set()
        self._parent: int | None = None
        self.rejected: list[Rejected] = []
        # Damaged ones count as well: a name in quarantine must not come a second time.
        names = [p.name for p in (*run.commits.iterdir(), *(run.quarantine / "commits").iterdir())]
        self._seq = max((int(m[1]) for m in map(_NAME.match, names) if m), default=0)

    def write(self, snapshot: Snapshot, *, extra_files: Mapping[str, bytes] | None = None) -> Commit:
        """Make a snapshot durable; it is the newest commit when this returns.

        `extra_files`: base names and contents to keep under the same manifest. Raises CommitFailed, and Refused where
        the run is no longer ours; in both cases the commits are as they were.
        """
        snapshot.wait()
        state = json.dumps(snapshot.state).encode()
        # A failed attempt uses its number up: no two commits may ever share one.
        self._seq += 1
        seq = self._seq
        attempt = self._run.commits / f".tmp-{seq:06d}-{secrets.token_hex(4)}"
        final = self._run.commits / f"{seq:06d}-{snapshot.step:010d}"
        try:
            self._check_space(snapshot, len(state) + sum(map(len, (extra_files or {}).values())))
            attempt.mkdir(0o700)
            manifest = self._fill(attempt, snapshot, state, extra_files or {}, seq)
            if not self._run.owned():
                raise Refused(
                    f"{self._run.path}: the lock or OWNER is no longer ours (term {self._run.term}); not committed"
                )
            attempt.rename(final)
            try:
                fsync_folder(self._run.commits)
            except OSError:
                # Whether the name is durable is unknown; it is not acknowledged, so it must not be found either.
                final.rename(attempt)
                raise
        except OSError as error:
            shutil.rmtree(attempt, ignore_errors=True)
            raise CommitFailed(
                f"{final}: not committed: {error.strerror or error} ({error.filename or attempt}); "
                f"the commits before it stand. Free space, or look at the disk"
            ) from error
        except BaseException:
            shutil.rmtree(attempt, ignore_errors=True)
            raise
        self._parent = seq
        self._verified.add(manifest.order)
        return Commit(final, manifest)

    def newest(self) -> Commit | None:
        """The newest commit that verifies, or None if there is none at all. What was passed over stands in `rejected`.

        Raises Refused where there are commits and none verifies, NewerFormat; nothing has been touched then.
        """
        readable, damaged = self._read_all()
        for commit in readable:
            try:
                commit.verify()
            except _Damaged as error:
                damaged.append(Rejected(commit.path, f"{error.path.name}: {error.expected}", error.found))
                continue
            self._verified.add(commit.manifest.order)
            self._parent = commit.manifest.seq
            # Only what is newer than the good one has been looked at; unreadable manifests may be of any age.
            self.rejected += [self._quarantine(r) for r in damaged]
            return commit
        if damaged:
            told = "; ".join(f"{r.path}: expected {r.expected}, found {r.found}" for r in damaged)
            raise Refused(
                f"{self._run.commits}: {len(damaged)} commits and none verifies: {told}. Nothing was changed. "
                "Restore one from a copy, or start over with --fresh, which moves this run aside"
            )
        return None

    def retain(self, keep: int) -> list[Commit]:
        """Keep the `keep` newest verified commits (2 or more), delete what is older; the kept ones, newest first.

        A commit of an earlier process is read and checked once before it counts; a damaged one goes to quarantine.
        """
        readable, damaged = self._read_all()
        good: list[Commit] = []
        for commit in readable:
            if len(good) == keep:
                break
            try:
                if commit.manifest.order not in self._verified:
                    commit.verify()
                    self._verified.add(commit.manifest.order)
                good.append(commit)
            except _Damaged as error:
                damaged.append(Rejected(commit.path, f"{error.path.name}: {error.expected}", error.found))
        if good:
            self.rejected += [self._quarantine(r) for r in damaged]
        going = set(superseded([c.manifest.order for c in readable], {c.manifest.order for c in good}, keep))
        for commit in (c for c in readable if c.manifest.order in going):
            try:
                # Out of sight first, in one move: a crash while deleting leaves no half commit behind.
                commit.path.rename(commit.path.with_name(f".del-{commit.path.name}-{secrets.token_hex(4)}"))
                fsync_folder(self._run.commits)
            except OSError as error:
                log.warning("%s: cannot be deleted: %s", commit.path, error.strerror)
        self._run.sweep(self._run.commits)
        return good

    # --- within ---

    def _check_space(self, snapshot: Snapshot, more: int) -> None:
        need = int(1.05 * (sum(t.data.nbytes for t in snapshot.tensors.values()) + more)) + _SPARE_BYTES
        free = self._free_bytes(self._run.commits)
        if free < need:
            raise CommitFailed(
                f"{self._run.commits}: {free} bytes free, a commit needs {need}; the earlier commits stand"
            )

    def _fill(
        self, folder: Path, snapshot: Snapshot, state: bytes, extra: Mapping[str, bytes], seq: int
    ) -> CommitManifest:
        rank = "rank-00000-of-00001.safetensors"
        size, sha256 = tensors.write(folder / rank, snapshot.tensors, _placement(snapshot.tensors))
        files = [FileEntry(name=rank, size=size, sha256=sha256)]
        for name, data in {_STATE: state, **extra}.items():
            size, sha256 = write_new(folder / base_name(name), data)
            files.append(FileEntry(name=name, size=size, sha256=sha256))
        manifest = CommitManifest(
            run_id=self._run.run_id,
            seq=seq,
            term=self._run.term,
            step=snapshot.step,
            parent=self._parent,
            created=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds"),
            files=files,
        )
        write_new(folder / _MANIFEST, manifest.to_bytes())
        fsync_folder(folder)
        return manifest

    def _read_all(self) -> tuple[list[Commit], list[Rejected]]:
        """Every commit whose manifest can be read, newest first; and the others."""
        readable, damaged = [], []
        for path in sorted(p for p in self._run.commits.iterdir() if _NAME.fullmatch(p.name)):
            where = path / _MANIFEST
            try:
                with where.open("rb") as file:
                    manifest = CommitManifest.from_bytes(file.read(MANIFEST_BYTES), str(where))
                expected = f"{manifest.seq:06d}-{manifest.step:010d}"
                if path.name != expected:
                    raise CorruptError(f"{where}: says {expected}")
                readable.append(Commit(path, manifest))
            except OSError as error:
                damaged.append(Rejected(path, _MANIFEST, str(_unreadable(where, error, "a manifest"))))
            except CorruptError as error:
                damaged.append(Rejected(path, f"a valid {_MANIFEST}", str(error)))
        return sorted(readable, key=lambda c: c.manifest.order, reverse=True), damaged

    def _quarantine(self, rejected: Rejected) -> Rejected:
        """Move a damaged commit where nothing looks for commits, with a note of what is wrong with it."""
        folder = self._run.quarantine / "commits"
        goal = folder / f"{rejected.path.name}-{secrets.token_hex(4)}"
        note = {"path": str(rejected.path), "expected": rejected.expected, "found": rejected.found}
        log.error("%s: does not verify: expected %s, found %s; moved to %s", *note.values(), goal)
        try:
            make_folders(folder)
            write_durably(goal.with_name(f"{goal.name}.json"), json.dumps(note, indent=1).encode() + b"\n")
            rejected.path.rename(goal)
            fsync_folder(folder)
            fsync_folder(rejected.path.parent)
        except OSError as error:
            log.warning("%s: cannot be moved to quarantine: %s; it is passed over", rejected.path, error.strerror)
            return rejected
        return Rejected(rejected.path, rejected.expected, rejected.found, goal)


def _placement(named: Mapping[str, HostTensor]) -> dict[str, str]:
    """Header metadata: the global shape of each tensor and where this rank's part starts in it."""
    whole = {name: {"shape": list(t.shape), "offset": [0] * len(t.shape)} for name, t in named.items()}
    return {"format": "pt", "global": json.dumps(whole, separators=(",", ":"))}


def _unreadable(path: Path, error: OSError, expected: str) -> AnytimedError:
    if error.errno in _TEMPORARY_ERRORS:
        raise AnytimedError(f"{path}: cannot be read now: {error.strerror}; nothing was judged or moved") from error
    return _Damaged(path, expected, error.strerror or str(error))
