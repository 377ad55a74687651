"""TensorBoard: event files, one for every opening, in a folder of the run.

Three runs of TensorBoard: the folder itself over steps, `by_tokens` in it over tokens, `events` what was decided.
Steps that are told again, after a kill or a rollback, supersede those told before: an entry that says so (a session's
START at that step) has TensorBoard drop what it read from there on. The files are named by term and number, so that
they are read in the order they were written whatever the clock said. Every write is whole when `write` returns: what
the disk refuses is known at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from anytimed.contracts import Json, SinkRun
from anytimed_adapters.sinks.figures import event, figures

_VERSION = "brain.Event:2"
"""From 2 on a START entry is what makes a reader drop what is superseded."""


class TensorBoard:
    """A `Sink`. Losses are in nats per token; TensorBoard keeps figures in float32."""

    class Settings(BaseModel):
        """Where the event files go."""

        model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
        directory: str | None = Field(
            default=None,
            min_length=1,
            description="folder for the runs, to be given to `tensorboard --logdir`; default: in the run directory",
        )
        run_name: str | None = Field(
            default=None, pattern=r"^\w[\w .-]*$", description="the run's folder in it; default: the run's id"
        )

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings = settings
        self._axes: list[_Axis] = []
        self._tokens = 0

    def check(self) -> str:
        directory = self._settings.directory
        return f"event files in {directory or 'the run directory'}: tensorboard --logdir {directory or 'RUN/sinks'}"

    def open(self, run: SinkRun) -> None:
        directory = Path(self._settings.directory) if self._settings.directory is not None else run.folder
        folder = directory / (self._settings.run_name or run.run_id)
        self._axes = []
        for path, at in ((folder, run.step), (folder / "by_tokens", run.tokens), (folder / "events", None)):
            self._axes.append(_Axis(path, run, at))
        self._tokens = run.tokens

    def write(self, record: Json) -> None:
        found, told = figures(record), event(record)
        if record["kind"] == "step":
            self._tokens = record["tokens"]
        steps, tokens, events = self._axes
        if told is not None:
            events.tell(record.get("step", 0), record["time"], told)
            if record["what"] == "rollback":
                steps.back_to(record["to_step"])
        elif found:
            steps.draw(record["step"], record["time"], found)
            tokens.draw(self._tokens, record["time"], found)

    def flush(self) -> None:
        """Every write is."""

    def close(self) -> None:
        for axis in self._axes:
            axis.close()


class _Axis:
    """One event file. at: the step (or tokens) after which what was told before is superseded; None: nothing is."""

    def __init__(self, folder: Path, run: SinkRun, at: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _next_file(folder, run.term)
        self._records = RecordWriter(self._file)
        self._last = 0
        self._write(Event(wall_time=time.time(), file_version=_VERSION))
        if at is not None:
            self.back_to(at)

    def back_to(self, at: int) -> None:
        """What was told beyond `at` is superseded by what follows."""
        self._last = at
        self._write(Event(wall_time=time.time(), step=at + 1, session_log=SessionLog(status=SessionLog.START)))

    def draw(self, at: int, when: float, found: Mapping[str, float]) -> None:
        if at < self._last:
            self.back_to(at - 1)
        self._last = at
        values = [Summary.Value(tag=name, simple_value=value) for name, value in found.items()]
        self._write(Event(wall_time=when, step=at, summary=Summary(value=values)))

    def tell(self, at: int, when: float, text: str) -> None:
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(
            tag="events/text_summary", metadata=create_summary_metadata("events", None), tensor=tensor
        )
        self._write(Event(wall_time=when, step=at, summary=Summary(value=[value])))

    def close(self) -> None:
        self._file.close()

    def _write(self, entry: Event) -> None:
        self._records.write(entry.SerializeToString())


def _next_file(folder: Path, term: int) -> BinaryIO:
    """A new file, named after all others."""
    for number in range(1_000_000):
        path = folder / f"events.out.tfevents.{term:010d}.{number:06d}"
        if not path.exists():
            return path.open("xb", buffering=0)
    raise FileExistsError(f"{folder}: a million event files of one start")
