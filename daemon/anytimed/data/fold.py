"""What a long journal comes to: the rows that its decisions adopted and finished, without reading each again.

A `Fold` is a run of consecutive decisions taken together: rows adopted per source, digests of finished rows per
source, and the decisions of other kinds as they are. `gathered` adds folds up. `fold_file` keeps them from one start
to the next, in the form that `to_bytes` gives them: a line `anytimed-fold-1 START LENGTH DIGEST BYTES SHA256` and so
many bytes of JSON; the SHA-256 is that of the line up to it and the JSON. Rows are any JSON values.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Json
from anytimed.data.digests import Digests

FORM = re.compile(rb"(anytimed-fold-1 (\d{1,15}) (\d{1,15}) ([0-9a-f]{64}) (\d{1,12}) )([0-9a-f]{64})\n")
"""The line before a fold's JSON."""
FORM_BYTES = 256
"""No such line is longer."""


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection within, in the whole process. A million rows that are made one after another and all kept
    make the collector walk over all of them again and again: that takes longer than making them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(slots=True)
class Finished:
    """Rows that were read to their end, as `Digests.put` takes them: their indices, and their digests, or, where these
    come from the file, all in one text, 64 characters each."""

    indices: list[int] | NDArray[np.int64] = field(default_factory=list)
    digests: list[str] | str = field(default_factory=list)

    def to_json(self) -> list[Any]:
        # One text is read ten times as fast as a text each.
        one = isinstance(self.digests, list) and all(len(digest) == 64 for digest in self.digests)
        return [list(map(int, self.indices)), "".join(self.digests) if one else self.digests]

    @staticmethod
    def from_json(value: Any) -> Finished:
        """Raises ValueError, TypeError on what `to_json` did not make."""
        indices, digests = value
        if len(digests) != len(indices) * (64 if isinstance(digests, str) else 1):
            raise ValueError(f"{len(indices)} rows and {len(digests)} of digests")
        at = np.array(indices)
        if at.dtype.kind != "i" or at.ndim != 1:
            return Finished([int(index) for index in indices], digests)
        return Finished(at, digests)


@dataclass(slots=True)
class Fold:
    """The data decisions [start, length) of a journal, taken together.

    adopted: per source its new rows, in order; finished: per source, rows and digests, the last of a row counts.
    Once they took effect, nothing asks for decisions of other kinds. `weight`: rows and digests. `digest`: the
    journal's at `length`, "" until somebody sets it.
    """

    start: int = 0
    length: int = 0
    digest: str = ""
    adopted: dict[str, list[Json]] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    weight: int = 0

    def update(self, entry: Json) -> None:
        """Take in the next decision."""
        match entry:
            case {"kind": "discovered", "source": str(name), "entries": list(rows)}:
                self.adopted.setdefault(name, []).extend(rows)
                self.weight += len(rows)
            case {"kind": "finished", "sources": dict(sources)}:
                for name, digests in sources.items():
                    known = self.finished.setdefault(name, Finished())
                    assert isinstance(known.indices, list), "a fold from the file is complete"
                    assert isinstance(known.digests, list), "a fold from the file is complete"
                    known.indices += map(int, digests)
                    known.digests += digests.values()
                    self.weight += len(digests)
        self.length += 1

    def pass_over(self) -> None:
        """The next decision is void."""
        self.length += 1

    def to_bytes(self) -> bytes:
        told = {
            "adopted": self.adopted,
            "finished": {name: finished.to_json() for name, finished in self.finished.items()},
        }
        body = json.dumps(told, separators=(",", ":")).encode()
        header = f"anytimed-fold-1 {self.start} {self.length} {self.digest} {len(body)} ".encode()
        return header + hashlib.sha256(header + body).hexdigest().encode() + b"\n" + body

    @staticmethod
    def from_body(start: int, length: int, digest: str, body: bytes) -> Fold:
        """The inverse of `to_bytes`, after its line. Raises ValueError, LookupError, TypeError, AttributeError or
        RecursionError on what it did not make."""
        told = json.loads(body)
        finished = {name: Finished.from_json(columns) for name, columns in told["finished"].items()}
        fold = Fold(start, length, digest, told["adopted"], finished)
        rows = [*fold.adopted.values(), *(part.indices for part in finished.values())]
        fold.weight = sum(map(len, rows))
        return fold


@dataclass(slots=True)
class Gathered:
    """The sum of folds, with the digests in 33 bytes each."""

    length: int = 0
    adopted: dict[str, list[Json]] = field(default_factory=dict)
    finished: dict[str, Digests] = field(default_factory=dict)


def gathered(folds: Iterable[Fold]) -> Gathered:
    """Add up consecutive folds from the first decision on."""
    whole = Gathered()
    with collector_off():
        for fold in folds:
            assert fold.start == whole.length, (fold.start, whole.length)
            for name, rows in fold.adopted.items():
                whole.adopted.setdefault(name, []).extend(rows)
            for name, part in fold.finished.items():
                whole.finished.setdefault(name, Digests()).put(part.indices, part.digests)
            whole.length = fold.length
    return whole
