"""Fault 18 on files of every format: SIGKILL at random moments while shards arrive and files grow, for one source and
for a mixture whose sources run dry and come back; and an audit of what was trained on that knows the files as they
were written, and takes from the journal only which bytes were found when.

What came when depends on the clock and stands in the journal, so the undisturbed run is one that is given the killed
run's journal."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import tiny
from tests.crash import audited
from tests.crash.arrivals import KINDS, SETTLE_S, Shards, decisions, rows_of
from tests.crash.lives import killed, stopped_when_dry, until_it_commits, until_it_trains
from tests.crash.test_bit_for_bit import status_of
from tests.crash.test_random_kills import BATCH, LENGTH, audit, same_steps, windows
from tests.faultlog import FULL, Injected

KILLS = 20 if FULL else 2
FIRST = 12
"""Arrivals before the first life."""
TELLING = 12
"""So many bytes of a record in a row are found in no other, and nowhere else in it."""


class Feeding:
    """Calls `arrive` again and again, beside the daemon."""

    def __init__(self, arrive: Callable[[], None], draw: random.Random) -> None:
        self._arrive, self._draw = arrive, draw
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._draw.uniform(0.01, 0.12)):
                self._arrive()
        except BaseException as failure:  # noqa: BLE001 - raised again in `end`
            self._failure = failure

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure


class Killed:
    """A run that was killed while its data came, and the undisturbed one that was given its journal."""

    def __init__(self, folder: Path, name: str, sources: Mapping[str, tuple[Shards, dict[str, Any]]]) -> None:
        self.lived, self.told = folder / "lived", folder / "told"
        self._name, self._sources, self._plugin = name, sources, folder / "plugin"
        self._environment = audited.installed(self._plugin)
        self._draw = random.Random(name)
        # What feeds draws for itself: how far it comes is a matter of time.
        self._feeds = random.Random(f"{name} feeds")

    def _config(self, folder: Path) -> Path:
        """`folder`/data is what the shards are in."""
        folder.mkdir(exist_ok=True)
        tables: dict[str, Any] = {}
        for name, (shards, rule) in self._sources.items():
            url = shards.source["url"].replace(str(self.lived), str(folder))
            tables[f"sources.{name}"] = {**shards.source, **rule, "url": url}
        return tiny.config(
            folder,
            model={"type": "audited"},
            commits={"every_steps": 4},
            exports={"every_steps": 9, "keep": 1000},
            without=["sources.main"] if "main" not in self._sources else [],
            **tables,
        )

    def _arrive(self) -> None:
        self._feeds.choice([shards for shards, _ in self._sources.values()]).arrive()

    def live(self, injected: Injected) -> None:
        """Be killed KILLS times, then read all there is, and be told again."""
        for shards, _ in self._sources.values():
            for _ in range(FIRST // len(self._sources)):
                shards.arrive(new=True)
        config = self._config(self.lived)
        for kill in range(KILLS):
            process = tiny.start("run", config, **self._environment)
            try:
                until_it_trains(self.lived, process)
                until_it_commits(self.lived, process)
                feeding = Feeding(self._arrive, self._feeds)
                try:
                    time.sleep(self._draw.uniform(0.0, 0.8))
                    killed(process)
                finally:
                    feeding.end()
            finally:
                process.kill()
            self._arrive()
            injected(18, f"{self._name}: kill {kill}, step {status_of(self.lived).get('step')}")
        time.sleep(SETTLE_S)
        stopped_when_dry(tiny.start("run", config, **self._environment))

        shutil.copytree(self.lived / "data", self.told / "data")  # with the times of the files
        undisturbed = self._config(self.told)
        (self.told / "run").mkdir(mode=0o700)
        shutil.copy(self.lived / "run" / "journal.jsonl", self.told / "run")
        tiny.run("run", undisturbed, "--steps", str(self.steps), timeout_s=600, **self._environment)
        tiny.assert_same_state(tiny.newest_commit(self.lived), tiny.newest_commit(self.told))
        assert decisions(self.lived / "run") == decisions(self.told / "run"), "the undisturbed run decided by itself"

    @property
    def steps(self) -> int:
        return int(tiny.newest_commit(self.lived).name.rpartition("-")[2])

    def lives(self) -> list[NDArray[np.int16]]:
        """What was trained on: in the undisturbed run, then in each life of the killed one."""
        *lives, line = audited.trained_on(self._plugin, BATCH, LENGTH)
        return [line, *lives]

    def rejected(self) -> list[int]:
        position = tiny.state_of(tiny.newest_commit(self.lived))[1]["position"]
        return [at["rejected"] for at in position["sources"].values()]


@pytest.mark.fault(18)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_killed_at_random_each_record_is_trained_on_once(tmp_path: Path, name: str, injected: Injected) -> None:
    shards = Shards(KINDS[name], tmp_path / "lived" / "data", random.Random(name), itertools.count())
    run = Killed(tmp_path, name, {"main": (shards, {})})
    run.live(injected)

    rows = rows_of(decisions(run.lived / "run"), "main")
    contents = [content for held in shards.read_in_order(rows) for content in held]
    assert len(rows) > FIRST, "nothing came while it ran"
    assert not shards.kind.grows or any(start for _, start, _, _ in rows), "no file grew"
    audit(run.lives(), contents, run.steps, shards.kind.held_out)
    left = len(windows(contents, shards.kind.held_out)) - run.steps * BATCH
    assert left < BATCH, f"{left} sequences were never trained on, though there was a batch to make of them"
    assert run.rejected() == [0]


MIXTURE: dict[str, tuple[str, dict[str, Any]]] = {
    "again": ("parquet", {"when_dry": "replay", "passes": 2}),
    "lines": ("jsonl", {"when_dry": "others", "weight": 2.0}),
    "tokens": ("bin", {"when_dry": "others"}),
}


@pytest.mark.fault(18)
@pytest.mark.timeout(3600)
def test_killed_at_random_a_mixture_reads_each_source_as_often_as_its_rule_says(
    tmp_path: Path, injected: Injected
) -> None:
    sources = {
        name: (
            Shards(KINDS[kind], tmp_path / "lived" / "data" / name, random.Random(name), itertools.count(i, 3)),
            rule,
        )
        for i, (name, (kind, rule)) in enumerate(MIXTURE.items())
    }
    run = Killed(tmp_path, "mixture", sources)
    run.live(injected)

    entries = decisions(run.lived / "run")
    kinds = [(entry["kind"], entry.get("source")) for entry in entries]
    assert kinds.count(("replayed", "again")) == 1
    assert {"left_out", "discovered"} <= {kind for kind, _ in kinds}
    again = rows_of(entries[: kinds.index(("replayed", "again"))], "again")
    passes: Counter[bytes] = Counter()
    for name, (shards, _) in sources.items():
        for i, held in enumerate(shards.read_in_order(rows_of(entries, name))):
            turns = 2 if name == "again" and i < len(again) else 1
            passes.update({content: turns for content in held if not shards.kind.held_out(content)})

    line, *lives = [[tuple(row.tobytes() for row in batch) for batch in life] for life in run.lives()]
    same_steps(line, lives, run.steps)
    trained_as_often(run.lives()[0], passes)
    assert run.rejected() == [0, 0, 0]


def trained_as_often(line: NDArray[np.int16], passes: Mapping[bytes, int]) -> None:
    """No byte of a record was trained on more often than `passes` says, no other record was, and what is missing is
    less than a batch: the sequences of which none could be made, and the tokens after the last of them."""
    known: dict[bytes, tuple[bytes, int]] = {}
    for content in passes:
        for at in range(len(content) - TELLING + 1):
            assert known.setdefault(content[at : at + TELLING], (content, at)) == (content, at)
    counts = {content: np.zeros(len(content), int) for content in passes}
    untold = 0  # bytes of pieces too short to tell whose they are
    for row in line.reshape(-1, LENGTH + 1):
        *ended, rest = pieces(row[1:])
        for piece, ends in (*((piece, True) for piece in ended), (rest, False)):
            if len(piece) < TELLING:
                untold += len(piece)
                continue
            content, at = known[piece[:TELLING]]
            assert content[at:].startswith(piece) and (not ends or len(content) == at + len(piece))
            counts[content][at : at + len(piece)] += 1
    for content, count in counts.items():
        assert count.max() <= passes[content], f"trained on {count.max()} times: {content[:20]!r}"
    told = sum(int(count.sum()) for count in counts.values())
    assert untold < told // 10, "too many pieces that could be anybody's"
    ends = int((line[:, :, 1:] == 256).sum())
    assert told + untold + ends == len(line) * BATCH * LENGTH
    due = sum(often * (len(content) + 1) for content, often in passes.items())
    missing = due - len(line) * BATCH * LENGTH
    assert 0 < missing <= BATCH * LENGTH, f"{missing} tokens were never trained on"


def pieces(tokens: Sequence[int] | NDArray[np.int16]) -> list[bytes]:
    """What lies between the end tokens; the last one did not end here."""
    found = [bytearray()]
    for token in tokens:
        if token == 256:
            found.append(bytearray())
        else:
            found[-1].append(int(token))
    return list(map(bytes, found))
