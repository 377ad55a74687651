"""`anytimed prove`: what it says of runs that are equal, that differ, that have no data, and that need not be equal."""

from __future__ import annotations

import copy
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anytimed.config import load
from anytimed.contracts import Json, Snapshot
from anytimed.service import victim
from anytimed.service.prove import inexact, planned
from anytimed.service.sameness import Sameness, compare
from anytimed.storage.commits import Commits
from anytimed.storage.journal import Journal
from tests import tiny
from tests.storage.material import Site, acquired, tensor

NAMES = ("undisturbed", "killed")


# --- comparing --------------------------------------------------------------------------------------------------------


def material() -> tuple[dict[str, Any], Json]:
    x = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(4, 6)
    tensors = {
        "comp.head": tensor(x, "BF16"),
        "holdout.tokens": tensor([1, 2, 3], "I32"),
        "x.head": tensor(x),
        "z.head": tensor(x),
    }
    source = {"place": {"entry": 3}, "records": 7, "held_out": 2, "rejected": 0, "tokens": 900}
    state = {
        "config_digest": "of this folder",
        "position": {"journal_length": 1, "block": 2, "index": 8, "sources": {"main": source}},
        "learner": {"clocks": [{"k": 5}], "skipped": 0},
    }
    return tensors, state


def ended(folder: Path, tensors: dict[str, Any], state: Json, entries: list[Json], step: int = 5) -> None:
    """A run that ended like this."""
    with acquired(folder) as run:
        journal = Journal(run.journal)
        for entry in entries:
            journal.append("data", entry)
        journal.close()
        Commits(run).write(Snapshot(step, tensors, state))


DISCOVERED = {"kind": "discovered", "draw": 0, "source": "main", "entries": [{"path": "a.txt"}, {"path": "b.txt"}]}


def compared(tmp_path: Path, change: Any = None, entries: list[Json] | None = None) -> Sameness:
    tensors, state = material()
    ended(tmp_path / "one", tensors, state, [DISCOVERED])
    tensors, state = copy.copy(tensors), copy.deepcopy(state)
    state["config_digest"] = "of that folder"
    if change is not None:
        change(tensors, state)
    ended(tmp_path / "other", tensors, state, [DISCOVERED] if entries is None else entries)
    return compare(NAMES, (tmp_path / "one", tmp_path / "other"), (tmp_path / "none", tmp_path / "none"))


def test_equal_runs_are_equal_whatever_their_folders_are(tmp_path: Path) -> None:
    found = compared(tmp_path)
    assert found.equal and not found.data_changed
    assert found.tensors == {"x": 1, "comp": 1, "holdout": 1, "z": 1}
    assert found.sources[0]["main"]["records"] == 7


def changed_x(tensors: dict[str, Any], _: Json) -> None:
    values = np.frombuffer(tensors["x.head"].data, np.float32).copy()
    values[[9, 20]] = [np.nextafter(values[9], np.float32(9)), 0.5]
    tensors["x.head"] = tensor(values.reshape(4, 6))


def changed_comp(tensors: dict[str, Any], _: Json) -> None:
    tensors["comp.head"] = tensor(np.full((4, 6), -1.0, np.float32), "BF16")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed_x, "x.head F32 [4, 6]: first at flat index 9: -0.21739129722118378 undisturbed, -0.21739128232002258"),
        (changed_x, "2 of 24 elements differ"),
        (changed_comp, "comp.head BF16 [4, 6]: first at flat index 1: -0.9"),
        (lambda t, s: t.pop("z.head"), "z.head is missing killed"),
        (lambda t, s: t.update({"x.head": tensor(np.zeros(24))}), "x.head: F32 [4, 6] undisturbed, F32 [24] killed"),
        (lambda t, s: s["learner"].update(skipped=1), "learner.skipped: 0 undisturbed, 1 killed"),
        (lambda t, s: s["learner"]["clocks"][0].update(k=6), "learner.clocks.0.k: 5 undisturbed, 6 killed"),
        (lambda t, s: s["position"]["sources"]["main"].update(records=8), "position.sources.main.records: 7 und"),
    ],
)
def test_the_first_difference_is_told(tmp_path: Path, change: Any, told: str) -> None:
    found = compared(tmp_path, change)
    assert not found.equal
    assert told in "\n".join(found.differences)
    assert not found.data_changed


def test_zeros_of_another_sign_differ(tmp_path: Path) -> None:
    tensors, state = material()
    for folder, zero in (("one", 0.0), ("other", -0.0)):
        ended(tmp_path / folder, {**tensors, "z.head": tensor(np.full((4, 6), zero))}, state, [DISCOVERED])
    found = compare(NAMES, (tmp_path / "one", tmp_path / "other"), (tmp_path / "none", tmp_path / "none"))
    assert found.differences == [
        "z.head F32 [4, 6]: first at flat index 0: 0.0 undisturbed, -0.0 killed; 24 of 24 elements differ"
    ]


def test_other_data_is_seen_in_the_journals(tmp_path: Path) -> None:
    more = {**DISCOVERED, "entries": [*DISCOVERED["entries"], {"path": "c.txt"}]}  # type: ignore[misc]
    found = compared(tmp_path, entries=[more])
    assert "journal, data entry 1" in found.differences[0]
    assert found.data_changed == 'source main: 1 entries were found only killed, as {"path": "c.txt"}'


def test_what_was_read_ahead_is_no_difference(tmp_path: Path) -> None:
    assert compared(tmp_path, entries=[DISCOVERED, {"kind": "finished", "block": 0, "sources": {}}]).equal


def test_exports_of_one_step_have_to_be_the_same_weights(tmp_path: Path) -> None:
    tensors, state = material()
    for name in ("one", "other"):
        ended(tmp_path / name, tensors, state, [DISCOVERED])
    sites = [Site(tmp_path / f"{name}-writer", str(tmp_path / f"{name}-published")) for name in ("one", "other")]
    runs, published = (tmp_path / "one", tmp_path / "other"), (tmp_path / "one-published", tmp_path / "other-published")
    for site in sites:
        site.publish(3)
    found = compare(NAMES, runs, published)
    assert found.equal and found.exports == 1
    sites[0].publish(4)
    sites[1].publish(4, tensors={"model.embed.weight": tensor(np.full((16, 8), 5))})
    found = compare(NAMES, runs, published)
    assert found.differences[0].startswith("step 4: ") and found.differences[0].endswith("have other weights")


# --- planning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "model", "told"),
    [
        ({}, {}, ""),
        ({"compile": True, "threads": 2}, {}, ""),
        ({"deterministic": False}, {}, ""),
        ({"compile": True, "deterministic": False, "threads": 1}, {}, ""),
        ({"compile": True, "deterministic": False, "threads": 2}, {}, "set deterministic = true, or threads = 1"),
        ({"device": "cuda", "deterministic": False}, {}, "deterministic = false on CUDA"),
        ({}, {"init_from": "s3://bucket/prefix"}, "init_from"),
    ],
)
def test_why_a_config_need_not_end_equal_is_known_before(
    tmp_path: Path, run: dict[str, Any], model: dict[str, Any], told: str
) -> None:
    reasons = list(inexact(load(tiny.config(tmp_path, run=run, model=model))))
    assert len(reasons) == bool(told)
    assert told in "".join(reasons)


def test_commits_are_as_frequent_as_the_kills_need(tmp_path: Path) -> None:
    by_the_clock = load(tiny.config(tmp_path, commits={"every_steps": None, "every_s": 60.0}))
    plan = planned(by_the_clock, steps=60, kills=10, seed=0)
    assert plan.commit_every == 2
    assert "every 2 steps (in the file: every_s = 60.0)" in plan.notes[0]
    often = load(tiny.config(tmp_path, commits={"every_steps": 3}, exports={"every_steps": 10}))
    plan = planned(often, steps=60, kills=10, seed=0)
    assert (plan.commit_every, plan.export_every, plan.notes) == (None, None, ())


def test_moments_come_of_the_seed_and_of_every_kind() -> None:
    drawn = victim.moments(20, 7)
    assert drawn == victim.moments(20, 7) != victim.moments(20, 8)
    assert [sum(m.kind == kind for m in drawn) for kind in ("start-up", "commit", "export", "steps")] == [4, 4, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "3", "--kills", "4"], "more kills than steps; allowed: at most one a step"),
        (["--keep", "."], "allowed: a new or an empty folder"),
    ],
)
def test_what_cannot_be_proved_is_refused_with_2(tmp_path: Path, arguments: list[str], told: str) -> None:
    said = tiny.run("prove", tiny.config(tmp_path), *arguments, expect=2)
    assert told in said
    assert "Traceback" not in said


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_stream_that_runs_dry_is_proved_as_far_as_it_goes(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 14)
    config = tiny.config(tmp_path, exports={"storage_options": {"secret": "planted-key"}})
    told = tiny.run("prove", config, "--steps", "5000", "--kills", "2", "--keep", tmp_path / "scratch")
    step = int(tiny.newest_commit(tmp_path / "scratch" / "killed").name.rpartition("-")[2])
    assert f"The stream gave {step} of 5000 steps (main: all of its 14 entries have been read)" in told
    assert f"Equal, bit for bit, at step {step}, after 2 kills" in told
    tiny.assert_same_state(*(tiny.newest_commit(tmp_path / "scratch" / name) for name in NAMES))
    # The user's own places were not touched, and no secret was copied.
    assert not (tmp_path / "run").exists() and not (tmp_path / "published").exists()
    assert "planted-key" not in "".join(p.read_text() for p in (tmp_path / "scratch").glob("*/*.t*"))


def test_no_data_is_an_error_and_no_hang(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()  # a folder that is not there may be one that is not mounted yet: a minute is waited
    said = tiny.run("prove", tiny.config(tmp_path), "--steps", "5", "--kills", "1", expect=2)
    assert "not one step can be taken: main: nothing was found yet" in said


def test_a_proof_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 100)
    process = tiny.start("prove", tiny.config(tmp_path), "--steps", "5000", TMPDIR=str(tmp_path))
    owners: list[Path] = []
    while not owners:
        assert process.poll() is None, process.communicate()
        owners = list(tmp_path.glob("anytimed-prove-*/undisturbed/run/OWNER"))
        time.sleep(0.01)
    trained = json.loads(owners[0].read_text())["pid"]
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not Path(f"/proc/{trained}").exists()
    assert not list(tmp_path.glob("anytimed-prove-*"))


def test_data_that_changes_meanwhile_is_named_as_the_reason(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 40)
    scratch = tmp_path / "scratch"
    process = tiny.start("prove", tiny.config(tmp_path), "--steps", "20", "--kills", "0", "--keep", scratch, "--json")
    while not (scratch / "killed" / "log.txt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    tiny.write_text(tmp_path / "data", 20, prefix="a", seed=9)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    proof = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert not proof["equal"]
    assert "20 entries were found only killed" in proof["found"]["data_changed"]
