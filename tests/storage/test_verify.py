"""`verify`: every byte that is not what was written is found and named, at every kind of place; nothing else is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from anytimed.storage.commits import Commits
from anytimed.storage.journal import Journal
from anytimed.storage.journal_lines import check_lines
from anytimed.storage.store import Store
from anytimed.storage.verify import Checked, kind_of, verify_mirror, verify_published, verify_run
from tests.storage.material import Site, content, flip, snapshot, tree
from tests.storage.test_mirror import Machine


def problems(found: Iterator[Checked]) -> list[str]:
    return [f"{p.path}: {p.expected} / {p.found}" for one in found for p in one.problems]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A run with two commits, a journal, one export that waits and two that are published."""
    made = Site(tmp_path, str(tmp_path / "published"))
    commits = Commits(made.run)
    for step in (1, 2):
        commits.write(snapshot(step))
    journal = Journal(made.run.journal)
    for draw in range(3):
        journal.append("data", {"draw": draw})
    made.publish(1)
    made.publish(2)
    made.spool.build(content(3))
    return made


def test_all_good_says_what_was_read_and_changes_nothing(site: Site) -> None:
    before = tree(site.run.path)
    seen: list[tuple[int, int]] = []
    found = list(verify_run(site.run.path, lambda done, total: seen.append((done, total))))
    assert [one.what for one in found] == ["commit", "commit", "journal", "spooled export"]
    assert not problems(iter(found)) and seen[-1][0] <= seen[-1][1] and seen == sorted(seen)
    assert tree(site.run.path) == before
    published = list(verify_published(site.store))
    assert [one.what for one in published] == ["pointer", "pointer", "checkpoint", "checkpoint"]
    assert not problems(iter(published))


def stored(run: Path) -> list[Path]:
    places = [run / "journal.jsonl", *(run / "commits").rglob("*"), *(run / "spool").rglob("*")]
    return [path for path in places if path.is_file()]


def test_a_flipped_byte_in_any_file_of_a_run_is_found_by_name(site: Site) -> None:
    files = stored(site.run.path)
    assert len(files) == 1 + 2 * 3 + 7
    for path in files:
        for at in (0, path.stat().st_size // 2):
            flip(path, at)
            (told,) = problems(verify_run(site.run.path))
            assert str(path) in told, told
            flip(path, at)
    assert not problems(verify_run(site.run.path))


def test_missing_short_and_extra_files_are_found(site: Site) -> None:
    newest = max((site.run.path / "commits").iterdir())
    (newest / "extra").write_bytes(b"123")
    assert problems(verify_run(site.run.path)) == [
        f"{newest}/extra: no such file: the manifest does not name it / 3 bytes"
    ]
    (newest / "extra").unlink()
    state = newest / "state.json"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    assert problems(verify_run(site.run.path)) == [f"{state}: {len(whole)} bytes / {len(whole) - 1} bytes"]
    state.unlink()
    assert problems(verify_run(site.run.path)) == [f"{state}: {len(whole)} bytes / No such file or directory"]


def test_a_commit_that_is_retired_while_it_is_read_is_no_fault(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = min((site.run.path / "commits").iterdir())
    real = Path.stat

    def retiring(self: Path, **options: bool) -> object:
        if self.parent == gone and self.name == "state.json":
            shutil.rmtree(gone)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", retiring)
    found = list(verify_run(site.run.path))
    assert not gone.exists() and not problems(iter(found))
    assert [one.what for one in found] == ["commit", "journal", "spooled export"]


def test_the_line_that_is_being_written_is_no_fault(site: Site) -> None:
    path = site.run.journal
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"scope":"da')
    found = [one for one in verify_run(site.run.path) if one.what == "journal"]
    assert not problems(iter(found)) and "the last 12 bytes are no whole line" in found[0].note
    assert check_lines(path) == (whole, 12) and path.stat().st_size == whole + 12


def test_a_published_prefix_is_read_to_the_last_byte(tmp_path: Path, url: str) -> None:
    site = Site(tmp_path / "writer", url)
    items = [site.publish(step) for step in (1, 2)]
    assert kind_of(site.store) == "published" and not problems(verify_published(site.store))
    for entry in items[0].manifest.files:
        key = f"checkpoints/{items[0].id}/{entry.name}"
        good = site.store.read(key, 1 << 20)
        site.store.replace(key, good[:-1] + bytes([good[-1] ^ 1]))
        (told,) = problems(verify_published(site.store))
        assert told.startswith(f"{url}/{key}: SHA-256 {entry.sha256}")
        site.store.delete(key)
        assert problems(verify_published(site.store)) == [f"{url}/{key}: {entry.size} bytes / nothing"]
        site.store.replace(key, good)
    manifest = f"checkpoints/{items[0].id}/manifest.json"
    site.store.replace(manifest, b"{}")
    assert any(line.startswith(f"{url}/{manifest}: a valid") for line in problems(verify_published(site.store)))


@pytest.mark.parametrize("data", [None, b"", b"{}", b"dangling"])
def test_a_pointer_that_leads_nowhere_is_found(tmp_path: Path, url: str, data: bytes | None) -> None:
    site = Site(tmp_path / "writer", url)
    items = [site.publish(step) for step in (1, 2)]
    good = site.store.read("latest.json", 1 << 20)
    if data is None:
        site.store.delete("latest.json")
    else:
        other = good.replace(items[1].id.encode(), b"00001-000009-0000000009")
        site.store.replace("latest.json", other if data == b"dangling" else data)
    (told,) = problems(verify_published(site.store))
    assert told.startswith(f"{url}/latest.json: ")
    site.store.replace("latest.json", good.replace(b'"manifest_sha256": "', b'"manifest_sha256": "0')[:-1])
    assert len(problems(verify_published(site.store))) == 1


def test_any_damaged_object_of_a_mirror_is_found(tmp_path: Path, url: str) -> None:
    machine = Machine(tmp_path / "run", url)
    for step in (1, 2):
        machine.push(step)
    assert kind_of(machine.store) == "mirror" and not problems(verify_mirror(machine.store))
    keys = machine.store.list()
    assert len(keys) == 1 + 2 * 4 + 2
    for key in keys:
        good = machine.store.read(key, 1 << 20)
        machine.store.replace(key, good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
        told = problems(verify_mirror(machine.store))
        assert told and all(key in line for line in told), (key, told)
        machine.store.replace(key, good)
    assert not problems(verify_mirror(machine.store))


def test_nothing_known_is_said(tmp_path: Path) -> None:
    assert kind_of(Store(str(tmp_path))) == ""
    (tmp_path / "notes.txt").touch()
    assert kind_of(Store(str(tmp_path))) == ""
