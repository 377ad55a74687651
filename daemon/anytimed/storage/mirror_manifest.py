"""The forms of the mirror, and how the journal is cut into objects.

A mirror is a prefix that holds the commits of one run for a machine that vanishes:

    terms/<term>.json                     who writes here in that term: a `Claim`, create-only
    journal/<start>-<end>-<sha256>.jsonl  bytes [start, end) of journal.jsonl: a `Segment`
    commits/<term>-<seq>-<step>/…         the files of a commit, its own MANIFEST.json among them
    commits/<term>-<seq>-<step>/mirror.json  a `MirrorManifest`, create-only, last: only now the commit is there

Objects never change once written. Every manifest names the segments that make the journal as long as its commit
needs; `cut` lets them grow together as it grows, so that a long journal is few objects and is not sent again with
every commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .durable import CHUNK_BYTES
from .manifest import CheckpointId, Count, FileEntry, Sealed, Sha256, unique

COMMITS, JOURNAL, TERMS = "commits", "journal", "terms"
MIRROR_MANIFEST = "mirror.json"
COMMIT_MANIFEST = "MANIFEST.json"


class Segment(BaseModel):
    """Bytes [start, end) of the journal, and their SHA-256 (hex)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    start: Count
    end: Count
    sha256: Sha256

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def key(self) -> str:
        return f"{JOURNAL}/{self.start:012d}-{self.end:012d}-{self.sha256}.jsonl"


class MirrorManifest(Sealed):
    """mirror.json: a commit's files, digests included, and the segments of the journal that belongs to it."""

    form: ClassVar[str] = "mirror manifest"

    run_id: str
    term: Count
    seq: Count
    step: Count
    created: str
    """UTC, ISO 8601: when it was mirrored; for people, it orders nothing."""
    files: Annotated[list[FileEntry], Field(min_length=2, max_length=100_000)]
    journal: Annotated[list[Segment], Field(max_length=10_000)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        unique(self.files, MIRROR_MANIFEST)
        if COMMIT_MANIFEST not in {entry.name for entry in self.files}:
            raise ValueError(f"the commit's own {COMMIT_MANIFEST} is not among its files")
        at = 0
        for segment in self.journal:
            if segment.start != at or segment.end <= at:
                raise ValueError(f"journal segment {segment.start} to {segment.end}, expected one that starts at {at}")
            at = segment.end
        return self

    @property
    def id(self) -> CheckpointId:
        return CheckpointId(self.term, self.seq, self.step)

    @property
    def order(self) -> tuple[int, int]:
        return self.term, self.seq

    @property
    def journal_bytes(self) -> int:
        return self.journal[-1].end if self.journal else 0

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files) + self.journal_bytes

    def key(self, name: str) -> str:
        return f"{COMMITS}/{self.id}/{name}"


class Claim(Sealed):
    """terms/<term>.json: the process that writes in this term. `nonce` tells two processes of one host apart."""

    form: ClassVar[str] = "claim of a term"

    run_id: str
    term: Count
    host: str
    pid: Count
    started: str
    nonce: str


def term_key(term: int) -> str:
    return f"{TERMS}/{term:05d}.json"


def cut(segments: Sequence[Segment], length: int) -> tuple[list[Segment], int]:
    """The segments that stay when the journal has grown to `length` bytes, and where the new one starts.

    The new one takes in those at the end that are less than twice as long as it. So each is at least twice as long as
    the next: n bytes are at most log2(n) + 1 segments, and no byte is sent more often than that.
    """
    kept = list(segments)
    start = kept[-1].end if kept else 0
    assert start <= length, (start, length)
    while start < length and kept and kept[-1].size < 2 * (length - start):
        start = kept.pop().start
    return kept, start


def matching(path: Path, segments: Sequence[Segment]) -> list[Segment]:
    """The first segments that are what a local journal holds; all of them, where it goes on after the last."""
    found: list[Segment] = []
    try:
        with path.open("rb") as file:
            for segment in segments:
                digest, left = hashlib.sha256(), segment.size
                while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                    digest.update(chunk)
                    left -= len(chunk)
                if left or digest.hexdigest() != segment.sha256:
                    break
                found.append(segment)
    except FileNotFoundError:
        pass
    return found
