"""The pipeline's promises: resume anywhere, bit for bit; every record once; decisions replayed, not retaken."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytimed.contracts import AnytimedError, Batch, ConfigError, Json, Refused, SourceRule
from anytimed.data.mixture import Mixture
from anytimed.data.pipeline import Dry, Interrupted, Pipeline
from anytimed.data.shuffle import permutation
from tests.data.world import END, Flaky, MemoryJournal, World, batches, told

FORMATS = {"lines": "jsonl", "texts": "text"}
WEIGHTS = {"lines": 2.0, "texts": 1.0}

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)
events = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(sorted(FORMATS)), st.sampled_from("abc"), lengths),
        st.tuples(st.just("poll")),
        st.tuples(st.just("read"), st.integers(1, 6)),
        st.tuples(st.just("crash"), st.floats(0, 1)),
    ),
    min_size=3,
    max_size=16,
)
shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 63),
        "batch_size": st.integers(1, 5),
        "sequence_length": st.integers(1, 12),
        "shuffle_block_sequences": st.integers(1, 12),
        "holdout_fraction": st.sampled_from([0.0, 0.1, 0.5]),
        "holdout_max_tokens": st.integers(1, 80),
    }
)


def is_held_out(document: list[int], fraction: float) -> bool:
    digest = hashlib.sha256(" ".join(map(str, document)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def audit(world: World, pipeline: Pipeline, made: list[Batch]) -> None:
    """Of a dry pipeline: what it read was a target exactly once, or held out, or waits for less than one batch."""
    fraction, sources = world.settings["holdout_fraction"], pipeline.status()["sources"]
    written = {name: {tuple(d): is_held_out(d, fraction) for d in world.written[name]} for name in world.written}
    held = {token for documents in written.values() for d, out in documents.items() if out for token in d}
    targets = [token for batch in made for token in batch.tokens[:, 1:].ravel().tolist()]
    inputs = {token for batch in made for token in batch.tokens.ravel().tolist()} - {END}
    assert max(Counter(token for token in targets if token != END).values(), default=0) <= 1
    assert not inputs & held
    evaluated = {token for record in (made[-1].holdout.records if made else ()) for token in record.tokens.tolist()}
    assert evaluated <= held | {END}

    # as many targets as tokens that were packed, but the first token of all and what waits for a batch
    batch_tokens = world.settings["batch_size"] * world.settings["sequence_length"]
    packed = sum(source["tokens"] for source in sources.values())
    assert 0 <= packed - 1 - len(targets) < batch_tokens or not packed

    # nothing of a source that was read to its end was passed over (one that is dry makes the others wait)
    read = [name for name, source in sources.items() if not source["lag_bytes"]]
    assert read or not any(written.values())
    for name in read:
        outs = list(written[name].values())
        assert (sources[name]["records"], sources[name]["held_out"]) == (outs.count(False), outs.count(True))
        due = {token for d, out in written[name].items() if not out for token in d}
        assert len(due - inputs) <= batch_tokens


@given(events, shapes, st.lists(st.integers(0, 12), max_size=30))
@settings(max_examples=150, deadline=None)
def test_every_record_once_and_every_resume_alike_whatever_happens_when(
    tmp_path_factory: pytest.TempPathFactory, happened: list[tuple], shape: dict[str, object], hiccups: list[int]
) -> None:
    """`hiccups`: after how many answers a store fails next. What then was decided, a replay repeats for which every
    store answers."""
    world = World(tmp_path_factory.mktemp("world"), FORMATS, WEIGHTS, dict(shape))
    journal = MemoryJournal()
    made: list[Batch] = []

    def living() -> Pipeline:
        flaky = {name: Flaky(stream, hiccups) for name, stream in world.streams().items()}
        return world.pipeline(journal, made[-1].position if made else None, streams=flaky)

    pipeline = living()

    def read(most: int) -> None:
        source = batches(pipeline)
        made.extend(batch for _, batch in zip(range(most), source, strict=False))

    for event, *what in [*happened, *[("read", 10**6)] * (len(hiccups) + 1)]:
        match event, what:
            case "write", [source, file, sizes]:
                world.write(source, file, sizes)
            case "poll", _:
                pipeline.poll()
            case "read", [most]:
                read(most)
            case "crash", [share]:  # fall back to a commit; what was decided since stands in the journal
                keep = int(share * (len(made) + 1))
                committed, again = made[:keep], made[keep:]
                made = list(committed)
                pipeline = living()
                for _ in range(2 * len(hiccups) + 1):
                    read(len(committed) + len(again) - len(made))
                assert list(map(trained, made)) == list(map(trained, [*committed, *again]))
    audit(world, pipeline, made)

    # from every position, with the whole journal, the rest of the line comes again; stop where a stride keeps this fast
    for i in range(-1, len(made), 1 + len(made) // 8):
        resumed = world.pipeline(MemoryJournal(journal.entries("data")), made[i].position if i >= 0 else None)
        rest = [told(batch) for batch in batches(resumed)]
        assert rest == [told(batch) for batch in made[i + 1 :]]


def trained(batch: Batch) -> tuple[object, ...]:
    """A batch without how much of the journal was in effect: where a store fails while steps are trained again that no
    decision stands behind, a poll may come sooner than it did, and adopt what the steps do not come to."""
    position = replace(batch.position, journal_length=0, journal_digest="")
    return told(replace(batch, position=position))


def static_world(tmp_path: Path, documents: int = 60, **more: object) -> World:
    world = World(tmp_path, FORMATS, WEIGHTS, dict(more))
    for source in FORMATS:
        for file in "abc":
            world.write(source, file, [1 + (7 * i) % 23 for i in range(documents // 3)])
    return world


def test_equals_the_plain_program(tmp_path: Path) -> None:
    """The slow twin: the same batches from lists, for data that was all there from the start."""
    world = static_world(tmp_path)
    made = list(batches(world.pipeline(MemoryJournal())))

    ordered = {name: iter(sorted(world.written[name], key=lambda d: d[0])) for name in FORMATS}
    mixture = Mixture({name: SourceRule(weight) for name, weight in WEIGHTS.items()}, 7)
    flat: list[int] = []
    plain: list[list[int]] = []
    block: list[list[int]] = []
    draw = blocks = 0
    while (document := next(ordered[mixture.pick(draw)], None)) is not None:
        draw += 1
        if not is_held_out(document, 0.2):
            flat += [*document, END]
        while len(flat) > 8:
            block.append(flat[:9])
            flat = flat[8:]
        if len(block) >= 6:
            plain += [block[i] for i in permutation(7, blocks, len(block))]
            block, blocks = [], blocks + 1
    rows = [row for batch in made for row in batch.tokens.tolist()]
    assert len(plain) > 50
    assert rows[: len(plain)] == plain[: len(rows)]


def test_a_resume_after_every_batch_is_the_undisturbed_run(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    journal = MemoryJournal()
    undisturbed = [told(batch) for batch in batches(world.pipeline(journal))]
    positions = [batch.position for batch in batches(world.pipeline(MemoryJournal(journal.entries("data"))))]
    assert {position.index for position in positions} > {0}, "positions inside blocks and at their ends"
    for i, position in enumerate(positions):
        resumed = world.pipeline(MemoryJournal(journal.entries("data")), position)
        assert [told(batch) for batch in batches(resumed)] == undisturbed[i + 1 :]


def test_a_crash_at_every_write_of_the_journal_loses_and_repeats_nothing(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def later(world: World) -> None:
        world.write("lines", "b", [9, 9])
        world.write("texts", "d", [20])

    class Mortal(MemoryJournal):
        kill_at: int | None = None

        def append(self, scope: str, entry: Json) -> None:
            if len(self.told) == self.kill_at:
                raise Killed
            super().append(scope, entry)

    def lived(folder: Path, kill_at: int | None) -> tuple[list[object], int]:
        world = static_world(folder, documents=30, holdout_fraction=0.0)
        mortal = Mortal()
        mortal.kill_at = kill_at
        journal: MemoryJournal = mortal
        made: list[Batch] = []
        pipeline = world.pipeline(journal)
        for happen in (lambda: None, lambda: later(world)):
            happen()
            try:
                made.extend(batches(pipeline))
            except Killed:
                journal = MemoryJournal(journal.entries("data"))
                pipeline = world.pipeline(journal, made[-1].position if made else None)
                made.extend(batches(pipeline))
        audit(world, pipeline, made)
        return [told(batch)[0] for batch in made], len(journal.told)

    undisturbed, writes = lived(tmp_path / "undisturbed", None)
    assert writes > 10
    for kill_at in range(writes):
        assert lived(tmp_path / str(kill_at), kill_at)[0] == undisturbed


def test_a_decision_that_the_journal_cannot_take_waits_and_changes_nothing(tmp_path: Path) -> None:
    """At every append once, and at all of them now and then: the batches are those of the undisturbed run, and so is
    the order of the journal."""

    class Full(MemoryJournal):
        refused: Callable[[int], bool] = staticmethod(lambda n: False)
        asked = 0

        def append(self, scope: str, entry: Json) -> None:
            self.asked += 1
            if self.refused(self.asked):
                raise AnytimedError("journal.jsonl: entry not written: No space left on device")
            super().append(scope, entry)

    def lived(folder: Path, refused: Callable[[int], bool]) -> tuple[list[object], list[Json], int]:
        world = static_world(folder, documents=30, holdout_fraction=0.0)
        journal = Full()
        journal.refused = refused  # type: ignore[method-assign]
        pipeline = world.pipeline(journal)
        made: list[Batch] = []
        for happen in (lambda: None, lambda: world.write("lines", "b", [9, 9])):
            happen()
            for _ in range(4):  # as the discovery asks again and again
                before = journal.asked
                made.extend(batches(pipeline))
                if pipeline.status()["undecided"] is None:
                    continue
                assert "No space left" in pipeline.status()["undecided"] and journal.asked > before
        assert pipeline.status()["undecided"] is None
        audit(world, pipeline, made)
        replayed = list(batches(world.pipeline(MemoryJournal(journal.entries("data")))))
        assert [told(batch) for batch in replayed] == [told(batch) for batch in made]
        return [told(batch)[0] for batch in made], journal.entries("data"), journal.asked

    undisturbed, entries, asked = lived(tmp_path / "undisturbed", lambda n: False)
    assert asked > 10
    for n in range(1, asked + 1):
        made, after, _ = lived(tmp_path / str(n), lambda asked, n=n: asked == n)  # type: ignore[misc]
        assert made == undisturbed and [e["kind"] for e in after] == [e["kind"] for e in entries], n


def test_a_dry_block_is_cut_once_a_poll_found_nothing_and_again_in_a_replay(tmp_path: Path) -> None:
    world = World(
        tmp_path, {"lines": "jsonl"}, {"lines": 1.0}, {"holdout_fraction": 0.0, "shuffle_block_sequences": 100}
    )
    world.write("lines", "a", [24])
    journal = MemoryJournal()
    pipeline = world.pipeline(journal)
    assert pipeline.poll() == 1
    assert isinstance(pipeline.next_batch(), Dry)
    assert isinstance(pipeline.next_batch(), Dry), "without a poll the block waits"
    assert pipeline.poll() == 0
    first = pipeline.next_batch()
    assert isinstance(first, Batch)
    cut = {"kind": "block_cut", "block": 0, "draw": 1, "sequences": 3}
    assert journal.entries("data")[2:] == [cut]
    dry = pipeline.next_batch()
    assert dry == Dry({"lines": "all of its 1 entries have been read"})
    assert (first.position.block, first.position.index) == (0, 2)

    # data comes: the sequence that was left over and the next block make one batch
    world.write("lines", "a", [24])
    replayed = world.pipeline(MemoryJournal(journal.entries("data")), first.position)
    for each in (pipeline, replayed):
        rest = list(batches(each))
        assert [batch.tokens.shape for batch in rest] == [(2, 9), (2, 9)]
        assert rest[0].position.block == 1


def test_no_block_is_cut_for_less_than_a_batch(tmp_path: Path) -> None:
    world = World(tmp_path, {"lines": "jsonl"}, {"lines": 1.0}, {"holdout_fraction": 0.0, "batch_size": 4})
    world.write("lines", "a", [24])
    journal = MemoryJournal()
    assert list(batches(world.pipeline(journal))) == []
    assert [entry["kind"] for entry in journal.entries("data")] == ["mixture", "discovered"]


def test_a_dry_source_is_waited_for_and_says_why(tmp_path: Path) -> None:
    world = World(tmp_path, FORMATS, WEIGHTS)
    world.write("lines", "a", [5] * 200)
    pipeline = world.pipeline(MemoryJournal())
    pipeline.poll()
    made = list(batches(pipeline))
    dry = pipeline.next_batch()
    assert isinstance(dry, Dry)
    assert dry.reasons == {"texts": "nothing was found yet"}
    # the draws are those of the mixture: nothing was taken in place of the source that is waited for
    assert sum(batch.read["lines"].records for batch in made[-1:]) <= 20


def test_a_source_that_does_not_answer_is_tried_again(tmp_path: Path) -> None:
    world = static_world(tmp_path / "world")
    undisturbed = [told(batch) for batch in batches(world.pipeline(MemoryJournal()))]
    journal = MemoryJournal()
    pipeline = world.pipeline(journal)
    pipeline.poll()
    away = tmp_path / "away"
    (world.folder / "texts").rename(away)
    made = []
    assert isinstance(dry := pipeline.next_batch(), Dry)
    assert "is not there" in dry.reasons["texts"]
    away.rename(world.folder / "texts")
    made += [told(batch) for batch in batches(pipeline)]
    assert made == undisturbed

    # the same at a restart, where what was finished must be verified before anything is read
    committed = list(batches(world.pipeline(MemoryJournal(journal.entries("data")))))[-2]
    for file in (world.folder / "texts").iterdir():
        os.utime(file)
    (world.folder / "texts").rename(away)
    resumed = world.pipeline(MemoryJournal(journal.entries("data")), committed.position)
    assert isinstance(resumed.next_batch(), Dry)
    away.rename(world.folder / "texts")
    assert [told(batch) for batch in batches(resumed)] == undisturbed[-1:]


# --- refusals ---------------------------------------------------------------------------------------------------------


def lived_to_the_end(tmp_path: Path) -> tuple[World, MemoryJournal, list[Batch]]:
    world = static_world(tmp_path)
    journal = MemoryJournal()
    made = list(batches(world.pipeline(journal)))
    assert len(made) > 20
    return world, journal, made


def rewrite(file: Path) -> None:
    content = file.read_text()
    at = next(i for i, character in enumerate(content) if character.isdigit())
    file.write_text(content[:at] + str((int(content[at]) % 8) + 1) + content[at + 1 :])
    os.utime(file, ns=(0, 0))


@pytest.mark.parametrize("file", ["lines/a.jsonl", "lines/c.jsonl"])
def test_refuses_a_rewritten_file_before_and_behind_the_position(tmp_path: Path, file: str) -> None:
    world, journal, made = lived_to_the_end(tmp_path)
    middle = made[len(made) // 2].position
    rewrite(world.folder / file)
    with pytest.raises(Refused, match="--fresh"):
        list(batches(world.pipeline(journal, middle)))
        # of the last file no end was journalled: it stays open to be appended to, and its beginning is checked when
        # a position inside it is resumed
        list(batches(world.pipeline(journal, made[-1].position)))


def test_refuses_a_file_that_lost_records_that_the_commit_had_used(tmp_path: Path) -> None:
    world, journal, made = lived_to_the_end(tmp_path)
    for file in (world.folder / "lines").iterdir():
        file.write_bytes(b"\n" * file.stat().st_size)
    with pytest.raises(Refused):
        list(batches(world.pipeline(journal, next(b for b in made if b.position.index).position)))


def test_a_replay_refuses_a_file_that_ends_with_another_digest_than_journalled(tmp_path: Path) -> None:
    world = static_world(tmp_path, holdout_fraction=0.0)
    journal = MemoryJournal()
    list(batches(world.pipeline(journal)))
    rewrite(world.folder / "lines/a.jsonl")
    # from the very beginning: nothing was finished yet that a start could verify
    with pytest.raises(Refused, match=r"'kind': 'finished'.* came to block \d+ finished"):
        list(batches(world.pipeline(journal)))


def test_refuses_a_block_that_became_shorter_than_what_was_used_of_it(tmp_path: Path) -> None:
    world = World(tmp_path, {"lines": "jsonl"}, {"lines": 1.0}, {"holdout_fraction": 0.0})
    world.write("lines", "a", [100, 60])
    journal = MemoryJournal()
    used = next(batch.position for batch in batches(world.pipeline(journal)) if batch.position.index > 8)
    file = world.folder / "lines/a.jsonl"
    file.write_text(re.sub("(?<=[13579]) ", "0", file.read_text()))  # as many bytes, half as many words
    with pytest.raises(Refused, match=rf"the commit had used {used.index}"):
        list(batches(world.pipeline(journal, used)))


def test_what_a_start_could_not_verify_is_verified_before_it_is_read(tmp_path: Path) -> None:
    world, journal, made = lived_to_the_end(tmp_path)
    rewrite(world.folder / "lines/a.jsonl")
    streams = {name: Flaky(stream, [0]) for name, stream in world.streams().items()}
    resumed = world.pipeline(journal, made[-1].position, streams=streams)
    with pytest.raises(Refused, match=r"a\.jsonl"):
        list(batches(resumed))


def test_refuses_a_source_that_reads_something_else(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    journal = MemoryJournal()
    made = list(batches(world.pipeline(journal, texts={"reads": {"url": "data"}, "identity": "a"})))
    with pytest.raises(ConfigError, match=r"source 'texts' reads something else than before: .*another"):
        world.pipeline(journal, made[0].position, texts={"reads": {"text_field": "another"}, "identity": "b"})
    world.pipeline(journal, made[0].position, texts={"reads": {"url": "data that was moved"}, "identity": "a"})


@pytest.mark.parametrize("drop", [0, 1, -1])
def test_refuses_a_journal_that_lost_an_entry(tmp_path: Path, drop: int) -> None:
    world, journal, made = lived_to_the_end(tmp_path)
    entries = journal.entries("data")
    del entries[drop]
    with pytest.raises(Refused, match=r"journal.*--fresh"):
        list(batches(world.pipeline(MemoryJournal(entries), made[-1].position)))


@pytest.mark.parametrize("more", [{"seed": 8}, {"sequence_length": 9}, {"shuffle_block_sequences": 40}])
def test_refuses_a_replay_under_other_settings(tmp_path: Path, more: dict[str, int]) -> None:
    world, journal, _ = lived_to_the_end(tmp_path)
    with pytest.raises(Refused, match="settings that say how data is read were changed"):
        list(batches(world.pipeline(journal, None, **more)))


def test_a_rewritten_file_is_found_by_a_poll_of_a_running_pipeline(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    pipeline = world.pipeline(MemoryJournal())
    list(batches(pipeline))
    rewrite(world.folder / "lines/a.jsonl")
    with pytest.raises(Refused, match=r"a\.jsonl"):
        pipeline.poll()


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_position_keeps_its_size_as_files_grow(tmp_path: Path) -> None:
    world = World(tmp_path, FORMATS, WEIGHTS, {"sequence_length": 64, "holdout_fraction": 0.0})
    pipeline = world.pipeline(MemoryJournal())
    sizes = []
    for i in range(30):
        world.write("lines", f"{i}", [50] * 20)
        world.write("texts", f"{i}", [5000])  # a document far longer than a block
        made = list(batches(pipeline))
        # before the first block a source has no place yet
        sizes += [len(json.dumps(batch.position.to_json())) for batch in made if batch.position.block]
    assert len(sizes) > 300
    # numbers gain digits, and the remainder is 1 to 64 tokens: 4 bytes each, in base64
    assert max(sizes) - min(sizes) <= 64 * 4 * 4 // 3 + 80


def test_counts_what_it_read_per_source(tmp_path: Path) -> None:
    world = World(tmp_path, FORMATS, WEIGHTS, {"holdout_fraction": 0.5, "batch_size": 1, "shuffle_block_sequences": 1})
    world.write("lines", "a", [10] * 40)
    world.write("texts", "a", [10] * 40)
    with (world.folder / "lines/a.jsonl").open("a") as file:
        file.write("not JSON\n")
    world.write("lines", "b", [10] * 10)
    rejected = []
    pipeline = world.pipeline(MemoryJournal(), quarantine=lambda *told: rejected.append(told))
    made = list(batches(pipeline))
    for name in FORMATS:
        read, documents = made[-1].read[name], sorted(world.written[name], key=lambda document: document[0])
        taken = documents[: read.records + read.held_out]
        held = [is_held_out(document, 0.5) for document in taken]
        assert (read.records, read.held_out, read.tokens) == (
            held.count(False),
            held.count(True),
            11 * held.count(False),
        )
    assert made[-1].read["lines"].rejected == 1
    [(source, place, record)] = rejected
    assert (source, "not JSON" in record.reason, place["entry"]) == ("lines", True, 0)
    status = pipeline.status()
    assert status["sources"]["lines"]["entries"] == 2
    assert status["sources"]["texts"]["lag_bytes"] >= 0
    assert not status["replaying"]


def test_the_holdout_in_force_is_the_one_after_the_block_and_the_position_has_the_one_before(tmp_path: Path) -> None:
    _, _, made = lived_to_the_end(tmp_path)
    assert len({batch.holdout.digest for batch in made}) > 3
    by_block = {batch.position.block: batch for batch in made if batch.position.index}
    for block, batch in by_block.items():
        if block + 1 in by_block:
            assert by_block[block + 1].position.holdout.digest == batch.holdout.digest
    ends = [batch for batch in made if not batch.position.index]
    assert ends
    assert all(batch.position.holdout.digest == batch.holdout.digest for batch in ends)


def test_an_interrupted_pipeline_decides_nothing_more(tmp_path: Path) -> None:
    world = static_world(tmp_path)
    journal = MemoryJournal()
    pipeline = world.pipeline(journal)
    pipeline.interrupt()
    with pytest.raises(Interrupted):
        pipeline.poll()
    with pytest.raises(Interrupted):
        pipeline.next_batch()
    assert journal.told == []


def test_a_batch_may_span_many_blocks(tmp_path: Path) -> None:
    more = {"batch_size": 16, "shuffle_block_sequences": 2}
    world = static_world(tmp_path, **more)
    journal = MemoryJournal()
    made = list(batches(world.pipeline(journal)))
    assert made[0].position.block > 3
    for i, batch in enumerate(made):
        rest = [told(b) for b in batches(world.pipeline(MemoryJournal(journal.entries("data")), batch.position))]
        assert rest == [told(b) for b in made[i + 1 :]]


def test_data_that_the_journal_cannot_take_for_now_waits_and_is_found_again(tmp_path: Path) -> None:
    class Full(MemoryJournal):
        full = False

        def append(self, scope: str, entry: Json) -> None:
            if self.full:
                raise AnytimedError("journal.jsonl: entry not written: No space left on device")
            super().append(scope, entry)

    world = World(
        tmp_path, {"lines": "jsonl"}, {"lines": 1.0}, {"holdout_fraction": 0.0, "shuffle_block_sequences": 100}
    )
    world.write("lines", "a", [24])
    journal = Full()
    pipeline = world.pipeline(journal)
    pipeline.poll()
    assert isinstance(pipeline.next_batch(), Dry)
    world.write("lines", "b", [9] * 3)
    journal.full = True
    assert pipeline.poll() == 0
    assert "1 new entries wait: journal.jsonl: entry not written" in pipeline.status()["undecided"]
    assert isinstance(pipeline.next_batch(), Dry), "there is something new, so no block is cut short"
    journal.full = False
    assert pipeline.poll() == 1
    assert pipeline.status()["undecided"] is None
    audit(world, pipeline, list(batches(pipeline)))
