"""One run: the daemon itself, in this process, with somebody who watches.

A branch is a copy of the trunk's run directory with another configuration: the daemon resumes the commit, and the
mixture changes at the next block, as it would after any restart. An emulated history is the optimizer's clock with a
larger weight sum, put there before the first step. Steered memory is the daemon's own, on the hold-out in force;
beside it x and y are measured on documents that are no part of any stream.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from anytimed.config import Config
from anytimed.contracts import Batch, HeldRecord, Holdout, Json
from anytimed.service.console import View
from anytimed.service.loop import Daemon
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.service.session import Session
from anytimed.storage.run_directory import RunDirectory
from anytimed.training.evaluate import Evaluator
from extension.corpora import Corpus
from extension.plans import Plan, Scale, tables


class Watched(Daemon):
    """The daemon; `probed` and `evaluations` fill while it runs.

    changed: the step that took the first batch of a source that the commit did not know."""

    def watch(self, plan: Plan, scale: Scale, corpora: dict[str, Corpus]) -> None:
        parts = self._session.parts
        self._plan, self._scale = plan, scale
        self._known = {name for name, at in self._session.position.sources.items() if at.records}
        self.changed: int | None = None
        self.probed: list[Json] = []
        self.evaluations: list[Json] = []
        self._probes = {}
        for name in plan.probes:
            texts = enumerate(corpora[name].probe)
            records = tuple(HeldRecord(name, str(i), parts.tokenizer.encode(text)) for i, text in texts)
            evaluator = Evaluator(
                parts.model,
                self._learner.module,
                self._learner.device,
                sequence_length=parts.config.data.sequence_length,
                batch_size=64,
            )
            self._probes[name] = (evaluator, Holdout(records, {name: 1.0}))

    def probe(self) -> None:
        """Measure x and y here."""
        named = dict(self._learner.module.named_parameters())
        averaged = self._learner.optimizer.averaged()
        x = {name: averaged[p] for name, p in named.items()}
        y = {name: p.detach() for name, p in named.items()}
        losses = {
            name: [_rounded(evaluator.loss_at(at, holdout)) for at in (x, y)]
            for name, (evaluator, holdout) in self._probes.items()
        }
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
        # From the change on, the grid begins there: its rows are then so many steps after it.
        step = self._learner.step_count
        since = step - (self.changed - 1 if self.changed is not None and self._plan.steps is None else 0)
        if since % self._scale.probe_every == 0 or step == self._limit:
            self.probe()

    def _evaluate(self) -> None:
        super()._evaluate()
        found = self._board.evaluation
        if found is not None and found.step == self._learner.step_count:
            losses = map(_rounded, (found.loss_x, found.loss_y, found.loss_z))
            self.evaluations.append({"step": found.step, "losses": [*losses], "tokens": found.tokens})


def train(plan: Plan, scale: Scale, corpora: dict[str, Corpus], folder: Path) -> Json:
    """Take all steps of a plan; what was seen. folder: where the run directories lie, this one's under its name."""
    directory = run_directory(folder, plan.name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if plan.start is not None:
        shutil.copytree(run_directory(folder, plan.start), directory, symlinks=True)
    streams = {name: str(corpus.stream) for name, corpus in corpora.items()}
    published = folder / "published" / directory.name
    config = Config.model_validate(tables(plan, scale, streams, str(directory), str(published)))
    began = time.monotonic()
    with RunDirectory(directory) as run:
        run.acquire()
        session = recover(config, run)
        start = session.learner.step_count
        _age(session, plan.history)
        with View(Console(quiet=True), plan.name) as view:
            daemon = Watched(session, Mailbox(), view, steps=plan.steps)
            daemon.watch(plan, scale, corpora)
            daemon.probe()
            daemon.run()
        told: Json = {
            "plan": plan.told(),
            "parameters": sum(p.numel() for p in session.learner.module.parameters()),
            "start": start,
            "end": session.learner.step_count,
            "changed": daemon.changed,
            "probed": daemon.probed,
            "evaluations": daemon.evaluations,
            "forgets": [entry for entry in session.decisions.of("forget") if entry["step"] > start],
            "memory_steps": _rounded(session.learner.memory().get("averaging_memory_steps")),
            "skipped": session.learner.skipped,
            "seconds": round(time.monotonic() - began, 1),
        }
    return told


def run_directory(folder: Path, name: str) -> Path:
    return folder / "runs" / name.replace("/", "-")


def _age(session: Session, factor: int) -> None:
    """As if so many times the steps had gone before."""
    clocks: list[dict[str, Any]] = session.learner.optimizer.clock_state()
    session.learner.optimizer.load_clock_state([{**c, "weight_sum": c["weight_sum"] * factor} for c in clocks])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
