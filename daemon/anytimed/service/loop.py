"""The loop: a state machine on one screen, and what each request does to it.

In order: `Daemon.run` matches the state; `_train` takes a batch, steps, adopts the batch's Position, and does what the
step number makes due; `_wait` is the healthy state of a dry stream, `_pause` that of a request; `_stop` commits and
drains. Then what is due, and the requests. Everything here runs in the main thread; other threads only post.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import time
from concurrent.futures import Future
from typing import Any

from anytimed.config import Config
from anytimed.contracts import AnytimedError, Batch, Json, Snapshot
from anytimed.data.pipeline import Dry
from anytimed.service import requests
from anytimed.service.access import Guarded
from anytimed.service.api import Api
from anytimed.service.board import Board
from anytimed.service.bulletin import Bulletin
from anytimed.service.console import View
from anytimed.service.control import Control
from anytimed.service.failures import TrainingFailed, not_deterministic
from anytimed.service.gatekeeper import Gatekeeper
from anytimed.service.inboxes import Inboxes
from anytimed.service.keeper import Keeper
from anytimed.service.outbox import Outbox
from anytimed.service.reload import changes, foreseen, reloaded
from anytimed.service.requests import Mailbox, Request
from anytimed.service.saving import Saving
from anytimed.service.session import Session, Trained
from anytimed.service.steering import Steering
from anytimed.service.systemd import Systemd
from anytimed.service.timetable import Timetable
from anytimed.training.guard import Span
from anytimed.urls import without_credentials

log = logging.getLogger("anytimed")

POLL_S = 0.5
COMPILE_S = 1800.0
LAST_COMMIT_S = 600.0
START_S = 600.0
LAST_WORDS_S = 1.0
"""What a process needs to end, of the time that it has to live."""


class State(enum.Enum):
    TRAINING = "training"
    WAITING = "waiting for data"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Daemon:
    """One run of the service, from a recovered session to the exit. `steps` ends it once the run has that many; `token`
    lets who has it change things over TCP."""

    def __init__(
        self,
        session: Session,
        mailbox: Mailbox,
        view: View,
        *,
        steps: int | None = None,
        systemd: Systemd | None = None,
        token: str | None = None,
    ) -> None:
        self._session, self._mailbox, self._view, self._limit = session, mailbox, view, steps
        self._config = session.parts.config
        self._learner, self._reader = session.learner, session.reader
        self._trained = Trained.at(session.position)
        self._parent = session.parent
        self._state = State.TRAINING
        self._span: Span | None = None
        self._unpaused = (State.TRAINING, "")
        self._asked_to_stop: float | None = None
        self._give_up = self._hung_up = False
        self._systemd = systemd or Systemd()
        self._gate = Gatekeeper(session.standing, session.served)
        self._url = without_credentials(self._config.exports.url)
        exports, run = self._config.exports, session.run
        self._keeper = Keeper(
            session.store, run.run_id, run.term, mailbox.post, ttl_s=exports.lease_s, require=exports.require_conditions
        )
        self._outbox = Outbox(session.spool, session.publisher, self._keeper, mailbox.post, self._url, session.parent)
        self._keeper.on_held, self._outbox.keeps = self._outbox.wake, self._gate.keeps
        bulletin = Bulletin()
        self._board = Board(session, view, self._systemd, self._outbox, self._keeper, bulletin)
        self._saving = Saving(session, self._config.commits, self._board, mailbox.post, self._snapshot)
        state = session.commit.state["steering"] if session.commit is not None else None
        self._steering = Steering(self._config, session.decisions, self._learner, state, self._board.decided)
        self._timetable = Timetable(mailbox)
        self._inboxes = Inboxes(lambda: self._config, mailbox.post)
        api = Api(
            mailbox, self.status, self._systemd.idle_s, self._foresee, self._inboxes, bulletin, self._board.history
        )
        listen = self._config.control.listen
        self._control = Control(session.run.control_socket, Guarded(api.app, token), listen, bulletin.close)

    def status(self) -> Json:
        """The last status told, as JSON; any thread may ask."""
        return self._board.last

    def _foresee(self, config: Config) -> Json:
        """What a reload would make of a configuration; any thread may ask."""
        return foreseen(self._config, config, self._trained.read)

    # --- the state machine

    def run(self) -> None:
        """Until a stop is asked for, or the step limit is reached. Raises what ends the run otherwise; the run
        directory stays the caller's to release."""
        if self._config.run.compile:
            log.info("compiling the model; this can take minutes")
            self._systemd.phase("starting: compiling the model", COMPILE_S)
            try:
                self._learner.compile_now(self._config.data.batch_size)
            except RuntimeError as error:
                if (refused := not_deterministic(error)) is not None:
                    raise refused from error
                raise
        self._timetable.apply(self._config)
        for part in (
            self._board,
            self._reader,
            self._keeper,
            self._outbox,
            self._saving,
            self._timetable,
            self._control,
        ):
            part.start()
        self._board.listen = self._control.listens
        self._session.failures.watch()
        self._board.started()
        self._systemd.notify("READY=1")
        self._tell(always=True)
        try:
            while self._state is not State.STOPPED:
                self._drain()
                match self._state:
                    case State.TRAINING:
                        self._state = self._train()
                    case State.WAITING:
                        self._state = self._wait()
                    case State.PAUSED:
                        self._state = self._pause()
                    case State.STOPPING:
                        self._state = self._stop()
        except TrainingFailed:
            raise
        except AnytimedError as error:
            # What was trained is good whatever ended the run: keep it, then say why.
            self._board.problem("run", str(error))
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
            self._board.reason = "; ".join(f"{name}: {why}" for name, why in got.reasons.items())
            log.info("everything is read (%s); waiting for data", self._board.reason)
            self._report()
            self._saving.begin()
            return State.WAITING
        return State.TRAINING

    def _wait(self) -> State:
        """Healthy: the watchdog is fed, the view goes on, and the reader wakes when discovery finds something."""
        self._drain(POLL_S)
        self._systemd.ping()
        if self._state is not State.WAITING:
            return self._state
        got = self._reader.get(0.0)
        self._tell()
        if isinstance(got, Batch):
            log.info("data again")
            self._board.reason = ""
            self._board.paused()
            self._step(got)
            return State.TRAINING
        return State.WAITING

    def _pause(self) -> State:
        """Healthy too: everything is answered and told, no step is taken."""
        self._drain(POLL_S)
        self._systemd.ping()
        self._tell()
        return self._state

    def _stop(self) -> State:
        """Commit first, then upload what waits, until the deadline or a second signal."""
        self._systemd.notify("STOPPING=1")
        self._systemd.extend(LAST_COMMIT_S + self._config.exports.drain_s)
        self._tell()
        self._inboxes.close()
        self._final_commit()
        self._reader.close()
        deadline = time.monotonic() + self._config.exports.drain_s
        if (within := self._config.run.stop_within_s) is not None and self._asked_to_stop is not None:
            deadline = min(deadline, self._asked_to_stop + within - LAST_WORDS_S)
        while not ((self._outbox.idle and self._saving.mirrored) or self._give_up) and time.monotonic() < deadline:
            self._drain(0.05)
            self._tell()
        if not self._outbox.idle:
            log.warning("not everything is published; the spool keeps it and the next start sends it")
        if not self._saving.mirrored:
            log.warning("the last commit is not mirrored; the next start sends it")
        self._drain()
        return State.STOPPED

    # --- a step, and what its number makes due

    def _step(self, batch: Batch) -> None:
        if self._session.decisions.jumped(batch.number):
            log.info("batch %d is passed over", batch.number)
            self._trained = Trained.on(batch)
            self._steering.passed_over(batch.number)
            return
        self._session.failures.at(batch.number)
        try:
            self._learner.step(batch)
            self._stepped(batch)
        except AnytimedError:
            raise
        except Exception as error:
            raise self._session.failures.record(error) from error

    def _stepped(self, batch: Batch) -> None:
        self._saving.stepped()
        self._trained = Trained.on(batch)
        step, config = self._learner.step_count, self._config
        if step % config.logging.every_steps == 0:
            self._report()
        if self._steering.evaluates(step):
            self._report()
            self._evaluate()
        if self._span is not None:
            self._go_back(self._span)
            return
        if config.commits.every_steps and step % config.commits.every_steps == 0:
            self._saving.begin()
        if config.exports.every_steps and step % config.exports.every_steps == 0:
            self._begin_export()

    def _go_back(self, span: Span) -> None:
        """To the newest commit before the span, and then around it. What was exported since stays what it is."""
        self._saving.settle()
        commits = self._session.commits
        to = commits.before(span.step)
        if to is None:
            raise AnytimedError(f"step {self._learner.step_count}: {span.why}, and there is no commit to go back to")
        self._steering.rollback(span, self._learner.step_count, to, commits.seq)
        self._reader.close()
        self._systemd.extend(START_S)
        commits.set_aside(to.manifest.seq, span.why)
        state = self._session.go_back(to)
        self._span = None
        self._trained = Trained.at(self._session.position)
        self._board.evaluation = self._session.evaluation
        self._steering.restore(state["steering"])
        self._reader = self._session.reader
        self._reader.start()
        self._saving.begin(again=True)

    def _evaluate(self) -> None:
        """Losses of x, y and z on the hold-out; and of the published x, where the gate could not compare otherwise."""
        holdout = self._trained.holdout
        found = self._learner.evaluate(holdout)
        if found is not None and self._gated:
            margin = self._config.exports.gate_margin_nats
            self._gate.evaluated(found, margin, lambda folder: self._learner.loss_at(folder, holdout))
            self._outbox.keeps = self._gate.keeps
        self._board.evaluated(found)
        if found is not None:
            self._steering.evaluated(found)
        self._tell()

    def _report(self) -> None:
        """Read what the steps since the last report did, judge them, refresh every view."""
        reports = self._learner.reports()
        self._span = self._steering.reported(reports)
        self._board.problem("journal", self._steering.problem)
        self._board.stepped(reports)
        self._tell()

    def _snapshot(self) -> Snapshot:
        self._report()
        state = self._steering.state()
        return self._session.snapshot(self._trained.position, self._board.evaluation, self._parent, state)

    def _final_commit(self) -> None:
        """The commit at the end. Raises AnytimedError where it could not be written."""
        self._report()
        self._saving.finish(self._drain)

    def _begin_export(self, reply: Future[dict[str, Any]] | None = None) -> None:
        self._report()
        verdict = self._gate.verdict(self._board.evaluation, self._config.exports.gate_margin_nats)
        self._outbox.submit(self._session.export(self._config, self._board.evaluation, self._trained, verdict), reply)

    # --- requests

    def _drain(self, wait_s: float = 0.0) -> None:
        for request in self._mailbox.drain(wait_s):
            self._do(request)
        self._saving.catch_up()

    def _do(self, request: Request) -> None:
        match request:
            case requests.Stop(why) if self._state is State.STOPPING:
                log.warning("%s again: giving up the uploads; the commit stays", why)
                self._give_up = True
            case requests.Stop(why, at):
                log.info("%s: stopping", why)
                self._state, self._asked_to_stop = State.STOPPING, at
            case requests.Pause(reply):
                self._pause_now()
                self._reply_state(reply)
            case requests.Resume(reply):
                if self._state is State.PAUSED:
                    log.info("resumed by request")
                    self._state, self._board.reason = self._unpaused
                    self._board.paused()
                    self._tell()
                self._reply_state(reply)
            case requests.Reload(reply):
                if reply is not None or not self._terminal_gone():
                    self._reload(reply)
            case requests.Commit(reply) if reply is not None:
                self._saving.ask(reply)
            case requests.Commit():
                self._saving.begin()
            case requests.Export(reply) if self._state is not State.STOPPING:
                self._begin_export(reply)
            case requests.Export(reply):
                if reply is not None:
                    reply.set_exception(AnytimedError("the daemon is stopping"))
            case requests.Discover():
                self._reader.poll()
            case requests.Retain():
                self._outbox.retain(lambda: self._session.retain_published(self._config.exports, self._keeper.check))
            case requests.Verify():
                self._saving.verify()
            case requests.Committed():
                self._saving.committed(request, waiting=self._state in (State.WAITING, State.PAUSED))
                if (oldest := self._session.oldest_position()) is not None:
                    self._reader.acknowledge(oldest, tell=self._config.commits.acknowledge)
                self._tell()
            case requests.Verified():
                self._saving.verified(request)
                self._tell()
            case requests.Mirrored():
                self._saving.mirrored_one(request)
                self._tell()
            case requests.Published():
                self._on_published(request)
            case requests.Leased(error, refused):
                self._board.problem("lease", error)
                if refused is not None:
                    raise refused
            case requests.Crashed(crash):
                raise crash

    def _pause_now(self) -> None:
        """Take no more steps, and commit those that were taken: a pause may be long."""
        if self._state not in (State.TRAINING, State.WAITING):
            return
        log.info("paused by request at step %d", self._learner.step_count)
        self._unpaused, self._state = (self._state, self._board.reason), State.PAUSED
        self._board.reason = "asked to pause; `anytimed resume` goes on, and so does a restart"
        self._report()
        self._saving.begin()

    def _reply_state(self, reply: Future[dict[str, Any]] | None) -> None:
        if reply is not None:
            reply.set_result({"state": self._state.value, "step": self._learner.step_count})

    def _reload(self, reply: Future[dict[str, Any]] | None = None) -> None:
        before = self._session.parts
        try:
            self._session.parts = parts = reloaded(before, self._trained.read)
        except AnytimedError as error:
            self._board.reloaded(error=str(error))
            self._tell()
            if reply is not None:
                reply.set_exception(error)
            return
        changed = changes(before.config, parts.config)
        self._config = parts.config
        self._saving.table = self._config.commits
        self._board.reloaded(changed)
        self._board.follow(self._config)
        self._timetable.apply(self._config)
        self._steering.configured(self._config)
        if parts.config.sources != before.config.sources and self._state is not State.STOPPING:
            self._read_anew()
            log.info("the mixture from the next block on: %s", parts.told())
        log.info("reloaded %s: %s", self._config.path, ", ".join(changed) or "nothing in it has changed")
        self._tell()
        if reply is not None:
            reply.set_result({"config": str(self._config.path), "changed": changed})

    def _read_anew(self) -> None:
        """Read again from the last batch that was trained on, by what the session says now."""
        self._reader.close()
        self._systemd.extend(START_S)
        self._session.read_from(self._trained.position)
        self._reader = self._session.reader
        self._reader.start()

    def _on_published(self, done: requests.Published) -> None:
        if done.refused is not None:
            raise done.refused
        self._board.problem("export", done.error)
        if done.error is None:
            self._parent = done.checkpoint
            self._gate.published(done)
            self._outbox.keeps = self._gate.keeps
            if done.step is not None and done.checkpoint is not None:
                self._board.exported(done.step, done.checkpoint, done.digest, self._url)
            self._mailbox.post(requests.Retain())
        self._tell()

    @property
    def _gated(self) -> bool:
        return math.isfinite(self._config.exports.gate_margin_nats)

    def _terminal_gone(self) -> bool:
        """Whether the terminal of the live view was closed, which asks for a stop, once."""
        if not self._hung_up and self._view.hung_up():
            self._hung_up = True
            self._mailbox.post(requests.Stop("the terminal was closed"))
        return self._hung_up

    def _tell(self, *, always: bool = False) -> None:
        # Looked at here as well: what closes a terminal may signal before it does, or not at all.
        self._terminal_gone()
        self._board.tell(self._state.value, always=always)

    def _close(self) -> None:
        """End the threads; what ends the run must not wait for any of them for long."""
        self._timetable.close()
        self._inboxes.close()
        self._reader.close()
        self._saving.close()
        self._outbox.close()
        self._keeper.close()
        self._control.close()
        self._session.failures.close()
        self._tell(always=True)
        self._board.close()
