"""Trains runs, some at once, and keeps what was seen in each.

A run is a process of its own, `python -m horizons.trainer RUN`, on one thread; or, for small ones, this process. What
it saw is a file under the scratch folder, and is taken from there (or from an earlier result) where run, texts, torch
and Python are the same: who stops a benchmark loses the runs under way and no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
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
        path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        one_thread = {} if self.scale.gpu else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {**os.environ, **one_thread, "PYTHONPATH": path}
        command = [sys.executable, "-m", "horizons.trainer", told]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{run.name}: exit {done.returncode}\n{done.stdout}{done.stderr}")

    def _kept(self, run: Run) -> Json | None:
        key = key_of(run, self.scale, self.corpus)
        try:
            found: Json = json.loads(_file(run, self._scratch).read_text())
        except (OSError, ValueError):
            found = self._earlier.get(run.name, {})
        return found if found.get("key") == key else None


def last(found: Json) -> float | None:
    """The loss of x at the end; None where it diverged."""
    return found["seen"][-1]["x"] if found["seen"] else None


def corpus_of(scale: Scale, scratch: Path, texts: str | None = None) -> Corpus:
    """The text, written where it is not yet."""
    if texts is not None:
        sizes = {"stream_bytes": scale.stream_bytes, "probe_bytes": scale.probe_bytes}
        return own_texts(texts, scratch / "corpora", **sizes)
    return gather("python", scratch / "corpora", stream_bytes=scale.stream_bytes, probe_bytes=scale.probe_bytes)


def text_of(corpus: Corpus) -> Json:
    """What a result tells of it."""
    return {
        "sha256": corpus.digest,
        "stream_bytes": corpus.size,
        "probe_documents": len(corpus.probe),
        "probe_bytes": sum(len(text.encode()) for text in corpus.probe),
    }


def machine() -> Json:
    return {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def key_of(run: Run, scale: Scale, corpus: Corpus) -> str:
    """What a kept run has to have come from."""
    made = [run.told(), tables(run, scale, corpus.digest, ""), torch.__version__, platform.python_version()]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def keep(run: Run, scale: Scale, corpus: Corpus, scratch: Path) -> None:
    """Train a run in this process and keep what was seen."""
    path = _file(run, scratch)
    folder = scratch / "runs" / f"{path.stem}-{os.getpid()}"
    found = {"key": key_of(run, scale, corpus), **train(run, scale, corpus, folder)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(found))
    beside.replace(path)


def _file(run: Run, scratch: Path) -> Path:
    return scratch / "curves" / f"{re.sub(r'[^A-Za-z0-9._@-]+', '-', run.name)}.json"


def as_text(result: Json) -> str:
    """JSON with everything that fits on a line on one."""
    text = json.dumps(result, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\s+", " ", m.group()), text) + "\n"


def earlier(path: Path | None) -> dict[str, Json]:
    """The runs of a result's file."""
    return {} if path is None else dict(json.loads(path.read_text())["runs"])


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
