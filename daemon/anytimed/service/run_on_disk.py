"""A run as it lies on the disk, for who only looks: no lock, no write, whether or not a daemon owns it.

`read_run` takes the newest commit by (term, seq) that the training did not go back from, and then the journal, so that
the journal holds all that the commit needs. Of the commit only what is asked for is compared with its digests: reading
gigabytes of weights is for `anytimed verify`. A commit that a daemon retires meanwhile is no damage: then there is a
newer one, and it is looked for again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from anytimed.contracts import AnytimedError, CorruptError, Json, Position, SourcePosition, Tokens
from anytimed.service.committed import HOLDOUT_TENSOR, described_by, position_of
from anytimed.service.decisions import Decisions
from anytimed.storage.commit import NAME, STATE, Commit, Damaged, read_commit
from anytimed.storage.durable import digest_of
from anytimed.storage.journal_copy import JournalCopy
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.tensors import read_header

_ATTEMPTS = 5
_HINT = "`anytimed verify` reads all of the run; the next start goes on from the newest commit that verifies"


@dataclass(frozen=True, slots=True)
class RunOnDisk:
    """commit: the newest, None before the first; state: what was committed beside its tensors, {} without one; held:
    the tokens of its hold-out, shape (n,)."""

    directory: RunDirectory
    commit: Commit | None
    state: Json
    held: Tokens
    journal: JournalCopy

    def told(self) -> Json | None:
        """The commit as the status tells of one, with the number of the last batch that was trained on."""
        if self.commit is None:
            return None
        with self.described():
            written = datetime.fromisoformat(self.commit.manifest.created).timestamp()
            position = self.state["position"]
            found = {key: int(position[key]) for key in ("batches", "block", "index")}
            return {"step": self.commit.manifest.step, "path": str(self.commit.path), "time": written, **found}

    def sources(self) -> dict[str, SourcePosition]:
        """Where every source that was ever read stands at the beginning of the commit's block."""
        if self.commit is None:
            return {}
        with self.described():
            return {name: SourcePosition.from_json(at) for name, at in self.state["position"]["sources"].items()}

    def position(self) -> Position:
        """Where the next start goes on."""
        if self.commit is None:
            return Position()
        with self.described():
            return position_of(self.state, self.held)

    def described(self) -> contextlib.AbstractContextManager[None]:
        """A state that is no state of ours, though its digest is right, is a named error."""
        return described_by(self.commit, _HINT)


def read_run(path: Path) -> RunOnDisk:
    """The run in a directory, which need not exist. Raises CorruptError where its newest commit is damaged, Refused
    where its journal is, AnytimedError where this process cannot read."""
    directory = RunDirectory(path)
    for left in reversed(range(_ATTEMPTS)):
        found = _commits(directory)
        journal = JournalCopy(directory.journal)
        decisions = Decisions(journal)
        commit = next((commit for commit in found if decisions.undone(commit.manifest.seq) is None), None)
        if commit is None:
            return RunOnDisk(directory, None, {}, np.zeros(0, np.int32), journal)
        try:
            _require(commit, STATE)
            return RunOnDisk(directory, commit, commit.state, _held(commit), journal)
        except (CorruptError, OSError) as error:
            if left and not commit.path.is_dir():
                continue
            raise _named(error) from error
    raise AssertionError


def _commits(directory: RunDirectory) -> list[Commit]:
    """Newest first, by (term, seq). Raises CorruptError where one newer than all others cannot be read; NewerFormat."""
    try:
        paths = sorted((p for p in directory.commits.iterdir() if NAME.fullmatch(p.name)), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found: list[Commit] = []
    for path in paths:
        try:
            found.append(read_commit(path))
        except Damaged as error:
            if path.is_dir() and not found:
                raise _named(error) from error
    return sorted(found, key=lambda commit: commit.manifest.order, reverse=True)


def _require(commit: Commit, name: str) -> None:
    """Raise Damaged where a file is not what the manifest says."""
    for entry in commit.manifest.files:
        if entry.name == name:
            path = commit.path / name
            size, sha256 = digest_of(path)
            if (size, sha256) != (entry.size, entry.sha256):
                raise Damaged(path, f"{entry.size} bytes, SHA-256 {entry.sha256}", f"{size} bytes, {sha256}")
            return
    raise Damaged(commit.path / name, "a file that the manifest names", "none")


def _held(commit: Commit) -> Tokens:
    """The tokens of the hold-out, out of a file whose other gigabytes are not read."""
    for path in commit.tensor_files:
        header = read_header(path)
        if HOLDOUT_TENSOR in header.tensors:
            place = header.tensors[HOLDOUT_TENSOR]
            with path.open("rb") as file:
                file.seek(header.data_start + place.start)
                return np.frombuffer(file.read(place.end - place.start), "<i4").astype(np.int32)
    raise CorruptError(f"{commit.path}: no tensor {HOLDOUT_TENSOR}")


def _named(error: Exception) -> AnytimedError:
    return CorruptError(f"{error}; {_HINT}")
