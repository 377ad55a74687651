"""A run stopped at 4T for want of data, its stream extended, continued to 8T with nothing changed: is it, bit for bit,
the run that had the same data in the same order from the start?

The stream is the text of `anytime.py` in two files. The first ends where a block of the shuffle does, near step 4T. One
run has both files; the other, real processes of `anytimed run`, has the first, waits when it is read, is stopped by
SIGTERM, finds the second file at its next start and goes on. In the end every tensor of both commits is compared, and
every number of their states but those that say when the second file was found.

    .venv/bin/python benchmarks/stop_and_extend.py            a quarter of an hour on two cores
    .venv/bin/python benchmarks/stop_and_extend.py --quick    a smaller model and some steps
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from horizons.plans import FULL, QUICK, Run, Scale, one_run, tables
from horizons.trainer import corpus_of
from keeping import machine
from safetensors.torch import load_file

from anytimed.config import load
from anytimed.contracts import Json, Position
from anytimed.data.pipeline import Dry
from anytimed.data.reader import read_one
from anytimed.service.assembly import parts_of, pipeline_of
from anytimed.service.victim import Life, to_the_end
from anytimed.storage.commits import Commits
from anytimed.storage.journal_copy import JournalCopy
from anytimed.storage.run_directory import RunDirectory

OF_THE_PLACE: Final = ("config_digest", "parent_checkpoint")
OF_THE_JOURNAL: Final = ("journal_length", "journal_digest")
"""When a file was found is in the journal: that differs, and is meant to."""
KINDS: Final = ("sf_normuon", "amuse")


def toml(told: Json, path: tuple[str, ...] = ()) -> str:
    """A configuration as its file says it; None is left out."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in told.items() if not isinstance(value, dict | None)]
    inner = [toml(value, (*path, key)) for key, value in told.items() if isinstance(value, dict)]
    return "\n".join([*([f"[{'.'.join(path)}]"] if path and plain else []), *plain, *inner])


class Half:
    """A folder with a run's configuration and the files of its stream."""

    def __init__(self, folder: Path, run: Run, scale: Scale) -> None:
        self.folder = folder
        (folder / "texts").mkdir(parents=True)
        told = tables(run, scale, f"{folder}/texts/*.jsonl", str(folder))
        # None of the timetable's own: a commit at each stop is enough.
        told["commits"] = {"every_steps": 10**9}
        told["data"]["discover"] = {"every_s": 0.2}
        (folder / "config.toml").write_text(toml(told), encoding="utf-8")

    def give(self, name: str, lines: list[str]) -> None:
        beside = self.folder / "texts" / ".beside"
        beside.write_text("".join(lines), encoding="utf-8")
        beside.rename(self.folder / "texts" / name)

    def train(self, steps: int) -> int:
        """Up to so many steps, or until there is nothing more to read; the step where it stands."""
        to_the_end(Life(self.folder, steps), lambda status: None)
        return self.commit().manifest.step

    def commit(self) -> Any:
        commit = Commits(RunDirectory(self.folder / "run")).newest()
        assert commit is not None, self.folder
        return commit


def cut(lines: list[str], folder: Path, run: Run, scale: Scale, near: int) -> int:
    """After how many of the lines a block ends, the first one at or after step `near`: read as the daemon reads."""
    half = Half(folder, run, scale)
    half.give("all.jsonl", lines)
    pipeline = pipeline_of(parts_of(load(folder / "config.toml")), JournalCopy(folder / "none"), lambda *_: None, None)
    try:
        pipeline.restore(Position())
        block = 0
        while not isinstance(batch := read_one(pipeline), Dry):
            if batch.position.block > block and batch.number > near:
                at = batch.position.sources["python"]
                return at.records + at.held_out + at.rejected
            block = batch.position.block
    finally:
        pipeline.close()
    raise SystemExit(f"the text has no block that ends after step {near}")


def differences(one: Json, other: Json, path: str = "") -> list[str]:
    """The places of two states that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [found for key in keys for found in differences(one.get(key), other.get(key), f"{path}.{key}")]
    return [] if one == other else [path.removeprefix(".")]


def compared(halves: tuple[Half, Half]) -> Json:
    """Every tensor of both newest commits, and every number of their states."""
    commits = [half.commit() for half in halves]
    tensors = [{name: t for f in commit.tensor_files for name, t in load_file(f).items()} for commit in commits]
    unequal = [
        name
        for name in sorted(tensors[0].keys() | tensors[1].keys())
        if name not in tensors[0] or name not in tensors[1] or not _same(tensors[0][name], tensors[1][name])
    ]
    states = [{k: v for k, v in commit.state.items() if k not in OF_THE_PLACE} for commit in commits]
    for state in states:
        state["position"] = {k: v for k, v in state["position"].items() if k not in OF_THE_JOURNAL}
    elements = sum(t.numel() for t in tensors[0].values())
    return {
        "steps": [commit.manifest.step for commit in commits],
        "tensors": len(tensors[0]),
        "elements": elements,
        "tensors_that_differ": unequal,
        "numbers_that_differ": differences(*states),
    }


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit: NaN is itself, and 0 is not -0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [t.reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*bits)


def measured(kind: str, scale: Scale, scratch: Path) -> Json:
    """Both runs of an optimizer, and whether they are the same."""
    unit = scale.horizons[-1] // 2
    run = one_run(kind, scale, 1)
    lines = corpus_of(scale, scratch).stream.read_text(encoding="utf-8").splitlines(keepends=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="anytimed-extend-") as folder:
        first = cut(lines, Path(folder) / "read", run, scale, unit)
        whole, extended = Half(Path(folder) / "whole", run, scale), Half(Path(folder) / "extended", run, scale)
        for half in (whole, extended):
            half.give("1.jsonl", lines[:first])
        whole.give("2.jsonl", lines[first:])
        stopped = extended.train(run.steps)
        extended.give("2.jsonl", lines[first:])
        extended.train(run.steps)
        whole.train(run.steps)
        found = compared((whole, extended))
    told = {"lines": [first, len(lines) - first], "stopped_at_step": stopped, **found}
    equal = not found["tensors_that_differ"] and not found["numbers_that_differ"] and found["steps"] == [run.steps] * 2
    return {**told, "equal": equal, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, some steps")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stop_and_extend.json"))
    parser.add_argument("--scratch", type=Path, default=Path(".anytimed/anytime"), help="where the text is written")
    parser.add_argument("--only", choices=KINDS, help="one optimizer")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    kinds = [arguments.only] if arguments.only else list(KINDS)
    result: Json = {"scale": scale.name, "machine": machine(), "horizons": list(scale.horizons)}
    scratch = (arguments.scratch / scale.name).absolute()
    corpus_of(scale, scratch)
    with ThreadPoolExecutor() as pool:  # the work is done by processes of their own, one thread each
        every = dict(zip(kinds, pool.map(lambda kind: measured(kind, scale, scratch), kinds), strict=True))
    for kind, found in every.items():
        result[kind] = found
        print(
            f"{kind}: stopped at step {found['stopped_at_step']:,} for want of data, extended, at step "
            f"{found['steps'][1]:,} {'equal, bit for bit' if found['equal'] else 'DIFFERENT'}: "
            f"{found['tensors']} tensors of {found['elements']:,} elements"
            + "".join(f"\n  {name}" for name in found["tensors_that_differ"] + found["numbers_that_differ"])
        )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result[kind]["equal"] for kind in kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
