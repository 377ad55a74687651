"""One run: the daemon itself, in this process, measured on documents that are no part of its stream.

Its directory is thrown away afterwards; what was seen stays.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from extension.corpora import Corpus
from probing import Probe, rounded
from rich.console import Console

from anytimed import registry
from anytimed.config import Config
from anytimed.contracts import Batch, Json
from anytimed.service.console import View
from anytimed.service.loop import Daemon
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.storage.run_directory import RunDirectory
from horizons.plans import ALLOWED, Run, Scale, tables


class Watched(Daemon):
    """The daemon; `seen` fills while it runs."""

    def watch(self, run: Run, probe: Probe) -> None:
        self._run, self._probe = run, probe
        self.seen: list[Json] = []
        self._since: float | None = None
        self.trained_s, self._trained_from = 0.0, 0

    def _step(self, batch: Batch) -> None:
        super()._step(batch)
        if self._since is None:  # the first step may compile
            self._since, self._trained_from = time.monotonic(), self._learner.tokens
        if self._learner.step_count in self._run.marks:
            figures = self._learner.metrics()  # waits for the device
            self.trained_s += time.monotonic() - self._since
            self._look(figures)
            self._since = time.monotonic()

    def tokens_per_s(self) -> float | None:
        """Until the last mark, evaluations of the daemon's own included, looks at the marks left out."""
        told = self.seen[-1]["tokens"] - self._trained_from if self.seen else 0
        return round(told / self.trained_s, 1) if self.trained_s and told else None

    def _look(self, figures: Mapping[str, float]) -> None:
        told = {name: rounded(figures[name]) for name in ("z_norm", "zx_distance", "beta", "c") if name in figures}
        norms = {name: rounded(v) for name, v in figures.items() if name.endswith(("weight_norm", "update_rms"))}
        losses = dict(zip(self._run.at, self._probe.losses(self._run.at), strict=True))
        self.seen.append({"step": self._learner.step_count, "tokens": self._learner.tokens, **losses, **told, **norms})


def train(run: Run, scale: Scale, corpus: Corpus, folder: Path) -> Json:
    """Take all steps of a run; what was seen. folder: scratch, emptied before and after."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    registry.allow(ALLOWED)
    config = Config.model_validate(tables(run, scale, str(corpus.stream), str(folder)))
    began = time.monotonic()
    with RunDirectory(folder / "run") as directory:
        directory.acquire()
        session = recover(config, directory)
        with View(Console(quiet=True), run.name) as view:
            daemon = Watched(session, Mailbox(), view, steps=run.steps)
            daemon.watch(run, Probe(session, "python", corpus.probe))
            daemon.run()
        told: Json = {
            "run": run.told(),
            "parameters": sum(p.numel() for p in session.learner.module.parameters()),
            "seen": daemon.seen,
            "forgets": [entry["step"] for entry in session.decisions.of("forget")],
            "skipped": session.learner.skipped,
            "tokens_per_s": daemon.tokens_per_s(),
            "seconds": round(time.monotonic() - began, 1),
        }
    shutil.rmtree(folder)
    return told
