"""What crosses the rooms of anytimed, and what an adapter implements.

In the order of a batch's life: a `Stream` yields `Record`s, each with the place after it; the data room turns them
into a `Batch` that carries the `Position` to resume after it and the `Holdout` in force; the learner answers a step
with a `StepReport`; a `Snapshot` takes tensors out of the learner as `HostTensor`s, which storage writes as a commit
or an export. Last come the Protocols: `Stream`, `Tokenizer`, `Model`, `Sink`, `Journal`.

Everything here is plain data: no torch, no I/O. Errors that a person should read carry their exit code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    import torch

Json = dict[str, Any]
"""A JSON object: str keys, values of JSON's own types."""

Tokens = NDArray[np.int32]
"""Token ids, shape (n,) unless stated."""


# --- errors -----------------------------------------------------------------------------------------------------------


class AnytimedError(Exception):
    """A failure that a person should read; its text says what was found, where, what was expected, what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(AnytimedError, ValueError):
    """Bad usage or configuration, one that does not fit the commit included."""

    exit_code = 2


class Refused(AnytimedError):
    """Going on would lose or mix something: another writer, rewritten data, no commit that verifies."""

    exit_code = 3


class StreamUnavailable(AnytimedError):
    """A source cannot be read for now; the daemon waits and tries again."""


class CorruptError(AnytimedError):
    """Stored bytes are not what their manifest says."""


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """One document of a source. `digest` is the SHA-256 (hex) of its content, and chooses the hold-out.

    tokens: of a source that is tokenized already, shape (n,), uint16, uint32 or int32, trained on as they are (its own
    end token included); `text` is empty then. The array is the pipeline's: nobody writes to it any more."""

    text: str
    digest: str
    tokens: NDArray[np.integer[Any]] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        same = (self.text, self.digest) == (other.text, other.digest)
        if self.tokens is None or other.tokens is None:
            return same and self.tokens is other.tokens
        return same and np.array_equal(self.tokens, other.tokens)

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not be read: kept for a person in quarantine, and passed over."""

    reason: str
    digest: str


@dataclass(frozen=True, slots=True)
class Finished:
    """An entry of the source was read to its end; `digest` is a SHA-256 (hex) over its content."""

    entry: int
    digest: str


@dataclass(frozen=True, slots=True)
class SourceRule:
    """How a source takes part in a mixture.

    weight: share of the draws, relative to the others. when_dry: what a draw does that finds nothing to read: wait for
    data, fall to the `others`, or `replay` the source from its beginning until it has been read `passes` times, and
    wait then. The source is read no further while more than `rejected_records` of its records and more than the
    fraction `rejected_fraction` of them could not be read. `reads`: adapter and settings, without credentials, by which
    it can be opened; `identity`: SHA-256 (hex) of those that make the source the one it is."""

    weight: float
    when_dry: Literal["wait", "others", "replay"] = "wait"
    passes: int = 1
    rejected_fraction: float = 0.01
    rejected_records: int = 1000
    reads: Json = field(default_factory=dict)
    identity: str = ""

    def to_json(self) -> Json:
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def from_json(value: Json) -> SourceRule:
        return SourceRule(**value)


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """Where one source stands. `place` is the adapter's own JSON (None before the first record); then come counts, the
    number of the pass (from 1), whether it is left out for want of data, and its rule's `identity`."""

    place: Json | None = None
    records: int = 0
    held_out: int = 0
    rejected: int = 0
    tokens: int = 0
    pass_number: int = 1
    dry: bool = False
    identity: str = ""

    def to_json(self) -> Json:
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def from_json(value: Json) -> SourcePosition:
        return SourcePosition(**value)


@dataclass(frozen=True, slots=True)
class HeldRecord:
    """A record kept for evaluation, never trained on. tokens: shape (n,), end token included."""

    source: str
    digest: str
    tokens: Tokens


@dataclass(frozen=True)
class Holdout:
    """The hold-out in force, oldest record first, and by source the weights of the mixture in force, by which its
    losses are weighed. Losses are compared only at equal `digest`."""

    records: tuple[HeldRecord, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over sources, record digests, kept lengths and weights; the version of this hold-out."""
        told = [[r.source, r.digest, int(r.tokens.size)] for r in self.records]
        weighed = [told, dict(sorted(self.weights.items()))]
        return hashlib.sha256(json.dumps(weighed, separators=(",", ":")).encode()).hexdigest()

    def to_arrays(self) -> tuple[Tokens, list[Json]]:
        """All tokens in one flat array, shape (sum n,), and what says where each record starts."""
        flat = np.concatenate([r.tokens for r in self.records]) if self.records else np.zeros(0, np.int32)
        return flat.astype(np.int32), [
            {"source": r.source, "digest": r.digest, "length": int(r.tokens.size)} for r in self.records
        ]

    @staticmethod
    def from_arrays(flat: Tokens, index: Sequence[Json], weights: Mapping[str, float]) -> Holdout:
        """The inverse of `to_arrays`, given the weights."""
        records, at = [], 0
        for item in index:
            records.append(HeldRecord(item["source"], item["digest"], flat[at : at + item["length"]].copy()))
            at += item["length"]
        if at != flat.size:
            raise CorruptError(f"hold-out: {flat.size} tokens stored, {at} described; the commit is damaged")
        return Holdout(tuple(records), dict(weights))


@dataclass(frozen=True, slots=True)
class Position:
    """Where the stream resumes: the start of a shuffle block and the number of its sequences already used.

    All but `index` and `batches` describe the block's start: what of the journal was in effect, the mixture (by source;
    empty before the first), the next draw, the place of every source that was ever in it, the tokens left over in the
    packer with runs of [source, tokens], and the hold-out before the block was read. Resuming re-reads one block.
    `batches` counts those handed out before."""

    journal_length: int = 0
    journal_digest: str = ""
    mixture: Mapping[str, SourceRule] = field(default_factory=dict)
    draw: int = 0
    block: int = 0
    index: int = 0
    batches: int = 0
    sources: Mapping[str, SourcePosition] = field(default_factory=dict)
    remainder: Tokens = field(default_factory=lambda: np.zeros(0, np.int32))
    runs: tuple[tuple[str, int], ...] = ()
    holdout: Holdout = field(default_factory=Holdout)
    _of_block: Json = field(default_factory=dict, init=False, compare=False, repr=False)

    def within(self, index: int, batches: int) -> Position:
        """Further on in the same block."""
        here = object.__new__(Position)  # `replace` takes four times as long, for every batch
        for name in Position.__slots__:
            object.__setattr__(here, name, getattr(self, name))
        object.__setattr__(here, "index", index)
        object.__setattr__(here, "batches", batches)
        return here

    def to_json(self) -> Json:
        """Everything but the hold-out's tokens, which travel as a tensor; the hold-out is named by its digest. What is
        the same for a whole block is made once; nobody may change it."""
        if not self._of_block:
            self._of_block.update(self._told())
        return {**self._of_block, "index": self.index, "batches": self.batches}

    def _told(self) -> Json:
        return {
            "journal_length": self.journal_length,
            "journal_digest": self.journal_digest,
            "mixture": mixture_to_json(self.mixture),
            "draw": self.draw,
            "block": self.block,
            "sources": {name: s.to_json() for name, s in sorted(self.sources.items())},
            "runs": [list(run) for run in self.runs],
            "remainder": base64.b64encode(self.remainder.astype("<i4").tobytes()).decode(),
            "holdout": self.holdout.digest,
        }

    @staticmethod
    def from_json(value: Json, holdout: Holdout) -> Position:
        """The inverse of `to_json`, given the hold-out that the digest names. Raises CorruptError on another one."""
        if value["holdout"] != holdout.digest:
            raise CorruptError(f"hold-out: the position names {value['holdout']}, stored is {holdout.digest}")
        remainder = np.frombuffer(base64.b64decode(value["remainder"]), "<i4").astype(np.int32)
        return Position(
            journal_length=value["journal_length"],
            journal_digest=value["journal_digest"],
            mixture=mixture_from_json(value["mixture"]),
            draw=value["draw"],
            block=value["block"],
            index=value["index"],
            batches=value["batches"],
            runs=tuple((str(name), int(count)) for name, count in value["runs"]),
            sources={name: SourcePosition.from_json(s) for name, s in value["sources"].items()},
            remainder=remainder,
            holdout=holdout,
        )


def mixture_to_json(mixture: Mapping[str, SourceRule]) -> Json:
    """Rules by source, in the order of their names."""
    return {name: mixture[name].to_json() for name in sorted(mixture)}


def mixture_from_json(value: Json) -> dict[str, SourceRule]:
    """The inverse of `mixture_to_json`."""
    return {name: SourceRule.from_json(rule) for name, rule in value.items()}


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens: (batch, sequence_length + 1), inputs and the targets one to the right. labels: (batch, sequence_length),
    for each target the index in `sources` of where it came from.

    `position` resumes after this batch. `holdout` is the one in force while it is trained on, and `mixture` the rules
    by which it was drawn. `read` says per source how far reading has come at the end of this batch's block: the span of
    everything the model can have seen."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int16]
    sources: tuple[str, ...]
    position: Position
    holdout: Holdout
    mixture: Mapping[str, SourceRule]
    read: Mapping[str, SourcePosition]

    @property
    def number(self) -> int:
        """Of this batch in the stream, from 1."""
        return self.position.batches


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, on the host. `batch`: the number of its batch. `skipped`: loss or gradient was not finite and
    nothing was changed. `by_source`: the batch's targets, and the sum of their losses in nats before it was trained
    on."""

    step: int
    batch: int
    loss: float
    grad_norm: float
    skipped: bool
    by_source: Mapping[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceLosses:
    """Mean losses of one source's held-out records, in nats per token."""

    tokens: int
    loss_x: float
    loss_y: float
    loss_z: float

    def to_json(self) -> Json:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss in nats per token on one hold-out, at the averaged weights x, the gradient point y, the fast iterate z: the
    means of the sources, weighed as the mixture in force weighs them (those without a held-out record left out)."""

    step: int
    holdout: str
    tokens: int
    loss_x: float
    loss_y: float
    loss_z: float
    by_source: dict[str, SourceLosses] = field(default_factory=dict)

    def to_json(self) -> Json:
        by_source = {name: losses.to_json() for name, losses in self.by_source.items()}
        return {**{name: getattr(self, name) for name in self.__slots__}, "by_source": by_source}

    @staticmethod
    def from_json(value: Json) -> Evaluation:
        by_source = {name: SourceLosses(**losses) for name, losses in value["by_source"].items()}
        return Evaluation(**{**value, "by_source": by_source})


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor's bytes in host memory, C order, little endian. `dtype` as safetensors names it: F32, BF16, I64, U8."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Tensors by name and the JSON that goes with them, all of one step boundary.

    `wait` returns once the device has delivered every byte; nobody may read `tensors` before it.
    """

    step: int
    tensors: Mapping[str, HostTensor]
    state: Json
    wait: Callable[[], None] = lambda: None


# --- what an adapter implements ---------------------------------------------------------------------------------------


class Stream(Protocol):
    """One source of records in a deterministic order.

    The stream keeps a list of entries (spans of files, spans of a partition's offsets). It grows only by `adopt`, in
    the order of the journal; `discover` merely says what could be added, so that a resume sees the same list at the
    same draw. An entry is any JSON value, and short: there may be millions.
    """

    def discover(self) -> list[Any]:
        """New entries beyond the adopted ones, in the order to adopt them. Raises StreamUnavailable, or Refused where
        data already read has changed."""

    def adopt(self, entries: Sequence[Any]) -> None:
        """Append entries, as `discover` gave them, to the list."""

    def read(self, place: Json | None) -> Iterator[tuple[Record | Rejected | Finished, Json]]:
        """Items after `place`, each with the place after it; ends when every adopted entry has been read. After more is
        adopted, a new call with the last place goes on. Raises StreamUnavailable, Refused on rewritten data."""

    def verify(self, finished: Mapping[int, str]) -> None:
        """Check entries read to their end (index to digest) against what is there now; cheap where nothing was touched.
        Raises Refused naming the entry that was rewritten."""

    def lag(self, place: Json | None) -> int:
        """Bytes adopted and not yet read, after `place`; another unit where the stream has an attribute `lag_unit` that
        names it."""


@runtime_checkable
class Preparing(Protocol):
    """A stream that can begin, beside whatever else happens, what `verify` and `discover` would wait for: at a start,
    first of all, and before a poll."""

    def prepare(self, place: Json | None, done: Callable[[], None]) -> None:
        """Begin, standing at `place`. `done` is called once, from any thread, when the next `verify` or `discover` need
        not wait; it may be called at once."""

    def forget(self) -> None:
        """The next `discover` is to say what is there when it is called, whatever has been prepared."""


@runtime_checkable
class Acknowledging(Protocol):
    """A stream whose source keeps records until it is told that they are no longer needed: brokers, the inbox."""

    def acknowledge(self, place: Json) -> None:
        """No commit that is kept resumes before `place`. Called between two reads, again after a restart, and never
        with an earlier place. Raises StreamUnavailable; the next commit tries again."""


@runtime_checkable
class Closable(Protocol):
    """A stream that holds a connection or threads."""

    def close(self) -> None:
        """Let go of them; nothing is read any more."""


@runtime_checkable
class KeepsFiles(Protocol):
    """A stream that keeps files of its own in the run directory."""

    def use_folder(self, folder: Path) -> None:
        """Called once, before anything else, with a folder that is the source's own; it need not exist yet."""


@runtime_checkable
class Describing(Protocol):
    """A stream that can tell a person where a place is."""

    def describe(self, place: Json | None) -> str:
        """What is read next after `place` (None: at the beginning), in a line: a file and a byte, a partition and an
        offset, without credentials; "" where every adopted entry has been read."""


class Tokenizer(Protocol):
    vocab_size: int
    end_token: int

    def encode(self, text: str) -> Tokens:
        """Token ids of one document, shape (n,), without the end token."""

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> list[str]:
        """Write the files with which Hugging Face's AutoTokenizer loads the same tokenizer; their names."""


Role = Literal["matrix", "embedding", "head", "norm", "bias", "other"]
"""What a parameter is for. `matrix` is a hidden matrix (rows = output neurons) and goes to the spectral rule."""


class Model(Protocol):
    """A model family with its settings."""

    hf_model_type: ClassVar[str]
    """`model_type` of the Hugging Face configurations that this family reads and writes."""

    def build(self, vocab_size: int, *, device: str = "cpu") -> torch.nn.Module:
        """The module with freshly drawn weights (torch's global generator), or on `meta` without any."""

    def losses(
        self, module: Callable[..., torch.Tensor], tokens: torch.Tensor, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Next-token losses in nats and float32, (batch, length). tokens: (batch, length + 1), int64; -100 marks
        targets that do not count, their loss is 0. documents: (batch, length), int32, ascending in a row: a token
        attends to tokens of its own document only, and positions begin anew in each; None: one document a row."""

    def roles(self, module: torch.nn.Module) -> Mapping[str, Role]:
        """The role of every trainable parameter, by the name that `named_parameters()` gives it."""

    def row_splits(self, module: torch.nn.Module) -> Mapping[str, Sequence[int]]:
        """The rows of every projection of a fused matrix (q, k, v in one), by parameter name, so that each is
        orthogonalised for itself; empty where nothing is fused."""

    def hf_config(self, vocab_size: int, end_token: int) -> Json:
        """The Hugging Face `config.json` with which the exported tensors load."""

    @classmethod
    def from_hf(cls, config: Json) -> Model:
        """The model that a Hugging Face `config.json` describes; ConfigError naming what this family does not do."""

    def initial_weights(
        self, tensors: Mapping[str, torch.Tensor], hf_config: Json, vocab_size: int
    ) -> Mapping[str, torch.Tensor]:
        """The module's tensors from an exported or Hugging Face checkpoint; ConfigError naming what does not fit."""

    def activation_bytes(
        self, batch: int, length: int, vocab_size: int, element_bytes: int, documents_on: str | None = None
    ) -> int:
        """An estimate of what one forward and backward pass keeps, in bytes. documents_on: the type of the device where
        `losses` is given documents; None: it is given none."""


@dataclass(frozen=True, slots=True)
class SinkRun:
    """The run whose figures a sink gets. term: a counter that every start raises. config: the whole configuration,
    without credentials; `config_digest` its SHA-256 (hex). folder: the sink's own, in the run directory; it need not
    exist yet.

    step, tokens: where the records that follow go on. A start after a kill replays steps: what was told before of steps
    beyond `step` is superseded by what follows."""

    run_id: str
    term: int
    config: Json
    config_digest: str
    step: int
    tokens: int
    folder: Path


class Sink(Protocol):
    """A tracker that the run's figures are sent to. It is built at the start, without any I/O, and used in a thread of
    its own. Whatever it raises there is told in the status, and tried again with a new one, from the record that failed
    on; the training never waits for it."""

    def check(self) -> str:
        """For `anytimed check`, which opens nothing: a line that says where the figures would go. Raises AnytimedError
        where it can be told already that they would not."""

    def open(self, run: SinkRun) -> None:
        """Called once, before the first record. May take as long as it has to, and must not ask a person."""

    def write(self, record: Json) -> None:
        """One line of `metrics.jsonl`, in order; it may come again where something failed. Nobody may change it. `kind`
        is "step", "evaluation", "event", or one that is not known yet, to be passed over; `time` is in seconds since
        1970. A step's or evaluation's record whose `step` is not beyond the last one's supersedes what was told from
        there on; so does an event whose `what` is "rollback", beyond its `to_step`."""

    def flush(self) -> None:
        """There is nothing more to write for now."""

    def close(self) -> None:
        """No call follows. Called after a failure too."""


class Journal(Protocol):
    """Append-only, fsynced decisions. Entries of one scope are numbered and chained by digest."""

    def append(self, scope: str, entry: Json) -> None:
        """Durable when this returns. Thread-safe."""

    def entries(self, scope: str, start: int = 0, stop: int | None = None) -> list[Json]:
        """Entries of the scope, oldest first: those from index `start` (from 0) up to `stop`, all that follow if
        None."""

    def length(self, scope: str) -> int:
        """How many entries the scope has."""

    def digest(self, scope: str, length: int | None = None) -> str:
        """The scope's `chain` after all entries, or after the first `length`; "" for none. IndexError beyond the
        end."""


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def chain(digest: str, entry: Json) -> str:
    """The digest of a journal scope after `entry`, given the one before it ("" for none): SHA-256, hex."""
    line = _canonical(entry)
    return hashlib.sha256(f"{digest}\n{line}".encode()).hexdigest()
