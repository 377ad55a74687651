"""metrics.jsonl: it stays small, loses no spike, and no line, crash or link spoils it."""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytimed.contracts import Json
from anytimed.service import history as history_module
from anytimed.service.history import MOST_BYTES, History, line_of, lines_of
from anytimed.service.thinning import EARLY, KEEP, Thinner, partition, read


def step(number: int, **figures: Any) -> Json:
    told = {"loss": 2.0, "tokens_per_s": 100.0, "grad_norm": 1.0, "prequential": {"main": 2.0, "more": 3.0}}
    at = {"time": 1_700_000_000 + number, "step": number, "tokens": 128 * number}
    return {"kind": "step", **at, **told, "skipped": 0, "batches_ready": 1, **figures}


def evaluation(number: int, **figures: Any) -> Json:
    at = {"time": 1_700_000_000 + number, "step": number, "tokens": 381}
    return {"kind": "evaluation", **at, "holdout": "ab", "loss_x": 1.0, "loss_y": 1.1, "loss_z": 1.2, **figures}


def event(number: int, what: str) -> Json:
    at = {"time": 1_700_000_000 + number, "step": number, "tokens": 128 * number}
    return {"kind": "event", "what": what, **at, "id": f"1-{number}", "told": f"{what} at {number}"}


def put(history: History, *records: Json) -> None:
    for record in records:
        history.append(record)


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def thinned(records: list[Json], budget: int = 1 << 24) -> list[Json]:
    thinner = Thinner(budget)
    for record in records:
        thinner.add(line_of(record))
    return [json.loads(raw) for raw in thinner.lines()]


# --- what the page gets -----------------------------------------------------------------------------------------------


def test_what_was_appended_is_viewed_by_column_and_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.load()
    put(history, step(5, loss=3.5), step(10, loss=None, prequential={"more": 1.0}), evaluation(10), event(10, "commit"))
    seen = history.view(100)
    assert seen["steps"]["step"] == [5, 10] and seen["steps"]["tokens"] == [640, 1280]
    assert seen["steps"]["loss"] == [3.5, None]
    assert seen["steps"]["prequential"] == {"main": [2.0, None], "more": [3.0, 1.0]}
    assert seen["evaluations"]["loss_y"] == [1.1]
    assert seen["evaluations"]["tokens"] == [1280], "those trained on, not those of the hold-out"
    assert [e["told"] for e in seen["events"]] == ["commit at 10"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = History(path)
    again.load()
    assert again.view(100) == seen
    assert again.view(100, since_s=1_700_000_006)["steps"]["step"] == [10]
    assert again.view(100, since_s=1_800_000_000)["steps"]["prequential"] == {}


def test_steps_that_were_taken_again_take_the_place_of_the_first(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    put(history, *(step(n, loss=9.0) for n in range(1, 11)), evaluation(4), evaluation(8), event(8, "rollback"))
    put(history, *(step(n, loss=1.0) for n in range(5, 9)), evaluation(8, loss_x=0.5))
    for seen in (history.view(100), _loaded(tmp_path).view(100)):
        assert seen["steps"]["step"] == list(range(1, 9))
        assert seen["steps"]["loss"] == [9.0] * 4 + [1.0] * 4
        assert seen["evaluations"]["step"] == [4, 8] and seen["evaluations"]["loss_x"] == [1.0, 0.5]
        assert len(seen["events"]) == 1, "what happened has happened"
    kept = thinned(lines(tmp_path / "metrics.jsonl"))
    assert [r["step"] for r in kept if r["kind"] == "step"] == list(range(1, 9))
    assert [r["loss_x"] for r in kept if r["kind"] == "evaluation"] == [1.0, 0.5]


def _loaded(folder: Path) -> History:
    history = History(folder / "metrics.jsonl")
    history.load()
    return history


@settings(max_examples=60)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=400), st.integers(4, 60))
def test_few_points_lose_no_spike_and_not_the_newest(losses: list[float], points: int) -> None:
    from anytimed.service.series import Series, few

    series = Series("step")
    for i, loss in enumerate(losses):
        series.add(step(i + 1, loss=loss, prequential={"main": loss}))
    seen = few(series.rows(), "step", points)
    assert len(seen["step"]) <= points + 2
    assert {len(column) for name, column in seen.items() if name != "prequential"} == {len(seen["step"])}
    assert seen["step"][-1] == len(losses) and seen["loss"][-1] == pytest.approx(losses[-1], rel=1e-5)
    assert max(seen["loss_high"]) == pytest.approx(max(losses), rel=1e-5)
    assert min(seen["loss_low"]) == pytest.approx(min(losses), rel=1e-5)
    counts = [b - a for a, b in itertools.pairwise([0, *seen["step"]])]
    mean = sum(v * n for v, n in zip(seen["loss"], counts, strict=True)) / len(losses)
    assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert seen["prequential"]["main"] == seen["loss"]


def test_interventions_are_seen_among_any_number_of_commits(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    put(history, event(1, "rollback"), *(event(n, "commit") for n in range(2, 200)), event(200, "degraded"))
    seen = [e["what"] for e in history.view(20)["events"]]
    assert len(seen) == 20 and seen[0] == "rollback" and seen[-1] == "degraded" and seen.count("commit") == 18
    assert history.view(20)["events"][-2]["step"] == 199


# --- the rule ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=300), st.integers(1, 20), st.sampled_from([0, 3, EARLY]))
def test_no_part_spans_more_than_its_share_of_its_age_and_of_its_place(of: list[int], keep: int, early: int) -> None:
    parts = partition(of, keep, early)
    assert [i for first, end in parts for i in range(first, end)] == list(range(len(of)))
    for first, end in parts:
        if end - first > 1:
            span, newer, older = sum(of[first:end]), sum(of[end:]), sum(of[: end - 1])
            assert span <= newer / keep
            assert not early or span <= older / early


def test_the_lines_left_grow_with_the_logarithm() -> None:
    """By the rule alone, as if a run were thinned after every 20,000 records."""
    of: list[int] = []
    counts: dict[int, int] = {}
    for n in range(1, 41):
        more = [*of, *[1] * 20_000]
        of = [sum(more[first:end]) for first, end in partition(more, KEEP["step"], EARLY)]
        counts[n] = len(of)
    assert sum(of) == 800_000
    assert all(counts[n] <= 2 * KEEP["step"] * math.log2(20_000 * n / KEEP["step"]) + 300 for n in counts)
    # Twice the records cost the lines of one octave, whatever their number.
    assert counts[40] - counts[20] < 2.2 * KEEP["step"] and counts[20] - counts[10] < 2.2 * KEEP["step"]
    newer = 0
    for span in reversed(of):
        assert span <= max(1, newer / KEEP["step"])
        newer += span


def test_a_long_run_stays_small_and_all_of_it_is_seen(tmp_path: Path) -> None:
    """Thirty thousand steps by the file's own thread, at an eighth of the size that the daemon allows."""
    path = tmp_path / "metrics.jsonl"
    most = MOST_BYTES >> 3
    history = History(path, most_bytes=most, budget_bytes=most // 2, rests=False)
    largest, wild = 0, {777: 80.0, 20_001: 90.0}
    for n in range(1, 30_001):
        history.append(step(n, loss=wild.get(n, 1 + 1 / n)))
        if n % 100 == 0:
            put(history, evaluation(n), event(n, "commit" if n % 1000 else "spike"))
        if n % 500 == 0:
            history.settle()  # a daemon takes ten minutes for as many
            largest = max(largest, path.stat().st_size)
    assert largest < 1.3 * most
    assert history.problem is None
    assert not [p for p in tmp_path.iterdir() if p != path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    told = lines(path)
    assert [r["time"] for r in told] == sorted(r["time"] for r in told)
    steps = [r for r in told if r["kind"] == "step"]
    assert sum(r.get("of", 1) for r in steps) == 30_000
    assert [r["step"] for r in steps[-50:]] == list(range(29_951, 30_001))
    assert steps[0]["step"] == 1 and steps[8]["step"] == 9, "the first decades of a logarithmic axis stay"
    for seen in (history.view(500)["steps"], _loaded(tmp_path).view(500)["steps"]):
        assert seen["loss_high"].count(80.0) == seen["loss_high"].count(90.0) == 1
        assert seen["step"][-1] == 30_000
        at = seen["step"][seen["loss_high"].index(90.0)]
        assert abs(at - 20_001) < 500
        assert max(b - a for a, b in itertools.pairwise(seen["step"])) < 500
    spikes = [r for r in told if r.get("what") == "spike"]
    assert len(spikes) == 30, "they live longer than commits"
    assert len([r for r in told if r.get("what") == "commit"]) < 270


def test_long_lines_cost_resolution_and_not_the_disk() -> None:
    many = {f"source-{i:03d}": 2.0 for i in range(200)}
    kept = thinned([step(n, prequential=many) for n in range(1, 2001)], budget=400_000)
    assert sum(len(line_of(r)) + 1 for r in kept) <= 400_000
    assert sum(r.get("of", 1) for r in kept) == 2000 and kept[-1]["step"] == 2000
    assert len(kept) > 30 and kept[0]["prequential"]["source-199"] == 2.0


def test_several_lines_become_one_of_means_and_bounds() -> None:
    records = [step(n, loss=None if n % 2 else float(n), tokens_per_s=math.nan) for n in range(1, 4000)]
    merged = [r for r in thinned(records) if "of" in r]
    assert merged and all(set(r) == {*step(1), "of", "range"} for r in merged)
    for r in merged:
        first = r["step"] - r["of"] + 1
        whole = [float(n) for n in range(first, r["step"] + 1) if n % 2 == 0]
        assert r["loss"] == pytest.approx(sum(whole) / len(whole))
        assert r["range"]["loss"] == [min(whole), max(whole)]
        assert r["tokens_per_s"] is None and r["range"]["tokens_per_s"] == [None, None]


# --- what may lie in the file -----------------------------------------------------------------------------------------

ODD = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"kind":"step"}', b'{"kind":3,"time":1}', b"[" * 100_000,
    b'{"kind":"step","time":1,"step":"7","tokens":1}', b'{"kind":"step","time":1,"step":-1,"tokens":1}',
    b'{"kind":"step","time":NaN,"step":1,"tokens":1}', b'{"kind":"step","time":1,"step":1e400,"tokens":1}',
    b'{"kind":"step","time":1,"step":1,"tokens":' + b"9" * 400 + b"}", b'{"kind":"event","time":1}',
    b'{"kind":"step","time":1,"step":1,"tokens":1,"of":0}', b'{"kind":"step","time":true,"step":1,"tokens":1}',
    b'{"kind":"evaluation","time":1,"step":1,"tokens":null}', b"7" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_a_line_that_is_none_is_passed_over(tmp_path: Path, odd: bytes) -> None:
    assert read(odd) is None
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line_of(step(1)) + b"\n" + odd + b"\n" + line_of(step(2)) + b"\n" + odd)
    history = History(path, rests=False)
    history.load()
    assert history.view(10)["steps"]["step"] == [1, 2]
    history.append(step(3))  # after a line without an end
    assert _loaded(tmp_path).view(10)["steps"]["step"] == [1, 2, 3]
    history._begin()
    history.settle()
    assert [r["step"] for r in lines(path)] == [1, 2, 3]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
figures = st.dictionaries(
    st.sampled_from([*step(1), *evaluation(1), "of", "range", "what"]), json_values, max_size=6
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from([step, evaluation]), st.integers(0, 40), figures), max_size=30))
def test_whatever_a_line_says_it_is_viewed_and_thinned(drawn: list[tuple[Any, int, Json]]) -> None:
    found = [line_of({**make(number), **changes}) for make, number, changes in drawn]
    held, thinner = history_module.Figures(), Thinner(500)
    for raw in found:
        held.add(raw)
        thinner.add(raw)
    again = history_module.Figures()
    for raw in thinner.lines():
        again.add(raw)
    for figures in (held, again):
        steps = figures.series["step"].rows().columns["step"].tolist()
        assert steps == sorted(set(steps))
    history = History(Path("nowhere"))
    for history._figures in (held, again):
        json.dumps(history.view(10), allow_nan=False)
    count = sum(held.series["step"].rows().columns["of"])
    assert sum(again.series["step"].rows().columns["of"]) == count


def test_lines_of_a_newer_version_are_kept_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path, rests=False)
    put(history, step(1), {"kind": "weather", "time": 1.0, "sky": "blue"})
    history._begin()
    history.settle()
    assert lines(path)[1] == {"kind": "weather", "time": 1.0, "sky": "blue"}
    assert history.view(10)["events"] == []


def test_neither_a_link_nor_a_pipe_is_followed(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    other.write_text("mine\n")
    path.symlink_to(other)
    history = History(path)
    with pytest.raises(OSError):
        history.load()
    with pytest.raises(OSError):
        history.append(step(1))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        history.load()
    assert other.read_text() == "mine\n" and history.view(10)["steps"]["step"] == []


def test_a_line_of_any_length_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MOST_LINE_BYTES", 16)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\n" + b"x" * 1000 + b"\ntwo\n" + b"y" * 16 + b"\nthree")
    assert list(lines_of(path, 0)) == [b"one", b"two", b"three"]
    assert list(lines_of(path, 1)) == [b"two", b"three"]
    assert list(lines_of(path, 0, 2)) == [b"one"]


# --- while others write and read --------------------------------------------------------------------------------------


def test_a_crash_while_it_is_thinned_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path, rests=False)
    put(history, *(step(n) for n in range(1, 3000)))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for broken in (lambda: monkeypatch.setattr(history_module, "write_all", full),
                   lambda: monkeypatch.setattr(Path, "rename", full)):  # fmt: skip
        with monkeypatch.context():
            broken()
            history._begin()
            history.settle()
        monkeypatch.undo()
        assert "cannot be thinned and grows" in str(history.problem)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    history._begin()
    history.settle()
    assert history.problem is None and path.stat().st_size < len(before)


def test_what_is_appended_while_it_is_thinned_is_in_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path, rests=False)
    put(history, *(step(n) for n in range(1, 3000)))
    reached, go = threading.Event(), threading.Event()
    fsync = os.fsync

    def waiting(file: int) -> None:
        fsync(file)
        reached.set()
        assert go.wait(30)

    monkeypatch.setattr(os, "fsync", waiting)
    history._begin()
    assert reached.wait(30)
    put(history, *(step(n) for n in range(3000, 3200)), event(3199, "commit"))  # nobody waits for the thinning
    assert history.view(4000)["steps"]["step"][-1] == 3199
    go.set()
    history.settle()
    put(history, step(3200))
    told = [r["step"] for r in lines(path) if r["kind"] == "step"]
    assert told[-201:] == list(range(3000, 3201)) and len(told) < 3000
    assert history.view(4000) == _loaded(tmp_path).view(4000)


def test_the_end_of_the_daemon_does_not_wait_for_a_thinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "REST_S", 30.0)
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    put(history, *(step(n) for n in range(1, 300)))
    before = path.read_bytes()
    history._begin()
    history.close()
    assert history._thread is not None and not history._thread.is_alive()
    assert path.read_bytes() == before and history.problem is None


def test_a_large_file_of_old_is_opened_at_its_end_and_then_thinned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line_of(step(n)) + b"\n" for n in range(1, 5001)))
    history = History(path, most_bytes=1 << 17, budget_bytes=1 << 16)
    history.load()
    history.settle()
    assert path.stat().st_size <= 1 << 16
    seen = history.view(4000)["steps"]
    assert seen["step"][0] == 1 and seen["step"][-1] == 5000
