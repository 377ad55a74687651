"""Lower the size from which a parameter has a flat stack of its own, so that small tests have both kinds."""

from __future__ import annotations

import pytest

from anytimed.optim import stacks


@pytest.fixture(autouse=True)
def small_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "PACKED_ELEMENTS", 256)
