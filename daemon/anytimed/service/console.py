"""What a person sees while it runs: a live table on a terminal, log lines anywhere else.

Under the journal a line starts with its priority (sd-daemon(3)) and carries no time, which the journal adds; elsewhere
it carries the time. Both show the same status, so `anytimed status` uses `table` too."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from typing import Any, ClassVar

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.table import Table

from anytimed.contracts import Json
from anytimed.urls import told

QUIET_LINE_S = 10.0


class _Formatter(logging.Formatter):
    """Without credentials, in messages and tracebacks alike."""

    def format(self, record: logging.LogRecord) -> str:
        return told(super().format(record))


class _JournalFormatter(_Formatter):
    PRIORITY: ClassVar = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(
            f"<{self.PRIORITY.get(record.levelno, 6)}>{line}" for line in super().format(record).splitlines()
        )


def configure_logging(console: Console) -> None:
    """Route the `anytimed` logger: rich on a terminal, `<priority>` lines in the journal, dated lines elsewhere."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        handler.setFormatter(_Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        journal = "JOURNAL_STREAM" in os.environ
        handler.setFormatter(
            _JournalFormatter("%(message)s") if journal else _Formatter("%(asctime)s %(levelname)s %(message)s")
        )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("anytimed").setLevel(logging.INFO)


def ago(seconds: float | None, none: str = "never") -> str:
    """A duration in the two largest units: 42 s, 3 min 05 s, 2 h 10 min, 4 d 3 h."""
    if seconds is None:
        return none
    s = int(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def table(status: Json, now: float) -> Table:
    """The status as two columns."""
    evaluation, commit, export = status["evaluation"], status["commit"], status["export"]
    rows: list[tuple[str, str]] = [
        ("state", f"{status['state']}, for {ago(now - status['since'])}"),
        (
            "step",
            f"{status['step']:,}   {status['tokens']:,} tokens   {number(status['tokens_per_s'], ',.0f')} tokens/s",
        ),
        ("loss at y (training)", number(status["loss"])),
    ]
    if status["reason"]:
        rows.insert(1, ("because", status["reason"]))
    if evaluation:
        losses = "   ".join(f"{which} {evaluation[f'loss_{which}']:.4f}" for which in "xyz")
        rows.append(
            (
                f"hold-out, step {evaluation['step']:,}",
                f"{losses}   nats/token",
            )
        )
    else:
        rows.append(("hold-out", "not evaluated yet, or no record held out yet"))
    rows.append(("last commit", f"{ago(_age(commit, now))} ago, step {commit['step']:,}" if commit else "none yet"))
    if mirror := status.get("mirror"):
        held = mirror["commit"]
        told = f"{ago(_age(held, now))} ago, step {held['step']:,}" if held else "none since this start"
        rows.append(("last mirrored", f"{told}, {mirror['url']}"))
    if checked := status.get("verification"):
        rows.append(("commits verified", f"{ago(_age(checked, now))} ago, {checked['found']}"))
    rows.append(
        ("last export", f"{ago(_age(export, now))} ago, {export['checkpoint']}" if export else "none yet"),
    )
    if upload := status.get("upload"):
        amount = f"{size(upload['done_bytes'])} of {size(upload['total_bytes'])}, {size(upload['bytes_per_s'])}/s"
        rows.append(("uploading", f"{upload['checkpoint']}, {amount}, {ago(upload['left_s'], '?')} left"))
    for name, source in status["sources"].items():
        told = (
            f"{source['share']:.1%} of the draws, {source['records']:,} records read, {size(source['lag_bytes'])} to go"
        )
        dry = ", left out until there is more" if source["dry"] else ""
        rows.append((f"source {name}", f"{told}{dry}"))
    if status["skipped"]:
        rows.append(("skipped steps", f"{status['skipped']:,} (loss or gradient not finite)"))
    rows.extend(("degraded", problem) for problem in status["degraded"])
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for row in rows:
        grid.add_row(*row)
    return grid


def _age(event: Json | None, now: float) -> float | None:
    return max(0.0, now - event["time"]) if event else None


class View:
    """Shows statuses as they come."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._last_line = -QUIET_LINE_S

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._live.stop()

    def hung_up(self) -> bool:
        """Whether there was a terminal and it is gone: then SIGHUP does not mean to reload."""
        if self._live is None:
            return False
        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        except OSError:
            return True
        return False

    def show(self, status: Json, always: bool = False) -> None:
        """Refresh the table, or write a line unless one was written moments ago."""
        if self._live:
            with contextlib.suppress(OSError):
                panel = Panel(table(status, time.time()), title=self._title, title_align="left", expand=False)
                self._live.update(panel)
        elif always or time.monotonic() - self._last_line >= QUIET_LINE_S:
            self._last_line = time.monotonic()
            logging.getLogger("anytimed").info("%s", line(status, time.time()))


def line(status: Json, now: float) -> str:
    """The status as one log line."""
    evaluation: dict[str, Any] = status["evaluation"] or {}
    lag = sum(source["lag_bytes"] for source in status["sources"].values())
    parts = [
        status["state"],
        f"step {status['step']}",
        f"tokens {status['tokens']}",
        f"{number(status['tokens_per_s'], '.0f')} tokens/s",
        f"loss y {number(status['loss'])}",
        f"hold-out x {number(evaluation.get('loss_x'))}",
        f"commit {ago(_age(status['commit'], now))}",
        f"export {ago(_age(status['export'], now))}",
        f"lag {size(lag)}",
    ]
    return " | ".join(parts)
