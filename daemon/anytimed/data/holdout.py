"""Which records are kept back for evaluation, and which of them are still kept.

A record is held out when its own digest falls below the fraction: equal content always falls on the same side,
whatever the source or the moment, and no record is ever moved from one side to the other. Every source has a bound in
tokens. Over it, the older half of that source's records is thinned, the largest digest first: a rule without state or
chance, so that a replay thins the same records, and one under which old data fades while the newest record always
stays. A source that leaves the mixture takes its records along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import HeldRecord, Holdout


class HoldoutKeeper:
    """The hold-out as it grows.

    fraction: of the records, in [0, 1]. max_tokens: bound over all sources, which share it as they share the draws.
    record_tokens: kept of one record.
    """

    def __init__(self, fraction: float, max_tokens: int, record_tokens: int, start: Holdout) -> None:
        self._threshold = int(fraction * 2.0**64)
        self._max_tokens = max_tokens
        self._record_tokens = record_tokens
        self._arrivals = 0
        # per source, oldest first; the arrival number restores the order over all sources
        self._kept: dict[str, list[tuple[int, HeldRecord]]] = {}
        self._digests: dict[str, set[str]] = {}
        self._sizes: dict[str, int] = {}
        self._bounds: dict[str, int] = {}
        self._weights: Mapping[str, float] = start.weights
        self._current: Holdout | None = start
        for record in start.records:
            self._append(record)
        self._bound(start.weights)

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Another mixture is in force: `weights` by source, and nothing is kept of sources that are not in it."""
        for name in self._kept.keys() - weights.keys():
            del self._kept[name], self._sizes[name], self._digests[name]
        self._bound(weights)
        self._weights, self._current = dict(weights), None

    def chooses(self, digest: str) -> bool:
        """Whether the record with this SHA-256 (hex) is held out."""
        return int(digest[:16], 16) < self._threshold

    def keep(self, source: str, digest: str, tokens: NDArray[np.integer[Any]]) -> None:
        """Take a chosen record in and thin its source. tokens: shape (n,), end token included.

        A record that the source already has in here is not counted twice, and one without a target (a single token)
        has nothing to evaluate: both are left out.
        """
        kept = tokens[: self._record_tokens]
        if kept.size < 2 or digest in self._digests.get(source, ()):
            return
        self._append(HeldRecord(source, digest, kept.astype(np.int32)))
        self._thin(source)
        self._current = None

    def current(self) -> Holdout:
        """The hold-out now, oldest record first."""
        if self._current is None:
            arrived = sorted((item for held in self._kept.values() for item in held), key=lambda item: item[0])
            self._current = Holdout(tuple(record for _, record in arrived), self._weights)
        return self._current

    def _bound(self, weights: Mapping[str, float]) -> None:
        total = math.fsum(weights.values())
        self._bounds = {name: int(self._max_tokens * weight / total) for name, weight in weights.items()}
        for name in sorted(self._kept):
            self._thin(name)

    def _append(self, record: HeldRecord) -> None:
        self._kept.setdefault(record.source, []).append((self._arrivals, record))
        self._digests.setdefault(record.source, set()).add(record.digest)
        self._sizes[record.source] = self._sizes.get(record.source, 0) + record.tokens.size
        self._arrivals += 1

    def _thin(self, source: str) -> None:
        held = self._kept[source]
        while self._sizes[source] > self._bounds[source] and len(held) > 1:
            oldest = range(len(held) // 2)
            drop = max(oldest, key=lambda i: held[i][1].digest)
            record = held.pop(drop)[1]
            self._sizes[source] -= record.tokens.size
            self._digests[source].discard(record.digest)
