"""Trains what is asked for, some runs at once, and keeps what was seen in them."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keeping

from anytimed.contracts import Json
from extension.corpora import SOURCES, Corpus, gather
from extension.plans import Plan, tables
from extension.runs import run_directory, train
from extension.scales import Scale


class NotKept(Exception):
    """A run that was not made, where none may be trained."""


class Trainer:
    """scratch: run directories and curves. program: takes `--one PLAN --scratch FOLDER` and calls `keep`; None: runs
    are trained in this process, one after the other. only_kept: nothing is trained."""

    def __init__(self, scale: Scale, scratch: Path, jobs: int, program: Path | None, *, only_kept: bool) -> None:
        self.scale, self._scratch, self._program, self._only_kept = scale, scratch, program, only_kept
        self.corpora = corpora_of(scale, scratch)
        self._pool = ThreadPoolExecutor(jobs if program else 1)
        self._again: set[str] = set()
        self.found: dict[str, Json] = {}
        """Every curve that was asked for, by its name."""

    def all_of(self, plans: Sequence[Plan]) -> list[Json]:
        """Their curves. What they start from was asked for before. Raises NotKept at the end, where one is missing."""
        curves = list(self._pool.map(self._one, plans))
        found = {plan.name: curve for plan, curve in zip(plans, curves, strict=True) if curve is not None}
        self.found.update(found)
        if len(found) < len(plans):
            raise NotKept
        return [*found.values()]

    def _one(self, plan: Plan) -> Json | None:
        found = None if plan.start in self._again else self._kept(plan)
        if found is not None or self._only_kept:
            return found
        self._again.add(plan.name)
        if self._program is None:
            keep(plan, self.scale, self._scratch)
        else:
            folder = str(self._scratch.parent)
            command = [sys.executable, str(self._program), "--one", json.dumps(plan.told()), "--scratch", folder]
            keeping.alone(command, plan.name)
        found = self._kept(plan)
        assert found is not None, plan.name
        losses = found["probed"][-1]["losses"]
        print(f"{plan.name}: {losses} at {found['end']}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        return found

    def _kept(self, plan: Plan) -> Json | None:
        """The curve of an earlier run of the same plan, if what others go on from is there as well."""
        path = keeping.curve_file(self._scratch, plan.name)
        found = keeping.kept(path, key_of(plan, self.scale, self.corpora))
        return found if run_directory(self._scratch, plan.name).exists() else None


def keep(plan: Plan, scale: Scale, scratch: Path) -> None:
    """Train one plan in this process and keep its curve."""
    corpora = corpora_of(scale, scratch)
    found = {"key": key_of(plan, scale, corpora), **train(plan, scale, corpora, scratch)}
    keeping.keep(keeping.curve_file(scratch, plan.name), found)


@functools.cache
def corpora_of(scale: Scale, scratch: Path) -> dict[str, Corpus]:
    """The texts, written where they are not yet."""
    return {
        name: gather(name, scratch / "corpora", stream_bytes=scale.stream_bytes, probe_bytes=scale.probe_bytes)
        for name in SOURCES
    }


def key_of(plan: Plan, scale: Scale, corpora: dict[str, Corpus]) -> str:
    """What a kept curve has to have come from."""
    texts = {name: corpus.digest for name, corpus in corpora.items()}
    return keeping.key_of(plan.told(), tables(plan, scale, texts, "", ("", "")), repr(scale))
