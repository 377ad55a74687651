"""What may go, as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytimed.storage.retention import Published, retirable, superseded

orders = st.tuples(st.integers(0, 3), st.integers(0, 9))


@given(st.sets(orders), st.sets(orders), st.integers(2, 4))
def test_superseded_keeps_the_newest_verified(
    present: set[tuple[int, int]], extra: set[tuple[int, int]], keep: int
) -> None:
    verified = present & extra
    going = set(superseded(present, verified, keep))
    left = verified - going
    assert len(left) >= min(keep, len(verified))
    assert all(order < min(sorted(verified)[-keep:]) for order in going)
    if len(verified) < keep:
        assert not going


def test_unverified_commits_are_not_counted() -> None:
    present = [(1, n) for n in range(1, 6)]
    assert superseded(present, {(1, 1), (1, 2)}, 2) == []
    assert superseded(present, {(1, 2), (1, 3)}, 2) == [(1, 1)]
    assert superseded([(1, 9), (2, 1), (2, 2)], {(1, 9), (2, 1), (2, 2)}, 2) == [(1, 9)]  # by term before seq


def test_one_commit_is_never_enough() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        superseded([], set(), 1)


def going(published: list[Published], **changes: object) -> list[str]:
    settings = {"now_s": 10_000.0, "keep": 1, "keep_every_s": None, "longest_pull_s": 0.0, "named": frozenset[str]()}
    return retirable(published, **{**settings, **changes})  # type: ignore[arg-type]


TEN = [Published(f"c{n}", (1, n), 1000.0 * n) for n in range(10)]


def test_the_newest_by_term_and_seq_stay() -> None:
    assert going(TEN, keep=3) == [f"c{n}" for n in range(7)]
    fresh = [*TEN, Published("fresh", (2, 0), 0.0)]  # a clock that went back: order is not time
    assert going(fresh, keep=1) == [f"c{n}" for n in range(10)]


def test_the_named_the_young_and_one_a_period_stay() -> None:
    assert "c2" not in going(TEN, named={"c2"})
    assert going(TEN, longest_pull_s=3500.0) == [f"c{n}" for n in range(7)]
    assert going(TEN, keep_every_s=4000.0) == ["c1", "c2", "c3", "c5", "c6", "c7"]


@given(st.lists(st.floats(0, 1e5), max_size=12), st.integers(1, 4), st.floats(10, 1e5))
def test_retiring_twice_retires_nothing_more(times: list[float], keep: int, every_s: float) -> None:
    published = [Published(f"c{n}", (1, n), t) for n, t in enumerate(times)]
    first = going(published, keep=keep, keep_every_s=every_s)
    left = [p for p in published if p.id not in first]
    assert going(left, keep=keep, keep_every_s=every_s) == []


def test_keep_none_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        going(TEN, keep=0)
