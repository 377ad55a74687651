"""Many ranges under way, handed out in order; a folder that fills up over any number of interruptions."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytimed.contracts import CorruptError
from anytimed.storage import ranges
from anytimed.storage.manifest import FileEntry, Manifest
from anytimed.storage.partial import claim
from anytimed.storage.ranges import Budget, Span, stream
from anytimed.storage.store import Answer, MissingKey, PassingError, Store, StoreError
from tests.storage import object_store  # noqa: F401 - registers objects://
from tests.storage.web_server import WebServer


class Interrupted(BaseException):
    """The pull ends here, as by SIGINT."""


class Interruptible(Store):
    """A local store that notes what it is asked for, fails where it is told to, and interrupts the pull."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.asked: list[tuple[str, int, int]] = []
        self.failing: set[int] = set()
        self.interrupted_after: int | None = None
        self._answered = 0

    def begin_range(self, key: str, start: int, end: int) -> Answer:
        number = len(self.asked)
        self.asked.append((key.rsplit("/", 1)[-1], start, end))
        answer = super().begin_range(key, start, end)

        def result() -> bytes:
            if self._answered == self.interrupted_after:
                raise Interrupted
            if number in self.failing:
                raise PassingError("slow down")
            self._answered += 1
            return answer.result()

        return Answer(result, answer.cancel)


def manifest_of(contents: list[bytes]) -> Manifest:
    files = [
        FileEntry(name=f"f{n}", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for n, data in enumerate(contents)
    ]
    return Manifest(
        id="00001-000001-0000000001",
        run_id="r",
        term=1,
        seq=1,
        step=1,
        tokens=1,
        created="",
        created_s=0.0,
        files=files,
        optimizer={},
        evaluation=None,
        config_digest="",
        parent=None,
        interventions=[],
        lineage={},
        flags=[],
    )


def published(folder: Path, contents: list[bytes]) -> Manifest:
    manifest = manifest_of(contents)
    target = folder / "checkpoints" / manifest.id
    target.mkdir(parents=True)
    for entry, data in zip(manifest.files, contents, strict=True):
        (target / entry.name).write_bytes(data)
    return manifest


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    range_bytes=st.integers(1, 12),
    under_way=st.integers(1, 5),
    interruptions=st.lists(st.integers(0, 12), max_size=6),
    failing=st.sets(st.integers(0, 30), max_size=6),
    torn=st.integers(0, 5),
)
def test_any_interruptions_end_with_the_right_bytes_and_fetch_each_once(
    sizes: list[int], range_bytes: int, under_way: int, interruptions: list[int], failing: set[int], torn: int
) -> None:
    contents = [bytes((7 * n + i) % 251 for i in range(size)) for n, size in enumerate(sizes)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(ranges, "RANGE_BYTES", range_bytes),
        mock.patch.object(ranges, "UNDER_WAY", under_way),
    ):
        manifest = published(Path(scratch) / "published", contents)
        versions = Path(scratch) / "versions"
        versions.mkdir()
        for after in [*interruptions, None]:
            store = Interruptible(Path(scratch) / "published")
            store.failing, store.interrupted_after = failing, after
            partial = claim(versions, manifest, b"manifest")
            had = {e.name: _size(partial.path / e.name) for e in manifest.files}
            assert partial.have_bytes == sum(had.values())
            told: list[tuple[int, int]] = []
            try:
                partial.fill(
                    store, Budget(sleep=lambda _: None), lambda done, total, told=told: told.append((done, total))
                )
            except Interrupted:
                assert after is not None
            have = {e.name: _size(partial.path / e.name) for e in manifest.files}
            _check_asked(store, failing, had, have, range_bytes * under_way)
            assert told[0] == (sum(had.values()), sum(sizes)) and told == sorted(told)
            for entry, content in zip(manifest.files, contents, strict=True):
                assert content.startswith(_content(partial.path / entry.name))  # a beginning, whatever happened
            if after is not None:  # a SIGKILL in the middle of a write leaves a part of a range
                growing = [n for n, size in have.items() if had[n] < size]
                if growing:
                    with (partial.path / growing[-1]).open("r+b") as file:
                        file.truncate(max(have[growing[-1]] - torn, had[growing[-1]]))
            path = partial.path
            partial.close()
        assert [_content(path / e.name) for e in manifest.files] == contents


def _check_asked(
    store: Interruptible, failing: set[int], had: dict[str, int], have: dict[str, int], ahead_bytes: int
) -> None:
    """Nothing that was there is asked for, nothing twice, and no more is lost than what was under way."""
    seen: set[tuple[str, int]] = set()
    lost = 0
    for number, (name, start, end) in enumerate(store.asked):
        assert start >= had[name]
        asked = {(name, at) for at in range(start, end)}
        assert not asked & seen
        if number in failing:
            continue  # it is asked for again
        seen |= asked
        lost += max(end - max(start, have[name]), 0)
    assert lost <= ahead_bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def test_a_slow_line_is_asked_for_one_range_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(tmp_path, [bytes(100)])
    key = "checkpoints/00001-000001-0000000001/f0"
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10)
    found = []
    for quick_s in (5.0, 0.0):
        monkeypatch.setattr(ranges, "QUICK_S", quick_s)
        store = Interruptible(tmp_path)
        found.append([len(store.asked) - n for n, _ in enumerate(stream(store, [Span(key, 0, 100)], Budget()))])
    assert found == [[1, 2, 3, 4, 5, 5, 4, 3, 2, 1], [1] * 10]


def test_one_budget_for_all_ranges(tmp_path: Path) -> None:
    published(tmp_path, [bytes(100)])
    store = Interruptible(tmp_path)
    store.failing = set(range(10**6))
    budget = Budget(3.0, sleep=lambda _: None)
    with pytest.raises(StoreError, match="slow down"):
        next(stream(store, [Span("checkpoints/00001-000001-0000000001/f0", 0, 100)], Budget(0.0)))
    assert len(store.asked) == 1  # nothing left: one attempt, no more
    tries = []

    def attempt() -> bytes:
        tries.append(1)
        if len(tries) < 4:
            raise PassingError("slow down")
        return b"x"

    assert budget.patiently(attempt) == b"x" and len(tries) == 4
    assert 0 < budget.left_s < 3.0


def test_an_object_store_without_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 10)
    url = f"objects://{tmp_path.name}"
    whole = Store(url)
    for name in ("a", "b"):
        whole.replace(name, bytes(range(95)))
    spans = [Span("a", 42, 95), Span("b", 0, 95)]
    found = list(stream(Store(url, {"no_ranges": True}), spans, Budget()))
    assert found == [("a", bytes(range(42, 95))), ("b", bytes(range(95)))]


# --- a real web server ------------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    with WebServer(tmp_path / "published") as server:
        yield server


def fetched(web: WebServer, contents: list[bytes], folder: Path, budget: Budget | None = None) -> list[bytes]:
    manifest = manifest_of(contents)
    folder.mkdir(exist_ok=True)
    partial = claim(folder, manifest, b"m")
    try:
        partial.fill(Store(web.url), budget or Budget(), None)
    finally:
        partial.close()
    return [(partial.path / e.name).read_bytes() for e in manifest.files]


CONTENTS = [bytes(range(256)) * 40, b"", b"small", bytes(reversed(range(256))) * 30]


@pytest.mark.parametrize("has_ranges", [True, False])
def test_with_and_without_ranges_from_any_beginning(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_ranges: bool
) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    web.ranges = has_ranges
    manifest = published(tmp_path / "published", CONTENTS)
    for cut in (0, 1, 999, 1000, 5000, len(CONTENTS[0])):
        versions = tmp_path / f"v{cut}"
        versions.mkdir()
        partial = claim(versions, manifest, b"m")
        (partial.path / "f0").write_bytes(CONTENTS[0][:cut])
        partial.close()
        web.asked.clear()
        assert fetched(web, CONTENTS, versions) == CONTENTS
        assert all(start >= cut for name, start, _ in web.asked if name == "f0")


def test_failures_that_pass_are_tried_again(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    published(tmp_path / "published", CONTENTS)
    web.failures = ["503", "cut", "500", "", "503", "503", "cut"]
    assert fetched(web, CONTENTS, tmp_path / "v", Budget(sleep=lambda _: None)) == CONTENTS
    assert not web.failures


def test_no_permission_is_an_answer(web: WebServer, tmp_path: Path) -> None:
    published(tmp_path / "published", CONTENTS)
    web.failures = ["403"] * 100
    with pytest.raises(StoreError, match="403"):
        fetched(web, CONTENTS, tmp_path / "v")
    assert len(web.failures) > 90


def test_no_more_is_read_than_was_asked_for(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    published(tmp_path / "published", CONTENTS)
    web.failures = ["more"] * 100
    assert fetched(web, CONTENTS, tmp_path / "v") == CONTENTS


@pytest.mark.parametrize("has_ranges", [True, False])
def test_an_object_that_is_shorter_or_gone(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_ranges: bool
) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    web.ranges = has_ranges
    manifest = published(tmp_path / "published", CONTENTS)
    path = tmp_path / "published" / "checkpoints" / manifest.id / "f0"
    for length in (0, 1, 1000, 1001, len(CONTENTS[0]) - 1):
        path.write_bytes(CONTENTS[0][:length])
        versions = tmp_path / f"v{length}"
        with pytest.raises(CorruptError, match=rf"f0: {length} bytes"):
            fetched(web, CONTENTS, versions)
        assert not list(versions.rglob("f0"))
    path.unlink()
    with pytest.raises(MissingKey):
        fetched(web, CONTENTS, tmp_path / "gone")
