"""Texts to tokens, batch by batch, in the order of the texts: in the calling thread, in two beside it, or in workers.

`tokenizing` chooses. Without workers a batch is encoded when its result is asked for; where the tokenizer encodes
batches without holding the interpreter, threads begin at once, while the caller reads on. With workers it goes to them
(`worker_pool`), and the result only waits for what is not done yet. All give the same tokens and raise the same errors,
so that nothing but speed depends on the choice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

from anytimed.contracts import Tokenizer, Tokens
from anytimed.data.encoding import PIECE_CHARACTERS, BatchTokenizer, Closed, Rebuild, encode_all, pieces
from anytimed.data.worker_pool import WorkerPool

_THREADS = 2
"""That encode beside the reading."""


class Pending(Protocol):
    """A batch that was submitted."""

    def result(self) -> list[Tokens]:
        """The tokens of each text, int32, shape (n,), without the end token, in the order of the texts. Waits.

        Raises what encoding the first text that cannot be encoded raised (from a worker: the nearest class of
        anytimed's or Python's own), with a note of which text it was; WorkerDied where a text ended its worker again
        and again; Closed after `close`; Refused where a worker's tokenizer came out as another one."""


class Tokenizing(Protocol):
    """`submit` and `result` for one thread at a time, `close` for any."""

    ahead: int
    """Characters worth having submitted before the first result is asked for; more of them only wait."""

    def submit(self, texts: Sequence[str]) -> Pending:
        """Take a batch of texts; returns at once where work happens elsewhere. The texts must not change any more.
        Raises Closed."""

    def close(self) -> None:
        """End; who waits for a result is told at once."""


def tokenizing(tokenizer: Tokenizer, workers: int, rebuild: Rebuild) -> Tokenizing:
    """workers: the processes that encode; 0: this one does, beside the reading where the tokenizer has `encode_batch`.
    rebuild: how a worker makes `tokenizer` again."""
    if workers:
        return WorkerPool(tokenizer, workers, rebuild)
    return _Beside(tokenizer) if isinstance(tokenizer, BatchTokenizer) else _Here(tokenizer)


class _Here:
    """The form without workers."""

    ahead = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.closed = False

    def submit(self, texts: Sequence[str]) -> Pending:
        if self.closed:
            raise Closed("the tokenizing is closed")
        return _Later(self, texts)

    def close(self) -> None:
        self.closed = True


class _Later:
    """A batch that is encoded when asked for, once."""

    def __init__(self, here: _Here, texts: Sequence[str]) -> None:
        self._here = here
        self._texts = texts
        self._encoded: list[Tokens] = []

    def result(self) -> list[Tokens]:
        # a second call goes on behind what there is: all of it, or what a failure left
        done = len(self._encoded)
        for _, piece in pieces(self._texts[done:]):
            if self._here.closed:
                raise Closed("the tokenizing is closed")
            encoded, error = encode_all(self._here.tokenizer, piece)
            self._encoded += encoded
            if error is not None:
                error.add_note(f"text {len(self._encoded)} of a batch of {len(self._texts)}, counted from 0")
                raise error
        return self._encoded


class _Beside:
    """The form without workers, by threads: for tokenizers that let others have the interpreter meanwhile. Two, so that
    one encodes while the other hands out what it has encoded, which takes the interpreter. Long texts take turns: each
    takes a hundred times its size while it is encoded."""

    ahead = 2 * PIECE_CHARACTERS

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.changed = threading.Condition()
        self.here = _Here(tokenizer)
        self.long = threading.Lock()
        self._batches: SimpleQueue[_Begun | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, texts: Sequence[str]) -> Pending:
        begun = _Begun(self, self.here.submit(texts), is_long=sum(map(len, texts)) > 2 * PIECE_CHARACTERS)
        while len(self._threads) < _THREADS:  # daemons: who leaves does not wait for a long text
            self._threads.append(threading.Thread(target=self._run, name="anytimed-tokenize", daemon=True))
            self._threads[-1].start()
        self._batches.put(begun)
        return begun

    def close(self) -> None:
        self.here.close()
        for _ in self._threads:
            self._batches.put(None)
        with self.changed:
            self.changed.notify_all()

    def _run(self) -> None:
        while (begun := self._batches.get()) is not None:
            begun.encode()


class _Begun:
    """A batch that a thread encodes, or has encoded."""

    def __init__(self, beside: _Beside, batch: Pending, *, is_long: bool) -> None:
        self._beside, self._batch = beside, batch
        self._turn = beside.long if is_long else contextlib.nullcontext()
        self._outcome: list[Tokens] | BaseException | None = None

    def encode(self) -> None:
        outcome: list[Tokens] | BaseException
        try:
            with self._turn:
                outcome = self._batch.result()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            outcome = error
        with self._beside.changed:
            self._outcome = outcome
            self._beside.changed.notify_all()

    def result(self) -> list[Tokens]:
        with self._beside.changed:
            self._beside.changed.wait_for(lambda: self._outcome is not None or self._beside.here.closed)
            outcome = self._outcome
        if outcome is None:
            raise Closed("the tokenizing is closed")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
