"""Mixtures that change, sources that end: nothing is lost or repeated, and a replay comes to the same batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytimed.contracts import Batch, Json, StreamUnavailable
from anytimed.data.pipeline import Dry, Pipeline
from tests.data.world import END, MemoryJournal, World, batches, told

FORMATS = {"a": "jsonl", "b": "text", "c": "jsonl"}
SHAPE = {"holdout_fraction": 0.0, "sequence_length": 8, "shuffle_block_sequences": 4, "batch_size": 2}


def world_of(folder: Path, counts: dict[str, int], **more: Any) -> World:
    world = World(folder, FORMATS, dict.fromkeys(FORMATS, 1.0), {**SHAPE, **more})
    for source, count in counts.items():
        for file in "xyz":
            world.write(source, file, [3 + (5 * i) % 17 for i in range(count)])
    return world


def trained_on(made: list[Batch]) -> Counter[int]:
    return Counter(token for batch in made for token in batch.tokens[:, 1:].ravel().tolist() if token != END)


def by_source(made: list[Batch]) -> dict[str, set[int]]:
    """The tokens of each source by what the labels say."""
    found: dict[str, set[int]] = {}
    for batch in made:
        for targets, labels in zip(batch.tokens[:, 1:].tolist(), batch.labels.tolist(), strict=True):
            for token, label in zip(targets, labels, strict=True):
                if token != END:
                    found.setdefault(batch.sources[label], set()).add(token)
    return found


def written(world: World) -> dict[str, list[int]]:
    return {name: [token for document in documents for token in document] for name, documents in world.written.items()}


def take(pipeline: Pipeline, most: int) -> list[Batch]:
    return [batch for _, batch in zip(range(most), batches(pipeline), strict=False)]


# --- changes ----------------------------------------------------------------------------------------------------------

weights = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 3.0]), min_size=1)
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 5)),
        st.tuples(st.just("change"), weights, st.integers(0, 3)),
        st.tuples(st.just("crash"), st.floats(0, 1)),
        st.tuples(
            st.just("write"), st.sampled_from("abc"), st.sampled_from("xw"), st.lists(st.integers(1, 30), max_size=4)
        ),
    ),
    min_size=3,
    max_size=14,
)


@given(happenings, st.sampled_from([{}, {"batch_size": 3}, {"shuffle_block_sequences": 9}]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_changes_lose_and_repeat_nothing_and_a_replay_is_the_same_line(
    tmp_path_factory: pytest.TempPathFactory, happened: list[tuple[Any, ...]], more: dict[str, int], others: bool
) -> None:
    """A change goes on from the last batch that was trained on, `ahead` batches of which were read beyond it."""
    world = world_of(tmp_path_factory.mktemp("world"), {"a": 8, "b": 5, "c": 6}, **more)
    journal = MemoryJournal()
    made: list[Batch] = []
    mixture: dict[str, float] = {"a": 1.0, "b": 2.0}
    rules = {name: {"when_dry": "others"} for name in "abc"} if others else {}

    def living() -> Pipeline:
        return world.pipeline(journal, made[-1].position if made else None, weights=mixture, **rules)

    pipeline = living()
    for event, *what in [*happened, ("read", 10**6)]:
        match event, what:
            case "read", [most]:
                made += take(pipeline, most)
            case "write", [source, file, sizes]:
                world.write(source, file, sizes)
            case "change", [new, ahead]:
                take(pipeline, ahead)
                mixture = new
                pipeline = living()
            case "crash", [share]:
                changes = [entry["sources"] for entry in journal.entries("data") if entry["kind"] == "mixture"]
                if not changes or {name: rule["weight"] for name, rule in changes[-1].items()} != mixture:
                    continue  # a change that nothing has come of yet: the next test
                kept = int(share * (len(made) + 1))
                again, made = made[kept:], made[:kept]
                pipeline = living()
                replayed = take(pipeline, len(again))
                assert list(map(told, replayed)) == list(map(told, again))
                made += replayed

    counts, owners = trained_on(made), by_source(made)
    assert max(counts.values(), default=1) == 1, "no record twice"
    for name, tokens in written(world).items():
        assert owners.get(name, set()) <= set(tokens)
    # without a gap: what was packed was a target, but for the first token of all and what waits for a batch
    packed = {name: at.tokens for name, at in (made[-1].read if made else {}).items()}
    packed |= {name: at["tokens"] for name, at in pipeline.status()["sources"].items()}
    batch_tokens = world.settings["batch_size"] * world.settings["sequence_length"]
    assert 0 <= sum(packed.values()) - 1 - len(made) * batch_tokens < batch_tokens or not made
    assert [batch.number for batch in made] == list(range(1, len(made) + 1))

    replay = world.pipeline(journal.copy(), None, weights=mixture, **rules)
    assert [told(batch) for batch in batches(replay)] == [told(batch) for batch in made]


def waiting(world: World) -> int:
    """The most tokens that are read and not trained on."""
    sequences = world.settings["shuffle_block_sequences"] + world.settings["batch_size"] + 5
    return int(sequences * world.settings["sequence_length"])


def test_a_change_takes_effect_at_the_next_block_and_leaves_the_others_where_they_are(tmp_path: Path) -> None:
    world = world_of(tmp_path, {"a": 30, "b": 30, "c": 30})
    journal = MemoryJournal()
    mixture = {"a": 1.0, "b": 1.0}
    pipeline = world.pipeline(journal, weights=mixture)
    made = take(pipeline, 5)
    while made[-1].position.index == 0:  # stand inside a block
        made += take(pipeline, 1)
    take(pipeline, 6)  # read ahead, never trained on
    at = made[-1].position
    pipeline = world.pipeline(journal, at, weights={"b": 1.0, "c": 3.0})
    after = take(pipeline, 12)
    begun = [batch for batch in after if batch.mixture.keys() == {"a", "b"}]
    assert [batch.position.block for batch in begun] == [at.block] * len(begun), "the block that was begun is finished"
    changed = after[len(begun) :]
    assert changed[0].mixture.keys() == {"b", "c"}
    assert changed[0].holdout.weights == {"b": 1.0, "c": 3.0}
    assert {"b", "c"} == {
        s for b in changed[3:] for s in (b.sources[label] for label in set(b.labels.ravel().tolist()))
    }
    # a stays where it was and comes back there
    stood = changed[-1].position.sources["a"]
    pipeline = world.pipeline(journal, changed[-1].position, weights={"a": 1.0, "b": 1.0})
    back = take(pipeline, 12)
    assert back[-1].position.sources["a"].records > stood.records
    line = [*made, *after, *back]
    assert max(trained_on(line).values()) == 1
    entries = journal.entries("data")
    assert [list(entry["sources"]) for entry in entries if entry["kind"] == "mixture"] == [
        ["a", "b"], ["b", "c"], ["a", "b"],
    ]  # fmt: skip
    replay = world.pipeline(journal.copy(), None, weights={"a": 1.0, "b": 1.0})
    assert [told(batch) for batch in take(replay, len(line))] == [told(batch) for batch in line]


def test_an_older_commit_under_another_configuration_begins_a_line_of_its_own(tmp_path: Path) -> None:
    """A crash after the change, and a commit from before it: the change takes effect after the commit."""
    world = world_of(tmp_path, {"a": 30, "b": 30, "c": 30})
    journal = MemoryJournal()
    made = take(world.pipeline(journal, weights={"a": 1.0, "b": 1.0}), 6)
    take(world.pipeline(journal, made[-1].position, weights={"a": 1.0, "c": 1.0}), 6)
    rest = take(world.pipeline(journal, made[2].position, weights={"b": 1.0, "c": 1.0}), 10**6)
    assert rest[-1].mixture.keys() == {"b", "c"}
    assert max(trained_on(made[:3] + rest).values()) == 1
    replay = world.pipeline(journal.copy(), made[1].position, weights={"b": 1.0, "c": 1.0})
    assert [told(batch) for batch in batches(replay)] == [told(batch) for batch in [made[2], *rest]]


# --- sources that end -------------------------------------------------------------------------------------------------


def test_a_source_that_ended_leaves_its_draws_to_the_others_until_there_is_more(tmp_path: Path) -> None:
    world = world_of(tmp_path, {"a": 4, "b": 40})
    journal = MemoryJournal()
    rules = {"weights": {"a": 1.0, "b": 1.0}, "a": {"when_dry": "others"}}
    pipeline = world.pipeline(journal, **rules)
    made = take(pipeline, 20)
    assert set(written(world)["a"]) <= set(trained_on(made)), "all of it was read"
    assert pipeline.status()["sources"]["a"]["dry"]
    world.write("a", "w", [9] * 12)
    assert pipeline.poll() == 2, "a new entry, and a source to draw from again"
    assert not pipeline.status()["sources"]["a"]["dry"]
    made += take(pipeline, 10**6)
    assert [e["kind"] for e in journal.entries("data") if e.get("source") == "a"] == [
        "discovered", "left_out", "discovered", "back", "left_out",
    ]  # fmt: skip
    assert isinstance(dry := pipeline.next_batch(), Dry)
    assert dry.reasons == {"b": "all of its 120 entries have been read"}, "somebody has to be waited for"
    everything = {token for name in "ab" for token in written(world)[name]}
    assert len(everything - set(trained_on(made))) <= 2 * 8
    for cut in (0, 7, 19, 25):
        position = made[cut - 1].position if cut else None
        resumed = world.pipeline(journal.copy(), position, **rules)
        assert [told(batch) for batch in batches(resumed)] == [told(batch) for batch in made[cut:]]


def test_a_source_that_does_not_answer_is_left_out_and_comes_back(tmp_path: Path) -> None:
    world = world_of(tmp_path, {"a": 20, "b": 40})
    away = [False]

    class Away:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def read(self, place: Json | None) -> Any:
            for item in self._stream.read(place):
                if away[0]:
                    raise StreamUnavailable("the store does not answer")
                yield item

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    streams = world.streams()
    streams["a"] = Away(streams["a"])
    journal = MemoryJournal()
    rules = {"weights": {"a": 1.0, "b": 1.0}, "a": {"when_dry": "others"}}
    away[0] = True
    pipeline = world.pipeline(journal, streams=streams, **rules)
    made = take(pipeline, 6)
    assert set(by_source(made)) == {"b"}
    away[0] = False
    assert pipeline.poll() == 1
    made += take(pipeline, 10**6)
    assert set(written(world)["a"]) <= set(trained_on(made))
    replay = world.pipeline(journal.copy(), None, **rules)
    assert [told(batch) for batch in batches(replay)] == [told(batch) for batch in made]


def test_a_source_is_read_again_as_often_as_it_says(tmp_path: Path) -> None:
    world = world_of(tmp_path, {"a": 4, "b": 60})
    journal = MemoryJournal()
    rules = {"weights": {"a": 1.0, "b": 1.0}, "a": {"when_dry": "replay", "passes": 3}}
    pipeline = world.pipeline(journal, **rules)
    made = take(pipeline, 10**6)
    counts = trained_on(made)
    assert pipeline.status()["sources"]["a"]["records"] == 3 * 12
    assert {counts[token] for token in written(world)["a"]} <= {2, 3}, "but for the first and what waits, three times"
    assert {counts[token] for token in written(world)["b"]} <= {0, 1}
    assert pipeline.status()["sources"]["a"]["pass_number"] == 3
    assert isinstance(dry := pipeline.next_batch(), Dry)
    assert set(dry.reasons) == {"a"}, "after its passes it is waited for"
    finished = [i for e in journal.entries("data") if e["kind"] == "finished" for i in e["sources"].get("a", {})]
    assert sorted(finished) == ["0", "1", "2"], "each once; the last with the first record of the second pass"
    for cut in range(0, len(made), 5):
        position = made[cut - 1].position if cut else None
        resumed = world.pipeline(journal.copy(), position, **rules)
        assert [told(batch) for batch in batches(resumed)] == [told(batch) for batch in made[cut:]]


# --- bad data ---------------------------------------------------------------------------------------------------------


def test_a_source_with_too_many_bad_records_is_read_no_further_until_its_limits_are_raised(tmp_path: Path) -> None:
    world = world_of(tmp_path, {"a": 10, "b": 60})
    with (world.folder / "a/x.jsonl").open("a") as file:
        file.write("not JSON\n" * 30)
    journal = MemoryJournal()
    limits = {"rejected_records": 5, "rejected_fraction": 0.1}
    pipeline = world.pipeline(journal, weights={"a": 1.0, "b": 1.0}, a=limits)
    made = take(pipeline, 10**6)
    assert isinstance(dry := pipeline.next_batch(), Dry)
    assert "6 of 16 records could not be read" in dry.reasons["a"]
    assert "rejected_records = 5" in pipeline.status()["sources"]["a"]["suspended"]
    raised = {"rejected_records": 100, "rejected_fraction": 0.1}
    pipeline = world.pipeline(journal, made[-1].position, weights={"a": 1.0, "b": 1.0}, a=raised)
    made += take(pipeline, 10**6)
    assert pipeline.status()["sources"]["a"]["rejected"] == 30
    assert max(trained_on(made).values()) == 1
    assert len(set(written(world)["a"]) - set(trained_on(made))) <= waiting(world)

    # where others may take its place, they do
    pipeline = world.pipeline(MemoryJournal(), weights={"a": 1.0, "b": 1.0}, a={**limits, "when_dry": "others"})
    assert set(written(world)["b"]) <= set(trained_on(take(pipeline, 10**6))) | set(range(10**6))
    assert pipeline.status()["sources"]["b"]["lag_bytes"] == 0
