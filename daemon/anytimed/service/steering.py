"""What steers the training between its steps: the guard, the memory of x, and when to evaluate.

The loop hands over every report and every evaluation. What comes of them is a decision: it is journalled, told in the
log and the metrics, and stands in the manifest of the next export. What the journal cannot take for now waits: all of
these follow from the steps themselves, so a replay comes to them again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from anytimed.config import Config
from anytimed.contracts import AnytimedError, Evaluation, Json, StepReport
from anytimed.service.decisions import Decisions
from anytimed.storage.commit import Commit
from anytimed.training.guard import Guard, Span
from anytimed.training.learner import Learner

log = logging.getLogger("anytimed")


class Steering:
    """`tell` gets every new decision. state: of the commit that the run goes on from, as `state` gave it."""

    def __init__(
        self,
        config: Config,
        decisions: Decisions,
        learner: Learner,
        state: Json | None,
        tell: Callable[[Json], None],
    ) -> None:
        self._config, self._decisions, self._learner, self._tell = config, decisions, learner, tell
        self.problem: str | None = None
        """Why decisions are not journalled yet."""
        self._unnoted: list[Json] = []
        self._batch = 0
        self._guard = _guard_of(config)
        self._every: list[tuple[int, int]] = []
        self.restore(state)

    def restore(self, state: Json | None) -> None:
        """Go on from a commit's state (None: from the beginning), at the step that the learner stands at."""
        self._guard = _guard_of(self._config)
        self._unnoted = [entry for entry in self._unnoted if entry["kind"] in ("rollback", "jump")]
        wanted = self._config.evaluation.every_steps
        step = self._learner.step_count
        self._every = [(step, state["evaluation_every_steps"] if state else wanted)]
        if state is not None:
            self._guard.restore(state["guard"])
            self._batch = state["batch"]
        for entry in self._decisions.of("evaluations"):
            if entry["step"] >= step:
                self._set_every(entry["step"], entry["every_steps"])
        self.configured(self._config)

    def state(self) -> Json:
        """For a commit."""
        return {
            "guard": self._guard.state(),
            "batch": self._batch,
            "evaluation_every_steps": self._every_at(self._learner.step_count + 1),
        }

    def configured(self, config: Config) -> None:
        """The configuration changed between two steps, or with a start."""
        if config.guard != self._config.guard:
            guard = _guard_of(config)
            guard.restore(self._guard.state())
            self._guard = guard
        self._config = config
        step, every = self._learner.step_count, config.evaluation.every_steps
        if self._every[-1][1] != every:
            self._set_every(step, every)
            self._note({"kind": "evaluations", "step": step, "batch": self._batch, "every_steps": every})

    def passed_over(self, batch: int) -> None:
        """A batch was jumped over."""
        self._batch = batch

    def rollback(self, span: Span, step: int, to: Commit, newest_seq: int) -> None:
        """Decide to go back to a commit and around a span of batches. Raises AnytimedError where the budget is used up,
        or the decision cannot be journalled: it must not be taken without."""
        table, batch = self._config.guard, self._batch
        since = batch - table.rollback_batches
        before = [entry for entry in self._decisions.of("rollback") if entry["batch"] > since]
        if len(before) >= table.rollbacks:
            raise AnytimedError(
                f"step {step}: {span.why}, and {len(before)} rollbacks within {table.rollback_batches} batches did not "
                "help ([guard] rollbacks). Look at the data and the learning rate; a start resumes at the last commit"
            )
        manifest = to.manifest
        entry = {
            "kind": "rollback", "step": step, "batch": batch, "why": span.why, "to_step": manifest.step,
            "to_seq": manifest.seq, "newest_seq": newest_seq,
            "first_batch": span.first_batch, "last_batch": span.last_batch,
        }  # fmt: skip
        self._decisions.note(entry)
        self._tell(entry)
        log.warning(
            "step %d: %s; back to step %d, and around batches %d to %d",
            step, span.why, manifest.step, span.first_batch, span.last_batch,
        )  # fmt: skip

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows this step."""
        return step % self._every_at(step) == 0

    def reported(self, reports: Sequence[StepReport]) -> Span | None:
        """Take reports in; the batches to go around where the training does not go well."""
        for report in reports:
            self._batch = report.batch
            if (bad := self._guard.look(report)) is not None:
                self._note(bad)
                log.warning(
                    "step %d %s: loss %g, gradient norm %g",
                    report.step, "skipped" if report.skipped else "spiked", report.loss, report.grad_norm,
                )  # fmt: skip
        self.catch_up()
        return self._guard.span

    def evaluated(self, found: Evaluation) -> None:
        """Steered memory: where y does better than x on the hold-out of the mixture in force, x is stale, and its
        memory is halved (ours; see the design's optimizers page)."""
        if not self._config.training.steered_memory:
            return
        if not (math.isfinite(found.loss_x) and found.loss_y < found.loss_x):
            return
        before = self._learner.memory()
        self._learner.forget()
        told = {"loss_x": found.loss_x, "loss_y": found.loss_y, "memory_steps": before.get("averaging_memory_steps")}
        self._note({"kind": "forget", "step": found.step, "batch": self._batch, **told})
        log.info(
            "step %d: y does better than x on the hold-out (%.4f, %.4f): x forgets half of what it averages over",
            found.step, found.loss_y, found.loss_x,
        )  # fmt: skip

    def catch_up(self) -> None:
        """Journal what waits."""
        try:
            while self._unnoted:
                if self._decisions.note(self._unnoted[0]):
                    self._tell(self._unnoted[0])
                del self._unnoted[0]
            self.problem = None
        except AnytimedError as error:
            self.problem = f"{len(self._unnoted)} decisions about the training are not journalled yet: {error}"

    def _note(self, entry: Json) -> None:
        self._unnoted.append(entry)
        self.catch_up()

    def _set_every(self, step: int, every: int) -> None:
        """From the step after `step` on; what was said of later steps is void."""
        self._every = [(at, n) for at, n in self._every if at < step] + [(step, every)]

    def _every_at(self, step: int) -> int:
        return next((every for at, every in reversed(self._every) if at < step), self._every[0][1])


def _guard_of(config: Config) -> Guard:
    table = config.guard
    return Guard(
        window_steps=table.window_steps,
        sigma=table.sigma,
        skipped_steps=table.skipped_steps,
        spike_steps=table.spike_steps,
    )
