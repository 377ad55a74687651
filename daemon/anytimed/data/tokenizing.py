"""placeholder until the workers branch is merged"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from anytimed.contracts import Tokenizer, Tokens


class Pending(Protocol):
    def result(self) -> list[Tokens]: ...


class Tokenizing(Protocol):
    def submit(self, texts: Sequence[str]) -> Pending: ...

    def close(self) -> None: ...


class _Done:
    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts

    def result(self) -> list[Tokens]:
        return [self._tokenizer.encode(text) for text in self._texts]


class InThread:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def submit(self, texts: Sequence[str]) -> Pending:
        return _Done(self._tokenizer, texts)

    def close(self) -> None: ...
