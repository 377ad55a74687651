"""The writer's side of a mirror: a commit sent, read back, and only then said to be there.

`claim` takes the term, so that an older process that was thought dead sees it and stops. `push` sends a commit: files,
then the part of the journal that is not there yet, each read back from the store and compared; the claim looked at
again; the manifest create-only and last. So every manifest that stands in a mirror was verified there. `retain`
deletes the manifest first, the data after, and never one of the `keep` newest.

One thread calls these. What is read while it is sent may not be deleted meanwhile: `Commits.pinned`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from anytimed.contracts import AnytimedError, CorruptError, Refused

from .commit import Commit
from .durable import CHUNK_BYTES, beside, digest_of
from .journal import Journal
from .listing import finished, folders
from .manifest import CheckpointId, FileEntry
from .mirror_manifest import (
    COMMIT_MANIFEST,
    COMMITS,
    JOURNAL,
    MIRROR_MANIFEST,
    Claim,
    MirrorManifest,
    Segment,
    cut,
    matching,
    term_key,
)
from .mirror_reader import known_terms, read_claim, read_manifest
from .run_directory import RunDirectory
from .store import MissingKey, Store, StoreError

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_CLAIMS_KEPT = 8


class TermTaken(Refused):
    """Another process writes in this term, or in a higher one."""


class Mirror:
    """Where this run's commits are kept a second time. Nothing is asked of the store before `claim` or `push`."""

    def __init__(self, store: Store, run: RunDirectory, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._run, self._clock = store, run, clock
        self._nonce = secrets.token_hex(8)
        self._claimed = 0
        self._newest: MirrorManifest | None = None
        self._known: dict[CheckpointId, MirrorManifest] = {}

    @property
    def url(self) -> str:
        return self._store.url

    def claim(self) -> None:
        """Say in the mirror that this process writes in the run's term. Raises TermTaken where another does, or where
        a higher term was claimed; StoreError."""
        term = self._run.term
        claim = Claim(
            run_id=self._run.run_id,
            term=term,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._now(),
            nonce=self._nonce,
        )
        if self._claimed != term:
            # A refused create may be our own, whose answer was lost: the nonce tells.
            taken = not self._store.create(term_key(term), claim.to_bytes())
            if taken and self._nonce_of(term) != self._nonce:
                raise TermTaken(self._told(term))
            self._claimed = term
        self._check_fence()

    def push(self, commit: Commit, journal: Journal, progress: Progress | None = None) -> MirrorManifest:
        """Send a commit and its journal; they are in the mirror, verified, when this returns. Repeating is safe.

        `progress(done, total)` in bytes sent. Raises TermTaken, Refused where other bytes stand under the commit's
        name, CorruptError where the local files are damaged, StoreError, OSError.
        """
        self.claim()
        path = commit.path / COMMIT_MANIFEST
        size, sha256 = digest_of(path)
        files = [*commit.manifest.files, FileEntry(name=COMMIT_MANIFEST, size=size, sha256=sha256)]
        ident = CheckpointId(commit.manifest.term, commit.manifest.seq, commit.manifest.step)
        standing = self._standing(ident)
        if standing is not None:
            if standing.run_id == self._run.run_id and standing.files == files:
                self._newest = standing
                return standing
            raise self._others(ident)
        length = journal.size
        kept, start = cut(self._segments(journal.path), length)
        total, done = sum(entry.size for entry in files) + length - start, 0
        for entry in files:
            self._send(commit.path / entry.name, f"{COMMITS}/{ident}/{entry.name}", entry.size, entry.sha256)
            done += entry.size
            if progress is not None:
                progress(done, total)
        for segment in kept:  # sent with an earlier commit: still there?
            if not self._holds(segment.key, segment.size):
                self._send_segment(journal.path, segment.start, segment.end)
        if start < length:
            kept.append(self._send_segment(journal.path, start, length))
        manifest = MirrorManifest(
            run_id=self._run.run_id,
            term=ident.term,
            seq=ident.seq,
            step=ident.step,
            created=self._now(),
            files=files,
            journal=kept,
        )
        self._check_fence()
        if not self._store.create(manifest.key(MIRROR_MANIFEST), manifest.to_bytes()) and (
            self._standing(ident) != manifest
        ):
            raise self._others(ident)
        self._newest = self._known[ident] = manifest
        return manifest

    def retain(self, keep: int) -> list[CheckpointId]:
        """Keep the `keep` newest commits, delete older ones and what no manifest names; the ids that went, oldest
        first.

        Raises TermTaken, StoreError; repeating is safe.
        """
        assert keep >= 2, keep
        self._check_fence()
        found = folders(self._store, COMMITS)
        whole = finished(found, MIRROR_MANIFEST)
        readable = [ident for ident in whole if self._readable(ident)]
        if len(readable) < keep:
            return []
        oldest = readable[keep - 1]
        going = [ident for ident in reversed(readable) if ident.order < oldest.order]
        for ident in going:
            self._store.delete(f"{COMMITS}/{ident}/{MIRROR_MANIFEST}")
            self._known.pop(ident, None)
        # An unreadable manifest stays for a person, or for a newer anytimed that wrote it.
        unreadable = set(whole) - set(readable)
        for ident in sorted(found.keys() - unreadable, key=lambda i: i.order):
            if ident.order < oldest.order:
                for name in found[ident]:
                    self._store.delete(f"{COMMITS}/{ident}/{name}")
        if not unreadable:
            named = {segment.key for manifest in self._known.values() for segment in manifest.journal}
            for key in self._store.list(JOURNAL):
                if key not in named:
                    self._store.delete(key)
        for term in known_terms(self._store)[:-_CLAIMS_KEPT]:
            self._store.delete(term_key(term))
        return going

    # --- within ---

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds")

    def _check_fence(self) -> None:
        """Raises TermTaken where a higher term was claimed or has sent anything, or ours was overwritten."""
        nonce = self._nonce_of(self._run.term)
        if nonce is None:
            self._claimed = 0
            raise StoreError(f"{self.url}/{term_key(self._run.term)}: our claim is gone; it is made anew")
        if nonce != self._nonce:
            raise TermTaken(self._told(self._run.term))
        seen = [*known_terms(self._store), *(ident.term for ident in folders(self._store, COMMITS))]
        if max(seen, default=0) > self._run.term:
            raise TermTaken(self._told(max(seen)))

    def _told(self, term: int) -> str:
        try:
            found = read_claim(self._store, term)
            who = f"pid {found.pid} on {found.host} since {found.started}, run {found.run_id}"
        except AnytimedError:
            who = "a process whose claim cannot be read"
        return (
            f"{self.url}: the mirror belongs to term {term}, ours is {self._run.term}: {who} took it over. Two "
            "machines must not go on with one run: stop one; a start takes the newest commit and a higher term"
        )

    def _others(self, ident: CheckpointId) -> Refused:
        return Refused(
            f"{self.url}/{COMMITS}/{ident}: another writer mirrored other bytes under our name; "
            f"two runs must not share a mirror: give this one a [commits] mirror_url of its own"
        )

    def _nonce_of(self, term: int) -> str | None:
        try:
            return read_claim(self._store, term).nonce
        except (MissingKey, CorruptError):
            return None

    def _standing(self, ident: CheckpointId) -> MirrorManifest | None:
        """The manifest that stands in the mirror, or None."""
        try:
            return read_manifest(self._store, ident)
        except MissingKey:
            return None

    def _readable(self, ident: CheckpointId) -> bool:
        if ident not in self._known:
            try:
                self._known[ident] = read_manifest(self._store, ident)
            except (MissingKey, CorruptError, Refused) as error:
                log.warning("%s; not counted, and kept", error)
                return False
        return True

    def _segments(self, journal: Path) -> list[Segment]:
        """The segments in the mirror that our journal begins with: those of the last push, or, in a process that has
        pushed nothing yet, those of the newest commit there that are what our journal holds."""
        if self._newest is None:
            ids = finished(folders(self._store, COMMITS), MIRROR_MANIFEST)
            newest = next(filter(self._readable, ids), None)
            return matching(journal, self._known[newest].journal) if newest is not None else []
        return self._newest.journal

    def _send_segment(self, journal: Path, start: int, end: int) -> Segment:
        with beside(journal) as part:
            digest, left = hashlib.sha256(), end - start
            with journal.open("rb") as source, part.open("xb") as copy:
                source.seek(start)
                while left:
                    chunk = source.read(min(CHUNK_BYTES, left))
                    if not chunk:
                        raise StoreError(f"{journal}: shorter than the {end} bytes that were appended to it")
                    digest.update(chunk)
                    copy.write(chunk)
                    left -= len(chunk)
            segment = Segment(start=start, end=end, sha256=digest.hexdigest())
            self._send(part, segment.key, segment.size, segment.sha256)
        return segment

    def _send(self, local: Path, key: str, size: int, sha256: str) -> None:
        """Store a file, unless it is there already from an attempt that was cut off, and read it back."""
        if self._holds(key, size) and self._store.digest(key, size) == sha256:
            return
        self._store.put_copy(local, key)
        found = self._store.digest(key, size)
        if found != sha256:
            if digest_of(local)[1] != sha256:
                raise CorruptError(f"{local}: damaged on the local disk: expected SHA-256 {sha256}; not mirrored")
            raise StoreError(f"{self.url}/{key}: read back with SHA-256 {found}, {sha256} was sent")

    def _holds(self, key: str, size: int) -> bool:
        try:
            return self._store.size(key) == size
        except MissingKey:
            return False
