"""Who may publish: the lease, what the probe finds out, compare-and-swap, and the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytimed.contracts import Refused
from anytimed.storage.gate import NOT_COMPARED, Standing, judge
from anytimed.storage.lease import LEASE, Lease, NotHeld, lease_term
from anytimed.storage.probe import PROBES, probe
from anytimed.storage.store import Store, StoreError
from tests.storage.material import Clock, evaluation
from tests.storage.object_store import ObjectStore


@pytest.fixture
def store(url: str) -> Store:
    return Store(url)


def lease(store: Store, run_id: str, term: int, clock: Clock, ttl_s: float = 60.0) -> Lease:
    return Lease(store, run_id, term, ttl_s=ttl_s, clock=clock, monotonic=clock, pause=lambda _: None)


# --- the lease --------------------------------------------------------------------------------------------------------


def test_the_first_takes_it_and_renews_it(store: Store) -> None:
    clock = Clock(0.0)
    ours = lease(store, "a", 1, clock)
    with pytest.raises(NotHeld):
        ours.check()
    for _ in range(5):
        assert ours.tend() and ours.held
        clock.now_s += 59
        ours.check()
    told = json.loads(store.read(LEASE, 1 << 16))
    assert (told["run_id"], told["term"], told["released"]) == ("a", 1, False) and lease_term(store) == 1


def test_it_runs_out_when_nobody_renews_it(store: Store) -> None:
    clock = Clock(0.0)
    ours = lease(store, "a", 1, clock)
    assert ours.tend()
    clock.now_s += 60
    assert not ours.held
    with pytest.raises(NotHeld, match="not ours now"):
        ours.check()
    assert ours.tend(), "nobody took it meanwhile"


def test_another_that_changes_is_alive_and_refused(store: Store) -> None:
    clock = Clock(0.0)
    theirs, ours = lease(store, "a", 1, clock), lease(store, "b", 2, clock)
    assert theirs.tend()
    assert not ours.tend(), "watched"
    clock.now_s += 20
    assert theirs.tend()
    with pytest.raises(Refused, match="another writer is alive here: run a, term 1") as caught:
        ours.tend()
    assert caught.value.exit_code == 3


def test_one_unchanged_for_its_whole_time_is_taken_over_and_its_holder_finds_out(store: Store) -> None:
    clock = Clock(0.0)
    theirs, ours = lease(store, "a", 1, clock), lease(store, "b", 2, clock)
    assert theirs.tend()
    clock.now_s += 50
    for _ in range(3):
        assert not ours.tend()
        clock.now_s += 19.9
    assert not theirs.held
    assert not ours.tend(), "59.7 s of our own watching"
    clock.now_s += 0.4
    assert ours.tend() and ours.held
    # Woken, the old holder first looks: a stranger's. Seen to change, it is refused.
    assert not theirs.tend() and not theirs.held
    clock.now_s += 10
    assert ours.tend()
    with pytest.raises(Refused, match="run b, term 2"):
        theirs.tend()


def test_an_earlier_process_of_the_same_run_is_followed_at_once_and_a_later_one_obeyed(store: Store) -> None:
    clock = Clock(0.0)
    before, now = lease(store, "a", 1, clock), lease(store, "a", 2, clock)
    assert before.tend() and now.tend()
    with pytest.raises(Refused, match="a later process of this run"):
        before.tend()
        before.tend()
    assert now.tend()


def test_given_up_it_is_free_at_once_for_a_higher_term(store: Store) -> None:
    clock = Clock(0.0)
    theirs, higher = lease(store, "a", 1, clock), lease(store, "b", 2, clock)
    assert theirs.tend()
    theirs.release()
    assert not theirs.held
    assert higher.tend()
    equal = lease(store, "c", 2, clock)
    higher.release()
    assert not equal.tend(), "its term is not higher: it is watched"
    clock.now_s += 60
    with pytest.raises(Refused, match="start again"):
        equal.tend()


def test_a_garbled_lease_is_watched_like_a_stranger_s(store: Store) -> None:
    clock = Clock(0.0)
    ours = lease(store, "a", 1, clock)
    store.replace(LEASE, b"{garbled")
    assert not ours.tend()
    clock.now_s += 60
    assert ours.tend()


def test_a_lost_answer_to_a_renewal_is_ours_all_the_same(tmp_path: Path) -> None:
    url = f"objects://{tmp_path.name}/p"
    try:
        clock = Clock(0.0)
        plain, losing = Store(url), Store(url, {"lose_answers": True}, deadline_s=0.3)
        ours = lease(losing, "a", 1, clock)
        assert ours.tend() and ours.held
        assert json.loads(plain.read(LEASE, 1 << 16))["run_id"] == "a"
    finally:
        ObjectStore.objects.clear()


def test_a_store_that_does_not_answer_is_no_fence(tmp_path: Path) -> None:
    clock = Clock(0.0)
    ours = lease(Store(f"objects://{tmp_path.name}/p", {"hang": True}, deadline_s=0.1), "a", 1, clock)
    with pytest.raises(StoreError, match="no answer within the deadline"):
        ours.tend()
    assert not ours.held


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 40.0)), max_size=40))
def test_never_do_two_hold_it(moves: list[tuple[int, float]]) -> None:
    """Three writers tend in any order with any pauses between, one of each run and term; at most one holds it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store, clock = Store(folder), Clock(0.0)
        writers: list[Lease | None] = [lease(store, name, term, clock) for term, name in enumerate("abc", 1)]
        for who, passed_s in moves:
            writer = writers[who]
            if writer is not None:
                try:
                    writer.tend()
                except Refused:
                    writers[who] = None  # its daemon ends
            clock.now_s += passed_s
            assert sum(w.held for w in writers if w is not None) <= 1


# --- the probe and compare-and-swap -----------------------------------------------------------------------------------


def test_a_local_folder_enforces_everything_and_nothing_stays(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "p"))
    found = probe(store, "run" * 5)
    assert found.fences and found.lists_at_once and not store.advisory
    assert found.told == "enforces create-only and compare-and-swap"
    assert store.list() == []


@pytest.mark.parametrize("options", [{}, {"ignore_conditions": True}])
def test_what_is_not_enforced_is_told(tmp_path: Path, options: dict[str, Any]) -> None:
    store = Store(f"objects://{tmp_path.name}/p", options, deadline_s=0.5)
    try:
        found = probe(store, "run" * 5)
        assert found.create_only is not bool(options) and not found.compare_and_swap and store.advisory
        assert "compare-and-swap (If-Match)" in found.told and "reading back only" in found.told
        assert not [name for name in ObjectStore.objects if PROBES in name]
    finally:
        ObjectStore.objects.clear()


def test_a_probe_that_was_killed_is_swept_by_the_next_of_its_run_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.replace(f"{PROBES}/ours-123", b"")
    store.replace(f"{PROBES}/theirs-123", b"")
    probe(store, "ours")
    assert store.list() == [f"{PROBES}/theirs-123"]


def test_swap_replaces_only_what_was_read(store: Store) -> None:
    assert store.swap("p", b"1", None)
    assert not store.swap("p", b"2", None)
    data, version = store.read_versioned("p", 10)
    assert data == b"1" and store.swap("p", b"2", version)
    assert not store.swap("p", b"3", version) and store.read("p", 10) == b"2"
    store.delete("p")
    assert not store.swap("p", b"3", version)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_gate() -> None:
    standing = Standing("id", "a" * 64, 2.0)
    assert judge(evaluation(2.4), standing, 0.5) == judge(None, standing, 0.5) == judge(evaluation(9.0), None, 0.5)
    assert judge(evaluation(2.4), standing, 0.5).refused is None
    assert "worse by more than 0.5 nats" in str(judge(evaluation(2.6), standing, 0.5).refused)
    assert judge(evaluation(float("nan")), standing, 0.5).refused is not None
    assert judge(evaluation(9.0), standing, None).refused is None
    assert judge(evaluation(9.0), standing, float("inf")).refused is None
    other = judge(evaluation(9.0, holdout="b" * 64), standing, 0.5)
    assert other.refused is None and other.flag == NOT_COMPARED
