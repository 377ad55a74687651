"""The loop: a state machine on one screen, and what each request does to it.

In order: `Daemon.run` matches the state; `_train` takes a batch, steps, adopts the batch's Position, and does what the
step number makes due; `_wait` is the healthy state of a dry stream; `_stop` commits and drains. Then the requests, one
method each, and the status that the view, `status.json` and the control socket show. Everything runs in the main
thread; other threads only post."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import time
from concurrent.futures import Future
from typing import Any

from anytimed.config import Config, load
from anytimed.contracts import AnytimedError, Batch, ConfigError, Evaluation, Json
from anytimed.data.pipeline import Dry
from anytimed.service import assembly, requests
from anytimed.service.committer import Committer
from anytimed.service.console import View, line
from anytimed.service.control import Control
from anytimed.service.metrics import Metrics
from anytimed.service.outbox import Outbox
from anytimed.service.recovery import Session
from anytimed.service.requests import Mailbox, Request
from anytimed.service.systemd import Systemd
from anytimed.service.timetable import Timetable

log = logging.getLogger("anytimed")

POLL_S = 0.5
LAST_COMMIT_S = 600.0


class State(enum.Enum):
    TRAINING = "training"
    WAITING = "waiting for data"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Daemon:
    """One run of the service, from a recovered session to the exit. `steps` ends it once the run has that many
    steps."""

    def __init__(self, session: Session, mailbox: Mailbox, view: View, *, steps: int | None = None) -> None:
        self._session, self._mailbox, self._view, self._limit = session, mailbox, view, steps
        self._config = session.parts.config
        self._learner, self._reader, self._run = session.learner, session.reader, session.run
        self._position, self._holdout, self._read = session.position, session.position.holdout, session.position.sources
        self._evaluation: Evaluation | None = session.evaluation
        self._parent: str | None = session.parent
        self._committed_step = session.learner.step_count if session.resumed else 0
        self._commit: Json | None = session.resumed
        self._export: Json | None = session.published
        self._problems: dict[str, str] = dict(session.problems)
        self._reason = ""
        self._state = State.TRAINING
        self._mark = (time.monotonic(), session.learner.tokens)
        self._speed: float | None = None
        self._loss: float | None = None
        self._give_up = False
        self._metrics = Metrics(self._run.metrics, self._run.status)
        self._systemd = Systemd()
        self._committer = Committer(session.commits, mailbox.post)
        self._outbox = Outbox(session.spool, session.publisher, mailbox.post, self._config.exports.url, session.parent)
        self._timetable = Timetable(mailbox)
        self._status = self.status()
        self._control = Control(self._run.control_socket, mailbox, self.status_now)

    # --- the state machine

    def run(self) -> None:
        """Until a stop is asked for, or the step limit is reached. Raises what ends the run otherwise; the run
        directory stays owned by the caller."""
        self._timetable.apply(self._config)
        self._reader.start()
        self._outbox.start()
        self._timetable.start()
        self._control.start()
        self._systemd.notify("READY=1")
        self._told(always=True)
        try:
            while self._state is not State.STOPPED:
                for request in self._mailbox.drain():
                    self._do(request)
                match self._state:
                    case State.TRAINING:
                        self._state = self._train()
                    case State.WAITING:
                        self._state = self._wait()
                    case State.STOPPING:
                        self._state = self._stop()
        except AnytimedError as error:
            # What was trained is good whatever ended the run: keep it, then say why.
            self._problem("run", str(error))
            self._report()
            with contextlib.suppress(AnytimedError):  # the first error is the one to tell
                self._final_commit()
            raise
        finally:
            self._close()

    def _train(self) -> State:
        if self._limit is not None and self._learner.step_count >= self._limit:
            log.info("reached step %d, as --steps asks", self._learner.step_count)
            return State.STOPPING
        got = self._reader.get(POLL_S)
        self._systemd.ping()
        if isinstance(got, Batch):
            self._step(got)
        elif isinstance(got, Dry):
            self._reason = "; ".join(f"{name}: {why}" for name, why in got.reasons.items())
            log.info("everything is read (%s); waiting for data", self._reason)
            self._report()
            self._begin_commit()
            return State.WAITING
        return State.TRAINING

    def _wait(self) -> State:
        """Healthy: the watchdog is fed, the view goes on, and the reader wakes when `discover` finds something."""
        for request in self._mailbox.drain(wait_s=POLL_S):
            self._do(request)
        self._systemd.ping()
        if self._state is not State.WAITING:
            return self._state
        got = self._reader.get(0.0)
        self._told()
        if isinstance(got, Batch):
            log.info("data again")
            self._reason = ""
            self._mark = (time.monotonic(), self._learner.tokens)
            self._step(got)
            return State.TRAINING
        return State.WAITING

    def _stop(self) -> State:
        """Commit first, then upload what waits, until the deadline or a second signal."""
        self._systemd.notify("STOPPING=1")
        self._systemd.extend(LAST_COMMIT_S + self._config.exports.drain_s)
        self._reader.close()
        self._report()
        self._final_commit()
        deadline = time.monotonic() + self._config.exports.drain_s
        while not self._outbox.idle and not self._give_up and time.monotonic() < deadline:
            for request in self._mailbox.drain(wait_s=0.05):
                self._do(request)
        if not self._outbox.idle:
            log.warning("not everything is published; the spool keeps it and the next start sends it")
        for request in self._mailbox.drain():
            self._do(request)
        return State.STOPPED

    # --- a step and what it makes due

    def _step(self, batch: Batch) -> None:
        self._learner.step(batch)
        self._position, self._holdout, self._read = batch.position, batch.holdout, batch.read
        step, config = self._learner.step_count, self._config
        if step % config.logging.every_steps == 0:
            self._report()
        if step % config.evaluation.every_steps == 0:
            self._evaluate()
        if config.commits.every_steps and step % config.commits.every_steps == 0:
            self._begin_commit()
        if config.exports.every_steps and step % config.exports.every_steps == 0:
            self._begin_export(None)

    def _report(self) -> None:
        """Read what the steps since the last report did; journal the skipped ones; refresh every view."""
        reports = self._learner.reports()
        for report in reports:
            if report.skipped:
                self._session.skip(report)
        taken = [report.loss for report in reports if not report.skipped]
        if reports:
            self._loss = sum(taken) / len(taken) if taken else None
            now, tokens = time.monotonic(), self._learner.tokens
            if now > self._mark[0]:
                self._speed = (tokens - self._mark[1]) / (now - self._mark[0])
            self._mark = (now, tokens)
            self._metrics.write(
                "step",
                step=self._learner.step_count,
                tokens=tokens,
                loss=self._loss,
                tokens_per_s=self._speed,
                skipped=self._learner.skipped,
                grad_norm=reports[-1].grad_norm if not reports[-1].skipped else None,
            )
        self._told()

    def _evaluate(self) -> None:
        self._report()
        self._evaluation = self._learner.evaluate(self._holdout) or self._evaluation
        if self._evaluation is not None:
            self._metrics.write("evaluation", **self._evaluation.to_json(), **self._learner.metrics())
        # What evaluating took is not the training's speed.
        self._mark = (time.monotonic(), self._learner.tokens)
        self._told()

    # --- commits

    def _begin_commit(self) -> None:
        """Hand a snapshot to the committer; while one is in flight, or nothing was trained since the last, there is
        none."""
        if self._committer.busy or self._committed_step == self._learner.step_count:
            return
        self._report()
        self._committed_step = self._learner.step_count
        snapshot = self._session.snapshot(self._position, self._evaluation, self._parent)
        self._committer.submit(snapshot, self._config.commits.keep)

    def _final_commit(self) -> None:
        """The commit at the end. Raises AnytimedError when it could not be written."""
        self._committer.wait()
        for request in self._mailbox.drain():
            self._do(request)
        self._begin_commit()
        self._committer.wait()
        for request in self._mailbox.drain():
            self._do(request)
        if self._learner.step_count and (self._commit is None or self._commit["step"] != self._learner.step_count):
            raise AnytimedError(f"the last commit could not be written: {self._problems.get('commit', 'unknown')}")

    # --- exports

    def _begin_export(self, reply: Future[dict[str, Any]] | None) -> None:
        self._report()
        make = self._session.export(self._config, self._evaluation, self._read)
        self._outbox.submit(make, reply)

    # --- requests

    def _do(self, request: Request) -> None:
        match request:
            case requests.Stop(why):
                if self._state is State.STOPPING:
                    log.warning("%s again: giving up the uploads; the commit stays", why)
                    self._give_up = True
                else:
                    log.info("%s: stopping", why)
                    self._state = State.STOPPING
            case requests.Commit():
                self._begin_commit()
            case requests.Export(reply) if self._state is not State.STOPPING:
                self._begin_export(reply)
            case requests.Export(reply):
                if reply is not None:
                    reply.set_exception(AnytimedError("the daemon is stopping"))
            case requests.Discover():
                self._reader.poll()
            case requests.Retain():
                self._outbox.retain(lambda: self._session.retain_published(self._config.exports))
            case requests.Reload() if self._view.hung_up():
                self._do(requests.Stop("the terminal is gone"))
            case requests.Reload():
                self._reload()
            case requests.Committed():
                self._on_committed(request)
            case requests.Published():
                self._on_published(request)

    def _on_committed(self, done: requests.Committed) -> None:
        if done.error is not None:
            self._committed_step = 0
            self._problem("commit", done.error)
            return
        self._problems.pop("commit", None)
        self._commit = {"step": done.step, "path": done.path, "time": time.time()}
        log.info("committed step %d: %s", done.step, done.path)
        self._told()

    def _on_published(self, done: requests.Published) -> None:
        if done.refused is not None:
            raise done.refused
        if done.error is not None:
            self._problem("export", done.error)
            return
        self._problems.pop("export", None)
        self._parent = done.checkpoint
        self._export = {"step": done.step, "checkpoint": done.checkpoint, "time": time.time()}
        log.info("exported step %d: %s/checkpoints/%s", done.step, self._config.exports.url, done.checkpoint)
        self._mailbox.post(requests.Retain())
        self._told()

    def _problem(self, key: str, text: str) -> None:
        if self._problems.get(key) != text:
            log.warning("%s", text)
        self._problems[key] = text

    def _reload(self) -> None:
        """Apply a changed config as one change between steps, or say what it may not change and apply nothing."""
        try:
            new = load(self._config.path)
            assembly.parts_of(new)
            fixed = changes_that_need_a_restart(self._config, new)
            if fixed:
                raise ConfigError(f"{new.path}: not reloaded; only a restart changes {', '.join(fixed)}")
        except AnytimedError as error:
            self._problem("reload", str(error))
            return
        self._problems.pop("reload", None)
        self._timetable.apply(new)
        self._config = new
        log.info("reloaded %s", new.path)

    # --- what is shown

    def status(self) -> Json:
        """The status as JSON; `anytimed status --json` prints it."""
        reading = self._reader.status()
        return {
            "state": self._state.value,
            "reason": self._reason,
            "degraded": [*self._problems.values(), *([self._metrics.failed] if self._metrics.failed else [])],
            "run_id": self._run.run_id,
            "term": self._run.term,
            "pid": os.getpid(),
            "directory": str(self._run.path),
            "device": str(self._learner.device),
            "step": self._learner.step_count,
            "tokens": self._learner.tokens,
            "tokens_per_s": self._speed,
            "loss": self._loss,
            "skipped": self._learner.skipped,
            "evaluation": self._evaluation.to_json() if self._evaluation else None,
            "commit": self._commit,
            "export": self._export,
            "exports_url": self._config.exports.url,
            "sources": reading["sources"],
            "batches_ready": reading["ready"],
            "time": time.time(),
        }

    def status_now(self) -> Json:
        """The last status made by the loop; other threads read this."""
        return self._status

    def _told(self, always: bool = False) -> None:
        self._status = self.status()
        self._view.show(self._status, always)
        self._systemd.notify(f"STATUS={line(self._status, time.time())}")
        self._metrics.show(self._status)

    def _close(self) -> None:
        self._timetable.close()
        self._reader.close()
        self._committer.close()
        self._outbox.close()
        self._control.close()
        self._told(always=True)


LIVE_TABLES = ("logging", "evaluation", "commits", "exports")
FIXED_KEYS = {"exports": ("url", "storage_options")}


def changes_that_need_a_restart(old: Config, new: Config) -> list[str]:
    """The keys that differ and may not change while it runs, as `[table] key`."""
    before, after = old.model_dump(), new.model_dump()
    for dumped in (before, after):
        for name in LIVE_TABLES:
            dumped[name] = {key: dumped[name][key] for key in FIXED_KEYS.get(name, ())}
        dumped["data"].pop("discover")
    return [
        f"[{table}] {key}"
        for table in before
        for key in sorted(before[table].keys() | after[table].keys())
        if before[table].get(key) != after[table].get(key)
    ]
