"""Which source draw `d` takes its record from.

Draw `d` hashes (seed, d) to a number u in [0, 1) and looks it up among the cumulated weights, sources in the order of
their names. No generator is advanced: a draw depends on nothing that was drawn before, so a resume starts at any draw.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

from anytimed.contracts import ConfigError

_UINT64 = (1 << 64) - 1


class Mixture:
    """Sources with their weights; raises ConfigError on weights that cannot be drawn from."""

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        for name, weight in weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise ConfigError(f"source {name!r}: weight {weight} found, expected a finite number >= 0")
        self._weights = {name: float(weights[name]) for name in sorted(weights)}
        self._names = tuple(self._weights)
        # accumulate, not sum(): from Python 3.12 on sum() compensates, and the last bit would depend on the version
        self._cumulated = list(accumulate(self._weights.values()))
        if not self._cumulated or self._cumulated[-1] <= 0:
            raise ConfigError(f"sources: weights {self._weights} found, expected at least one above 0")
        self._seed = seed & _UINT64

    @property
    def version(self) -> str:
        """Names and weights as canonical JSON, as `Position.mixture` holds them: a mismatch can be told in full."""
        return json.dumps(self._weights, separators=(",", ":"), ensure_ascii=False)

    def share(self, name: str) -> float:
        """The part of the draws that falls to the source, in [0, 1]."""
        return self._weights[name] / self._cumulated[-1]

    def pick(self, draw: int) -> str:
        """The source of draw `draw` (>= 0)."""
        word = hashlib.blake2b(struct.pack("<QQ", self._seed, draw), digest_size=8).digest()
        u = (int.from_bytes(word, "little") >> 11) * 2.0**-53
        # u < 1, but u * total may round up to the total: the last source with a weight takes it
        at = bisect_right(self._cumulated, u * self._cumulated[-1])
        if at == len(self._names):
            at = self._cumulated.index(self._cumulated[-1])
        return self._names[at]

    def require(self, version: str) -> None:
        """Raise ConfigError unless `version`, as a position holds it, is this mixture; the text says what differs."""
        if version == self.version:
            return
        then: dict[str, float] = json.loads(version)
        told = [f"source {name!r} is new" for name in self._weights if name not in then]
        told += [f"source {name!r} is gone" for name in then if name not in self._weights]
        told += [
            f"source {name!r} has weight {self._weights[name]}, was {then[name]}"
            for name in self._weights
            if name in then and then[name] != self._weights[name]
        ]
        raise ConfigError(
            f"sources: the commit was made with another mixture: {'; '.join(told)}. "
            "Restore the sources and weights, or start over with --fresh"
        )
