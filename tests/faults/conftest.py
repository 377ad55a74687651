"""The process that the faults of the state are injected into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.state_injection import Victim


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    process = Victim(tmp_path / "scratch")
    yield process
    process.close()
