"""What a journal comes to: the folds that a file keeps are the journal's own, or are not used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytimed.contracts import Json, chain
from anytimed.data.digests import Digests
from anytimed.data.fold import Fold, Gathered, gathered
from anytimed.data.fold_file import FoldFile
from anytimed.storage.journal import Journal
from anytimed.storage.journal_lines import made
from tests.data.world import MemoryJournal
from tests.storage.material import flip


def sha(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def decisions(blocks: int, *, name: str = "web") -> list[Json]:
    """Three decisions a block: rows found, some of them finished, something else now and then."""
    told: list[Json] = []
    for block in range(blocks):
        rows: list[Any] = [[f"{name}/part-{block}-{i}", 0, i, sha(i)[:8]] for i in range(3)]
        told.append({"kind": "discovered", "draw": block, "source": name, "entries": rows})
        finished = {str(i): sha(i) for i in range(3 * block, 3 * block + 3) if i % 5}
        told.append({"kind": "finished", "block": block, "sources": {name: finished, "ö": {str(block): sha(name)}}})
        cut: Json = {"kind": "block_cut", "block": block, "draw": block, "sequences": 1}
        told.append(cut if block % 2 else {"kind": "mixture", "block": block, "weights": {name: block}})
    return told


def plainly(entries: Sequence[Json]) -> tuple[Json, Json]:
    """Adopted and finished, the slow way."""
    adopted: dict[str, list[Json]] = {}
    finished: dict[str, dict[int, str]] = {}
    for entry in entries:
        if entry["kind"] == "discovered":
            adopted.setdefault(entry["source"], []).extend(entry["entries"])
        elif entry["kind"] == "finished":
            for name, digests in entry["sources"].items():
                finished.setdefault(name, {}).update({int(i): digest for i, digest in digests.items()})
    return adopted, finished


def as_plain(whole: Gathered) -> tuple[Json, Json]:
    return whole.adopted, {name: dict(digests.items()) for name, digests in whole.finished.items()}


def journal_of(path: Path, entries: Sequence[Json]) -> Journal:
    digest, lines = "", []
    for n, entry in enumerate(entries, 1):
        digest = chain(digest, entry)
        lines.append(made("data", n, digest, json.dumps(entry, separators=(",", ":"))))
    path.write_bytes(b"".join(lines))
    return Journal(path)


ENTRIES = decisions(2_400)
"""Enough for three folds."""


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return journal_of(tmp_path / "journal.jsonl", ENTRIES)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.fold"


class Counting:
    """A journal that counts what is read of it."""

    def __init__(self, journal: Journal) -> None:
        self.read = 0
        self._journal = journal

    def entries(self, scope: str, start: int = 0, stop: int | None = None) -> list[Json]:
        found = self._journal.entries(scope, start, stop)
        self.read += len(found)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)


def restored(file: Path | None, journal: Any, length: int) -> tuple[Json, Json, list[Json]]:
    whole = gathered(FoldFile(file, journal).restore(length))
    assert whole.length == length
    return as_plain(whole)


def test_folds_add_up_to_the_journal_with_and_without_the_file(journal: Journal, file: Path) -> None:
    for length in (0, 1, 17, 1_999, 2_000, 5_000, len(ENTRIES)):
        assert restored(None, journal, length) == plainly(ENTRIES[:length])
        for _ in range(2):
            assert restored(file, journal, length) == plainly(ENTRIES[:length])


def test_a_second_start_reads_what_follows_the_last_fold_only(journal: Journal, file: Path) -> None:
    counting = Counting(journal)
    restored(file, counting, 5_000)
    assert counting.read == 5_000
    counting.read = 0
    assert restored(file, counting, 5_100) == plainly(ENTRIES[:5_100])
    assert 0 < counting.read < 2_100
    counting.read = 0
    assert restored(file, counting, 30) == plainly(ENTRIES[:30])  # an older commit: the folds go beyond it
    assert counting.read == 30
    assert restored(file, counting, 4_500) == plainly(ENTRIES[:4_500])


def test_a_run_keeps_folds_as_it_goes_on(tmp_path: Path, file: Path) -> None:
    journal = journal_of(tmp_path / "journal.jsonl", ENTRIES[:10])
    folds = FoldFile(file, journal)
    assert list(folds.restore(0)) == []
    folds.keep(10)
    assert not file.exists()
    journal = journal_of(tmp_path / "journal.jsonl", ENTRIES[:4_500])
    folds = FoldFile(file, journal)
    for length in (*range(0, 4_501, 250), 4_000, 10):
        folds.keep(length)
    counting = Counting(journal)
    assert restored(file, counting, 4_500) == plainly(ENTRIES[:4_500])
    assert counting.read < 2_100


def test_few_decisions_of_many_rows_are_worth_a_fold(tmp_path: Path, file: Path) -> None:
    rows = [[f"part-{i}", 0, i, ""] for i in range(12_000)]
    entries: list[Json] = [
        {"kind": "discovered", "draw": 0, "source": "web", "entries": rows},
        {"kind": "finished", "block": 0, "sources": {"web": {str(i): sha(i) for i in range(12_000)}}},
    ]
    counting = Counting(journal_of(tmp_path / "journal.jsonl", entries))
    assert restored(file, counting, 2) == plainly(entries)
    counting.read = 0
    assert restored(file, counting, 2) == plainly(entries)
    assert counting.read == 0


def test_any_damage_of_the_file_costs_time_only(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anytimed.data.fold_file._ENTRIES", 100)  # small folds are folds
    entries = ENTRIES[:500]
    journal = journal_of(tmp_path / "journal.jsonl", entries)
    restored(file, journal, len(entries))
    good = file.read_bytes()
    starts = [at for at in range(len(good)) if good.startswith(b"anytimed-fold-1", at)]
    assert len(starts) >= 3
    bad = [b"", b"\0" * 5_000, good[:-1], good[: starts[1] + 40], good[starts[1] :], good[: starts[1]] * 2, b"x" + good]
    flips = (0, 16, 20, 60, 90, 150, starts[1] + 3, starts[1] + 300, len(good) - 1)
    bad += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in flips]
    bad.append(good[: starts[2]] + bytes(4096) + good[starts[2] + 4096 :])
    for data in bad:
        file.write_bytes(data)
        assert restored(file, journal, len(entries)) == plainly(entries)
        counting = Counting(journal)
        assert restored(file, counting, len(entries)) == plainly(entries)
        assert counting.read < 250  # another has taken its place


def test_a_file_of_another_journal_is_not_used(tmp_path: Path, journal: Journal, file: Path) -> None:
    """Of a journal that was put back and went on otherwise, what is common counts."""
    restored(file, journal, len(ENTRIES))
    (tmp_path / "other").mkdir()
    strange = decisions(2_000, name="other")
    other = journal_of(tmp_path / "other" / "journal.jsonl", strange)
    assert restored(file, other, 6_000) == plainly(strange)
    assert restored(file, journal, 6_000) == plainly(ENTRIES[:6_000])
    branched = [*ENTRIES[:4_200], *strange[:1_900]]
    counting = Counting(journal_of(tmp_path / "other" / "journal.jsonl", branched))
    assert restored(file, counting, 6_100) == plainly(branched)
    assert 0 < counting.read < 4_200
    short = journal_of(tmp_path / "other" / "journal.jsonl", ENTRIES[:100])
    assert restored(file, short, 100) == plainly(ENTRIES[:100])


def sealed(fold: Fold, body: bytes) -> bytes:
    header = f"anytimed-fold-1 {fold.start} {fold.length} {fold.digest} {len(body)} ".encode()
    return header + hashlib.sha256(header + body).hexdigest().encode() + b"\n" + body


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"adopted":{},"finished":{"web":[[1],["a","b"]]}}',
     b'{"adopted":{},"finished":{"web":[["x"],["a"]]}}',
     b'{"adopted":{},"finished":{"web":[[[1]],["a"]]}}',
     b'{"adopted":{},"finished":{"web":[[1,2],"abc"]}}',
     b'{"adopted":[],"finished":[],"others":3}', b'{"adopted":{"web":4},"finished":{}}', b"\xff\xfe"],
)  # fmt: skip
def test_a_sealed_fold_that_is_none_is_not_used(journal: Journal, file: Path, body: bytes) -> None:
    fold = Fold(0, 2_000, journal.digest("data", 2_000))
    file.write_bytes(sealed(fold, body))
    assert restored(file, journal, 3_000) == plainly(ENTRIES[:3_000])
    assert restored(file, journal, 3_000) == plainly(ENTRIES[:3_000])


def test_what_is_no_file_is_no_cache(journal: Journal, file: Path, tmp_path: Path) -> None:
    os.mkfifo(file)
    assert restored(file, journal, 3_000) == plainly(ENTRIES[:3_000])
    file.unlink()
    file.mkdir()
    assert restored(file, journal, 3_000) == plainly(ENTRIES[:3_000])
    file.rmdir()
    (tmp_path / "planted").write_bytes(b"theirs")
    file.symlink_to(tmp_path / "planted")
    assert restored(file, journal, 3_000) == plainly(ENTRIES[:3_000])
    assert (tmp_path / "planted").read_bytes() == b"theirs"


def test_a_full_disk_costs_the_cache_only(journal: Journal, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = os.write

    def full(number: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            return real(number, bytes(data)[:100])
        if calls > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(number, data)

    monkeypatch.setattr(os, "write", full)
    folds = FoldFile(file, journal)
    assert as_plain(gathered(folds.restore(5_000))) == plainly(ENTRIES[:5_000])
    folds.keep(6_000)
    monkeypatch.undo()
    counting = Counting(journal)
    assert restored(file, counting, 6_000) == plainly(ENTRIES[:6_000])
    assert 0 < counting.read < 6_000


def test_a_byte_that_rots_while_a_start_reads_is_found(journal: Journal, file: Path) -> None:
    """Between the look at the whole file and the reading of a fold it may be damaged so far that it is no JSON."""
    restored(file, journal, len(ENTRIES))
    folds = FoldFile(file, journal)
    flip(file, file.read_bytes().index(b'{"adopted"'))
    assert as_plain(gathered(folds.restore(6_000))) == plainly(ENTRIES[:6_000])
    assert restored(file, journal, 6_000) == plainly(ENTRIES[:6_000])


def test_a_journal_that_cannot_be_read_ends_the_keeping_only(
    journal: Journal, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folds = FoldFile(file, journal)
    list(folds.restore(4_100))
    size = file.stat().st_size
    flip(journal.path, journal.path.read_bytes().index(b"part-2000-"))
    for length in (7_000, len(ENTRIES)):
        folds.keep(length)
    assert "nothing more is kept: " in caplog.text and file.stat().st_size == size


def test_a_fold_goes_through_bytes() -> None:
    fold = Fold(7, 7)
    for entry in decisions(5):
        fold.update(entry)
    fold.digest = sha("end")
    line, body = fold.to_bytes().split(b"\n", 1)
    assert line.split()[1:4] == [b"7", b"22", fold.digest.encode()]
    again = Fold.from_body(7, 22, fold.digest, body)
    assert again.to_bytes() == fold.to_bytes()
    assert (again.length, again.weight, again.adopted) == (22, fold.weight, fold.adopted)


def test_a_journal_in_memory_will_do() -> None:
    memory = MemoryJournal(ENTRIES[:300])
    assert restored(None, memory, 250) == plainly(ENTRIES[:250])


digest_texts = st.integers(0, 5).map(sha) | st.sampled_from(["", "x", "A" * 64, " " * 64, sha(1).upper(), sha(1) * 2])
indices = st.integers(0, 40) | st.integers(-3, 2**60)


@given(st.lists(st.dictionaries(indices, digest_texts, max_size=6), max_size=6))
def test_digests_are_a_mapping(updates: list[dict[int, str]]) -> None:
    digests, expected = Digests(), dict[int, str]()
    for update in updates:
        digests.update(update)
        expected.update(update)
        if update and min(update) >= 0:
            digests.put(list(update), list(update.values()))
        assert len(digests) == len(expected) and dict(digests.items()) == expected
    mapping: Mapping[int, str] = digests
    assert dict(mapping) == expected and mapping == expected and sorted(mapping) == sorted(expected)
    for index in (*expected, -1, 41, 10**30):
        assert mapping.get(index) == expected.get(index) and (index in mapping) == (index in expected)


def test_a_million_digests_are_small() -> None:
    digests = Digests()
    for start in range(0, 1_000_000, 50_000):
        digests.put(range(start, start + 50_000), sha(start) * 50_000)
    with pytest.raises(ValueError, match="2 indices, 1 digests"):
        digests.put([1, 2], sha(1))
    assert len(digests) == 1_000_000 and digests[999_999] == sha(950_000)
    assert digests.nbytes < 45 << 20
