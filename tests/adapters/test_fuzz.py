"""Damaged shards and hostile records: no crash, bounded memory, each accounted for. FUZZ=full: 1e3 and 1e5 of them."""

from __future__ import annotations

import json
import os

import pytest

from tests.adapters import fuzz
from tests.adapters.formats import FORMATS
from tests.security.measured import MIB, measured

SHARDS, RECORDS = (1000, 100_000) if os.environ.get("FUZZ") == "full" else (120, 3000)


@pytest.mark.timeout(1800)
def test_damaged_shards_and_hostile_records_are_accounted_for_in_bounded_memory() -> None:
    cost = measured(fuzz.run, SHARDS, RECORDS, timeout_s=1700)
    told = json.loads(cost.said)
    print(json.dumps(told, indent=1), f"grew by {cost.grew_bytes / MIB:.0f} MiB")
    assert told.keys() == FORMATS.keys()
    assert all(counts.get("shards", 0) + counts.get("empty", 0) for counts in told.values())
    assert cost.grew_bytes < 512 * MIB
