"""One run: the daemon itself, in this process, with somebody who watches.

A branch is a copy of the trunk's run directory with another configuration: the daemon resumes the commit, and the
mixture changes at the next block, as it would after any restart. An emulated history is the optimizer's clock, put
forward before the first step. A rival restarts: a new run that begins with the weights that the trunk published.
Steered memory is the daemon's own, on the hold-out in force; beside it x is measured on documents that are no part of
any stream.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from horizons.plans import ALLOWED
from keeping import plain
from probing import Probe, rounded
from rich.console import Console

from anytimed import registry
from anytimed.config import Config
from anytimed.contracts import Batch, Json
from anytimed.service.console import View
from anytimed.service.loop import Daemon
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.service.session import Session
from anytimed.storage.run_directory import RunDirectory
from extension.corpora import Corpus
from extension.plans import TEXTS, Plan, tables
from extension.scales import Scale


class Watched(Daemon):
    """The daemon; `probed` and `evaluations` fill while it runs.

    changed: the step that took the first batch of a source that the commit did not know; of a restart the first."""

    def watch(self, plan: Plan, scale: Scale, corpora: Mapping[str, Corpus]) -> None:
        self._plan, self._scale = plan, scale
        self._known = {name for name, at in self._session.position.sources.items() if at.records}
        self.changed: int | None = 1 if plan.restart else None
        self.probed: list[Json] = []
        self.evaluations: list[Json] = []
        self._probes = {name: Probe(self._session, name, corpora[name].probe) for name in TEXTS}

    def probe(self) -> None:
        """Measure x here."""
        losses = {name: probe.losses("x")[0] for name, probe in self._probes.items()}
        self.probed.append({"step": self._learner.step_count, "tokens": self._learner.tokens, "losses": losses})

    def _step(self, batch: Batch) -> None:
        if self._known and self.changed is None:
            used = {batch.sources[i] for i in np.unique(batch.labels)}
            if used - self._known:
                self.changed = self._learner.step_count + 1
                if self._plan.steps is None:
                    self._limit = self._learner.step_count + self._scale.after
                self.probe()
        super()._step(batch)
        step = self._learner.step_count
        since = None if self.changed is None else step - self.changed + 1
        due = step % self._scale.every == 0 if since is None else since in self._scale.probes
        if due or step == self._limit:
            self.probe()

    def _evaluate(self) -> None:
        super()._evaluate()
        found = self._board.evaluation
        if found is not None and found.step == self._learner.step_count:
            losses = map(rounded, (found.loss_x, found.loss_y, found.loss_z))
            self.evaluations.append({"step": found.step, "losses": [*losses], "tokens": found.tokens})


def train(plan: Plan, scale: Scale, corpora: Mapping[str, Corpus], folder: Path) -> Json:
    """Take all steps of a plan; what was seen. folder: where the run directories lie, this one's under its name."""
    directory, published = run_directory(folder, plan.name), _published(folder, plan.name)
    for old in (directory, published):
        shutil.rmtree(old, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if plan.start is not None and not plan.restart:
        shutil.copytree(run_directory(folder, plan.start), directory, symlinks=True)
    registry.allow(ALLOWED)
    streams = {name: str(corpus.stream) for name, corpus in corpora.items()}
    told = tables(plan, scale, streams, str(directory), (str(published), str(_published(folder, plan.start or ""))))
    config = Config.model_validate(told)
    began = time.monotonic()
    with RunDirectory(directory) as run:
        run.acquire()
        session = recover(config, run)
        start = session.learner.step_count
        if plan.start is not None and not plan.restart:
            _age(session, plan.history, plan.optimizer.get("averaging_power", 0.0))
        with View(Console(quiet=True), plan.name) as view:
            daemon = Watched(session, Mailbox(), view, steps=plan.steps)
            daemon.watch(plan, scale, corpora)
            daemon.probe()
            daemon.run()
        return {
            "plan": plan.told(),
            "parameters": sum(p.numel() for p in session.learner.module.parameters()),
            "start": start,
            "end": session.learner.step_count,
            "changed": daemon.changed,
            "probed": daemon.probed,
            "evaluations": daemon.evaluations,
            "forgets": [entry for entry in session.decisions.of("forget") if entry["step"] > start],
            "memory_steps": rounded(session.learner.memory().get("averaging_memory_steps")),
            "skipped": session.learner.skipped,
            "seconds": round(time.monotonic() - began, 1),
        }


def run_directory(folder: Path, name: str) -> Path:
    return folder / "runs" / plain(name)


def _published(folder: Path, name: str) -> Path:
    return folder / "published" / plain(name)


def _age(session: Session, factor: int, power: float) -> None:
    """As if so many times the steps had gone before, and each had weighed t^power: the sum of that over t steps is
    t^power / (power + 1) times the plain one."""
    clocks = []
    for clock in session.learner.optimizer.clock_state():
        t = int(clock["t"]) * factor
        more = float(t) ** power
        sums = {"weight_sum": clock["weight_sum"] * factor * more / (power + 1), "weight": clock["weight"] * more}
        clocks.append({**clock, "t": t, **sums})
    session.learner.optimizer.load_clock_state(clocks)
