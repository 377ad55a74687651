"""Texts to tokens, batch by batch, in the order of the texts: in the calling thread or in worker processes.

`tokenizing` chooses. Without workers a batch is encoded when its result is asked for. With workers it goes to them at
once (`worker_pool`), and the result only waits for what is not done yet. Both give the same tokens and raise the same
errors, so that nothing but speed depends on the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from anytimed.contracts import Tokenizer, Tokens
from anytimed.data.encoding import Closed, Rebuild, encode_all, pieces
from anytimed.data.worker_pool import WorkerPool


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
    """workers: the processes that encode; 0: the calling thread does (and, with its `encode_batch`, the tokenizer's
    own threads). rebuild: how a worker makes `tokenizer` again."""
    return WorkerPool(tokenizer, workers, rebuild) if workers else _Here(tokenizer)


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
