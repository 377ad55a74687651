"""Which source draw `d` takes its record from.

Draw `d` hashes (seed, d) to a number u in [0, 1) and looks it up among the cumulated weights, sources in the order of
their names, those left out that have nothing to read for now. No generator is advanced: a draw depends on nothing that
was drawn before, so a resume starts at any draw, and another weight or source changes no draw before it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

from anytimed.contracts import ConfigError, Json, SourceRule, mixture_to_json

_UINT64 = (1 << 64) - 1


class Mixture:
    """Sources with their rules; raises ConfigError on weights that cannot be drawn from."""

    def __init__(self, rules: Mapping[str, SourceRule], seed: int) -> None:
        for name, rule in rules.items():
            if not math.isfinite(rule.weight) or rule.weight <= 0:
                raise ConfigError(f"source {name!r}: weight {rule.weight} found, expected a finite number above 0")
        if not rules:
            raise ConfigError("sources: none has a weight above 0, expected at least one")
        self.rules = {name: rules[name] for name in sorted(rules)}
        self._seed = seed & _UINT64
        self._left_out: frozenset[str] = frozenset()
        self._spread()

    @property
    def weights(self) -> dict[str, float]:
        """By source, as drawn among all of them."""
        return {name: float(rule.weight) for name, rule in self.rules.items()}

    def to_json(self) -> Json:
        """The rules, as the journal and a Position tell them."""
        return mixture_to_json(self.rules)

    def share(self, name: str) -> float:
        """The part of the draws that falls to the source while none is left out, in [0, 1]."""
        return self.rules[name].weight / math.fsum(rule.weight for rule in self.rules.values())

    def leave_out(self, names: frozenset[str]) -> None:
        """Draw among the other sources from now on; `names` is not all of them."""
        self._left_out = names
        self._spread()

    def pick(self, draw: int) -> str:
        """The source of draw `draw` (>= 0)."""
        if len(self._names) == 1:
            return self._names[0]
        word = hashlib.blake2b(struct.pack("<QQ", self._seed, draw), digest_size=8).digest()
        u = (int.from_bytes(word, "little") >> 11) * 2.0**-53
        # u < 1, but u * total may round up to the total: the last source takes it
        at = bisect_right(self._cumulated, u * self._cumulated[-1])
        return self._names[min(at, len(self._names) - 1)]

    def _spread(self) -> None:
        self._names = tuple(name for name in self.rules if name not in self._left_out)
        assert self._names, "at least one source is drawn from"
        # accumulate, not sum(): from Python 3.12 on sum() compensates, and the last bit would depend on the version
        self._cumulated = list(accumulate(float(self.rules[name].weight) for name in self._names))
