"""A run's directory and the right to write in it.

`acquire` takes the lock (one writer, enforced by the kernel, free again the moment its process is gone), raises the
term (a counter that goes up at every start and orders everything that is written), writes down who owns the run, and
sweeps what earlier processes left half done. `owned` asks again before a commit point. `start_fresh` moves a run
aside, never away.

Workers must be spawned, not forked: the lock is close-on-exec, and a forked child would hold it after its parent is
gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from anytimed.contracts import AnytimedError, ConfigError, CorruptError, Json, Refused
from anytimed.trust import owned_by_us

from .durable import fsync_folder, make_folders, write_durably
from .manifest import MANIFEST_BYTES
from .strangers import read_json

log = logging.getLogger(__name__)

_OWNER_BYTES = 64 << 10
_BUSY_S = 0.4
"""How long a busy lock is tried again: enough for the holder to have written OWNER, and for a stopped one to be
gone."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds the run, or held it last. `started`: UTC, ISO 8601."""

    run_id: str
    term: int
    pid: int
    host: str
    started: str


class RunDirectory:
    """The folder of one run. Its paths can be asked for without owning it; nothing is created before `acquire`."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path).absolute()
        self._clock = clock
        self._lock: int | None = None
        self._owner: Owner | None = None

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def fold(self) -> Path:
        """What the journal's data decisions come to, as a start needs it. A cache, as `journal.checked` is: neither is
        mirrored or verified, and both may be deleted at any time."""
        return self.path / "journal.fold"

    @property
    def commits(self) -> Path:
        return self.path / "commits"

    def committed_bytes(self) -> int:
        """What a start may have to read: the size of all that lies among the commits."""
        sizes = (entry.stat().st_size for entry in self.commits.glob("*/*") if entry.is_file())
        try:
            return sum(sizes)
        except OSError:  # retention, or a stranger, was quicker
            return 0

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def served(self) -> Path:
        """The export that was published last: what the gate compares the next one with."""
        return self.path / "served"

    @property
    def refused_exports(self) -> Path:
        """Exports that were not fit to be served, the newest few."""
        return self.quarantine / "exports"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def control_socket(self) -> Path:
        return self.path / "control.sock"

    @property
    def run_id(self) -> str:
        return self._held().run_id

    @property
    def term(self) -> int:
        return self._held().term

    def owner(self) -> Owner | None:
        """What OWNER says, whether or not its process still runs; None where it is missing or damaged."""
        try:
            told = read_json(self.path / "OWNER", _OWNER_BYTES)
            if told["digest"] != _digest(told):
                return None
            return Owner(
                str(told["run_id"]), int(told["term"]), int(told["pid"]), str(told["host"]), str(told["started"])
            )
        except (FileNotFoundError, CorruptError, ValueError, KeyError, TypeError):
            return None

    def acquire(self, at_least: int = 0, run_id: str | None = None) -> None:
        """Become the one writer. `at_least`: a term that was published already; ours becomes higher than it.
        `run_id`: of the run to go on with, where this directory holds nothing of its own yet.

        Raises Refused within a second where another process holds the run, naming it; ConfigError where the folder is
        something else, or not ours to write; OSError.
        """
        if self._lock is not None:
            raise AnytimedError(f"{self.path}: this process holds the run already")
        try:
            self._prepare()
            self._lock = self._flock()
        except (PermissionError, NotADirectoryError) as error:
            raise ConfigError(
                f"{self.path}: no run can be kept here: {error}; expected a folder that uid {os.geteuid()} can write"
            ) from error
        try:
            before = self.owner()
            if before is None:
                if (self.path / "OWNER").exists():
                    log.warning("%s: OWNER is damaged; run id and term are taken from the commits", self.path)
                before = self._recovered()
            self._owner = Owner(
                run_id=run_id or (before.run_id if before else uuid.uuid4().hex),
                term=max(before.term if before else 0, at_least) + 1,
                pid=os.getpid(),
                host=socket.gethostname(),
                started=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds"),
            )
            told = asdict(self._owner)
            write_durably(self.path / "OWNER", json.dumps({**told, "digest": _digest(told)}).encode() + b"\n")
            kept = ("commits", "records", "exports")
            for folder in (self.commits, self.spool, self.served, *(self.quarantine / name for name in kept)):
                make_folders(folder)
            damaged = self.quarantine / "commits"
            for folder in (self.path, self.commits, self.spool, self.served, self.refused_exports, damaged):
                self.sweep(folder)
        except BaseException:
            self.release()
            raise

    def owned(self) -> bool:
        """Whether the run is still ours: the lock lies where we took it, and OWNER names our term."""
        if self._lock is None or self._owner is None:
            return False
        try:
            same = os.path.samestat(os.fstat(self._lock), os.stat(self.path / "LOCK"))  # noqa: PTH116 - of the path as it is
        except FileNotFoundError:
            return False
        return same and self.owner() == self._owner

    def release(self) -> None:
        """Give the run up; the kernel does the same when the process ends."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = self._owner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def start_fresh(self) -> Path | None:
        """Move an existing run aside to `<path>.old-<n>` and return that; None if there is none. Then `acquire`
        starts anew.

        The new run has a new id, and its term goes on above the old one's, so that what it publishes counts as newer.
        Raises Refused where a process holds the run, AnytimedError where the folder cannot be moved.
        """
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return None
        self._prepare()
        lock = self._flock()
        try:
            number = max((_number(p) for p in self._moved_aside()), default=0) + 1
            aside = self.path.with_name(f"{self.path.name}.old-{number}")
            self.path.rename(aside)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise AnytimedError(
                f"{self.path}: cannot be moved aside: {error.strerror}; nothing was changed. The folder above must be "
                "writable and the run no mount point; or name another directory"
            ) from error
        finally:
            os.close(lock)
        return aside

    def sweep(self, folder: Path) -> None:
        """Remove what interrupted writes (`.tmp-`) and interrupted deletions (`.del-`) left in a folder of ours."""
        for leftover in sorted(p for p in folder.iterdir() if p.name.startswith((".tmp-", ".del-"))):
            try:
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            except OSError as error:
                log.warning("%s: cannot be removed: %s; it is tried again at the next start", leftover, error.strerror)

    # --- within ---

    def _held(self) -> Owner:
        if self._owner is None:
            raise AnytimedError(f"{self.path}: not acquired; run id and term are known to the owner only")
        return self._owner

    def _prepare(self) -> None:
        """The folder exists, is a run or empty, and nobody else can read it."""
        if not self.path.exists():
            make_folders(self.path, mode=0o700)
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: a file; expected a run directory, or a path where one can be made")
        found = self.path.stat()
        if not owned_by_us(found):
            raise ConfigError(
                f"{self.path}: belongs to uid {found.st_uid}, who could exchange what is in it; expected uid "
                f"{os.geteuid()}: chown it, or choose another"
            )
        if found.st_mode & 0o022 and any(self.path.iterdir()):
            raise ConfigError(
                f"{self.path}: others can write here (mode {found.st_mode & 0o777:o}) and there is something in it; "
                "expected a run that is ours alone, or an empty folder: look at what is there, then chmod 700 it"
            )
        for planted in (p for p in self.path.iterdir() if p.is_symlink() and not owned_by_us(p.lstat())):
            raise ConfigError(f"{planted}: a symlink that uid {planted.lstat().st_uid} made; remove it")
        if found.st_mode & 0o077:
            if any(self.path.iterdir()) and not (self.path / "LOCK").exists():
                raise ConfigError(
                    f"{self.path}: holds other things and is open to other users (mode "
                    f"{self.path.stat().st_mode & 0o777:o}); expected a run, or an empty folder: "
                    "chmod 700 it, or choose another"
                )
            self.path.chmod(0o700)

    def _flock(self) -> int:
        """The locked LOCK. Raises Refused naming who holds it."""
        give_up = time.monotonic() + _BUSY_S
        while True:
            file = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    # Another start_fresh may have moved the folder between open and flock: then this is the old run's.
                    if os.path.samestat(os.fstat(file), os.stat(self.path / "LOCK")):  # noqa: PTH116
                        return file
            except BlockingIOError:
                pass
            os.close(file)
            if time.monotonic() > give_up:
                owner = self.owner()
                who = (
                    f"pid {owner.pid} on {owner.host} since {owner.started}" if owner else "a process that left no name"
                )
                raise Refused(
                    f"{self.path}: another writer holds this run: {who}; stop it first, or name another directory"
                )
            time.sleep(0.05)

    def _moved_aside(self) -> Iterator[Path]:
        for path in self.path.parent.glob(f"{self.path.name}.old-*"):
            if _number(path):
                yield path

    def _recovered(self) -> Owner | None:
        """Run id and term where OWNER is gone: from our commits, else a term above that of every run moved aside."""
        found = []
        for manifest in self.commits.glob("*/MANIFEST.json"):
            with contextlib.suppress(CorruptError, ValueError, KeyError, TypeError, OSError):
                told = read_json(manifest, MANIFEST_BYTES)
                found.append(Owner(str(told["run_id"]), int(told["term"]), 0, "", ""))
        if not found:
            # A crash between start_fresh and the first acquire must not let the term fall back, so it is looked up
            # here.
            aside = [RunDirectory(path) for path in self._moved_aside()]
            terms = [run.owner() or run._recovered() for run in aside]
            found = [Owner(uuid.uuid4().hex, known.term, 0, "", "") for known in terms if known]
        return max(found, key=lambda owner: owner.term, default=None)


def _digest(told: Json) -> str:
    """Of what OWNER says: a term that rotted into a lower one would order new commits before old ones."""
    rest = {key: value for key, value in told.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _number(path: Path) -> int:
    text = path.name.rpartition(".old-")[2]
    return int(text) if text.isascii() and text.isdigit() else 0
