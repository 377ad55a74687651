"""Which records are kept back for evaluation, and which of them are still kept.

A record is held out when its own digest falls below the fraction: equal content always falls on the same side,
whatever the source or the moment, and no record is ever moved from one side to the other. Every source has a bound in
tokens. Over it, the older half of that source's records is thinned, the largest digest first: a rule without state or
chance, so that a replay thins the same records, and one under which old data fades while the newest record always
stays.
"""

from __future__ import annotations

from collections.abc import Mapping

from anytimed.contracts import HeldRecord, Holdout, Tokens


class HoldoutKeeper:
    """The hold-out as it grows.

    fraction: of the records, in [0, 1]. source_tokens: bound per source, in tokens. record_tokens: kept of one record.
    """

    def __init__(self, fraction: float, source_tokens: Mapping[str, int], record_tokens: int, start: Holdout) -> None:
        self._threshold = int(fraction * 2.0**64)
        self._bounds = source_tokens
        self._record_tokens = record_tokens
        self._arrivals = 0
        # per source, oldest first; the arrival number restores the order over all sources
        self._kept: dict[str, list[tuple[int, HeldRecord]]] = {name: [] for name in source_tokens}
        self._sizes = dict.fromkeys(source_tokens, 0)
        self._current: Holdout | None = start
        for record in start.records:
            self._append(record)

    def chooses(self, digest: str) -> bool:
        """Whether the record with this SHA-256 (hex) is held out."""
        return int(digest[:16], 16) < self._threshold

    def keep(self, source: str, digest: str, tokens: Tokens) -> None:
        """Take a chosen record in and thin its source. tokens: shape (n,), end token included.

        A record that the source already has in here is not counted twice, and one without a target (a single token)
        has nothing to evaluate: both are left out.
        """
        kept = tokens[: self._record_tokens]
        if kept.size < 2 or any(held.digest == digest for _, held in self._kept[source]):
            return
        self._append(HeldRecord(source, digest, kept.copy()))
        self._thin(source)
        self._current = None

    def current(self) -> Holdout:
        """The hold-out now, oldest record first."""
        if self._current is None:
            arrived = sorted((item for held in self._kept.values() for item in held), key=lambda item: item[0])
            self._current = Holdout(tuple(record for _, record in arrived))
        return self._current

    def _append(self, record: HeldRecord) -> None:
        self._kept[record.source].append((self._arrivals, record))
        self._sizes[record.source] += record.tokens.size
        self._arrivals += 1

    def _thin(self, source: str) -> None:
        held = self._kept[source]
        while self._sizes[source] > self._bounds[source] and len(held) > 1:
            oldest = range(len(held) // 2)
            drop = max(oldest, key=lambda i: held[i][1].digest)
            self._sizes[source] -= held.pop(drop)[1].tokens.size
