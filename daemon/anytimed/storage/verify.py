"""Every digest again: what `anytimed verify` reads, and what it finds wrong.

`verify_run` reads a run directory: commits (manifest, each file, files that nobody named), the journal line by line,
the spool. `verify_published` reads a published prefix: the pointers, every manifest, every file. `verify_mirror` reads
a mirror: claims, every manifest, every file and segment. Each thing looked at becomes one `Checked`.

Nothing is changed and no lock is taken, so a daemon may be at work: what it retires meanwhile is passed over, and the
end of a line that it is just writing to the journal is no fault.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anytimed.contracts import AnytimedError, CorruptError, Json, Refused

from .commit import MANIFEST, NAME, Damaged, read_commit
from .durable import digest_of
from .journal_lines import check_lines
from .listing import finished, folders, manifest_key, published_ids, read_published
from .manifest import (
    CHECKPOINTS,
    MANIFEST_BYTES,
    MANIFEST_NAME,
    POINTER_BYTES,
    CheckpointId,
    CommitManifest,
    FileEntry,
    Manifest,
    Pointer,
)
from .mirror_manifest import COMMIT_MANIFEST, COMMITS, MIRROR_MANIFEST, TERMS, MirrorManifest
from .mirror_reader import known_terms, read_claim, read_manifest
from .run_directory import RunDirectory
from .spool import SEAL
from .store import MissingKey, Store

log = logging.getLogger(__name__)

Meter = Callable[[int, int], None]
"""Called with bytes read and bytes known of."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong: where, what was expected there, what was found."""

    path: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Checked:
    """One thing that was looked at. `size`: bytes read; `note`: what a person may want to know and is no fault."""

    what: str
    where: str
    size: int
    problems: tuple[Problem, ...] = ()
    note: str = ""

    def to_json(self) -> Json:
        found = [{"path": p.path, "expected": p.expected, "found": p.found} for p in self.problems]
        return {"what": self.what, "where": self.where, "bytes": self.size, "problems": found, "note": self.note}


class _Progress:
    def __init__(self, meter: Meter | None, total: int) -> None:
        self._meter, self._done, self._total = meter, 0, total

    def add(self, count: int) -> None:
        self._done += count
        if self._meter is not None:
            self._meter(self._done, max(self._done, self._total))


def kind_of(store: Store) -> str:
    """What a prefix holds: "mirror", "published", or "" for nothing that we know."""
    if store.list(TERMS) or finished(folders(store, COMMITS), MIRROR_MANIFEST):
        return "mirror"
    return "published" if store.exists("latest.json") or store.list(CHECKPOINTS) else ""


# --- a run directory --------------------------------------------------------------------------------------------------


def verify_run(path: Path, meter: Meter | None = None) -> Iterator[Checked]:
    """Commits newest first, the journal, the spool. Raises AnytimedError where this process cannot read."""
    run = RunDirectory(path)
    progress = _Progress(meter, sum(p.lstat().st_size for p in _files(run.commits, run.spool) if p.is_file()))
    commits = sorted((p for p in _inside(run.commits) if NAME.fullmatch(p.name)), reverse=True)
    for commit in commits:
        checked = _commit(commit, progress)
        if commit.is_dir():  # else it was retired meanwhile
            yield checked
    yield _journal(run.journal)
    for folder in sorted(_inside(run.spool)):
        if not folder.name.startswith("."):
            checked = _spooled(folder, progress)
            if folder.is_dir():
                yield checked


def _commit(path: Path, progress: _Progress) -> Checked:
    try:
        commit = read_commit(path)
    except (Damaged, Refused) as error:
        return Checked("commit", str(path), 0, (_told(path / MANIFEST, error),))
    problems = []
    named = {entry.name for entry in commit.manifest.files} | {MANIFEST}
    for entry in commit.manifest.files:
        problems += _file(path / entry.name, entry, progress)
    problems += [
        Problem(str(extra), "no such file: the manifest does not name it", f"{extra.lstat().st_size} bytes")
        for extra in sorted(_inside(path))
        if extra.name not in named
    ]
    return Checked("commit", str(path), sum(entry.size for entry in commit.manifest.files), tuple(problems))


def _journal(path: Path) -> Checked:
    try:
        size, torn = check_lines(path)
    except FileNotFoundError:
        return Checked("journal", str(path), 0, note="none yet")
    except Refused as error:
        return Checked("journal", str(path), path.stat().st_size, (Problem(str(path), "a whole chain", str(error)),))
    note = f"the last {torn} bytes are no whole line: being written, or cut by a crash and dropped at the next start"
    return Checked("journal", str(path), size, note=note if torn else "")


def _spooled(path: Path, progress: _Progress) -> Checked:
    try:
        data = (path / MANIFEST_NAME).read_bytes()
        manifest = Manifest.from_bytes(data, str(path / MANIFEST_NAME))
        if manifest.id != path.name:
            raise CorruptError(f"{path}: the manifest says {manifest.id}")
        seal = (path / SEAL).read_bytes().decode("ascii", "replace")[:64]
    except (OSError, CorruptError, Refused) as error:
        return Checked("spooled export", str(path), 0, (_told(path / MANIFEST_NAME, error),))
    found = hashlib.sha256(data).hexdigest()
    if found != seal:
        expected = f"SHA-256 {seal}, as {path / SEAL} says"
        return Checked("spooled export", str(path), 0, (Problem(str(path / MANIFEST_NAME), expected, found),))
    problems = [problem for entry in manifest.files for problem in _file(path / entry.name, entry, progress)]
    return Checked("spooled export", str(path), manifest.total_bytes, tuple(problems))


def _file(path: Path, entry: FileEntry, progress: _Progress) -> list[Problem]:
    try:
        size = path.stat().st_size
        digest = digest_of(path)[1] if size == entry.size else ""
    except OSError as error:
        return [Problem(str(path), f"{entry.size} bytes", error.strerror or str(error))]
    progress.add(entry.size)
    return _differences(str(path), entry.size, entry.sha256, size, digest)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        for inner in _inside(folder):
            yield from _inside(inner)


# --- a published prefix -----------------------------------------------------------------------------------------------


def verify_published(store: Store, meter: Meter | None = None) -> Iterator[Checked]:
    """The pointers, then every checkpoint, newest first. Raises StoreError where the store does not answer."""
    found: dict[str, bytes] = {}
    problems: dict[str, Problem] = {}
    manifests: list[Manifest] = []
    for ident in published_ids(store):
        try:
            manifest, found[ident] = read_published(store, ident)
            manifests.append(manifest)
        except MissingKey:
            continue  # retired meanwhile
        except (CorruptError, Refused) as error:
            problems[ident] = _told(f"{store.url}/{manifest_key(ident)}", error)
    for name in ("latest.json", "best.json"):
        checked = _pointer(store, name, found)
        if checked is not None:
            yield checked
    for ident, problem in problems.items():
        yield Checked("checkpoint", f"{store.url}/{CHECKPOINTS}/{ident}", 0, (problem,))
    progress = _Progress(meter, sum(manifest.total_bytes for manifest in manifests))
    for manifest in sorted(manifests, key=lambda m: m.order, reverse=True):
        folder = f"{CHECKPOINTS}/{manifest.id}"
        wrong = [p for e in manifest.files for p in _object(store, f"{folder}/{e.name}", e.size, e.sha256, progress)]
        if not wrong or store.exists(manifest_key(manifest.id)):  # else it was retired meanwhile
            yield Checked("checkpoint", f"{store.url}/{folder}", manifest.total_bytes, tuple(wrong))


def _pointer(store: Store, name: str, manifests: dict[str, bytes]) -> Checked | None:
    where = f"{store.url}/{name}"
    for attempt in (1, 2):
        try:
            pointer = Pointer.from_bytes(store.read(name, POINTER_BYTES), where)
        except MissingKey:
            if name == "best.json" or not manifests:
                return None
            return Checked("pointer", where, 0, (Problem(where, "a pointer to the newest checkpoint", "nothing"),))
        except (CorruptError, Refused) as error:
            return Checked("pointer", where, 0, (_told(where, error),))
        try:
            data = manifests.get(pointer.id) or store.read(manifest_key(pointer.id), MANIFEST_BYTES)
        except CorruptError as error:
            return Checked("pointer", where, 0, (_told(f"{store.url}/{manifest_key(pointer.id)}", error),))
        except MissingKey:
            if attempt == 1:
                continue  # it may have moved on, and what it named been retired
            return Checked("pointer", where, 0, (Problem(where, f"{pointer.id}, which it names", "not there"),))
        digest = hashlib.sha256(data).hexdigest()
        if digest != pointer.manifest_sha256:
            expected = f"the manifest of {pointer.id} with SHA-256 {pointer.manifest_sha256}"
            return Checked("pointer", where, 0, (Problem(where, expected, digest),))
        newest = max(manifests, default=pointer.id)
        late = name == "latest.json" and CheckpointId.parse(newest).order > pointer.order
        return Checked("pointer", where, 0, note=f"older than {newest}: moved at the next start" if late else "")
    raise AssertionError


# --- a mirror ---------------------------------------------------------------------------------------------------------


def verify_mirror(store: Store, meter: Meter | None = None) -> Iterator[Checked]:
    """Claims, then every commit with its journal, newest first. Raises StoreError where the store does not answer."""
    for term in known_terms(store):
        try:
            read_claim(store, term)
        except MissingKey:
            continue
        except (CorruptError, Refused) as error:
            where = f"{store.url}/{TERMS}/{term:05d}.json"
            yield Checked("claim", where, 0, (_told(where, error),))
    manifests: list[MirrorManifest] = []
    for ident in finished(folders(store, COMMITS), MIRROR_MANIFEST):
        try:
            manifests.append(read_manifest(store, ident))
        except MissingKey:
            continue
        except (CorruptError, Refused) as error:
            where = f"{store.url}/{COMMITS}/{ident}"
            yield Checked("mirrored commit", where, 0, (_told(f"{where}/{MIRROR_MANIFEST}", error),))
    segments = {segment.key: segment for manifest in manifests for segment in manifest.journal}
    total = sum(e.size for m in manifests for e in m.files) + sum(s.size for s in segments.values())
    progress = _Progress(meter, total)
    judged: dict[str, list[Problem]] = {}
    for manifest in manifests:
        wrong = [p for e in manifest.files for p in _object(store, manifest.key(e.name), e.size, e.sha256, progress)]
        if not wrong:
            wrong += _inner(store, manifest)
        for segment in manifest.journal:
            if segment.key not in judged:
                judged[segment.key] = _object(store, segment.key, segment.size, segment.sha256, progress)
            wrong += judged[segment.key]
        if not wrong or store.exists(manifest.key(MIRROR_MANIFEST)):
            where = f"{store.url}/{COMMITS}/{manifest.id}"
            yield Checked("mirrored commit", where, manifest.total_bytes, tuple(wrong))


def _inner(store: Store, manifest: MirrorManifest) -> list[Problem]:
    """The commit's own manifest says the same as the mirror's."""
    where = f"{store.url}/{manifest.key(COMMIT_MANIFEST)}"
    try:
        inner = CommitManifest.from_bytes(store.read(manifest.key(COMMIT_MANIFEST), MANIFEST_BYTES), where)
    except (AnytimedError, OSError) as error:
        return [_told(where, error)]
    named = [entry for entry in manifest.files if entry.name != COMMIT_MANIFEST]
    same = (inner.run_id, inner.order, inner.files) == (manifest.run_id, manifest.order, named)
    return [] if same else [Problem(where, f"the commit and files of {MIRROR_MANIFEST}", "others")]


# --- what they share --------------------------------------------------------------------------------------------------


def _object(store: Store, key: str, size: int, sha256: str, progress: _Progress) -> list[Problem]:
    where = f"{store.url}/{key}"
    try:
        stored = store.size(key)
        digest = store.digest(key, size, progress.add) if stored == size else ""
    except MissingKey:
        return [Problem(where, f"{size} bytes", "nothing")]
    return _differences(where, size, sha256, stored, digest)


def _differences(where: str, size: int, sha256: str, found_size: int, found: str) -> list[Problem]:
    if found_size != size:
        return [Problem(where, f"{size} bytes", f"{found_size} bytes")]
    return [] if found == sha256 else [Problem(where, f"SHA-256 {sha256}", found)]


def _told(where: Path | str, error: Exception) -> Problem:
    return Problem(str(where), "a valid manifest, claim or pointer", str(error))
