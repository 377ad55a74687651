"""What the daemon says of itself: the figures behind the view, `status.json`, `anytimed status` and the control socket.

The loop writes figures as they come; `tell` makes one JSON object of them, shows it everywhere, and keeps it for the
threads that answer questions.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence

from anytimed.contracts import Evaluation, Json, StepReport
from anytimed.service.console import View, line
from anytimed.service.keeper import Keeper
from anytimed.service.metrics import Metrics
from anytimed.service.outbox import Outbox
from anytimed.service.requests import Verified
from anytimed.service.session import Session
from anytimed.service.systemd import Systemd
from anytimed.urls import told, without_credentials

log = logging.getLogger("anytimed")


class Board:
    """The figures of one run. Losses are in nats per token, times in seconds since 1970."""

    def __init__(self, session: Session, view: View, systemd: Systemd, outbox: Outbox, keeper: Keeper) -> None:
        self._session, self._view, self._systemd = session, view, systemd
        self._outbox, self._keeper = outbox, keeper
        self._metrics = Metrics(session.run.metrics, session.run.status)
        self.history = self._metrics.history
        self._mark = (time.monotonic(), session.learner.tokens)
        self._speed: float | None = None
        self._loss: float | None = None
        self._began = self.since = time.time()
        self.state = "starting"
        self.reason = ""
        self.evaluation: Evaluation | None = session.evaluation
        self.commit: Json | None = session.resumed
        self.verification: Json | None = None
        self.mirrored: Json | None = None
        self.export: Json | None = session.published
        self.problems: dict[str, str] = dict(session.problems)
        self.reload: Json | None = None
        self._configured = self._began
        self.last = self._status()

    # --- what the loop notes

    def stepped(self, reports: Sequence[StepReport]) -> None:
        """Losses and speed since the last call; skipped steps have no loss."""
        if not reports:
            return
        learner = self._session.learner
        taken = [report.loss for report in reports if not report.skipped]
        self._loss = sum(taken) / len(taken) if taken else None
        now = time.monotonic()
        self._speed = (learner.tokens - self._mark[1]) / max(now - self._mark[0], 1e-9)
        self._mark = (now, learner.tokens)
        self._metrics.write(
            "step",
            step=learner.step_count,
            tokens=learner.tokens,
            loss=self._loss,
            tokens_per_s=self._speed,
            skipped=learner.skipped,
            grad_norm=reports[-1].grad_norm,
            prequential=_prequential(reports),
            batches_ready=self._session.reader.status()["ready"],
        )

    def evaluated(self, evaluation: Evaluation | None) -> None:
        """A new evaluation, None where nothing is held out yet."""
        if evaluation is not None:
            self.evaluation = evaluation
            self._metrics.write("evaluation", **evaluation.to_json(), **self._session.learner.metrics())
        self.paused()

    def paused(self) -> None:
        """What went by until now was no training, and does not count for the speed."""
        self._mark = (time.monotonic(), self._session.learner.tokens)

    def decided(self, entry: Json) -> None:
        """Something was decided about the training: an event."""
        self._metrics.write("event", what=entry["kind"], **{key: v for key, v in entry.items() if key != "kind"})

    def verified(self, done: Verified) -> None:
        """What reading the commits again has found."""
        if done.error is not None:
            self.problem("verification", f"kept commits could not be read again: {done.error}")
        elif done.rotten:
            told = "; ".join(f"{r.path}: expected {r.expected}, found {r.found}" for r in done.rotten)
            self.problem("verification", f"no longer what was written: {told}; a new commit replaces it")
        else:
            log.info("read %d commits again: all are what was written", done.commits)
            self.problem("verification", None)
        found = "not finished" if done.error else f"{done.commits} read, {len(done.rotten)} rotten"
        self.verification = {
            "time": time.time(),
            "commits": done.commits,
            "rotten": [str(rejected.path) for rejected in done.rotten],
            "found": found,
        }

    def reloaded(self, changed: Sequence[str] = (), error: str | None = None) -> None:
        """The configuration was taken anew, and what of it has changed; or not, and why."""
        self.problem("reload", error)
        self.reload = {"time": time.time(), "changed": list(changed), "error": None if error is None else told(error)}
        if error is None:
            self._configured = self.reload["time"]

    def problem(self, key: str, text: str | None) -> None:
        """Note that something is degraded, or (None) well again; logged when it changes."""
        if text is None:
            self.problems.pop(key, None)
        elif self.problems.get(key) != text:
            log.warning("%s", text)
            self.problems[key] = text

    # --- what it tells

    def tell(self, state: str, *, always: bool = False) -> None:
        """Refresh every view. `always`: also where log lines would be too close together."""
        if state != self.state:
            self.state, self.since = state, time.time()
        self.last = self._status()
        self._view.show(self.last, always)
        self._systemd.notify(f"STATUS={line(self.last, time.time())}")
        self._metrics.show(self.last)

    def _status(self) -> Json:
        session = self._session
        config, run, learner, reading = session.parts.config, session.run, session.learner, session.reader.status()
        failing = (self._metrics.failed, session.quarantine.failed, reading["undecided"], *_ailing(reading["sources"]))
        return {
            "state": self.state,
            "since": self.since,
            "reason": told(self.reason),
            "degraded": [told(problem) for problem in (*self.problems.values(), *filter(None, failing))],
            "run_id": run.run_id,
            "term": run.term,
            "pid": os.getpid(),
            "directory": str(run.path),
            "device": str(learner.device),
            "step": learner.step_count,
            "tokens": learner.tokens,
            "tokens_per_s": self._speed,
            "loss": self._loss,
            "skipped": learner.skipped,
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
            "commit": self.commit,
            "last_commit_age_s": time.time() - (self.commit["time"] if self.commit else self._began),
            "resumed": session.resumed,
            "verification": self.verification,
            "mirror": self._mirror(),
            "export": self.export,
            "upload": self._outbox.upload,
            "exports_url": without_credentials(config.exports.url),
            "reload": self.reload,
            "configured": self._configured,
            "store": self._keeper.status(),
            "sources": reading["sources"],
            "batches_ready": reading["ready"],
            "time": time.time(),
        }

    def _mirror(self) -> Json | None:
        """The commit that the mirror holds since this start, and how old it is; None without a mirror."""
        mirror = self._session.mirror
        if mirror is None:
            return None
        since = self.mirrored["time"] if self.mirrored else self._began
        return {"url": mirror.url, "commit": self.mirrored, "last_mirrored_age_s": time.time() - since}


def _ailing(sources: Json) -> Iterator[str]:
    """What is wrong with the sources, by the reader's status."""
    for name, source in sources.items():
        for what in ("suspended", "unacknowledged"):
            if source[what] is not None:
                yield f"source {name}: {source[what]}"


def _prequential(reports: Sequence[StepReport]) -> dict[str, float]:
    """By source the mean loss, in nats per token, of batches that had not been trained on."""
    targets: dict[str, int] = {}
    sums: dict[str, float] = {}
    for report in reports:
        for name, (count, total) in report.by_source.items() if not report.skipped else ():
            targets[name] = targets.get(name, 0) + count
            sums[name] = sums.get(name, 0.0) + total
    return {name: sums[name] / count for name, count in sorted(targets.items())}
