"""The mirror: what is sent comes back, is verified before it counts, and belongs to one writer at a time."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytimed.contracts import CorruptError, Refused
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.journal import Journal
from anytimed.storage.manifest import FileEntry
from anytimed.storage.mirror import Mirror, TermTaken
from anytimed.storage.mirror_manifest import MirrorManifest, Segment, cut, matching, term_key
from anytimed.storage.mirror_reader import fetch_commit, fetch_journal, look
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store, StoreError
from anytimed.storage.verify import verify_mirror
from tests.faults import servers
from tests.storage import faults
from tests.storage.material import acquired, flip, snapshot, tree
from tests.storage.object_store import ObjectStore


class Machine:
    """A run on a machine of its own, with the mirror that it keeps."""

    def __init__(self, folder: Path, url: str, *, deadline_s: float = 60.0, **options: Any) -> None:
        self.store = Store(url, options, deadline_s=deadline_s)
        self.run = acquired(folder)
        self.commits = Commits(self.run)
        self.journal = Journal(self.run.journal)
        self.mirror = Mirror(self.store, self.run)

    def decide(self, count: int) -> None:
        for n in range(count):
            self.journal.append("data", {"draw": n, "why": "w" * (n % 7)})

    def commit(self, step: int) -> Commit:
        self.decide(step % 3)
        return self.commits.write(snapshot(step))

    def push(self, step: int) -> MirrorManifest:
        return self.mirror.push(self.commit(step), self.journal)


def problems(store: Store) -> list[str]:
    return [f"{p.path}: {p.found}" for one in verify_mirror(store) for p in one.problems]


# --- forms ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=120))
def test_a_journal_is_few_segments_and_no_byte_is_sent_often(growth: list[int]) -> None:
    segments: list[Segment] = []
    length, sent = 0, 0
    for grown in growth:
        length += grown
        kept, start = cut(segments, length)
        assert kept == segments[: len(kept)] and start == (kept[-1].end if kept else 0)
        segments = [*kept, Segment(start=start, end=length, sha256="a" * 64)]
        sent += length - start
        assert all(one.size >= 2 * two.size for one, two in itertools.pairwise(segments))
    assert len(segments) <= length.bit_length() + 1
    assert sent <= length * (length.bit_length() + 1)
    assert cut(segments, length) == (segments, length)


def test_a_year_of_appends_is_not_sent_with_every_commit() -> None:
    segments: list[Segment] = []
    length = sent = 0
    for _ in range(365 * 24 * 12):  # a commit every five minutes, 200 bytes of decisions each
        length += 200
        kept, start = cut(segments, length)
        segments = [*kept, Segment(start=start, end=length, sha256="a" * 64)]
        sent += length - start
    assert sent < 17 * length  # log2 of the commits; all of it with every commit would be 50,000 times
    assert len(segments) <= 17


names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)


@st.composite
def manifests(draw: st.DrawFn) -> MirrorManifest:
    listed = {name: draw(digests) for name in draw(st.sets(names, min_size=1, max_size=5))}
    files = [FileEntry(name=name, size=draw(st.integers(0, 1 << 40)), sha256=sha) for name, sha in listed.items()]
    ends = sorted(draw(st.sets(st.integers(1, 1 << 40), max_size=6)))
    journal = [Segment(start=start, end=end, sha256=draw(digests)) for start, end in itertools.pairwise([0, *ends])]
    number = st.integers(0, 99_999)
    return MirrorManifest(
        run_id=draw(names),
        term=draw(number),
        seq=draw(number),
        step=draw(number),
        created="2027-01-15T08:00:00+00:00",
        files=[*files, FileEntry(name="MANIFEST.json", size=1, sha256="b" * 64)],
        journal=journal,
    )


@given(manifests(), st.data())
def test_a_manifest_comes_back_and_any_flipped_bit_shows(manifest: MirrorManifest, data: st.DataObject) -> None:
    stored = manifest.to_bytes()
    assert MirrorManifest.from_bytes(stored, "here") == manifest
    at = data.draw(st.integers(0, len(stored) - 2))  # the last byte is the line's end
    damaged = bytearray(stored)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptError, match="here"):
        MirrorManifest.from_bytes(bytes(damaged), "here")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"journal": [Segment(start=3, end=9, sha256="a" * 64)]}, "expected one that starts at 0"),
        ({"journal": [Segment(start=0, end=0, sha256="a" * 64)]}, "journal segment 0 to 0"),
        ({"files": [FileEntry(name=n, size=1, sha256="a" * 64) for n in ("a", "b")]}, "not among its files"),
        ({"files": [FileEntry(name="MANIFEST.json", size=1, sha256="a" * 64)] * 2}, "listed twice"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_corrupt(change: dict[str, Any], told: str) -> None:
    good = MirrorManifest(
        run_id="r",
        term=1,
        seq=1,
        step=1,
        created="",
        files=[FileEntry(name=n, size=1, sha256="a" * 64) for n in ("MANIFEST.json", "b")],
        journal=[],
    )
    with pytest.raises(CorruptError, match=told):
        MirrorManifest.from_bytes(good.model_copy(update=change).to_bytes(), "here")


# --- there and back ---------------------------------------------------------------------------------------------------


def test_what_was_pushed_comes_back_on_another_machine(tmp_path: Path, url: str) -> None:
    old = Machine(tmp_path / "old", url)
    old.decide(5)
    made = [old.commit(step) for step in (1, 2)]
    sent = [old.mirror.push(commit, old.journal) for commit in made]
    seen = look(old.store)
    assert (seen.run_id, seen.term, list(seen.commits)) == (old.run.run_id, 1, sent[::-1])
    shutil.copytree(old.run.path, tmp_path / "kept")
    shutil.rmtree(old.run.path)  # the machine has vanished

    run = RunDirectory(tmp_path / "new")
    run.acquire(at_least=seen.term, run_id=seen.run_id)
    commits = Commits(run)
    back = fetch_commit(old.store, seen.commits[0], commits)
    fetch_journal(old.store, seen.commits[0], run.journal)
    assert tree(back.path) == tree(tmp_path / "kept" / "commits" / back.path.name)
    assert run.journal.read_bytes() == (tmp_path / "kept" / "journal.jsonl").read_bytes()
    newest = Commits(run).newest()
    assert newest is not None and (newest.manifest, newest.state) == (made[1].manifest, {"step": 2, "window": [2, 0.5]})
    assert commits.write(snapshot(3)).manifest.order == (2, 3)
    assert not problems(old.store)


def test_pushing_again_sends_nothing(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path / "run", url)
    machine.decide(40)
    commit = machine.commit(1)
    sent = machine.mirror.push(commit, machine.journal)
    puts: list[str] = []
    real = Store.put_copy
    monkeypatch.setattr(Store, "put_copy", lambda self, local, key: (puts.append(key), real(self, local, key)))
    assert machine.mirror.push(commit, machine.journal) == sent
    again = Mirror(machine.store, machine.run)  # as the next process: it knows nothing
    machine.run.release()
    machine.run.acquire()
    assert again.push(commit, machine.journal) == sent and puts == []
    machine.decide(1)
    again.push(machine.commit(2), machine.journal)
    journal = [key for key in puts if key.startswith("journal/")]
    assert len(journal) == 1 and journal[0].split("-")[0] == f"journal/{sent.journal_bytes:012d}"


def test_a_lost_segment_is_sent_again(tmp_path: Path, url: str) -> None:
    machine = Machine(tmp_path / "run", url)
    machine.decide(40)
    first = machine.push(2)
    machine.store.delete(first.journal[0].key)
    assert problems(machine.store)
    machine.decide(1)
    machine.push(4)
    assert not problems(machine.store)


def test_local_and_mirrored_bytes_are_not_the_same_bytes(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", str(tmp_path / "mirror"))
    commit = machine.commit(1)
    machine.mirror.push(commit, machine.journal)
    for file in commit.path.iterdir():
        flip(file, 0)
    assert not problems(machine.store)


def test_only_the_journal_that_matches_is_built_upon(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", str(tmp_path / "mirror"))
    for step, decisions in ((3, 40), (6, 8), (9, 1)):
        machine.decide(decisions)
        machine.push(step)
    manifest = look(machine.store).commits[0]
    assert len(manifest.journal) > 1 and matching(machine.run.journal, manifest.journal) == manifest.journal
    flip(machine.run.journal, manifest.journal[-1].start + 5)
    assert matching(machine.run.journal, manifest.journal) == manifest.journal[:-1]
    assert matching(tmp_path / "none", manifest.journal) == []


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[str]:
    yield f"objects://{tmp_path.name}/mirror"
    ObjectStore.objects.clear()
    ObjectStore.calls.clear()


def test_wrong_bytes_in_the_store_are_seen_before_the_commit_counts(
    tmp_path: Path, objects: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path / "run", objects)
    real = ObjectStore._put_file

    async def garbled(self: ObjectStore, lpath: str, rpath: str, **options: Any) -> None:
        await real(self, lpath, rpath, **options)
        path = str(self._strip_protocol(rpath))
        if path.endswith("state.json"):
            self.objects[path] = self.objects[path][:-1] + b"?"

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "_put_file", garbled)
        with pytest.raises(StoreError, match=r"state\.json: read back with SHA-256"):
            machine.push(1)
    assert look(machine.store).commits == ()
    machine.push(2)
    assert not problems(machine.store)


def test_a_commit_that_rotted_here_is_not_blamed_on_the_store(tmp_path: Path, url: str) -> None:
    machine = Machine(tmp_path / "run", url)
    commit = machine.commit(1)
    flip(commit.path / "state.json", 3)
    with pytest.raises(CorruptError, match="damaged on the local disk"):
        machine.mirror.push(commit, machine.journal)
    assert look(machine.store).commits == ()


def test_lost_answers_are_no_fence(tmp_path: Path, objects: str) -> None:
    machine = Machine(tmp_path / "run", objects, deadline_s=0.05, lose_answers=True)
    commit = machine.commit(1)
    for _ in range(20):  # puts say that they failed, and did not: what stands there decides
        try:
            sent = machine.mirror.push(commit, machine.journal)
            break
        except StoreError:
            continue
    assert look(machine.store).commits == (sent,) and not problems(machine.store)


VERBS = ["put_copy", "create", "delete", "list", "read", "size", "download"]


def test_cut_off_at_any_request_the_old_or_the_new_stands(tmp_path: Path, url: str) -> None:
    machine = Machine(tmp_path / "run", url)
    for step in (1, 2):
        machine.push(step)
    n, step, cut_off = 0, 2, True
    while cut_off:
        n, step = n + 1, step + 1
        commit = machine.commit(step)
        cut_off = False
        try:
            with faults.cut_at(n, VERBS):
                machine.mirror.push(commit, machine.journal)
                machine.mirror.retain(2)
        except faults.Cut:
            cut_off = True
        seen = look(machine.store)
        assert seen.commits[0].step in (step - 1, step) and len(seen.commits) >= 2, n
        assert not problems(machine.store), n
        machine.mirror.push(commit, machine.journal)
        machine.mirror.retain(2)
        assert [m.step for m in look(machine.store).commits] == [step, step - 1], n
        keys = {key.split("/")[1] for key in machine.store.list("commits")}
        assert len(keys) == 2, (n, keys)
    assert n > 20
    named = {segment.key for manifest in look(machine.store).commits for segment in manifest.journal}
    assert set(machine.store.list("journal")) == named


# --- one writer -------------------------------------------------------------------------------------------------------


def test_an_older_machine_that_wakes_up_is_refused(tmp_path: Path, url: str) -> None:
    old = Machine(tmp_path / "old", url)
    old.push(1)
    run = RunDirectory(tmp_path / "new")
    run.acquire(at_least=1, run_id=old.run.run_id)
    new = Mirror(Store(url), run)
    before = old.store.list()
    new.claim()
    for action in (lambda: old.push(2), lambda: old.mirror.retain(2), old.mirror.claim):
        with pytest.raises(TermTaken, match=r"belongs to term 2, ours is 1: pid \d+ on ") as caught:
            action()
        assert caught.value.exit_code == 3
    assert old.store.list() == [*before, term_key(2)]


def test_two_starts_with_one_term_do_not_both_write(tmp_path: Path, url: str) -> None:
    one, two = (Machine(tmp_path / name, url) for name in ("one", "two"))
    one.mirror.claim()
    with pytest.raises(TermTaken, match="belongs to term 1, ours is 1"):
        two.push(1)
    one.push(1)


def test_a_store_that_ignores_conditions_lets_one_of_two_go_on(tmp_path: Path, objects: str) -> None:
    one, two = (Machine(tmp_path / name, objects, ignore_conditions=True) for name in ("one", "two"))
    one.push(1)
    claim = one.store.read(term_key(1), 10_000)
    two.store.replace(term_key(1), claim.replace(b'"pid"', b'"pid"'))
    one.push(2)  # the same claim, not another one
    two.store.delete(term_key(1))
    two.mirror.claim()
    with pytest.raises(TermTaken):
        one.push(3)


def test_other_bytes_under_our_name_are_a_fence(tmp_path: Path, url: str) -> None:
    machine = Machine(tmp_path / "run", url)
    commit = machine.commit(1)
    sent = machine.mirror.push(commit, machine.journal)
    other = sent.model_copy(update={"files": [*sent.files[:-1], sent.files[-1].model_copy(update={"size": 5})]})
    machine.store.replace(sent.key("mirror.json"), other.to_bytes())
    with pytest.raises(Refused, match="other bytes under our name"):
        machine.mirror.push(commit, machine.journal)


def test_a_claim_that_was_deleted_is_made_anew(tmp_path: Path, url: str) -> None:
    machine = Machine(tmp_path / "run", url)
    machine.push(1)
    machine.store.delete(term_key(1))
    with pytest.raises(StoreError, match="made anew"):
        machine.push(2)
    machine.push(2)
    assert look(machine.store).commits[0].step == 2 and machine.store.exists(term_key(1))


# --- retention --------------------------------------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_takes_leftovers_along(tmp_path: Path, url: str) -> None:
    machine = Machine(tmp_path / "run", url)
    for step in range(1, 6):
        machine.decide(step)
        machine.push(step)
    store = machine.store
    store.replace("commits/00001-000000-0000000000/state.json", b"of a push that was cut off")
    store.replace("commits/00001-000009-0000000009/state.json", b"of one that is under way")
    store.replace("commits/notes/readme.txt", b"of somebody else")
    store.replace("journal/orphan.jsonl", b"")
    assert [ident.step for ident in machine.mirror.retain(3)] == [1, 2]
    assert [m.step for m in look(store).commits] == [5, 4, 3]
    folders = {key.split("/")[1] for key in store.list("commits")}
    assert folders == {f"00001-{n:06d}-{n:010d}" for n in (3, 4, 5, 9)} | {"notes"}
    assert not store.exists("journal/orphan.jsonl") and not problems(store)
    assert machine.mirror.retain(3) == []


def test_retention_counts_and_deletes_nothing_that_it_cannot_read(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(tmp_path / "run", url)
    sent = [machine.push(step) for step in range(1, 5)]
    machine.store.replace(sent[3].key("mirror.json"), b"{}")
    mirror = Mirror(machine.store, machine.run)
    machine.run.release()
    machine.run.acquire()
    mirror.claim()
    with caplog.at_level(logging.WARNING):
        assert [ident.step for ident in mirror.retain(2)] == [1]
    assert [m.step for m in look(machine.store).commits] == [3, 2]
    assert "not counted, and kept" in caplog.text and machine.store.exists(sent[3].key("state.json"))


def test_a_store_that_does_not_answer_is_an_error_with_its_name(tmp_path: Path, objects: str) -> None:
    machine = Machine(tmp_path / "run", objects, deadline_s=0.5, denied=True, secret="hunter2hunter2")
    with pytest.raises(StoreError, match="403") as caught:
        machine.push(1)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StoreError):
        look(machine.store)


# --- real servers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", [servers.moto, servers.rclone, servers.localbucket], ids=lambda s: s.__name__)
def test_a_real_server_holds_a_mirror_and_its_fence(tmp_path: Path, server: Callable[[Path], Any]) -> None:
    with server(tmp_path) as running:
        url, options = f"s3://{servers.BUCKET}/mirror", running.options()
        old = Machine(tmp_path / "old", url, **options)
        for step in (1, 2, 3):
            old.decide(5)
            old.push(step)
            old.mirror.retain(2)
        seen = look(old.store)
        assert [m.step for m in seen.commits] == [3, 2] and not problems(old.store)
        run = RunDirectory(tmp_path / "new")
        run.acquire(at_least=seen.term, run_id=seen.run_id)
        back = fetch_commit(old.store, seen.commits[0], Commits(run))
        fetch_journal(old.store, seen.commits[0], run.journal)
        assert tree(back.path) == tree(old.run.commits / back.path.name)
        assert run.journal.read_bytes() == old.run.journal.read_bytes()
        Mirror(Store(url, options), run).claim()
        with pytest.raises(TermTaken):
            old.push(4)
        assert look(old.store).commits == seen.commits
