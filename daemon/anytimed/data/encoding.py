"""What is common to encoding here and in a worker: how texts are cut into pieces, encoded, and a tokenizer rebuilt.

In order: `pieces` bounds what is encoded at once; `encode_all` encodes it, as one batch where the tokenizer can;
`Rebuild` is what a worker needs to make the daemon's tokenizer again, and `identity` is how both see that it is the
same one. A worker imports this module: nothing here is heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from anytimed import registry
from anytimed.config import AdapterTable
from anytimed.contracts import AnytimedError, Json, Tokenizer, Tokens

PIECE_CHARACTERS = 320 << 10
"""Encoded at once, a longer text apart: `tokenizers` takes some 130 bytes a character while it encodes."""
OVERHEAD_CHARACTERS = 64
"""What a text costs beyond its characters, in characters; an empty one is not free."""

_PROBE = (
    "The 3 quick-brown foxes' \t“déjà vu”\r\n\n  naïve 北京 مرحبا Привет 🙂👩\u200d👧 e\u0301 "
    "def f(x):\n    return x[0] != 1e-9 <|endoftext|>"
)


class Closed(Exception):
    """The tokenizing was closed: no result comes any more."""


class WorkerDied(AnytimedError):
    """A text ended the worker that encoded it, again and again. `index`: where it is among the texts submitted."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


@runtime_checkable
class BatchTokenizer(Protocol):
    """A tokenizer that encodes many texts faster than one after the other, or without holding the GIL. Two threads may
    call it at once."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """As `encode` of each, in their order."""


def size(text: str) -> int:
    """What encoding the text costs, in characters."""
    return len(text) + OVERHEAD_CHARACTERS


def pieces(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Consecutive runs of the texts of at most PIECE_CHARACTERS, or of one longer text; each with the index of its
    first."""
    first, filled = 0, 0
    for index, text in enumerate(texts):
        if filled and filled + size(text) > PIECE_CHARACTERS:
            yield first, texts[first:index]
            first, filled = index, 0
        filled += size(text)
    if filled:
        yield first, texts[first:]


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[Tokens], Exception | None]:
    """The tokens of the texts up to the first that cannot be encoded, and what encoding that one raised."""
    try:
        return _encoded(tokenizer, texts)
    finally:
        if sum(map(len, texts)) > PIECE_CHARACTERS:
            return_memory()


def return_memory() -> None:
    """What a long text took while it was encoded goes back to the system, where the C library would keep most of it:
    a gigabyte after a text of 16 MB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[Tokens], Exception | None]:
    if isinstance(tokenizer, BatchTokenizer) and len(texts) > 1:
        try:
            batch = tokenizer.encode_batch(texts)
        except Exception:  # noqa: BLE001 - one after the other they tell which text it was
            pass
        else:
            if len(batch) != len(texts):
                raise AnytimedError(
                    f"tokenizer: encode_batch of {type(tokenizer).__name__} gave {len(batch)} arrays for {len(texts)} "
                    "texts. Expected one for each: the adapter has to be corrected"
                )
            return batch, None
    encoded: list[Tokens] = []
    for text in texts:
        try:
            encoded.append(tokenizer.encode(text))
        except Exception as error:  # noqa: BLE001 - the caller raises it
            return encoded, error
    return encoded, None


@dataclass(frozen=True, slots=True)
class Rebuild:
    """What `registry.build` was given when the tokenizer was made. allowed: the classes that configurations of this
    process may name (`registry.allowed`)."""

    table: AdapterTable
    file: str
    base: Path
    allowed: tuple[str, ...] = ()

    def build(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError, as at the start of the daemon."""
        registry.allow(self.allowed)
        tokenizer: Tokenizer = registry.build("anytimed.tokenizers", self.table, self.file, ("tokenizer",), self.base)
        return tokenizer

    def to_json(self) -> Json:
        return {
            "table": self.table.model_dump(mode="json"),
            "file": self.file,
            "base": str(self.base.absolute()),
            "allowed": list(self.allowed),
        }

    @staticmethod
    def from_json(value: Json) -> Rebuild:
        table = AdapterTable.model_validate(value["table"])
        return Rebuild(table, value["file"], Path(value["base"]), tuple(value["allowed"]))


def identity(tokenizer: Tokenizer) -> list[Any]:
    """What tells a tokenizer from another one, as JSON: its numbers, the `digest` of its files where the adapter has
    that, and the tokens of a text with a bit of everything."""
    tokens, error = encode_all(tokenizer, [_PROBE])
    probed = repr(error) if error else tokens[0].tolist()
    return [tokenizer.vocab_size, tokenizer.end_token, getattr(tokenizer, "digest", None), probed]
