"""Records to batches: the deterministic core, synchronous and without a clock.

A block is read record by record: a draw picks a source, the source's next record is held out or packed, until there
are at least `shuffle_block_sequences` windows (a block ends with the record that fills it, so that what is left in the
packer is shorter than one window). Its windows are permuted and handed out in batches, which may span blocks.

Every batch carries the position that resumes after it: the start of its last block and how many of its sequences are
used. Resuming reads that block again. What reading alone does not repeat is decided once and journalled before it
takes effect: entries that were discovered, sources left out or read again for want of data, blocks cut short by a dry
stream, digests of finished entries, and the mixture, which changes at the start of a block. A replay takes these
decisions from the journal instead, each at its draw or block, and refuses a journal that does not fit what it reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from anytimed.contracts import (
    AnytimedError,
    Batch,
    Journal,
    Json,
    Position,
    Refused,
    Rejected,
    SourceRule,
    Stream,
    Tokenizer,
    mixture_from_json,
)
from anytimed.data.blocks import Block, Blocks
from anytimed.data.cursor import Cursor, Interrupted, Taken
from anytimed.data.fold import collector_off
from anytimed.data.fold_file import FoldFile
from anytimed.data.holdout import HoldoutKeeper
from anytimed.data.mixture import Mixture
from anytimed.data.packer import Packer
from anytimed.data.position import Ledger
from anytimed.data.shuffle import permutation
from anytimed.data.sources import OpenStream, Sources, Unanswered, Undecided, require_same_sources, same_mixture
from anytimed.data.tokenizing import Tokenizing

__all__ = ["Dry", "Interrupted", "Pipeline", "Quarantine"]

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


class Pipeline:
    """Batches of a mixture of streams. Call `restore` once, first; then `next_batch` and, to find more data, `poll`.

    rules: of the mixture that is to be in force. sequence_length, holdout_max_tokens (over all sources),
    holdout_record_tokens (kept of one record): in tokens. shuffle_block_sequences: the fewest windows of a block.
    holdout_fraction: of the records, in [0, 1]. fold: a file that caches what the journal adds up to.
    Raises ConfigError on rules that cannot be drawn by.
    """

    def __init__(
        self,
        rules: Mapping[str, SourceRule],
        open_stream: OpenStream,
        tokenizer: Tokenizer,
        tokenizing: Tokenizing,
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
        fold: Path | None = None,
    ) -> None:
        self._wanted = Mixture(rules, seed)
        self._open_stream = open_stream
        self._end = tokenizer.end_token
        self._vocab_size = tokenizer.vocab_size
        self._tokenizing = tokenizing
        self._journal = journal
        self._seed = seed
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._block_sequences = shuffle_block_sequences
        self._holdout = (holdout_fraction, holdout_max_tokens, holdout_record_tokens)
        self._quarantine = quarantine
        self._fold = fold
        self._stop = threading.Event()
        self._labels: dict[str, int] = {}
        self._is_dry = False
        self._nothing_new = False
        self._undecided: str | None = None

    # --- before the first batch ---------------------------------------------------------------------------------------

    def restore(self, position: Position) -> None:
        """Stand at `position` (`Position()`: at the beginning). Where the rules are others than those last in force,
        they take effect at the first block that begins after the position.

        Raises ConfigError when a source reads something else than before, Refused when the journal is another's, or
        when an entry that was read has changed. A source that does not answer is asked again when it is read.
        """
        self._ledger = Ledger(self._journal, position)
        self._folds = FoldFile(self._fold, self._journal, self._ledger.voids)
        self._sources = Sources(position, self._open_stream, self._cursor)
        require_same_sources(self._wanted.rules, position.sources)
        self._draw = position.draw
        self._block = position.block
        self._skip = position.index
        expected = (self._block_sequences + 2) * self._sequence_length
        self._packer = Packer(self._sequence_length, expected, vocab_size=self._vocab_size)
        at = 0
        for name, count in position.runs:
            self._packer.add(position.remainder[at : at + count], self._label(name))
            at += count
        self._keeper = HoldoutKeeper(*self._holdout, position.holdout)
        self._blocks = Blocks(self._batch_size, position.batches, self._packer.give_back)
        self._finished: dict[str, dict[str, str]] = {}
        self._cut = False
        in_force = Mixture(position.mixture, self._seed) if position.mixture else None
        mixtures = [entry["sources"] for entry in self._ledger.waiting("mixture")]
        last = [in_force.to_json() if in_force else {}, *mixtures][-1]
        self._changes = not same_mixture(last, self._wanted.to_json())
        if in_force is not None:
            self._sources.put_in_force(in_force)
        with collector_off():
            self._sources.recall(self._folds.restore(position.journal_length))
        self._start = self._here() if in_force is not None else position
        self._begun = position.index > 0  # the mixture of a block that was begun does not change

    # --- what the owner calls -----------------------------------------------------------------------------------------

    def prepare(self, done: Callable[[], None]) -> None:
        """Begin what a poll would wait for; `done` is called, from any thread, when `poll(prepared=True)` will not."""
        self._sources.prepare(done)

    def poll(self, *, prepared: bool = False) -> int:
        """Ask the sources for new data; journal and adopt it. How many new entries there are, and sources that can be
        drawn from again; 0 during a replay. prepared: what was there when `prepare` was called will do.

        A source that does not answer is passed over (`Dry` tells of it), and so is what the journal cannot take for now
        (`status` tells of it). Raises Refused where read data has changed.
        """
        if not self._begun:
            try:
                self._begin_block()
            except Undecided as error:
                self._undecided = str(error)
                return 0
        if self._replaying or self._ends:
            return 0  # the end of the block stands in the journal before anything else does
        if not prepared:
            self._sources.forget()
        found, undecided = self._sources.discover(self._decide_here)
        self._undecided = undecided
        self._nothing_new = self._is_dry and not found and undecided is None
        return found

    def next_batch(self) -> Batch | Dry:
        """The next batch, or why there is none for now; then `poll` and try again.

        If `poll` has just found nothing, a source that has nothing is left out or read again where its rule says so,
        and a block whose sequences complete a batch is cut short. Raises Refused on data that was rewritten,
        Interrupted after `interrupt`.
        """
        while not self._blocks.full:
            try:
                dry = self._read_block()
            except Undecided as error:
                self._undecided = str(error)
                return Dry({"journal": str(error)})
            if dry:
                self._is_dry = True
                return dry
        return self._blocks.take(tuple(self._labels))

    @property
    def stands(self) -> bool:
        """A poll has found nothing, and what could be done about that is done: only another poll helps."""
        return self._nothing_new

    @property
    def has_batch(self) -> bool:
        """The next batch needs no reading."""
        return self._blocks.full

    def acknowledge(self, position: Json, *, tell: bool = True) -> None:
        """No commit resumes before this position, as JSON: tell the sources (where `tell`) that records before it are
        not needed any more, but those that are to be read again from their beginning."""
        self._folds.keep(position["journal_length"])
        if tell:
            self._sources.acknowledge(position)

    def close(self) -> None:
        """Let the sources go, and everything that was read ahead; by the thread that reads, last."""
        self._blocks.clear()
        self._packer.clear()
        self._sources.close()

    def interrupt(self) -> None:
        """Make the reading stop at the next record and decide nothing more. From any thread."""
        self._stop.set()
        self._tokenizing.close()

    def status(self) -> Json:
        """Per source of the mixture: entries adopted, bytes not yet read, records, its rule; whether decisions are
        being replayed; `undecided`: why a decision cannot take effect for now, or None."""
        return {
            "sources": self._sources.status(),
            "draw": self._draw,
            "block": self._block,
            "replaying": self._replaying,
            "undecided": self._undecided,
        }

    # --- one block ----------------------------------------------------------------------------------------------------

    def _read_block(self) -> Dry | None:
        """Read on until the block is complete; None then. Goes on where a dry stream made it stop."""
        if not self._begun:
            self._begin_block()
        while not self._ends:
            if self._stop.is_set():
                raise Interrupted
            try:
                if self._ledger.head is not None and self._replay_before_draw():
                    self._cut = True
                    break
            except Unanswered as source:
                return self._dry(str(source))
            name = self._sources.mixture.pick(self._draw)
            taken = self._sources.take(name)
            if taken is not None:
                self._is_dry = self._nothing_new = False
                self._consume(name, taken)
                continue
            match self._without(name):
                case "wait":
                    return self._dry(name)
                case "cut":
                    self._cut = True
        self._end_block()
        return None

    def _begin_block(self) -> None:
        """Put in force what was decided, or is to be, for the block that begins."""
        while (head := self._ledger.head) is not None and head["kind"] == "mixture" and not self._changes:
            if head["block"] != self._block:
                break
            self._ledger.replayed()
            self._put_in_force(Mixture(mixture_from_json(head["sources"]), self._seed))
        if self._changes:
            self._decide({"kind": "mixture", "block": self._block, "sources": self._wanted.to_json()})
            self._changes = False
            self._put_in_force(self._wanted)
        self._begun = True

    def _put_in_force(self, mixture: Mixture) -> None:
        self._sources.put_in_force(mixture)
        self._keeper.weigh(mixture.weights)
        self._start = self._here()

    def _consume(self, name: str, taken: Taken) -> None:
        tally, item = self._sources.tally(name), taken.item
        tally.place = taken.place
        if isinstance(item, Rejected):
            self._quarantine(name, taken.place, item)
            tally.rejected += 1
        else:
            tokens, whole = taken.tokens, taken.whole
            assert tokens is not None, "a record that was read has tokens"
            if self._keeper.chooses(item.digest):
                self._keeper.keep(name, item.digest, tokens if whole else np.append(tokens, self._end))
                tally.held_out += 1
            else:
                self._packer.add(tokens, self._label(name), None if whole else self._end)
                tally.records += 1
                tally.tokens += tokens.size + (not whole)
        if taken.finished:
            self._finished.setdefault(name, {}).update({str(index): d for index, d in taken.finished.items()})
        self._draw += 1

    def _label(self, name: str) -> int:
        return self._labels.setdefault(name, len(self._labels))

    def _without(self, name: str) -> Literal["wait", "cut", "go on"]:
        """Decide about a source that has nothing, by its rule: wait for it, cut the block here, or go on with another
        source or from its beginning."""
        cursor = self._sources.cursor(name)
        if self._replaying:
            if cursor.exhausted:
                raise Refused(
                    f"source {name!r} ended at draw {self._draw} (block {self._block}), where it gave a record when "
                    f"the run was first here: {cursor.reason}. {_REMEDY}"
                )
            return "wait"
        if not self._nothing_new:
            return "wait"
        if self._sources.without(name, self._decide_here):
            return "go on"
        # A source that does not answer is waited for: a replay beyond the journal's end would otherwise cut where the
        # run did not, and train other steps than those that an export may already hold.
        if not cursor.exhausted or not self._blocks.completes(self._packer.windows):
            return "wait"
        self._decide({"kind": "block_cut", "block": self._block, "draw": self._draw, "sequences": self._packer.windows})
        return "cut"

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
        filled = self._packer.windows
        if self._skip and self._skip >= filled:
            raise Refused(
                f"block {self._block} has {filled} sequences, the commit had used {self._skip} and more were left. "
                f"{_REMEDY}"
            )
        windows = self._packer.take()
        order = permutation(self._seed, self._block, filled)
        start, used = self._start, self._skip
        self._block += 1
        self._skip = 0
        self._finished, self._cut, self._begun = {}, False, False
        self._start = self._here()
        self._blocks.add(
            Block(
                start,
                windows,
                order,
                used,
                self._start,
                self._sources.mixture.rules,
                self._start.sources,
                self._start.holdout,
            )
        )

    # --- decisions ----------------------------------------------------------------------------------------------------

    @property
    def _replaying(self) -> bool:
        return self._ledger.head is not None or self._skip > 0

    @property
    def _ends(self) -> bool:
        """The block has all its sequences; where it still stands so later, the journal could not take its end."""
        return self._cut or self._packer.windows >= self._block_sequences

    def _decide(self, entry: Json) -> None:
        if self._stop.is_set():
            raise Interrupted
        try:
            if entry["kind"] == "mixture":
                self._folds.forget(self._ledger.length)
                self._ledger.drop()
            self._ledger.append(entry)
        except Refused:
            raise
        except AnytimedError as error:
            raise Undecided(str(error)) from error
        self._undecided = None

    def _decide_here(self, entry: Json) -> None:
        """Of a source, before the next draw."""
        self._decide({**entry, "draw": self._draw})

    def _replay_before_draw(self) -> bool:
        """Apply the journalled decisions that were taken before the next draw; whether the block was cut here."""
        while (head := self._ledger.head) is not None:
            match head:
                case {"kind": "block_cut", "block": self._block, "draw": self._draw, "sequences": int(sequences)} if (
                    sequences == self._packer.windows
                ):
                    self._ledger.replayed()
                    return True
                case {"draw": self._draw, "source": str(name)} if name in self._sources.mixture.rules:
                    try:
                        self._sources.decided(head)
                    except ValueError as error:
                        raise self._mismatch(str(error)) from None
                    self._ledger.replayed()
                case {"kind": "finished" | "mixture", "block": int(block)} if block >= self._block:
                    return False
                case {"draw": int(draw)} if draw > self._draw:
                    return False
                case _:
                    windows = self._packer.windows
                    raise self._mismatch(f"draw {self._draw} of block {self._block} with {windows} sequences")
        return False

    def _mismatch(self, found: str) -> Refused:
        journalled = {key: value for key, value in (self._ledger.head or {}).items() if key != "entries"}
        return Refused(
            f"journal: data entry {self._ledger.length} is {journalled}, reading the data again came to {found}. "
            f"{_REMEDY}"
        )

    def _dry(self, name: str) -> Dry:
        told = {other: cursor.undiscovered for other, cursor in self._sources.active() if cursor.undiscovered}
        return Dry({**told, name: "; ".join(filter(None, (self._sources.cursor(name).reason, told.get(name))))})

    def _cursor(self, stream: Stream, place: Json | None) -> Cursor:
        return Cursor(stream, place, self._tokenizing, vocab_size=self._vocab_size, stop=self._stop)

    def _here(self) -> Position:
        remainder, runs = self._packer.remainder()
        names = tuple(self._labels)
        return Position(
            journal_length=self._ledger.length,
            journal_digest=self._ledger.digest,
            mixture=self._sources.mixture.rules,
            draw=self._draw,
            block=self._block,
            sources=self._sources.positions(),
            remainder=remainder,
            runs=tuple((names[label], count) for label, count in runs),
            holdout=self._keeper.current(),
        )
