"""A run that was recovered, and the two copies that leave its training: the snapshot of a commit and the content of an
export. `Trained` is what the last batch brought along; `Session` holds the parts that the loop works with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from anytimed.config import Config, ExportsTable
from anytimed.contracts import (
    Batch,
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
from anytimed.service.assembly import WORLD_SIZE, Parts, inexact_resume, pipeline_of, shape
from anytimed.service.committed import HOLDOUT_TENSOR, restored
from anytimed.service.decisions import Decisions
from anytimed.service.failures import Failures
from anytimed.service.quarantine import Quarantine
from anytimed.storage.commit import STATE
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.exports import ExportContent, Publisher, Spool
from anytimed.storage.gate import Standing, Verdict
from anytimed.storage.journal import Journal
from anytimed.storage.mirror import Mirror
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store
from anytimed.training.learner import Learner
from anytimed.urls import without_credentials


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
        # What waits for the device first: once x is on its way, waiting would take longer.
        numbers = {"type": config.optimizer.type, **self.parts.recipe.numbers(), **self.learner.memory()}
        snapshot = self.learner.export(config.exports.dtype)
        tokens = self.learner.tokens
        flags = [f"a resume need not be bit for bit: {why}" for why in inexact_resume(config)]
        interventions = self.decisions.interventions(snapshot.step)
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
                sequence_length=config.data.sequence_length,
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
        position = restored(self.learner, commit)
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
