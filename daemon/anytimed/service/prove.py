"""Proves that a configuration resumes bit for bit: it is run undisturbed and killed at random, and compared.

In order: `planned` says what the proof sets otherwise than the file does, and why the runs may differ in any case; the
two folders get a config.toml each that is based on the user's own and differs in where things go and how often it
commits; the undisturbed run shows how many steps the stream gives and how long things take; the other one is killed
with SIGKILL, K times, at moments drawn from the seed, and then runs to the same step; `sameness` compares what is left.
The user's run, mirror and published prefix are never touched.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from anytimed.config import Config
from anytimed.contracts import ConfigError, Json
from anytimed.service.assembly import inexact_resume, parts_of
from anytimed.service.sameness import Sameness, compare
from anytimed.service.victim import Life, await_moment, committed_step, moments, to_the_end

UNDISTURBED, KILLED = "undisturbed", "killed"

OF_THE_USER = (
    "exports.storage_options",
    "commits.mirror_url",
    "commits.mirror_storage_options",
    "commits.mirror_keep",
    "sinks",
)
"""Keys that lead out of the scratch folder."""

Tell = Callable[[str, int, int], None]
"""Told of progress: which run, its step, the step that it is to reach."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be run. `notes`: what is set otherwise than in the file. `inexact`: why the two may differ."""

    steps: int
    kills: int
    seed: int
    commit_every: int | None
    export_every: int | None
    notes: tuple[str, ...]
    inexact: tuple[str, ...]


@dataclass(slots=True)
class Proof:
    """What was found, and what it cost. `killed`: for each kill, in the middle of what, and the step of the newest
    commit then. `replayed`: steps that had been seen taken and were taken again."""

    steps: int
    kills: int
    killed: list[tuple[str, int]] = field(default_factory=list)
    dry: str | None = None
    starts: int = 0
    replayed: int = 0
    seconds: float = 0.0
    found: Sameness = field(default_factory=Sameness)

    def to_json(self) -> Json:
        return {**asdict(self), "equal": self.found.equal}


def planned(config: Config, *, steps: int, kills: int, seed: int) -> Plan:
    """Raises ConfigError where adapters, tables, or the numbers are wrong."""
    parts_of(config)
    if kills > steps:
        raise ConfigError(f"--kills {kills} --steps {steps}: found more kills than steps; allowed: at most one a step")
    notes, between = [], max(1, steps // (kills + 1))
    commit_every, export_every = None, None
    if (config.commits.every_steps or steps + 1) > between:
        commit_every = max(1, between // 2)
        notes.append(
            f"commits every {_steps(commit_every)} (in the file: {_cadence(config.commits)}), "
            "so that the run gets on between kills"
        )
    if (config.exports.every_steps or steps + 1) > max(1, steps // 4):
        export_every = max(1, steps // 8)
        notes.append(
            f"exports every {_steps(export_every)} (in the file: {_cadence(config.exports)}), so that kills meet some"
        )
    return Plan(steps, kills, seed, commit_every, export_every, tuple(notes), tuple(inexact(config)))


def inexact(config: Config) -> Iterator[str]:
    """Why the two runs of this configuration need not end bit for bit equal."""
    yield from inexact_resume(config)
    start = config.model.init_from
    if start is not None and not any(
        (folder / "config.json").is_file() for folder in (Path(start), Path(start) / "current")
    ):
        yield f"[model] init_from = {json.dumps(start)} is a published prefix, whose newest may change"


def prove(config: Config, plan: Plan, scratch: Path, tell: Tell) -> Proof:
    """Run both and compare; the runs stay in `scratch`. Raises ConfigError where not a single step can be taken, and
    AnytimedError where a run ended by itself with an error."""
    began = time.monotonic()
    proof = Proof(plan.steps, plan.kills)
    for name in (UNDISTURBED, KILLED):
        _write_config(config, plan, scratch / name)
    pace = _undisturbed(plan, scratch / UNDISTURBED, proof, tell)
    _killed(plan, scratch / KILLED, proof, pace, tell)
    runs, published = ((scratch / UNDISTURBED / what, scratch / KILLED / what) for what in ("run", "published"))
    proof.found = compare((UNDISTURBED, KILLED), runs, published)
    proof.seconds = time.monotonic() - began
    return proof


@contextmanager
def scratch_folder(keep: Path | None) -> Iterator[Path]:
    """`keep`, which has to be new or empty; else a folder that is removed unless the caller leaves a file `KEEP` in it.
    Raises ConfigError."""
    if keep is None:
        folder = Path(tempfile.mkdtemp(prefix="anytimed-prove-"))
    elif keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError(f"--keep {keep}: found something there; allowed: a new or an empty folder")
    else:
        folder = keep.absolute()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if keep is None and not (folder / "KEEP").exists():
            shutil.rmtree(folder, ignore_errors=True)


def verdict(proof: Proof, plan: Plan) -> Iterator[str]:
    """What a person reads, line by line."""
    found = proof.found
    during = ", ".join(f"{count} {what}" for what, count in sorted(Counter(what for what, _ in proof.killed).items()))
    if proof.dry:
        yield f"The stream gave {proof.steps} of {plan.steps} steps ({proof.dry}); the proof is about those."
    after = f"at step {found.step}, after {proof.kills} kills" + (f" ({during})" if during else "")
    if found.equal:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.tensors.items())
        yield f"Equal, bit for bit, {after}."
        yield f"  compared: {kinds} tensors; Position, hold-out, clocks, counters, journal; {found.exports} exports"
        yield f"  stream, in both: {found.sequences:,} sequences into shuffle block {found.block + 1}"
        for name, source in sorted(found.sources[0].items()) if found.block else ():
            yield (
                f"  before that block, of source {name}: {source['records']:,} records with {source['tokens']:,} "
                f"tokens read, {source['held_out']:,} held out, {source['rejected']:,} rejected"
            )
    else:
        yield f"DIFFERENT {after}:"
        yield from (f"  {line}" for line in found.differences)
        yield from (f"  That was to be expected: {why}" for why in plan.inexact)
    if found.data_changed:
        yield (
            f"  The data changed while this ran: {found.data_changed}. "
            + ("" if found.equal else "That is why they differ: ")
            + "prove it again when nothing is being written"
        )
    yield f"  it took {proof.starts} starts, {proof.replayed} steps or more taken again, {proof.seconds:.0f} s"


# --- the two runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pace:
    startup_s: float
    step_s: float


def _write_config(config: Config, plan: Plan, folder: Path) -> None:
    """The user's file with other places and cadences; its own relative paths keep their meaning."""
    folder.mkdir(mode=0o700)
    commits = f"every_steps = {plan.commit_every}\n" if plan.commit_every else ""
    exports = f"every_steps = {plan.export_every}\n" if plan.export_every else ""
    (folder / "config.toml").write_text(
        f"based_on = {_text(config.path.absolute())}\nwithout = {json.dumps(OF_THE_USER)}\n\n"
        f"[run]\ndirectory = {_text(folder / 'run')}\n\n"
        f"[commits]\nacknowledge = false\n{commits}\n"
        f"[exports]\nurl = {_text(folder / 'published')}\n{exports}",
        encoding="utf-8",
    )


def _undisturbed(plan: Plan, folder: Path, proof: Proof, tell: Tell) -> _Pace:
    """Up to the last step, or as far as the stream goes."""
    life, proof.dry = _to_the_end(plan.steps, folder, proof, tell, UNDISTURBED)
    proof.steps = committed_step(folder)
    if not proof.steps:
        raise ConfigError(f"not one step can be taken: {proof.dry}")
    trained_s = time.monotonic() - (life.trained_from or life.began)
    return _Pace((life.trained_from or life.began) - life.began, trained_s / proof.steps)


def _killed(plan: Plan, folder: Path, proof: Proof, pace: _Pace, tell: Tell) -> None:
    """The kills, then to the end. Every life may take twice its even share of the steps that are left."""
    steps = proof.steps
    for made, moment in enumerate(moments(plan.kills, plan.seed)):
        while True:
            resumed = committed_step(folder)
            share = 2 * (steps - resumed) / (plan.kills - made + 1)
            life = Life(folder, steps)
            try:
                proof.starts += 1
                limit = min(resumed + max(1, round(share)), steps - 1)
                code = await_moment(life, moment, startup_s=pace.startup_s, steps_s=share * pace.step_s, limit=limit)
            finally:
                hit = life.kill()
            if hit:
                break
            if code:
                raise life.failed(code)
            # It was over before the moment came. A run that is over can still be killed while it starts.
            moment = replace(moment, kind="start-up", at=moment.at / 2)
        committed, seen = committed_step(folder), life.status()
        proof.killed.append((life.doing(), committed))
        proof.replayed += max(0, (seen["step"] if seen else 0) - committed)
        tell(KILLED, committed, steps)
    _to_the_end(steps, folder, proof, tell, KILLED)


def _to_the_end(steps: int, folder: Path, proof: Proof, tell: Tell, name: str) -> tuple[Life, str | None]:
    """One life up to `steps`, or until the stream is dry: then it is stopped, and why it was is the second answer."""
    life = Life(folder, steps)
    proof.starts += 1
    return life, to_the_end(life, lambda status: tell(name, status["step"], steps))


def _cadence(table: object) -> str:
    told = [f"{key} = {value}" for key in ("every_steps", "every_s", "cron") if (value := getattr(table, key))]
    return ", ".join(told) or "never"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _text(value: object) -> str:
    """A TOML string: JSON's, but for the characters that only JSON lets stand."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
