"""Every start is a recovery: from a run directory and a configuration to a session that goes on.

In order: the lock and the term (above any that the published prefix and the mirror have seen); the newest commit that
verifies, here or in the mirror, and its journal (`origin`), saying which were rejected; whether the configuration fits
it; model, optimizer and stream restored from it, or drawn from the seed when there is none. `Session` then makes the
two copies that leave the training: the snapshot of a commit and the content of an export.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from anytimed.config import Config, ExportsTable
from anytimed.contracts import (
    AnytimedError,
    Batch,
    ConfigError,
    CorruptError,
    Evaluation,
    Holdout,
    HostTensor,
    Json,
    Position,
    Snapshot,
    SourcePosition,
    SourceRule,
    mixture_to_json,
)
from anytimed.data.reader import Reader
from anytimed.service.assembly import (
    Parts,
    differences,
    inexact_resume,
    initial_weights,
    learner_of,
    parts_of,
    pipeline_of,
    shape,
)
from anytimed.service.decisions import Decisions
from anytimed.service.failures import Failures
from anytimed.service.origin import START_S, Origin, Sources
from anytimed.service.quarantine import Quarantine
from anytimed.service.run_on_disk import HOLDOUT_TENSOR
from anytimed.storage.commit import STATE
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.exports import ExportContent, Publisher, Spool
from anytimed.storage.gate import Standing, Verdict
from anytimed.storage.journal import Journal
from anytimed.storage.manifest import Manifest
from anytimed.storage.mirror import Mirror
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store, StoreError
from anytimed.training.device import Device
from anytimed.training.learner import Learner
from anytimed.urls import without_credentials

log = logging.getLogger("anytimed")

WORLD_SIZE = 1


@dataclass(frozen=True, slots=True)
class Trained:
    """What the last batch that was trained on brought along: the position after it, the hold-out and the mixture in
    force, and how far every source had been read."""

    position: Position
    holdout: Holdout
    mixture: Mapping[str, SourceRule]
    read: Mapping[str, SourcePosition]

    def lineage(self, urls: Mapping[str, str]) -> Json:
        """By source where it lies, what was read of it, and its rule in the mixture (None where it takes no part)."""
        rules = mixture_to_json(self.mixture)
        return {
            name: {"url": urls.get(name, ""), **at.to_json(), "rule": rules.get(name)}
            for name, at in sorted(self.read.items())
        }

    @staticmethod
    def at(position: Position) -> Trained:
        """Before the first batch after a position."""
        return Trained(position, position.holdout, position.mixture, position.sources)

    @staticmethod
    def on(batch: Batch) -> Trained:
        return Trained(batch.position, batch.holdout, batch.mixture, batch.read)


@dataclass
class Session:
    """A run that was recovered, ready for the loop."""

    parts: Parts
    run: RunDirectory
    journal: Journal
    commits: Commits
    learner: Learner
    reader: Reader
    spool: Spool
    store: Store
    publisher: Publisher
    position: Position
    quarantine: Quarantine
    decisions: Decisions
    failures: Failures
    mirror: Mirror | None = None
    commit: Commit | None = None
    standing: Standing | None = None
    served: Path | None = None
    evaluation: Evaluation | None = None
    parent: str | None = None
    resumed: Json | None = None
    published: Json | None = None
    problems: Mapping[str, str] = field(default_factory=dict)

    def snapshot(
        self, position: Position, evaluation: Evaluation | None, parent: str | None, steering: Json
    ) -> Snapshot:
        """A commit's tensors and state: the learner, the Position and its hold-out, what the next export will need."""
        flat, index = position.holdout.to_arrays()
        held = HostTensor(
            "I32", (int(flat.size),), np.ascontiguousarray(flat, "<i4").data.cast("B") if flat.size else memoryview(b"")
        )
        state = {
            "world_size": WORLD_SIZE,
            "shape": shape(self.parts),
            "config_digest": self.parts.config.digest(),
            "position": position.to_json(),
            "holdout": index,
            "evaluation": evaluation.to_json() if evaluation else None,
            "parent_checkpoint": parent,
            "steering": steering,
        }
        return self.learner.snapshot({HOLDOUT_TENSOR: held}, state)

    def export(
        self,
        config: Config,
        evaluation: Evaluation | None,
        trained: Trained,
        verdict: Verdict,
    ) -> Callable[[], ExportContent]:
        """Copy x out now; what is returned waits for the copy and gives a checkpoint's content, in any thread."""
        snapshot = self.learner.export(config.exports.dtype)
        tokens = self.learner.tokens
        flags = [f"a resume need not be bit for bit: {why}" for why in inexact_resume(config)]
        interventions = self.decisions.interventions(snapshot.step)
        numbers = {"type": config.optimizer.type, **self.parts.recipe.numbers(), **self.learner.memory()}
        lineage = trained.lineage(self.urls)

        def make() -> ExportContent:
            snapshot.wait()
            return ExportContent(
                step=snapshot.step,
                tokens=tokens,
                tensors=snapshot.tensors,
                config={**self.hf_config, "torch_dtype": config.exports.dtype},
                files=self.tokenizer_files,
                optimizer=numbers,
                evaluation=evaluation,
                config_digest=config.digest(),
                lineage=lineage,
                interventions=interventions,
                url=without_credentials(config.exports.url),
                license=config.exports.model_license,
                flags=[*flags, verdict.flag] if verdict.flag else flags,
                refused=verdict.refused,
            )

        return make

    @cached_property
    def hf_config(self) -> Json:
        tokenizer = self.parts.tokenizer
        return self.parts.model.hf_config(tokenizer.vocab_size, tokenizer.end_token)

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files with which transformers loads the tokenizer, by name."""
        with tempfile.TemporaryDirectory(prefix="anytimed-") as folder:
            return {name: (Path(folder) / name).read_bytes() for name in self.parts.tokenizer.save(Path(folder))}

    @property
    def urls(self) -> dict[str, str]:
        """Where each source lies, as it may be published."""
        tables = self.parts.config.sources
        return {name: without_credentials(str(table.settings.get("url", ""))) for name, table in tables.items()}

    def go_back(self, commit: Commit) -> Json:
        """Stand at a commit again, as a start from it would; its state."""
        position = _restore(self.learner, commit)
        state = commit.state
        self.evaluation = Evaluation.from_json(state["evaluation"]) if state["evaluation"] else None
        self.read_from(position)
        self.position = position
        return state

    def read_from(self, position: Position) -> None:
        """Read on from a position, by the configuration of `parts`."""
        pipeline = pipeline_of(self.parts, self.journal, self.quarantine, self.run.fold)
        pipeline.restore(position)
        self.reader = Reader(pipeline, self.parts.config.data.prefetch_batches)

    def oldest_position(self) -> Json | None:
        """The position, as JSON, that no commit here resumes before; None where that cannot be told."""
        try:
            position: Json = json.loads((self.commits.kept()[-1] / STATE).read_bytes())["position"]
        except (OSError, LookupError, ValueError, TypeError):
            return None  # it is asked again after the next commit
        return position

    def retain_published(self, exports: ExportsTable, check: Callable[[], None]) -> None:
        self.publisher.retain(
            keep=exports.keep,
            keep_every_s=exports.keep_every_s,
            longest_pull_s=0.0,
            grace_s=exports.delete_after_s,
            check=check,
        )


def recover(config: Config, run: RunDirectory, *, fresh: bool = False) -> Session:
    """Bring the run in a directory that is ours back to its newest commit, or begin it.

    `fresh`: the directory is not ours yet; what is in it is moved aside once the configuration is known to be good,
    and a new run is acquired. The caller releases `run` in any case. Raises ConfigError where the configuration is
    wrong or does not fit the commit, Refused where another writer holds the run, no commit verifies, or data that was
    read has changed.
    """
    parts = parts_of(config)
    if fresh:
        aside = run.start_fresh()
        if aside is not None:
            log.info("--fresh: the old run is in %s", aside)
        run.acquire()
    sources = Sources(run, config.commits)
    sources.identify(fresh=fresh)
    problems: dict[str, str] = {}
    store = Store(config.exports.url, config.exports.storage_options, deadline_s=config.exports.deadline_s)
    publisher = Publisher(store, verify=config.exports.verify_uploads)
    published: Manifest | None = None
    try:
        # Only looking, and not for long: what has to be repaired there waits until the lease is ours.
        looking = Publisher(store.hurried(min(START_S, config.exports.deadline_s)))
        term = looking.latest_term()
        if term >= run.term:
            # Another run published here, one that is gone perhaps: what we publish has to count as newer.
            run.release()
            run.acquire(at_least=term)
        published = looking.latest()
    except (StoreError, CorruptError) as error:
        problems["export"] = str(error)
        log.warning("%s; training goes on, exports wait", error)

    origin, decisions = _newest(sources, fresh)
    commits, journal, commit = origin.commits, origin.journal, origin.commit
    if origin.problem is not None:
        problems["mirror"] = origin.problem
    for rejected in commits.rejected:
        log.warning("rejected a commit: %s", rejected)
    if commit is not None:
        with _described_by(commit):
            _fits(parts, commit)

    device = Device(
        config.run.device,
        threads=config.run.threads,
        precision=config.run.precision,
        deterministic=config.run.deterministic,
    )
    learner = learner_of(parts, device)
    if commit is None and config.model.init_from is not None:
        with tempfile.TemporaryDirectory(prefix=".tmp-init-", dir=run.path) as cache:
            learner.start_from(initial_weights(parts, config.model.init_from, Path(cache)))
    with _described_by(commit):
        position = Position() if commit is None else _restore(learner, commit)

    quarantine = Quarantine(run.quarantine / "records")
    failures = Failures(run.path)
    failures.judge(decisions, learner.step_count, position.batches)
    pipeline = pipeline_of(parts, journal, quarantine, run.fold)
    pipeline.restore(position)
    session = Session(
        parts=parts,
        run=run,
        journal=journal,
        commits=commits,
        learner=learner,
        reader=Reader(pipeline, config.data.prefetch_batches),
        spool=Spool(run, max_shard_bytes=config.exports.max_shard_bytes),
        store=store,
        publisher=publisher,
        position=position,
        quarantine=quarantine,
        decisions=decisions,
        failures=failures,
        mirror=origin.mirror,
        commit=commit,
        problems=problems,
    )
    if published is not None and published.run_id != run.run_id:
        log.warning(
            "%s: the newest checkpoint %s is of another run, %s; what this run publishes counts as newer. If that run "
            "is alive, give this one a prefix of its own", store.url, published.id, published.run_id
        )  # fmt: skip
    elif published is not None:
        session.parent = published.id
        if published.evaluation is not None:
            found = published.evaluation
            session.standing = Standing(published.id, found.holdout, found.loss_x)
            session.served = session.spool.served(published.id)
        session.published = {"step": published.step, "checkpoint": published.id, "time": published.created_s}
    if commit is None:
        if journal.length("data"):
            log.info("run %s in %s on %s: no commit yet, begins again by its journal", run.run_id, run.path, device)
        else:
            log.info("new run %s in %s on %s", run.run_id, run.path, device)
        return session
    with _described_by(commit):
        session.evaluation = Evaluation.from_json(commit.state["evaluation"]) if commit.state["evaluation"] else None
        session.parent = session.parent or commit.state["parent_checkpoint"]
        written = datetime.fromisoformat(commit.manifest.created).timestamp()
    where = {"step": commit.manifest.step, "path": str(commit.path), "time": written}
    session.resumed = {**where, "from": origin.taken}
    via = f", taken from the mirror {origin.mirror.url}," if origin.mirror and origin.taken == "mirror" else ""
    log.info("resumed step %d from %s%s on %s", commit.manifest.step, commit.path, via, device)
    return session


def _newest(sources: Sources, fresh: bool) -> tuple[Origin, Decisions]:
    """The newest commit to go on from. One that was gone back from, by a process that was killed before it made
    another, is set aside now."""
    without: set[int] = set()
    while True:
        origin = sources.newest(_journal_needs, fresh=fresh, without=without)
        decisions = Decisions(origin.journal)
        seq = origin.commit.manifest.seq if origin.commit is not None else 0
        if (undone := decisions.undone(seq)) is None:
            return origin, decisions
        log.warning("commit %d was gone back from: %s", seq, undone["why"])
        origin.commits.set_aside(undone["to_seq"], undone["why"])
        without.update(range(undone["to_seq"] + 1, undone["newest_seq"] + 1))
        origin.journal.close()


def _journal_needs(commit: Commit) -> tuple[int, str]:
    length, digest = 0, ""
    with _described_by(commit):
        length, digest = (commit.state["position"][key] for key in ("journal_length", "journal_digest"))
    return length, digest


@contextlib.contextmanager
def _described_by(commit: Commit | None) -> Iterator[None]:
    """A state that is no state of ours, though its digest is right, is a named error."""
    try:
        yield
    except AnytimedError as error:
        if commit is None or not isinstance(error, CorruptError) or str(commit.path) in str(error):
            raise
        raise CorruptError(f"{commit.path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if commit is None:
            raise
        raise CorruptError(f"{commit.path}: its state is none of anytimed's: {error!r}; restore another one") from error


def _fits(parts: Parts, commit: Commit) -> None:
    found = differences(commit.state["shape"], shape(parts))
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise ConfigError(
            f"{parts.config.path}: does not fit the commit {commit.path}:\n{listed}\n"
            "Restore these values to go on, or start over with --fresh, which moves the old run aside."
        )
    if commit.state["world_size"] != WORLD_SIZE:
        raise ConfigError(f"{commit.path}: written by {commit.state['world_size']} ranks; this version resumes 1")


def _restore(learner: Learner, commit: Commit) -> Position:
    for name, now in learner.device.facts().items():
        then = commit.state["learner"]["facts"].get(name)
        if then != now:
            log.warning(
                "%s was %s when the commit was written and is %s now: not bit for bit from here", name, then, now
            )
    rest = learner.restore(commit.tensor_files, commit.state)
    weights = {name: float(rule["weight"]) for name, rule in commit.state["position"]["mixture"].items()}
    holdout = Holdout.from_arrays(rest[HOLDOUT_TENSOR].numpy(), commit.state["holdout"], weights)
    return Position.from_json(commit.state["position"], holdout)
