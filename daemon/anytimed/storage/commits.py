"""Commits: the resumable state, all of one step boundary under one manifest.

`write` follows "A commit" of the reliability page: enough space? a new folder under a temporary name; tensors and
state written, digested from memory and fsynced; MANIFEST.json last; still the owner? rename: this is the commit
point. Whatever fails before it leaves the commits as they were. `newest` finds the highest (term, seq) whose every
digest matches, and puts damaged ones into quarantine with the reason. `retain` deletes what K newer verified commits
have made superfluous.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from anytimed.contracts import AnytimedError, HostTensor, Refused, Snapshot

from . import tensors
from .commit import MANIFEST, NAME, STATE, Commit, Damaged, Rejected, read_commit
from .durable import fsync_folder, make_folders, write_durably, write_new
from .manifest import CommitManifest, FileEntry, base_name
from .retention import superseded
from .run_directory import RunDirectory

__all__ = ["Commit", "CommitFailed", "Commits", "Rejected"]

log = logging.getLogger(__name__)

_SPARE_BYTES = 16 << 20
KEPT = 4
"""Damaged commits kept for a person, whole; of older ones only the note stays, or rot would fill the disk."""


class CommitFailed(AnytimedError):
    """This commit was not made; the earlier ones stand, and training may go on."""


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
        self._pins = threading.Lock()
        self._pinned: set[Path] = set()
        self._abandoned: set[Path] = set()
        self._rotten: dict[Path, Rejected] = {}
        self._parent: int | None = None
        self.rejected: list[Rejected] = []
        # Damaged ones count as well: a name in quarantine must not come a second time.
        names = [p.name for p in (*run.commits.iterdir(), *(run.quarantine / "commits").iterdir())]
        self._seq = max((int(m[1]) for m in map(NAME.match, names) if m), default=0)

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
        with self._attempt(attempt, final):
            more = len(state) + sum(map(len, (extra_files or {}).values()))
            self._check_space(sum(t.data.nbytes for t in snapshot.tensors.values()) + more)
            attempt.mkdir(0o700)
            manifest = self._fill(attempt, snapshot, state, extra_files or {}, seq)
            self._put_in_place(attempt, final)
        self._parent = seq
        self._verified.add(manifest.order)
        return Commit(final, manifest)

    def adopt(self, manifest: CommitManifest, data: bytes, fill: Callable[[Path], None]) -> Commit:
        """Put a commit of this run that was kept elsewhere in its place, by the same protocol as `write`.

        `data`: the manifest's bytes; `fill` writes the files that it names into the folder it is given, fsynced and
        compared with their digests. What lies in that place goes to quarantine. Raises as `write`, and what `fill`
        raises.
        """
        name = f"{manifest.seq:06d}-{manifest.step:010d}"
        attempt, final = self._run.commits / f".tmp-{name}-{secrets.token_hex(4)}", self._run.commits / name
        with self._attempt(attempt, final):
            self._check_space(sum(entry.size for entry in manifest.files))
            attempt.mkdir(0o700)
            fill(attempt)
            write_new(attempt / MANIFEST, data)
            fsync_folder(attempt)
            if final.exists():
                self._quarantine(Rejected(final, f"the commit of term {manifest.term} from the mirror", "another"))
            self._put_in_place(attempt, final)
        self._seq = max(self._seq, manifest.seq)
        self._verified.add(manifest.order)
        return Commit(final, manifest)

    @contextlib.contextmanager
    def pinned(self, commit: Commit) -> Iterator[bool]:
        """While a commit is read by another thread, retention leaves it in its place; whether it is there at all."""
        with self._pins:
            self._pinned.add(commit.path)
        try:
            yield commit.path.is_dir()
        finally:
            with self._pins:
                self._pinned.discard(commit.path)

    def kept(self) -> list[Path]:
        """The folders of all commits, newest first by their names."""
        found = {path for path in self._run.commits.iterdir() if NAME.fullmatch(path.name)}
        return sorted(found - self._abandoned, reverse=True)

    def recheck(self, path: Path) -> Rejected | None:
        """Read a commit again, manifest and files, from the disk; what is wrong with it, or None.

        A rotten one counts as verified no longer and stays where it is: `retain` moves it to quarantine once there is
        a newer good one, which the next commit makes sure of. Raises AnytimedError where it cannot be read for now.
        """
        try:
            commit = read_commit(path, from_disk=True)
            self._verified.discard(commit.manifest.order)
            commit.verify(from_disk=True)
        except Damaged as error:
            self._rotten[path] = Rejected(path, f"{error.path.name}: {error.expected}", error.found)
            return self._rotten[path]
        self._verified.add(commit.manifest.order)
        return None

    def newest(self) -> Commit | None:
        """The newest commit that verifies, or None if there is none at all. What was passed over stands in `rejected`.

        Raises Refused where there are commits and none verifies, NewerFormat; nothing has been touched then.
        """
        readable, damaged = self._read_all()
        for commit in readable:
            try:
                commit.verify()
            except Damaged as error:
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

    def before(self, step: int) -> Commit | None:
        """The newest commit of a step below this one that verifies, read from the disk; else the oldest that does."""
        readable, _ = self._read_all()
        earlier = [commit for commit in readable if commit.manifest.step < step]
        for commit in [*earlier, *reversed([c for c in readable if c not in earlier])]:
            if self.recheck(commit.path) is None:
                return commit
        return None

    @property
    def seq(self) -> int:
        """The highest number that was given to a commit, or an attempt at one."""
        return self._seq

    def set_aside(self, after_seq: int, why: str) -> None:
        """Move every commit with a higher number to quarantine: the run goes on from that one."""
        readable, _ = self._read_all()
        for commit in readable:
            if commit.manifest.seq > after_seq:
                self.rejected.append(self._quarantine(Rejected(commit.path, f"no rollback to {after_seq}", why)))

    def retain(self, keep: int) -> list[Commit]:
        """Keep the `keep` newest verified commits (2 or more), delete what is older; the kept ones, newest first.

        A commit of an earlier process is read and checked once before it counts; a damaged one goes to quarantine.
        """
        readable, damaged = self._read_all()
        damaged += [self._rotten[c.path] for c in readable if c.path in self._rotten]
        readable = [c for c in readable if c.path not in self._rotten]
        good: list[Commit] = []
        for commit in readable:
            if len(good) == keep:
                break
            try:
                if commit.manifest.order not in self._verified:
                    commit.verify()
                    self._verified.add(commit.manifest.order)
                good.append(commit)
            except Damaged as error:
                damaged.append(Rejected(commit.path, f"{error.path.name}: {error.expected}", error.found))
        if good:
            self.rejected += [self._quarantine(r) for r in damaged]
            self._rotten.clear()
        going = set(superseded([c.manifest.order for c in readable], {c.manifest.order for c in good}, keep))
        for commit in (c for c in readable if c.manifest.order in going):
            try:
                # Out of sight first, in one move: a crash while deleting leaves no half commit behind.
                with self._pins:
                    if commit.path in self._pinned:
                        continue  # it goes next time
                    commit.path.rename(commit.path.with_name(f".del-{commit.path.name}-{secrets.token_hex(4)}"))
                fsync_folder(self._run.commits)
            except OSError as error:
                log.warning("%s: cannot be deleted: %s", commit.path, error.strerror)
        self._run.sweep(self._run.commits)
        return good

    # --- within ---

    @contextlib.contextmanager
    def _attempt(self, attempt: Path, final: Path) -> Iterator[None]:
        """Whatever fails within leaves nothing of the attempt; the system's errors become CommitFailed."""
        try:
            yield
        except (OSError, MemoryError) as error:
            shutil.rmtree(attempt, ignore_errors=True)
            if isinstance(error, MemoryError):
                raise CommitFailed(f"{final}: not committed: no memory; the commits before it stand") from error
            raise CommitFailed(
                f"{final}: not committed: {error.strerror or error} ({error.filename or attempt}); "
                f"the commits before it stand. Free space, or look at the disk"
            ) from error
        except BaseException:
            shutil.rmtree(attempt, ignore_errors=True)
            raise

    def _put_in_place(self, attempt: Path, final: Path) -> None:
        """The commit point."""
        if not self._run.owned():
            raise Refused(
                f"{self._run.path}: the lock or OWNER is no longer ours (term {self._run.term}); not committed"
            )
        attempt.rename(final)
        try:
            fsync_folder(self._run.commits)
        except OSError:
            # Whether the name is durable is unknown; it is not acknowledged, so it must not be found either, nor
            # counted where it cannot be taken back.
            self._abandoned.add(final)
            final.rename(attempt)
            raise

    def _check_space(self, size: int) -> None:
        need = int(1.05 * size) + _SPARE_BYTES
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
        for name, data in {STATE: state, **extra}.items():
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
        write_new(folder / MANIFEST, manifest.to_bytes())
        fsync_folder(folder)
        return manifest

    def _read_all(self) -> tuple[list[Commit], list[Rejected]]:
        """Every commit whose manifest can be read, newest first; and the others."""
        readable, damaged = [], []
        for path in self.kept():
            try:
                readable.append(read_commit(path))
            except Damaged as error:
                damaged.append(Rejected(path, error.expected, f"{error.path.name}: {error.found}"))
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
            for old in sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.lstat().st_ctime_ns)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)  # its note stays
        except OSError as error:
            log.warning("%s: cannot be moved to quarantine: %s; it is passed over", rejected.path, error.strerror)
            return rejected
        return Rejected(rejected.path, rejected.expected, rejected.found, goal)


def _placement(named: Mapping[str, HostTensor]) -> dict[str, str]:
    """Header metadata: the global shape of each tensor and where this rank's part starts in it."""
    whole = {name: {"shape": list(t.shape), "offset": [0] * len(t.shape)} for name, t in named.items()}
    return {"format": "pt", "global": json.dumps(whole, separators=(",", ":"))}
