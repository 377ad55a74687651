"""Every start is a recovery: from a run directory and a configuration to a session that goes on.

In order: the lock and the term (above any that the published prefix and the mirror have seen); the newest commit that
verifies, here or in the mirror, and its journal (`origin`), saying which were rejected; whether the configuration fits
it; model, optimizer and stream restored from it, or drawn from the seed when there is none.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from anytimed.config import Config
from anytimed.contracts import (
    CorruptError,
    Evaluation,
    Position,
)
from anytimed.data.reader import Reader
from anytimed.service.assembly import (
    initial_weights,
    learner_of,
    parts_of,
    pipeline_of,
    require_fit,
)
from anytimed.service.committed import described_by, restored
from anytimed.service.decisions import Decisions
from anytimed.service.failures import Failures
from anytimed.service.origin import START_S, Origin, Sources
from anytimed.service.quarantine import Quarantine
from anytimed.service.session import Session
from anytimed.storage.commits import Commit
from anytimed.storage.exports import Publisher, Spool
from anytimed.storage.gate import Standing
from anytimed.storage.manifest import Manifest
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store, StoreError
from anytimed.training.device import Device

log = logging.getLogger("anytimed")

Tell = Callable[[str, float], None]
START_ALLOWANCE_S = 600.0
SLOWEST_BYTES_PER_S = 50e6
"""A disk that reads its commits more slowly than that is as good as one that hangs."""


def recover(
    config: Config, run: RunDirectory, *, fresh: bool = False, tell: Tell = lambda what, seconds: None
) -> Session:
    """Bring the run in a directory that is ours back to its newest commit, or begin it.

    `fresh`: the directory is not ours yet; what is in it is moved aside once the configuration is known to be good,
    and a new run is acquired. `tell`: gets what begins now, and how many seconds it may take. The caller releases `run`
    in any case. Raises ConfigError where the configuration is
    wrong or does not fit the commit, Refused where another writer holds the run, no commit verifies, or data that was
    read has changed.
    """
    tell("starting: reading the configuration", START_ALLOWANCE_S)
    parts = parts_of(config)
    if fresh:
        aside = run.start_fresh()
        if aside is not None:
            log.info("--fresh: the old run is in %s", aside)
        run.acquire()
    sources = Sources(run, config.commits, tell)
    sources.identify(fresh=fresh)
    problems: dict[str, str] = {}
    store = Store(config.exports.url, config.exports.storage_options, deadline_s=config.exports.deadline_s)
    publisher = Publisher(store, verify=config.exports.verify_uploads)
    published: Manifest | None = None
    digest: str | None = None
    try:
        # Only looking, and not for long: what has to be repaired there waits until the lease is ours.
        looking = Publisher(store.hurried(min(START_S, config.exports.deadline_s)))
        term = looking.latest_term()
        if term >= run.term:
            # Another run published here, one that is gone perhaps: what we publish has to count as newer.
            run.release()
            run.acquire(at_least=term)
        published, pointer = looking.latest(), looking.pointer("latest.json")
        if published is not None and pointer is not None and pointer.id == published.id:
            digest = pointer.manifest_sha256
    except (StoreError, CorruptError) as error:
        problems["export"] = str(error)
        log.warning("%s; training goes on, exports wait", error)

    reading_s = START_ALLOWANCE_S + run.committed_bytes() / SLOWEST_BYTES_PER_S
    tell("starting: reading and verifying the commits", reading_s)
    origin, decisions = _newest(sources, fresh)
    commits, journal, commit = origin.commits, origin.journal, origin.commit
    if origin.problem is not None:
        problems["mirror"] = origin.problem
    for rejected in commits.rejected:
        log.warning("rejected a commit: %s", rejected)
    if commit is not None:
        with described_by(commit):
            require_fit(parts, commit)

    device = Device(
        config.run.device,
        threads=config.run.threads,
        precision=config.run.precision,
        deterministic=config.run.deterministic,
    )
    at = f"step {commit.manifest.step}" if commit is not None else "the beginning"
    tell(f"starting: going on from {at}", reading_s)
    learner = learner_of(parts, device)
    if commit is None and config.model.init_from is not None:
        with tempfile.TemporaryDirectory(prefix=".tmp-init-", dir=run.path) as cache:
            learner.start_from(initial_weights(parts, config.model.init_from, Path(cache)))
    with described_by(commit):
        position = Position() if commit is None else restored(learner, commit)

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
        session.published = {
            "step": published.step, "checkpoint": published.id, "digest": digest, "time": published.created_s,
        }  # fmt: skip
    if commit is None:
        if journal.length("data"):
            log.info("run %s in %s on %s: no commit yet, begins again by its journal", run.run_id, run.path, device)
        else:
            log.info("new run %s in %s on %s", run.run_id, run.path, device)
        return session
    with described_by(commit):
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
    with described_by(commit):
        length, digest = (commit.state["position"][key] for key in ("journal_length", "journal_digest"))
    return length, digest
