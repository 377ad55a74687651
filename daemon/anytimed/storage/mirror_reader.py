"""The reader's side of a mirror: what is there, and how it comes back to a local disk.

`look` asks what the mirror holds: whose it is, the highest term that anything in it bears, its commits newest first.
`fetch_commit` brings one into a run directory by the protocol of a commit, `fetch_journal` the journal beside its
place; every digest is checked while the bytes arrive, and nothing is in place before all of it is durable. Nothing
here writes into the mirror.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from anytimed.contracts import CorruptError

from .commits import Commit, Commits
from .durable import write_all
from .listing import finished, folders
from .manifest import MANIFEST_BYTES, CheckpointId, CommitManifest
from .mirror_manifest import COMMIT_MANIFEST, COMMITS, MIRROR_MANIFEST, TERMS, Claim, MirrorManifest, term_key
from .store import MissingKey, Store

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a mirror holds. `run_id`: of the highest term, None where there is nothing; `commits`: of that run, newest
    first; `passed_over`: manifests that could not be read, with the reason."""

    run_id: str | None
    term: int
    commits: tuple[MirrorManifest, ...]
    passed_over: tuple[str, ...] = ()


def look(store: Store) -> Seen:
    """Read claims and manifests. Raises StoreError where the store does not answer, NewerFormat."""
    found = folders(store, COMMITS)
    terms = known_terms(store)
    bad: list[str] = []
    manifests: list[MirrorManifest] = []
    for ident in finished(found, MIRROR_MANIFEST):
        try:
            manifests.append(read_manifest(store, ident))
        except MissingKey:
            continue  # retired meanwhile
        except CorruptError as error:
            bad.append(str(error))
    run_id = manifests[0].run_id if manifests else None
    for term in reversed(terms):
        if manifests and manifests[0].term > term:
            break
        with contextlib.suppress(MissingKey, CorruptError):
            run_id = read_claim(store, term).run_id
            break
    highest = max([*terms, *(ident.term for ident in found)], default=0)
    return Seen(run_id, highest, tuple(m for m in manifests if m.run_id == run_id), tuple(bad))


def read_claim(store: Store, term: int) -> Claim:
    """Who claimed a term. Raises MissingKey, CorruptError, NewerFormat, StoreError."""
    return Claim.from_bytes(store.read(term_key(term), MANIFEST_BYTES), f"{store.url}/{term_key(term)}")


def read_manifest(store: Store, ident: CheckpointId) -> MirrorManifest:
    """The manifest of a mirrored commit. Raises MissingKey, CorruptError, NewerFormat, StoreError."""
    key = f"{COMMITS}/{ident}/{MIRROR_MANIFEST}"
    manifest = MirrorManifest.from_bytes(store.read(key, MANIFEST_BYTES), f"{store.url}/{key}")
    if manifest.id != ident:
        raise CorruptError(f"{store.url}/{key}: says {manifest.id}")
    return manifest


def known_terms(store: Store) -> list[int]:
    """Terms that were claimed, lowest first."""
    names = (key.rpartition("/")[2].removesuffix(".json") for key in store.list(TERMS))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def fetch_commit(
    store: Store,
    manifest: MirrorManifest,
    commits: Commits,
    progress: Progress | None = None,
    *,
    before: Callable[[], None] = lambda: None,
) -> Commit:
    """Bring a mirrored commit into the run directory. `before` is called when every file is there and verified, right
    before the commit is put in its place. Raises CorruptError where its bytes are not what the manifests
    say, MissingKey where it was retired meanwhile, CommitFailed on a local failure, StoreError."""
    own = {entry.name: entry for entry in manifest.files}
    entry, key = own[COMMIT_MANIFEST], manifest.key(COMMIT_MANIFEST)
    data = store.read(key, MANIFEST_BYTES)
    _compare(f"{store.url}/{key}", (len(data), hashlib.sha256(data).hexdigest()), (entry.size, entry.sha256))
    inner = CommitManifest.from_bytes(data, f"{store.url}/{key}")
    named = [entry for entry in manifest.files if entry.name != COMMIT_MANIFEST]
    if (inner.run_id, inner.term, inner.seq, inner.step) != (
        manifest.run_id,
        manifest.term,
        manifest.seq,
        manifest.step,
    ) or inner.files != named:
        raise CorruptError(f"{store.url}/{key}: names another commit or other files than its {MIRROR_MANIFEST}")
    total, done = sum(entry.size for entry in named), 0

    def fill(folder: Path) -> None:
        nonlocal done
        for entry in named:
            where = manifest.key(entry.name)
            for count in _fetch(store, [(where, entry.size, entry.sha256)], folder / entry.name):
                done += count
                if progress is not None:
                    progress(done, total)
        before()

    return commits.adopt(inner, data, fill)


def fetch_journal(store: Store, manifest: MirrorManifest, path: Path) -> None:
    """Write the journal that belongs to a mirrored commit into a new file, fsynced; raises as `fetch_commit`."""
    for _ in _fetch(store, [(s.key, s.size, s.sha256) for s in manifest.journal], path):
        pass


def _fetch(store: Store, parts: Iterable[tuple[str, int, str]], path: Path) -> Iterable[int]:
    """Download objects (key, size, SHA-256) one behind the other into a new file, fsynced; bytes as they arrive."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for key, size, sha256 in parts:
            digest, found = hashlib.sha256(), 0
            for chunk in store.download(key, size):
                digest.update(chunk)
                write_all(file, memoryview(chunk))
                found += len(chunk)
                yield len(chunk)
            _compare(f"{store.url}/{key}", (found, digest.hexdigest()), (size, sha256))
        os.fsync(file)
    finally:
        os.close(file)


def _compare(where: str, found: tuple[int, str], expected: tuple[int, str]) -> None:
    if found != expected:
        raise CorruptError(
            f"{where}: expected {expected[0]} bytes with SHA-256 {expected[1]}, "
            f"found {found[0]} bytes with SHA-256 {found[1]}"
        )
