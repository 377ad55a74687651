"""In which order bytes and names are made durable: what a power cut would show, and no kill can."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from anytimed.storage.commits import Commits
from anytimed.storage.durable import digest_of, write_durably
from anytimed.storage.journal import Journal
from anytimed.storage.pull import pull
from anytimed.storage.store import Store
from tests.storage import faults
from tests.storage.material import Site, acquired, content, snapshot


def commit(folder: Path) -> tuple[Path, Callable[[], object]]:
    commits = Commits(acquired(folder / "run"))
    return folder / "run/commits/000001-0000000005", lambda: commits.write(snapshot(5), extra_files={"a": b"1"})


def export(folder: Path) -> tuple[Path, Callable[[], object]]:
    site = Site(folder, str(folder / "published"))
    return site.run.spool / "00001-000001-0000000005", lambda: site.spool.build(content(5))


def pulled(folder: Path) -> tuple[Path, Callable[[], object]]:
    site = Site(folder, str(folder / "published"))
    item = site.publish(5)
    return folder / "to/versions" / item.id, lambda: pull(site.url, folder / "to")


def pointer(folder: Path) -> tuple[Path, Callable[[], object]]:
    (folder / "p").mkdir()
    store = Store(str(folder / "p"))
    return folder / "p/latest.json", lambda: store.replace("latest.json", b"{}")


def owner(folder: Path) -> tuple[Path, Callable[[], object]]:
    (folder / "run").mkdir(mode=0o700)
    return folder / "run/OWNER", lambda: acquired(folder / "run")


def plain(folder: Path) -> tuple[Path, Callable[[], object]]:
    return folder / "f", lambda: write_durably(folder / "f", b"data")


@pytest.mark.parametrize("case", [commit, export, pulled, pointer, owner, plain], ids=lambda case: case.__name__)
def test_bytes_before_the_name_and_the_name_before_the_answer(
    tmp_path: Path, case: Callable[[Path], tuple[Path, Callable[[], object]]]
) -> None:
    goal, action = case(tmp_path)
    with faults.recorded() as events:
        action()
    faults.check_order(events, goal)


def test_the_manifest_is_written_when_all_it_names_is_durable(tmp_path: Path) -> None:
    for case, manifest in ((commit, "MANIFEST.json"), (export, "manifest.json"), (pulled, "manifest.json")):
        goal, action = case(tmp_path / case.__name__)
        with faults.recorded() as events:
            action()
        source = next(event[1] for event in events if event[2] == goal)
        written = events.index(("write", source / manifest, None))
        for path in goal.iterdir():
            if path.name not in (manifest, "manifest.sha256"):
                assert events.index(("fsync", source / path.name, None)) < written, path.name


def test_current_is_flipped_after_the_version_is_durable(tmp_path: Path) -> None:
    goal, action = pulled(tmp_path)
    with faults.recorded() as events:
        action()
    durable = events.index(("fsync", goal.parent, None), events.index(("rename", _source(events, goal), goal)))
    flipped = events.index(("rename", tmp_path / "to/.tmp-current", tmp_path / "to/current"))
    assert durable < flipped < len(events) - 1 - events[::-1].index(("fsync", tmp_path / "to", None))


def test_an_append_is_fsynced_before_it_returns(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    with faults.recorded() as events:
        journal.append("s", {})
    assert events == [("write", path, None), ("fsync", path, None)]


def test_a_local_create_is_durable(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with faults.recorded() as events:
        assert store.create("m", b"1")
    calls = [(call, path.name[:6]) for call, path, _ in events]
    assert calls == [("write", ".tmp-m"), ("fsync", ".tmp-m"), ("fsync", tmp_path.name[:6])]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:7]))
    size, sha256 = write_durably(tmp_path / "f", b"0123456789" * 10)
    assert (tmp_path / "f").read_bytes() == b"0123456789" * 10
    made = Commits(acquired(tmp_path / "run")).write(snapshot(1))
    made.verify()
    assert digest_of(tmp_path / "f") == (size, sha256)


def _source(events: list[faults.Event], goal: Path) -> Path:
    return next(path for _, path, to in events if to == goal)
