"""The reader: the same batches as the pipeline's own, ahead of the learner, and nothing lost at its edges."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from anytimed.contracts import Batch, Refused, Stream
from anytimed.data.cursor import Interrupted
from anytimed.data.pipeline import Dry
from anytimed.data.reader import Reader
from tests.data.test_pipeline import static_world
from tests.data.world import MemoryJournal, World, batches, told

PATIENCE_S = 20.0  # far more than any step here needs, even on a busy core: only a hang takes as long


def drain(reader: Reader) -> tuple[list[Batch], Dry]:
    made = []
    while True:
        match reader.get(PATIENCE_S):
            case Batch() as batch:
                made.append(batch)
            case Dry() as dry:
                return made, dry
            case None:
                pytest.fail(f"the reader hangs: {reader.status()}")


def until(happened: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 3])
def test_gives_the_batches_of_the_pipeline_and_goes_on_when_data_comes(tmp_path: Path, depth: int) -> None:
    world = static_world(tmp_path)
    journal = MemoryJournal()
    reader = Reader(world.pipeline(journal), depth)
    reader.start()
    made, dry = drain(reader)
    assert set(dry.reasons) < {"lines", "texts"}
    assert reader.get(0.0) == dry, "dry until someone asks for a poll"
    assert reader.status()["waiting"] == dry.reasons

    world.write("lines", "d", [20] * 30)
    world.write("texts", "d", [20] * 30)
    reader.poll()
    more, _ = drain(reader)
    assert more
    assert reader.close()
    replayed = [told(batch) for batch in batches(world.pipeline(MemoryJournal(journal.entries("data"))))]
    assert [told(batch) for batch in made + more] == replayed


def test_reads_ahead_as_far_as_the_queue_is_deep_and_serves_polls_meanwhile(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    reader = Reader(world.pipeline(MemoryJournal()), 3)
    reader.start()
    until(lambda: reader.status()["ready"] == 3)
    assert reader.status()["sources"]["lines"]["entries"] == 3
    world.write("lines", "d", [5])
    reader.poll()
    until(lambda: reader.status()["sources"]["lines"]["entries"] == 4)
    assert reader.status()["ready"] == 3
    assert reader.status()["sources"]["lines"]["lag_bytes"] > 0
    assert reader.close()


def test_a_failure_is_raised_after_the_batches_that_were_made_before_it(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    reader = Reader(world.pipeline(MemoryJournal()), 1000)
    reader.start()
    until(lambda: reader.status()["waiting"])
    (world.folder / "lines/a.jsonl").write_text("{}")
    reader.poll()
    count = 0
    with pytest.raises(Refused, match=r"a\.jsonl"):
        while isinstance(reader.get(PATIENCE_S), Batch):
            count += 1
    assert count > 20
    with pytest.raises(Refused):
        reader.get(0.0)
    assert reader.close()


def test_nothing_ready_yet_is_none_and_closing_does_not_wait_for_a_store_that_hangs(tmp_path: Path) -> None:
    world = World(tmp_path, {"lines": "jsonl"}, {"lines": 1.0}, {"holdout_fraction": 0.0})
    world.write("lines", "a", [30] * 10)
    hangs, entered = threading.Event(), threading.Event()
    streams = world.streams()

    class Hanging:
        def __getattr__(self, name: str) -> object:
            return getattr(streams["lines"], name)

        def read(self, place: object) -> object:
            entered.set()
            assert hangs.wait(PATIENCE_S)
            return streams["lines"].read(place)

    journal = MemoryJournal()
    reader = Reader(world.pipeline(journal, streams={"lines": Hanging()}), 2)
    reader.start()
    assert entered.wait(PATIENCE_S)
    assert reader.get(0.01) is None
    decided = journal.entries("data")
    assert not reader.close(timeout_s=0.01)
    with pytest.raises(Interrupted):
        reader.get(PATIENCE_S)
    # whoever takes over writes the same journal: when the store answers at last, the old thread decides nothing more
    hangs.set()
    assert reader.close()
    assert journal.entries("data") == decided


def test_closing_wakes_a_thread_that_sleeps_on_a_full_queue_or_a_dry_stream(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    full, dry = Reader(world.pipeline(MemoryJournal()), 1), Reader(world.pipeline(MemoryJournal()), 1000)
    for reader in (full, dry):
        reader.start()
    until(lambda: full.status()["ready"] == 1)
    until(lambda: dry.status()["waiting"])
    assert full.close()
    assert dry.close()


def test_a_poll_that_takes_long_is_not_all_that_is_done(tmp_path: Path) -> None:
    """Asked for all the time, a slow poll takes its turn with reading; where there is nothing to read it is made."""
    world = static_world(tmp_path)
    pipeline = world.pipeline(MemoryJournal())
    polled, poll = [0], pipeline.poll

    def slow(*, prepared: bool = False) -> int:
        polled[0] += 1
        time.sleep(0.05)
        return poll(prepared=prepared)

    pipeline.poll = slow  # type: ignore[method-assign]
    reader = Reader(pipeline, 2)
    reader.start()
    made = 0
    while isinstance(got := reader.get(PATIENCE_S), Batch):
        made += 1
        reader.poll()
    assert made > 20
    assert isinstance(got, Dry)
    assert polled[0] < 10, "fifty times as long in between"
    before = polled[0]
    reader.poll()
    until(lambda: polled[0] > before)
    reader.close()


def test_what_a_poll_waits_for_is_prepared_beside_the_reading(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    pipeline = world.pipeline(MemoryJournal())
    begun: list[Callable[[], None]] = []
    polls: list[bool] = []
    poll = pipeline.poll

    def noted(*, prepared: bool = False) -> int:
        polls.append(prepared)
        return poll(prepared=prepared)

    pipeline.prepare = begun.append  # type: ignore[method-assign]
    pipeline.poll = noted  # type: ignore[method-assign]
    reader = Reader(pipeline, 1)
    reader.start()
    assert isinstance(reader.get(PATIENCE_S), Batch)
    before = len(polls)  # at the start there was nothing to read
    reader.poll()
    until(lambda: begun)
    for _ in range(3):
        reader.poll()
        assert isinstance(reader.get(PATIENCE_S), Batch), "nothing waits for it"
    assert len(begun) == 1 and len(polls) == before
    begun[0]()
    until(lambda: polls[before:] == [True])

    # Nothing to read any more: a poll does not wait for what is being prepared, and looks for itself.
    drain(reader)
    world.write("lines", "z", [20] * 30)
    world.write("texts", "z", [20] * 30)
    reader.poll()
    assert drain(reader)[0]
    assert not any(polls[before + 1 :])
    assert reader.close()


class Closed:
    """A stream that counts how often it was closed, and may fail to be."""

    def __init__(self, stream: Stream, failure: Exception | None = None) -> None:
        self._stream, self._failure = stream, failure
        self.closed = 0

    def close(self) -> None:
        self.closed += 1
        if self._failure is not None:
            raise self._failure

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@pytest.mark.parametrize("asleep", ["full", "dry", "failed", "never started"])
def test_whatever_it_does_when_it_is_closed_the_streams_are_closed_and_everything_is_let_go(
    tmp_path: Path, asleep: str
) -> None:
    """Without the collector, which leaves what is old alone: after a hundred reloads the buffers of a hundred readers
    would be there."""
    world = static_world(tmp_path)
    streams = {name: Closed(stream) for name, stream in world.streams().items()}

    def closed() -> list[weakref.ref[object]]:
        """Its parts, once it was asleep and was closed."""
        pipeline = world.pipeline(MemoryJournal(), streams=streams)
        reader = Reader(pipeline, 1 if asleep == "full" else 1000)
        if asleep != "never started":
            reader.start()
            until(lambda: reader.status()["ready"] == 1 if asleep == "full" else reader.status()["waiting"])
        if asleep == "failed":
            (world.folder / "lines/a.jsonl").write_text("{}")
            reader.poll()
            until(lambda: reader._failure)
        assert reader.close()
        return [weakref.ref(part) for part in (pipeline, *pipeline._sources._cursors.values(), pipeline._packer)]

    gc.collect()
    gc.disable()
    try:
        parts = closed()
        once = int(asleep != "never started")
        assert {name: stream.closed for name, stream in streams.items()} == {"lines": once, "texts": once}
        if asleep != "failed":  # the traceback of a failure holds on to it
            assert [part() for part in parts] == [None] * len(parts)
            assert len(parts) == 2 + 2 * once
    finally:
        gc.enable()


def test_a_stream_that_cannot_be_closed_is_told_of_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = static_world(tmp_path)
    streams = {name: Closed(stream, OSError("the broker is gone")) for name, stream in world.streams().items()}
    reader = Reader(world.pipeline(MemoryJournal(), streams=streams), 1)
    reader.start()
    until(lambda: reader.status()["ready"] == 1)
    assert reader.close()
    assert "could not be closed: OSError: the broker is gone" in caplog.text
