"""Digests of finished entries, a million of them in 33 MB: index to SHA-256, as a dict of texts would take 200 MB."""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

_SPARSE = 1 << 20
_BLOCK = 1 << 14


class Digests(Mapping[int, str]):
    """Index (from 0) to digest, ascending. Digests that are no SHA-256 in lower-case hex, and indices far beyond the
    others, are kept as they are.

    To go through all of it use `items()`; looking up each index alone is ten times as slow.
    """

    def __init__(self) -> None:
        self._table: NDArray[np.uint8] = np.empty((0, 32), np.uint8)
        self._known: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._others: dict[int, str] = {}
        self._count = 0

    def update(self, digests: Mapping[int, str]) -> None:
        """Add or replace."""
        if not digests:
            return
        rows, highest = _rows(digests.values()), max(digests)
        if rows is None or min(digests) < 0 or highest >= 4 * (self._count + len(digests)) + _SPARSE:
            for index, digest in digests.items():
                self._forget(index)
                self._others[index] = digest
            return
        if self._others:
            for index in digests.keys() & self._others.keys():
                del self._others[index]
        self._reserve(highest + 1)
        at = np.fromiter(digests, np.int64, len(digests))
        self._table[at] = rows
        self._count += len(at) - int(np.count_nonzero(self._known[at]))
        self._known[at] = True

    def items(self) -> ItemsView[int, str]:
        return _Items(self)

    @property
    def nbytes(self) -> int:
        return self._table.nbytes + self._known.nbytes

    def pairs(self) -> Iterator[tuple[int, str]]:
        """All of it, ascending but for what is kept as it is, which comes last."""
        for start in range(0, len(self._known), _BLOCK):
            at = np.flatnonzero(self._known[start : start + _BLOCK]) + start
            text = self._table[at].tobytes().hex()
            yield from zip(at.tolist(), (text[i : i + 64] for i in range(0, len(text), 64)), strict=True)
        yield from self._others.items()

    def __getitem__(self, index: int) -> str:
        if 0 <= index < len(self._known) and self._known[index]:
            return bytes(self._table[index]).hex()
        return self._others[index]

    def __iter__(self) -> Iterator[int]:
        yield from np.flatnonzero(self._known).tolist()
        yield from self._others

    def __len__(self) -> int:
        return self._count + len(self._others)

    def _forget(self, index: int) -> None:
        if 0 <= index < len(self._known) and self._known[index]:
            self._known[index] = False
            self._count -= 1

    def _reserve(self, length: int) -> None:
        missing = length - len(self._known)
        if missing > 0:
            missing = max(missing, len(self._known) // 4, 1024)
            self._table = np.concatenate([self._table, np.empty((missing, 32), np.uint8)])
            self._known = np.concatenate([self._known, np.zeros(missing, np.bool_)])


def _rows(digests: Collection[str]) -> NDArray[np.uint8] | None:
    """Shape (n, 32): the bytes of n digests; None unless all are SHA-256 in lower-case hex."""
    joined = "".join(digests)
    if any(len(digest) != 64 for digest in digests):
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
