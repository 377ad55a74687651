"""The samples that come next, as the model will see them: what `anytimed data --peek` shows.

A pipeline like the daemon's own reads on from the newest commit's position, by the same decisions: those that the
journal holds are replayed from a copy of it, and what would be decided next goes to that copy, in memory. What it gives
is what a start now would train on. A daemon that runs has done so already, up to what it decided meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Batch, Json, Rejected, Tokenizer
from anytimed.data.pipeline import Dry
from anytimed.data.reader import read_one
from anytimed.service.assembly import Parts, pipeline_of, require_fit
from anytimed.service.decisions import Decisions
from anytimed.service.run_on_disk import RunOnDisk


@dataclass(frozen=True, slots=True)
class Document:
    """Consecutive tokens of a sample from one document. source: None where the sample does not tell (its first token,
    the last target of another sample). ended: the document's end token follows, and is the last of `tokens`."""

    source: str | None
    tokens: NDArray[np.int32]
    ended: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a batch. batch: its number in the stream, row: in the batch, both from 1. tokens: (length + 1,);
    labels: (length,), for each target the index of its source in `sources`."""

    batch: int
    row: int
    tokens: NDArray[np.int32]
    labels: NDArray[np.int16]
    sources: tuple[str, ...]

    def targets(self) -> dict[str, int]:
        """How many targets are of each source, the most first."""
        labels, counts = np.unique(self.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {self.sources[int(labels[i])]: int(counts[i]) for i in order}

    def documents(self, end_token: int) -> list[Document]:
        """The row cut after each end token, and where the source changes (a source may have end tokens of its own)."""
        ends = self.tokens == end_token
        # The first token has no label: it is of the next one's document unless it ends its own.
        labels = np.concatenate([[-1 if ends[0] else self.labels[0]], self.labels])
        cuts = np.flatnonzero(ends[:-1] | (labels[1:] != labels[:-1])) + 1
        found = []
        for first, stop in zip([0, *cuts], [*cuts, self.tokens.size], strict=True):
            label = int(labels[first])
            source = self.sources[label] if label >= 0 else None
            found.append(Document(source, self.tokens[first:stop], bool(ends[stop - 1])))
        return found

    def to_json(self, tokenizer: Tokenizer) -> Json:
        """Whole, with token ids."""
        documents = [
            {"source": d.source, "tokens": int(d.tokens.size), "ended": d.ended, "text": text_of(d, tokenizer)}
            for d in self.documents(tokenizer.end_token)
        ]
        return {
            "batch": self.batch,
            "row": self.row,
            "targets": self.targets(),
            "documents": documents,
            "tokens": self.tokens.tolist(),
        }


def text_of(document: Document, tokenizer: Tokenizer) -> str:
    """Decoded, without its end token."""
    tokens = document.tokens[:-1] if document.ended else document.tokens
    return tokenizer.decode(tokens.tolist()) if tokens.size else ""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A batch that no start trains on: the guard has jumped over it."""

    batch: int


def peek(parts: Parts, run: RunOnDisk, count: int) -> Iterator[Sample | PassedOver | Dry]:
    """The next `count` samples; a Dry is the last item where there are fewer for now. Raises ConfigError where the
    configuration does not fit the commit, Refused where the journal is not the commit's or read data has changed."""
    if run.commit is not None:
        with run.described():
            require_fit(parts, run.commit)
    # Here, not in processes of its own: the tokens are the same, and it is over soon.
    data = parts.config.data.model_copy(update={"tokenizer_workers": 0})
    parts = replace(parts, config=parts.config.model_copy(update={"data": data}))
    decisions = Decisions(run.journal)
    pipeline = pipeline_of(parts, run.journal, _unnoted, None)
    try:
        pipeline.restore(run.position())
        while count > 0:
            outcome = read_one(pipeline)
            if isinstance(outcome, Dry):
                yield outcome
                return
            if decisions.jumped(outcome.number):
                yield PassedOver(outcome.number)
                continue
            rows = min(count, len(outcome.tokens))
            yield from _rows(outcome, rows)
            count -= rows
    finally:
        pipeline.close()


def _rows(batch: Batch, count: int) -> Iterator[Sample]:
    for row in range(count):
        yield Sample(batch.number, row + 1, batch.tokens[row], batch.labels[row], batch.sources)


def _unnoted(_source: str, _place: Json, _rejected: Rejected) -> None:
    """The daemon notes a bad record when it comes to it."""
