"""What the daemon says of itself: the figures behind the view, `status.json`, `anytimed status` and the control socket.

The loop writes figures as they come; `tell` makes one JSON object of them, shows it everywhere, and keeps it for the
threads that answer questions.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from anytimed.config import Config
from anytimed.contracts import Evaluation, Json, SinkRun, StepReport
from anytimed.service.bulletin import Bulletin
from anytimed.service.console import View, line
from anytimed.service.keeper import Keeper
from anytimed.service.metrics import Metrics
from anytimed.service.outbox import Outbox
from anytimed.service.requests import Verified
from anytimed.service.session import Session
from anytimed.service.sinks import tables_of
from anytimed.service.status import STATUS_FORMAT
from anytimed.service.systemd import Systemd, unit
from anytimed.urls import public, told, without_credentials

log = logging.getLogger("anytimed")

VERSION: Final = version("anytimed")
USAGE_EVERY_S = 5.0


class Board:
    """The figures of one run. Losses are in nats per token, times in seconds since 1970."""

    def __init__(
        self, session: Session, view: View, systemd: Systemd, outbox: Outbox, keeper: Keeper, bulletin: Bulletin
    ) -> None:
        self._session, self._view, self._systemd, self._bulletin = session, view, systemd, bulletin
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
        resumed = session.resumed
        self.commit: Json | None = resumed and {key: resumed[key] for key in ("step", "path", "time")}
        self.verification: Json | None = None
        self.mirrored: Json | None = None
        self.export: Json | None = session.published
        self.problems: dict[str, str] = dict(session.problems)
        self.reload: Json | None = None
        self._configured = self._began
        self.listen: str | None = None
        self._unit = unit()
        self._events = 0
        self._decided = session.decisions.counts()
        self._used: Json | None = None
        self._usage_from = 0.0
        self.last = self._status()

    def start(self) -> None:
        """Begin to write figures, and to send them to the trackers."""
        self._metrics.start()
        self.follow(self._session.parts.config)

    def follow(self, config: Config) -> None:
        """Send the figures from now on to the trackers that the configuration names."""
        learner, run, tables = self._session.learner, self._session.run, public(config.model_dump(mode="json"))
        where = SinkRun(
            run.run_id, run.term, tables, config.digest(), learner.step_count, learner.tokens, run.path / "sinks"
        )
        self._metrics.follow(tables_of(config), where)

    def close(self) -> None:
        """Write what was told before; nobody waits for it for long."""
        self._metrics.close()

    # --- what the loop notes

    def started(self) -> None:
        """It is ready."""
        session = self._session
        at = f"went on from the commit of step {session.resumed['step']}" if session.resumed else "began"
        self.event("started", f"started on {session.learner.device}, {at}", resumed=session.resumed)

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
        self._record(
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
            learner, losses = self._session.learner, evaluation.to_json()
            losses["holdout_tokens"] = losses.pop("tokens")  # a record's tokens are those trained on
            self._record("evaluation", **losses, tokens=learner.tokens, **learner.metrics())
        self.paused()

    def paused(self) -> None:
        """What went by until now was no training, and does not count for the speed."""
        self._mark = (time.monotonic(), self._session.learner.tokens)

    def decided(self, entry: Json) -> None:
        """Something was decided about the training: an event."""
        rest = {key: value for key, value in entry.items() if key != "kind"}
        self._decided[entry["kind"]] = self._decided.get(entry["kind"], 0) + 1
        self.event(entry["kind"], decision(entry), **rest)

    def event(self, what: str, sentence: str, **fields: Any) -> None:
        """Something happened that people may want to know of later. sentence: for them; fields: for programs."""
        learner = self._session.learner
        self._events += 1
        self._record("event", **{
            "what": what, "id": f"{self._session.run.term}-{self._events}", "told": told(sentence),
            "step": learner.step_count, "tokens": learner.tokens, **fields,
        })  # fmt: skip

    def committed(self, step: int, path: Path) -> Json:
        """A commit is durable; what the status says of it."""
        self.commit = {"step": step, "path": str(path), "time": time.time()}
        log.info("committed step %d: %s", step, path)
        self.event("commit", f"committed step {step}", step=step, path=str(path))
        return self.commit

    def mirrored_one(self, step: int, ident: str) -> None:
        """The mirror holds a commit."""
        self.mirrored = {"step": step, "id": ident, "time": time.time()}
        self.event("mirrored", f"mirrored the commit of step {step}", step=step, commit=ident)

    def exported(self, step: int, checkpoint: str, digest: str | None, url: str) -> None:
        """A checkpoint is published. digest: of its manifest."""
        self.export = {"step": step, "checkpoint": checkpoint, "digest": digest, "time": time.time()}
        log.info("exported step %d: %s/checkpoints/%s", step, url, checkpoint)
        self.event("export", f"published {checkpoint}", step=step, checkpoint=checkpoint, digest=digest)

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
        if error is None:
            self.event("reload", f"reloaded: {', '.join(changed) or 'nothing has changed'}", changed=list(changed))
        self.reload = {"time": time.time(), "changed": list(changed), "error": None if error is None else told(error)}
        if error is None:
            self._configured = self.reload["time"]

    def problem(self, key: str, text: str | None) -> None:
        """Note that something is degraded, or (None) well again; logged when it changes."""
        if text is None:
            if self.problems.pop(key, None) is not None:
                self.event("recovered", f"{key}: well again", problem=key)
        elif self.problems.get(key) != text:
            log.warning("%s", text)
            new = key not in self.problems
            self.problems[key] = text
            if new:  # one that says the same in other words, as a growing age, is still the same trouble
                self.event("degraded", text, problem=key)

    # --- what it tells

    def tell(self, state: str, *, always: bool = False) -> None:
        """Refresh every view. `always`: also where log lines would be too close together."""
        if state != self.state:
            before, self.state, self.since = self.state, state, time.time()
            why = f": {self.reason}" if self.reason else ""
            self.event("state", f"{state}{why}", state=state, before=before)
        self.last = self._status()
        self._bulletin.show(self.last)
        self._view.show(self.last, always)
        self._systemd.notify(f"STATUS={line(self.last, time.time())}")
        self._metrics.show(self.last)

    def _status(self) -> Json:
        session = self._session
        config, run, learner, reading = session.parts.config, session.run, session.learner, session.reader.status()
        failing = (self._metrics.failed, session.quarantine.failed, reading["undecided"], *_ailing(reading["sources"]))
        return {
            "format": STATUS_FORMAT,
            "version": VERSION,
            "state": self.state,
            "since": self.since,
            "reason": told(self.reason),
            "degraded": [told(problem) for problem in (*self.problems.values(), *filter(None, failing))],
            "run_id": run.run_id,
            "term": run.term,
            "pid": os.getpid(),
            "unit": self._unit,
            "listen": self.listen,
            "directory": str(run.path),
            "config": str(config.path.absolute()),
            "device": str(learner.device),
            "step": learner.step_count,
            "tokens": learner.tokens,
            "tokens_per_s": self._speed,
            "loss": self._loss,
            "skipped": learner.skipped,
            "interventions": dict(self._decided),
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
            "commit": self.commit,
            "last_commit_age_s": time.time() - (self.commit["time"] if self.commit else self._began),
            "resumed": session.resumed,
            "verification": self.verification,
            "mirror": self._mirror(),
            "export": self.export,
            "upload": self._outbox.upload,
            "spooled": self._outbox.spooled,
            "exports_url": without_credentials(config.exports.url),
            "reload": self.reload,
            "configured": self._configured,
            "store": self._keeper.status(),
            "sources": reading["sources"],
            "batches_ready": reading["ready"],
            "disk": self._metrics.disk,
            "sinks": self._metrics.sinks(),
            "accelerator": self._usage(),
            "time": time.time(),
        }

    def _record(self, kind: str, **values: Any) -> None:
        """One record, for metrics.jsonl and for who listens."""
        self._bulletin.post(self._metrics.write(kind, **values))

    def _usage(self) -> Json | None:
        """The accelerator's, asked every few seconds: the driver takes a moment."""
        now = time.monotonic()
        if now >= self._usage_from:
            self._used, self._usage_from = self._session.learner.device.usage(), now + USAGE_EVERY_S
        return self._used

    def _mirror(self) -> Json | None:
        """The commit that the mirror holds since this start, and how old it is; None without a mirror."""
        mirror = self._session.mirror
        if mirror is None:
            return None
        since = self.mirrored["time"] if self.mirrored else self._began
        return {"url": mirror.url, "commit": self.mirrored, "last_mirrored_age_s": time.time() - since}


def decision(entry: Json) -> str:
    """A sentence about an entry of the journal about the training."""
    match entry["kind"]:
        case "forget":
            losses = f"{entry['loss_y']:.4f}, {entry['loss_x']:.4f}"
            return f"y did better than x on the hold-out ({losses}): x forgets half of what it averages over"
        case "rollback":
            first, last = entry["first_batch"], entry["last_batch"]
            return f"{entry['why']}: back to step {entry['to_step']}, and around batches {first} to {last}"
        case "jump":
            return f"batches {entry['first_batch']} to {entry['last_batch']} are passed over: {entry.get('why', '')}"
        case "evaluations":
            return f"evaluated every {entry['every_steps']} steps from here on"
        case "skipped":
            return f"step {entry['step']} was not finite, and changed nothing"
        case "spike":
            return f"the loss spiked at step {entry['step']}"
    return str(entry["kind"])


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
