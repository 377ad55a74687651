"""Where a start takes the state from: the newest commit that verifies, on the local disk or in the mirror.

In order: `identify` settles whose run this is before anything is written under its name (an empty directory goes on
with the run of its mirror; a mirror of another run is refused) and raises the term above all that the mirror has seen;
`newest` takes the newest commit by (term, seq), fetches it where only the mirror has it, brings the journal to what it
needs, and says what it took and why.

A mirror that does not answer is passed over where there is a good local commit; where there is none the start fails,
and is worth another attempt: nothing ever begins from nothing because a store was down.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from anytimed.config import CommitsTable
from anytimed.contracts import AnytimedError, CorruptError, Refused
from anytimed.service.console import size
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.durable import fsync_folder
from anytimed.storage.journal import Journal
from anytimed.storage.mirror import Mirror, TermTaken
from anytimed.storage.mirror_manifest import MirrorManifest, matching
from anytimed.storage.mirror_reader import Seen, fetch_commit, fetch_journal, look
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import MissingKey, Store, StoreError

log = logging.getLogger("anytimed")

Needs = Callable[[Commit], tuple[int, str]]
"""Entries of the journal's data scope that a commit was made after, and their digest."""

SCOPE = "data"
FETCH_S = 600.0
"""A transfer that stands still for longer is given up by who started the daemon."""
TELL_EVERY_S = 5.0
START_S = 10.0
"""Budget of one request while a start looks at a store: a dead one must not keep a good local commit waiting."""


@dataclass
class Origin:
    """What a start found. `taken` is "local", "mirror", or "" for nothing; `problem`: why the mirror is degraded."""

    commits: Commits
    journal: Journal
    commit: Commit | None
    taken: str
    mirror: Mirror | None
    problem: str | None


class Sources:
    """The local run directory, which is ours, and its mirror, if the configuration names one."""

    def __init__(
        self, run: RunDirectory, table: CommitsTable, tell: Callable[[str, float], None] = lambda what, seconds: None
    ) -> None:
        self._run, self._tell = run, tell
        self._seen: Seen | None = None
        self._store: Store | None = None
        self._mirror: Mirror | None = None
        self._problem: str | None = None
        self._rejected: list[str] = []
        if table.mirror_url is not None:
            self._store = Store(table.mirror_url, table.mirror_storage_options)
            self._mirror = Mirror(self._store, run)

    def identify(self, *, fresh: bool = False) -> None:
        """Settle run id and term. `fresh`: this run starts over, whatever the mirror holds.

        Raises Refused where the mirror is another run's.
        """
        if self._store is None:
            return
        try:
            self._seen = seen = look(self._store.hurried(START_S))
        except StoreError as error:
            self._problem = f"mirror: {error}"
            return
        for told in seen.passed_over:
            log.warning("passed over in the mirror: %s", told)
        self._rejected += seen.passed_over
        run = self._run
        run_id = None
        if seen.run_id not in (None, run.run_id) and not fresh:
            if self._has_anything():
                raise Refused(
                    f"{self._store.url}: the mirror of run {seen.run_id}; {run.path} holds run {run.run_id}. Give this "
                    "run a [commits] mirror_url of its own, or move the directory away to restore the other one"
                )
            run_id = seen.run_id
        if seen.term >= run.term or run_id is not None:
            run.release()
            run.acquire(at_least=seen.term, run_id=run_id)

    def newest(self, needs: Needs, *, fresh: bool = False, without: Collection[int] = ()) -> Origin:
        """The newest commit that verifies and the journal that it needs, both in place. `without`: numbers of commits
        that are not to be taken from the mirror.

        Raises Refused where commits exist and none verifies, or another process claimed the mirror; AnytimedError
        where nothing is here and the mirror does not answer, or a newer commit there cannot be fetched.
        """
        self._claim()
        commits = Commits(self._run)
        refusal: Refused | None = None
        local: Commit | None = None
        try:
            local = commits.newest()
        except Refused as error:
            if self._store is None:
                raise
            refusal = error
        fetched = not fresh and self._fetched(commits, local, without)
        if fetched:
            local = commits.newest()  # what was fetched; damaged ones beside it go to quarantine
        elif local is None and self._problem is not None and not fresh:
            raise AnytimedError(
                f"{self._run.path}: {refusal or 'no commit here'}; and the mirror cannot be asked: {self._problem}. "
                "Nothing was begun: start again when it answers, or begin a new run with --fresh"
            )
        elif refusal is not None:
            raise refusal
        elif local is None and self._rejected and not fresh:
            raise Refused(
                f"{self._run.path}: no commit here, and none in the mirror verifies: {'; '.join(self._rejected)}. "
                "Nothing was changed. Restore one from a copy, or begin a new run with --fresh"
            )
        elif local is not None:
            self._fit_journal(needs(local))
        taken = "mirror" if fetched else "local" if local is not None else ""
        if self._problem is not None:
            log.warning("%s; training goes on, the newest commit is mirrored later", self._problem)
        return Origin(commits, Journal(self._run.journal), local, taken, self._mirror, self._problem)

    # --- within ---

    def _has_anything(self) -> bool:
        journal = self._run.journal
        return any(not p.name.startswith(".") for p in self._run.commits.iterdir()) or (
            journal.exists() and journal.stat().st_size > 0
        )

    def _claim(self) -> None:
        """Take the term in the mirror; another start that was quicker is outbid, as it would be a moment later."""
        if self._mirror is None or self._problem is not None:
            return
        for attempt in (1, 2, 3):
            try:
                self._mirror.claim()
                return
            except TermTaken:
                if attempt == 3:
                    raise
                self._run.release()
                self._run.acquire(at_least=self._run_term())
            except StoreError as error:
                self._problem = f"mirror: {error}"
                return

    def _run_term(self) -> int:
        assert self._store is not None
        owner = self._run.owner()
        return max(look(self._store).term, owner.term if owner else 0)

    def _fetched(self, commits: Commits, local: Commit | None, without: Collection[int]) -> bool:
        """Bring the newest mirrored commit that verifies here, and its journal, if it is newer than the local one."""
        for manifest in self._seen.commits if self._seen is not None else ():
            if local is not None and manifest.order <= local.manifest.order:
                return False
            if manifest.seq in without:
                continue
            assert self._store is not None
            than = f"the newest good one here is {local.path.name}" if local else "there is no good one here"
            log.info("taking commit %s from the mirror %s: %s", manifest.id, self._store.url, than)
            try:
                with self._journal_of(manifest) as put_in_place:
                    # Before the commit: one whose decisions are missing would replay others.
                    fetch_commit(self._store, manifest, commits, _telling(self._tell), before=put_in_place)
            except (CorruptError, MissingKey) as error:
                log.warning("rejected a commit in the mirror: %s", error)
                self._rejected.append(str(error))
                continue
            # A store that breaks down now is worth another start: going on from an older commit would drop this one.
            return True
        return False

    def _fit_journal(self, needed: tuple[int, str]) -> None:
        """Where the local commit's journal is missing, broken or shorter than it was: the mirror's, which knows it."""
        path = self._run.journal
        for manifest in self._seen.commits if self._seen is not None else ():
            if matching(path, manifest.journal) == manifest.journal:
                return
            try:
                with self._journal_of(manifest) as put_in_place:
                    attempt = put_in_place.attempt
                    lost = not path.exists() or _begins(attempt, path) or not _fits(path, needed)
                    if lost and _fits(attempt, needed):
                        log.warning("%s: missing, broken or shorter than it was", path)
                        put_in_place()
                        return
            except (CorruptError, MissingKey, StoreError) as error:
                log.warning("rejected a journal in the mirror: %s", error)

    @contextlib.contextmanager
    def _journal_of(self, manifest: MirrorManifest) -> Iterator[_JournalPlace]:
        """The mirror's journal of a commit, fetched beside its place, and what puts it there."""
        assert self._store is not None
        place = _JournalPlace(self._run, manifest, self._store.url)
        try:
            if matching(self._run.journal, manifest.journal) != manifest.journal:
                fetch_journal(self._store, manifest, place.attempt)
            yield place
        finally:
            place.attempt.unlink(missing_ok=True)


class _JournalPlace:
    """Puts a fetched journal in its place when called. What lies there is kept in quarantine, unless it is no more than
    the beginning of the fetched one; nothing happens where nothing had to be fetched."""

    def __init__(self, run: RunDirectory, manifest: MirrorManifest, url: str) -> None:
        self._run, self._manifest, self._url = run, manifest, url
        self.attempt = run.path / f".tmp-journal-{secrets.token_hex(4)}"

    def __call__(self) -> None:
        path = self._run.journal
        if not self.attempt.exists():
            return
        if path.exists() and not _begins(self.attempt, path):
            aside = self._run.quarantine / f"journal-{secrets.token_hex(4)}.jsonl"
            path.rename(aside)
            fsync_folder(aside.parent)
            log.warning("%s: not the journal of commit %s; moved to %s", path, self._manifest.id, aside)
        self.attempt.rename(path)
        fsync_folder(path.parent)
        log.info("took the journal, %d bytes, from the mirror %s", self._manifest.journal_bytes, self._url)


def _telling(announce: Callable[[str, float], None]) -> Callable[[int, int], None]:
    """Says every few seconds how far a transfer has come, and asks for the time of the next part."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            log.info("fetched %s of %s", size(done), size(total))
            announce(f"starting: fetched {size(done)} of {size(total)} of the newest commit", FETCH_S)

    return tell


def _fits(path: Path, needed: tuple[int, str]) -> bool:
    """Whether the journal is whole and its data scope begins with what was needed."""
    if not path.exists():
        return needed[0] == 0
    try:
        journal = Journal(path)
    except Refused as error:
        log.warning("%s", error)
        return False
    try:
        return journal.length(SCOPE) >= needed[0] and journal.digest(SCOPE, needed[0]) == needed[1]
    finally:
        journal.close()


def _begins(whole: Path, part: Path) -> bool:
    """Whether `whole` begins with the bytes of `part`."""
    with whole.open("rb") as one, part.open("rb") as other:
        while chunk := other.read(1 << 20):
            if one.read(len(chunk)) != chunk:
                return False
    return True
