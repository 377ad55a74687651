"""A published prefix at each kind of store that is written differently: local folder, fsspec's memory, an object
store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.storage.object_store import ObjectStore


@pytest.fixture(params=["local", "memory", "objects"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "published")
        return
    yield f"{request.param}://{tmp_path.name}/published"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
    ObjectStore.objects.clear()
    ObjectStore.calls.clear()


@pytest.fixture
def local_url(tmp_path: Path) -> str:
    return str(tmp_path / "published")
