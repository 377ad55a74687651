"""Trains runs, some at once, and keeps what was seen in each.

A run is a process of its own, `python -m horizons.trainer RUN`, on one thread; or, for small ones, this process. What
it saw is kept under the scratch folder, and is taken from there (or from an earlier result) where run, texts, torch and
Python are the same.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keeping
from extension.corpora import Corpus, gather

from anytimed.contracts import Json
from horizons.plans import SCALES, Run, Scale, tables
from horizons.runs import train
from horizons.texts import own_texts


class Trainer:
    """`found`: by name, every run that was asked for."""

    def __init__(
        self,
        scale: Scale,
        scratch: Path,
        jobs: int,
        *,
        here: bool,
        earlier: Mapping[str, Json],
        texts: str | None = None,
    ) -> None:
        """here: in this process, one after the other; otherwise a process each. earlier: runs of a result that may be
        taken where their key is the same. texts: a glob of files to read instead of Python's library."""
        self.scale, self._scratch, self._here, self._earlier = scale, scratch, here, earlier
        self._texts = texts
        self.corpus = corpus_of(scale, scratch, texts)
        self._pool = ThreadPoolExecutor(1 if here else jobs)
        self._lock = threading.Lock()
        self.found: dict[str, Json] = {}

    def all_of(self, runs: Sequence[Run]) -> list[Json]:
        """What was seen in each. Raises SystemExit where one failed."""
        return list(self._pool.map(self._one, runs))

    def has(self, run: Run) -> bool:
        """Whether it was trained already."""
        return self._kept(run) is not None

    def _one(self, run: Run) -> Json:
        found = self._kept(run)
        if found is None:
            if self._here:
                keep(run, self.scale, self.corpus, self._scratch)
            else:
                self._elsewhere(run)
            found = self._kept(run)
            assert found is not None, run.name
            print(f"{run.name}: {last(found)} in {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        with self._lock:
            self.found[run.name] = found
        return found

    def _elsewhere(self, run: Run) -> None:
        asked = {"scale": self.scale.name, "multiples": self.scale.multiples, "texts": self._texts}
        told = json.dumps({**asked, "scratch": str(self._scratch), "run": run.told()})
        command = [sys.executable, "-m", "horizons.trainer", told]
        keeping.alone(command, run.name, one_thread=not self.scale.gpu)

    def _kept(self, run: Run) -> Json | None:
        key = key_of(run, self.scale, self.corpus)
        if (found := keeping.kept(keeping.curve_file(self._scratch, run.name), key)) is not None:
            return found
        found = self._earlier.get(run.name)
        return found if found is not None and found["key"] == key else None


def last(found: Json) -> float | None:
    """The loss of x at the end; None where it diverged."""
    return found["seen"][-1]["x"] if found["seen"] else None


def corpus_of(scale: Scale, scratch: Path, texts: str | None = None) -> Corpus:
    """The text, written where it is not yet."""
    if texts is not None:
        sizes = {"stream_bytes": scale.stream_bytes, "probe_bytes": scale.probe_bytes}
        return own_texts(texts, scratch / "corpora", **sizes)
    return gather("python", scratch / "corpora", stream_bytes=scale.stream_bytes, probe_bytes=scale.probe_bytes)


def key_of(run: Run, scale: Scale, corpus: Corpus) -> str:
    """What a kept run has to have come from."""
    return keeping.key_of(run.told(), tables(run, scale, corpus.digest, ""))


def keep(run: Run, scale: Scale, corpus: Corpus, scratch: Path) -> None:
    """Train a run in this process and keep what was seen."""
    path = keeping.curve_file(scratch, run.name)
    found = train(run, scale, corpus, scratch / "runs" / f"{path.stem}-{os.getpid()}")
    keeping.keep(path, {"key": key_of(run, scale, corpus), **found})


def main() -> None:
    """For `python -m`: one run, told as JSON."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    told, scale, scratch = asked["run"], SCALES[asked["scale"]], Path(asked["scratch"])
    if list(scale.multiples) != asked["multiples"]:
        scale = scale.to(tuple(asked["multiples"]))
    run = Run(**{**told, "marks": tuple(told["marks"]), "at": tuple(told["at"])})
    keep(run, scale, corpus_of(scale, scratch, asked["texts"]), scratch)


if __name__ == "__main__":
    main()
