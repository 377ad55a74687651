"""Records to batches: the deterministic core, synchronous and without a clock.

A block is read record by record: a draw picks a source, the source's next record is held out or tokenized and packed,
until there are at least `shuffle_block_sequences` windows (a block ends with the record that fills it, so that what
is left in the packer is shorter than one window). Its windows are permuted and handed out in batches, which may span
blocks.

Every batch carries the position that resumes after it: the start of its last block and how many of its sequences are
used. Resuming reads that block again. What reading alone does not repeat is decided once and journalled before it
takes effect: entries that were discovered, blocks cut short by a dry stream, digests of finished entries. A replay
takes these decisions from the journal instead, each at its draw or block, and refuses a journal that does not fit
what it reads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import (
    AnytimedError,
    Batch,
    Holdout,
    Journal,
    Json,
    Position,
    Record,
    Refused,
    Rejected,
    SourcePosition,
    Stream,
    Tokenizer,
)
from anytimed.data.holdout import HoldoutKeeper
from anytimed.data.mixture import Mixture
from anytimed.data.packer import Packer
from anytimed.data.position import Cursor, Ledger
from anytimed.data.shuffle import permutation

_REMEDY = (
    "Data that had been read was rewritten, settings that say how data is read were changed, or the journal belongs to "
    "another run: restore them, or start over with --fresh"
)

Quarantine = Callable[[str, Json, Rejected], None]
"""Told of a record that was passed over: source, place after it, why. A replay tells it again."""


@dataclass(frozen=True, slots=True)
class Dry:
    """No batch can be made for now. `reasons`: per source that is waited for, what is missing."""

    reasons: Mapping[str, str]


class Interrupted(Exception):
    """`Pipeline.interrupt` was called: nothing is read or decided any more."""


class _Undecided(Exception):
    """The journal cannot take a decision for now, so it did not take effect; it is taken again later."""


@dataclass(slots=True)
class _Block:
    """A block that was read. sequences: shape (k, sequence_length + 1), in the order of use; `used` of them are
    taken."""

    start: Position
    sequences: NDArray[np.int32]
    used: int
    following: Position
    read: Mapping[str, SourcePosition]
    holdout: Holdout

    @property
    def left(self) -> int:
        return len(self.sequences) - self.used


class Pipeline:
    """Batches of a mixture of streams. Call `restore` once, first; then `next_batch` and, to find more data, `poll`.

    sequence_length, holdout_max_tokens (over all sources), holdout_record_tokens (kept of one record): in tokens.
    shuffle_block_sequences: the fewest windows of a block. holdout_fraction: of the records, in [0, 1].
    Raises ConfigError on weights that do not fit the streams.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        weights: Mapping[str, float],
        tokenizer: Tokenizer,
        journal: Journal,
        *,
        seed: int,
        batch_size: int,
        sequence_length: int,
        shuffle_block_sequences: int,
        holdout_fraction: float,
        holdout_max_tokens: int,
        holdout_record_tokens: int,
        quarantine: Quarantine,
    ) -> None:
        assert streams.keys() == weights.keys(), (sorted(streams), sorted(weights))
        self._streams = {name: streams[name] for name in sorted(streams)}
        self._mixture = Mixture(weights, seed)
        self._tokenizer = tokenizer
        self._journal = journal
        self._seed = seed
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._block_sequences = shuffle_block_sequences
        self._holdout_fraction = holdout_fraction
        self._holdout_bounds = {name: int(holdout_max_tokens * self._mixture.share(name)) for name in self._streams}
        self._holdout_record_tokens = holdout_record_tokens
        self._quarantine = quarantine
        self._stop = threading.Event()
        self._ready: deque[_Block] = deque()
        self._finished: dict[str, dict[str, str]] = {}
        self._is_dry = False
        self._nothing_new = False
        self._undecided: str | None = None

    # --- before the first batch ---------------------------------------------------------------------------------------

    def restore(self, position: Position) -> None:
        """Stand at `position` (`Position()`: at the beginning). The streams must be new, with nothing adopted.

        Raises ConfigError when the mixture is another than the position's, Refused when the journal is, or when an
        entry that was read has changed. A source that does not answer is asked again when it is read.
        """
        if position.mixture:
            self._mixture.require(position.mixture)
        self._ledger = Ledger(self._journal, position)
        adopted: dict[str, list[Json]] = {name: [] for name in self._streams}
        finished: dict[str, dict[int, str]] = {name: {} for name in self._streams}
        for entry in self._ledger.effective:
            if entry["kind"] == "discovered":
                adopted[entry["source"]].extend(entry["entries"])
            elif entry["kind"] == "finished":
                for name, digests in entry["sources"].items():
                    finished[name].update({int(index): digest for index, digest in digests.items()})
        self._sources = {name: position.sources.get(name, SourcePosition()) for name in self._streams}
        self._cursors = {
            name: Cursor(stream, self._sources[name].place, adopted[name], finished[name])
            for name, stream in self._streams.items()
        }
        self._draw = position.draw
        self._block = position.block
        self._skip = position.index
        self._packer = Packer(self._sequence_length, position.remainder)
        self._keeper = HoldoutKeeper(
            self._holdout_fraction, self._holdout_bounds, self._holdout_record_tokens, position.holdout
        )
        self._start = self._here()
        self._windows: list[NDArray[np.int32]] = []
        self._filled, self._cut = 0, False

    # --- what the owner calls -----------------------------------------------------------------------------------------

    def poll(self) -> int:
        """Ask the sources for new data; journal and adopt it. The number of new entries; 0 during a replay.

        A source that does not answer is passed over (`Dry` tells of it), and so is what the journal cannot take for now
        (`status` tells of it). Raises Refused where read data has changed.
        """
        if self._replaying or self._ends:  # the end of the block stands in the journal before anything else does
            return 0
        found, undecided = 0, None
        for name, cursor in self._cursors.items():
            if entries := cursor.discover():
                try:
                    self._decide({"kind": "discovered", "draw": self._draw, "source": name, "entries": entries})
                except _Undecided as error:
                    # A full disk, say: what was not decided is found again by the next poll.
                    undecided = f"source {name}: {len(entries)} new entries wait: {error}"
                    continue
                cursor.adopt(entries)
                found += len(entries)
        self._undecided = undecided
        self._nothing_new = self._is_dry and not found and undecided is None
        return found

    def next_batch(self) -> Batch | Dry:
        """The next batch, or why there is none for now; then `poll` and try again.

        If `poll` has just found nothing, a block whose sequences complete a batch is cut short. Raises Refused on
        data that was rewritten, Interrupted after `interrupt`.
        """
        while sum(block.left for block in self._ready) < self._batch_size:
            try:
                dry = self._read_block()
            except _Undecided as error:
                self._undecided = str(error)
                return Dry({"journal": str(error)})
            if dry:
                self._is_dry = True
                return dry
        return self._take_batch()

    def interrupt(self) -> None:
        """Make the reading stop at the next record and decide nothing more. From any thread."""
        self._stop.set()

    def status(self) -> Json:
        """Per source: entries adopted, bytes not yet read, records; whether decisions are being replayed; `undecided`:
        why a decision cannot take effect for now, or None."""
        sources: dict[str, Any] = {}
        for name, cursor in self._cursors.items():
            at = self._sources[name]
            sources[name] = {
                "entries": cursor.entries,
                "lag_bytes": cursor.lag_bytes(),
                "records": at.records,
                "held_out": at.held_out,
                "rejected": at.rejected,
                "tokens": at.tokens,
                "unavailable": cursor.undiscovered,
            }
        return {
            "sources": sources,
            "draw": self._draw,
            "block": self._block,
            "replaying": self._replaying,
            "undecided": self._undecided,
        }

    # --- one block ----------------------------------------------------------------------------------------------------

    def _read_block(self) -> Dry | None:
        """Read on until the block is complete; None then. Goes on where a dry stream made it stop."""
        while not self._ends:
            if self._stop.is_set():
                raise Interrupted
            if self._replay_before_draw():
                self._cut = True
                break
            name = self._mixture.pick(self._draw)
            taken = self._cursors[name].take()
            if taken is None:
                if self._cut_short(name):
                    self._cut = True
                    break
                return self._dry(name)
            self._is_dry = self._nothing_new = False
            self._consume(name, *taken)
        self._end_block()
        return None

    def _consume(self, name: str, record: Record | Rejected, place: Json, finished: Mapping[int, str]) -> None:
        at = self._sources[name]
        if isinstance(record, Rejected):
            self._quarantine(name, place, record)
            at = replace(at, place=place, rejected=at.rejected + 1)
        else:
            tokens = np.append(self._tokenizer.encode(record.text), self._tokenizer.end_token).astype(np.int32)
            if self._keeper.chooses(record.digest):
                self._keeper.keep(name, record.digest, tokens)
                at = replace(at, place=place, held_out=at.held_out + 1)
            else:
                self._packer.add(tokens)
                at = replace(at, place=place, records=at.records + 1, tokens=at.tokens + tokens.size)
        self._sources[name] = at
        if finished:
            self._finished.setdefault(name, {}).update({str(index): digest for index, digest in finished.items()})
        self._draw += 1
        if self._packer.windows:
            windows = self._packer.take()
            self._windows.append(windows)
            self._filled += len(windows)

    def _cut_short(self, name: str) -> bool:
        """Whether the block ends here because source `name` has nothing more: only if that completes a batch."""
        if self._replaying:
            if self._cursors[name].exhausted:
                raise Refused(
                    f"source {name!r} ended at draw {self._draw} (block {self._block}), where it gave a record when "
                    f"the run was first here: {self._cursors[name].reason}. {_REMEDY}"
                )
            return False
        # A source that does not answer is waited for: a replay beyond the journal's end would otherwise cut where the
        # run did not, and train other steps than those that an export may already hold.
        if not (self._nothing_new and self._cursors[name].exhausted):
            return False
        if sum(block.left for block in self._ready) + self._filled < self._batch_size:
            return False
        self._decide({"kind": "block_cut", "block": self._block, "draw": self._draw, "sequences": self._filled})
        return True

    def _end_block(self) -> None:
        finished = {name: self._finished[name] for name in sorted(self._finished)}
        entry = {"kind": "finished", "block": self._block, "sources": finished}
        head = self._ledger.head
        if head is not None and (finished or (head["kind"], head.get("block")) == ("finished", self._block)):
            if head != entry:
                raise self._mismatch(f"block {self._block} finished {finished or 'no entry'}")
            self._ledger.replayed()
        elif finished:
            self._decide(entry)
        if self._skip and self._skip >= self._filled:
            raise Refused(
                f"block {self._block} has {self._filled} sequences, the commit had used {self._skip} and more were "
                f"left. {_REMEDY}"
            )
        sequences = np.concatenate(self._windows)[permutation(self._seed, self._block, self._filled)]
        start, used = self._start, self._skip
        self._block += 1
        self._skip = 0
        self._finished, self._windows, self._filled, self._cut = {}, [], 0, False
        self._start = self._here()
        self._ready.append(_Block(start, sequences, used, self._start, self._start.sources, self._start.holdout))

    def _take_batch(self) -> Batch:
        rows: list[NDArray[np.int32]] = []
        missing = self._batch_size
        while missing:
            block = self._ready[0]
            count = min(missing, block.left)
            rows.append(block.sequences[block.used : block.used + count])
            block.used += count
            missing -= count
            if not block.left:
                self._ready.popleft()
        position = replace(block.start, index=block.used) if block.left else block.following
        return Batch(np.concatenate(rows), position, block.holdout, block.read)

    # --- decisions ----------------------------------------------------------------------------------------------------

    @property
    def _replaying(self) -> bool:
        return self._ledger.head is not None or self._skip > 0

    @property
    def _ends(self) -> bool:
        """The block has all its sequences; where it still stands so later, the journal could not take its end."""
        return self._cut or self._filled >= self._block_sequences

    def _decide(self, entry: Json) -> None:
        if self._stop.is_set():
            raise Interrupted
        try:
            self._ledger.append(entry)
        except Refused:
            raise
        except AnytimedError as error:
            raise _Undecided(str(error)) from error
        self._undecided = None

    def _replay_before_draw(self) -> bool:
        """Apply the journalled decisions that were taken before the next draw; whether the block was cut here."""
        while (head := self._ledger.head) is not None:
            match head:
                case {"kind": "discovered", "draw": self._draw, "source": str(name), "entries": list(entries)} if (
                    name in self._cursors
                ):
                    self._ledger.replayed()
                    self._cursors[name].adopt(entries)
                case {"kind": "block_cut", "block": self._block, "draw": self._draw, "sequences": self._filled}:
                    self._ledger.replayed()
                    return True
                case {"kind": "discovered" | "block_cut", "draw": int(draw)} if draw > self._draw:
                    return False
                case {"kind": "finished", "block": int(block)} if block >= self._block:
                    return False
                case _:
                    raise self._mismatch(f"draw {self._draw} of block {self._block} with {self._filled} sequences")
        return False

    def _mismatch(self, found: str) -> Refused:
        journalled = {key: value for key, value in (self._ledger.head or {}).items() if key != "entries"}
        return Refused(
            f"journal: data entry {self._ledger.length} is {journalled}, reading the data again came to {found}. "
            f"{_REMEDY}"
        )

    def _dry(self, name: str) -> Dry:
        told = {other: cursor.undiscovered for other, cursor in self._cursors.items() if cursor.undiscovered}
        return Dry({**told, name: "; ".join(filter(None, (self._cursors[name].reason, told.get(name))))})

    def _here(self) -> Position:
        return Position(
            journal_length=self._ledger.length,
            journal_digest=self._ledger.digest,
            mixture=self._mixture.version,
            draw=self._draw,
            block=self._block,
            sources=dict(self._sources),
            remainder=self._packer.remainder(),
            holdout=self._keeper.current(),
        )
