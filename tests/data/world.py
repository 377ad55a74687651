"""What the tests of the data room share: a journal in memory, a tokenizer of numbers, a world of files that is read.

Every document is a run of numbers that stand in no other document, and a token is its number. So what was trained on
can be counted token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from anytimed.config import AdapterTable
from anytimed.contracts import (
    Batch,
    Finished,
    Holdout,
    Json,
    Position,
    Record,
    Rejected,
    SourceRule,
    Stream,
    StreamUnavailable,
    Tokens,
    chain,
    mixture_to_json,
)
from anytimed.data.encoding import Rebuild
from anytimed.data.pipeline import Pipeline
from anytimed.data.tokenizing import tokenizing
from anytimed_adapters.streams.jsonl import JsonLines
from anytimed_adapters.streams.text import TextFiles

END = 0
NEVER = Rebuild(AdapterTable(type="none"), "", Path(), ())
"""No worker is started."""


class MemoryJournal:
    """A `Journal` that keeps what a file would give back."""

    def __init__(self, entries: Sequence[Json] = ()) -> None:
        self.told = [json.dumps({"scope": "data", "entry": entry}) for entry in entries]

    def copy(self) -> MemoryJournal:
        other = MemoryJournal()
        other.told = list(self.told)
        return other

    def append(self, scope: str, entry: Json) -> None:
        self.told.append(json.dumps({"scope": scope, "entry": entry}))

    def entries(self, scope: str, start: int = 0, stop: int | None = None) -> list[Json]:
        lines = [json.loads(line) for line in self.told]
        return [line["entry"] for line in lines if line["scope"] == scope][start:stop]

    def length(self, scope: str) -> int:
        return len(self.entries(scope))

    def digest(self, scope: str, length: int | None = None) -> str:
        if length is not None and not 0 <= length <= self.length(scope):
            raise IndexError(length)
        return reduce(chain, self.entries(scope, 0, length), "")


class NumberTokenizer:
    """A `Tokenizer` of documents like "12 13 14"."""

    vocab_size = 1 << 30
    end_token = END

    def encode(self, text: str) -> Tokens:
        return np.array([int(word) for word in text.split()], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def save(self, folder: Path) -> list[str]:
        raise NotImplementedError("nothing is exported here")


DEFAULTS = {
    "seed": 7,
    "batch_size": 2,
    "sequence_length": 8,
    "shuffle_block_sequences": 6,
    "holdout_fraction": 0.2,
    "holdout_max_tokens": 60,
    "holdout_record_tokens": 16,
}


@dataclass
class World:
    """Folders of files, a source each, and the settings with which they are read."""

    folder: Path
    formats: Mapping[str, str]
    weights: Mapping[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    written: dict[str, list[list[int]]] = field(default_factory=dict)
    _next: int = 1

    def __post_init__(self) -> None:
        self.settings = {**DEFAULTS, **self.settings}
        for name in self.formats:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.written[name] = []

    def numbers(self, count: int) -> list[int]:
        self._next += count
        return list(range(self._next - count, self._next))

    def write(self, source: str, file: str, lengths: Sequence[int]) -> None:
        """Add documents of these lengths to a file of the source, at its end if it is there."""
        for length in lengths:
            document = self.numbers(length)
            self.written[source].append(document)
            text = " ".join(map(str, document))
            if self.formats[source] == "jsonl":
                path, content = self.folder / source / f"{file}.jsonl", json.dumps({"text": text}) + "\n"
            else:  # a document a file
                path, content = self.folder / source / f"{file}-{document[0]:08}.txt", text
            with path.open("a") as opened:
                opened.write(content)

    def streams(self) -> dict[str, Stream]:
        # A minute passes with every look: what a start has listed would hide what a test writes a moment later.
        clock = count(step=60.0).__next__
        make: dict[str, Callable[[str], Stream]] = {
            "jsonl": lambda name: JsonLines(JsonLines.Settings(url=f"{self.folder}/{name}/*.jsonl"), name, clock=clock),
            "text": lambda name: TextFiles(TextFiles.Settings(url=f"{self.folder}/{name}/*.txt"), name, clock=clock),
        }
        return {name: make[kind](name) for name, kind in self.formats.items()}

    def pipeline(self, journal: MemoryJournal, position: Position | None = None, **more: Any) -> Pipeline:
        """A new pipeline over the files, at a position that went through JSON."""
        rejected: list[tuple[str, Json, Rejected]] = []
        settings: dict[str, Any] = {"quarantine": lambda *told: rejected.append(told), **self.settings, **more}
        weights = settings.pop("weights", self.weights)
        more = {name: settings.pop(name, {}) for name in self.formats}
        rules = {name: SourceRule(weight, **more[name]) for name, weight in weights.items()}
        streams = settings.pop("streams", None) or self.streams()
        tokenizer = NumberTokenizer()
        pipeline = Pipeline(
            rules, lambda name, rule: streams[name], tokenizer, tokenizing(tokenizer, 0, NEVER), journal, **settings
        )
        pipeline.restore(stored(position) if position else Position())
        return pipeline


class Flaky:
    """A stream whose store does not answer now and then: every `pattern[i]`-th question while there is a pattern."""

    def __init__(self, stream: Stream, pattern: Sequence[int]) -> None:
        self._stream = stream
        self._due = iter(pattern)
        self._left = next(self._due, None)

    def _ask(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self._left = next(self._due, None)
                raise StreamUnavailable("the store does not answer")

    def discover(self) -> list[Json]:
        self._ask()
        return self._stream.discover()

    def read(self, place: Json | None) -> Iterator[tuple[Record | Rejected | Finished, Json]]:
        for item in self._stream.read(place):
            self._ask()
            yield item
        self._ask()

    def verify(self, finished: Mapping[int, str]) -> None:
        self._ask()
        self._stream.verify(finished)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def stored(position: Position) -> Position:
    """The position as a commit gives it back."""
    flat, index = position.holdout.to_arrays()
    holdout = Holdout.from_arrays(flat.copy(), json.loads(json.dumps(index)), position.holdout.weights)
    return Position.from_json(json.loads(json.dumps(position.to_json())), holdout)


def batches(pipeline: Pipeline) -> Iterator[Batch]:
    """All that can be made until there is nothing new, as the reader would."""
    polled = False
    while True:
        outcome = pipeline.next_batch()
        if isinstance(outcome, Batch):
            polled = False
            yield outcome
        elif (polled and pipeline.stands) or (not pipeline.poll() and not pipeline.stands):
            return
        else:
            polled = True


def told(batch: Batch) -> tuple[Any, ...]:
    """Everything a batch carries, as values that compare."""
    flat, index = batch.holdout.to_arrays()
    before, before_index = batch.position.holdout.to_arrays()
    return (
        batch.tokens.tolist(),
        [[batch.sources[label] for label in row] for row in batch.labels.tolist()],
        mixture_to_json(batch.mixture),
        json.dumps(batch.position.to_json()),
        (flat.tolist(), index),
        (before.tolist(), before_index),
        {name: source.to_json() for name, source in batch.read.items()},
    )
