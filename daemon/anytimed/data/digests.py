"""Digests of finished entries: a million of them in 33 MB, where a dict of texts takes 200.

What is added waits, as it came, until something is read; then it is put in its place in a table, index by index.
"""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_SPARSE = 1 << 20
_BLOCK = 1 << 14

_Block = tuple[NDArray[np.int64], NDArray[np.uint8]]
"""Indices, shape (n,), and their digests, shape (n, 32)."""


class Digests(Mapping[int, str]):
    """Index (from 0) to SHA-256 in lower-case hex, ascending. Other texts, and indices far beyond the rest, are kept
    as they are, and come last.

    To go through all of it use `items()`; looking up each index alone is ten times as slow.
    """

    def __init__(self) -> None:
        self._waiting: list[_Block] = []
        self._table: NDArray[np.uint8] = np.empty((0, 32), np.uint8)
        self._known: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._others: dict[int, str] = {}
        self._count = 0

    def update(self, digests: Mapping[int, str]) -> None:
        """Add or replace."""
        self.put(list(digests), list(digests.values()))

    def put(self, indices: Sequence[int] | NDArray[np.int64], digests: str | Sequence[str]) -> None:
        """Add or replace; the last of an index counts. digests: of each, or all in one text, 64 characters each."""
        if not len(indices):
            return
        at, rows = np.asarray(indices), _rows(digests)
        if rows is not None and at.dtype.kind == "i" and at.min() >= 0:
            if len(rows) != len(at):
                raise ValueError(f"{len(at)} indices, {len(rows)} digests")
            self._waiting.append((at, rows))
        else:
            self._settle()
            texts = [digests[i : i + 64] for i in range(0, len(digests), 64)] if isinstance(digests, str) else digests
            self._keep({int(index): text for index, text in zip(indices, texts, strict=True)})

    @property
    def nbytes(self) -> int:
        self._settle()
        return self._table.nbytes + self._known.nbytes

    def items(self) -> ItemsView[int, str]:
        return _Items(self)

    def pairs(self) -> Iterator[tuple[int, str]]:
        """What `items` goes through."""
        self._settle()
        for start in range(0, len(self._known), _BLOCK):
            at = np.flatnonzero(self._known[start : start + _BLOCK]) + start
            text = self._table[at].tobytes().hex()
            yield from zip(at.tolist(), (text[i : i + 64] for i in range(0, len(text), 64)), strict=True)
        yield from self._others.items()

    def __getitem__(self, index: int) -> str:
        self._settle()
        if 0 <= index < len(self._known) and self._known[index]:
            return bytes(self._table[index]).hex()
        return self._others[index]

    def __iter__(self) -> Iterator[int]:
        self._settle()
        yield from np.flatnonzero(self._known).tolist()
        yield from self._others

    def __len__(self) -> int:
        self._settle()
        return self._count + len(self._others)

    # --- within ---

    def _settle(self) -> None:
        """Put what waits in its place."""
        blocks, self._waiting = self._waiting, []
        if not blocks:
            return
        total = self._count + sum(len(at) for at, _ in blocks)
        near = [(at, rows) for at, rows in blocks if at.max() < 4 * total + _SPARSE]
        if near:
            self._reserve(max(int(at.max()) for at, _ in near) + 1)
        for at, rows in blocks:
            if at.max() >= 4 * total + _SPARSE:
                self._keep({int(i): bytes(row).hex() for i, row in zip(at, rows, strict=True)})
                continue
            for index in set(at.tolist()) & self._others.keys() if self._others else ():
                del self._others[index]
            self._table[at] = rows
            self._known[at] = True
        self._count = int(np.count_nonzero(self._known))

    def _keep(self, digests: Mapping[int, str]) -> None:
        """As they are, outside the table."""
        for index in digests:
            if 0 <= index < len(self._known) and self._known[index]:
                self._known[index] = False
                self._count -= 1
        self._others.update(digests)

    def _reserve(self, length: int) -> None:
        missing = length - len(self._known)
        if missing > 0:
            missing = max(missing, len(self._known) // 4, 64)
            self._table = np.concatenate([self._table, np.empty((missing, 32), np.uint8)])
            self._known = np.concatenate([self._known, np.zeros(missing, np.bool_)])


def _rows(digests: str | Collection[str]) -> NDArray[np.uint8] | None:
    """Shape (n, 32): the bytes of n digests; None unless all are SHA-256 in lower-case hex."""
    if isinstance(digests, str):
        joined = digests
    elif all(len(digest) == 64 for digest in digests):
        joined = "".join(digests)
    else:
        return None
    try:
        data = bytes.fromhex(joined)
    except ValueError:
        return None
    return np.frombuffer(data, np.uint8).reshape(-1, 32) if data.hex() == joined else None


class _Items(ItemsView[int, str]):
    _mapping: Digests

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._mapping.pairs()
