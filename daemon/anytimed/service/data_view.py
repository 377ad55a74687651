"""What `anytimed data` shows on a terminal: the sources as a table and what is worth knowing of each, or samples.

Texts of a source may hold anything: characters that would steer a terminal, reorder a line or cannot be seen are shown
as escapes, line ends and tabs as signs, all dim, so that a sample is a few lines that say what is in it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from anytimed.contracts import Json, Tokenizer
from anytimed.data.pipeline import Dry
from anytimed.service.console import ago, size
from anytimed.service.data_report import DataReport, SourceRow
from anytimed.service.peek import Document, PassedOver, Sample, text_of
from anytimed.urls import told

SAMPLE_LINES = 6
"""Of the terminal, at most, that a sample takes."""
END = "<|end|>"
_SIGNS = {"\n": "↵", "\t": "→", "\r": "␍"}
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

Item = Sample | PassedOver | Dry


# --- where the sources stand ------------------------------------------------------------------------------------------


def report_lines(report: DataReport, now: float) -> Iterator[RenderableType]:
    """Where the run stands, a row a source, and lines about each."""
    yield _head(report, now)
    yield ""
    yield _table(report)
    yield ""
    yield _notes(report)


def _head(report: DataReport, now: float) -> Table:
    grid = _grid()
    grid.add_row("commit", _commit(report.commit, now))
    if report.daemon is not None:
        figures = (
            f"of the running daemon (pid {report.daemon['pid']}, step {report.daemon['step']:,}), which reads ahead"
        )
    elif report.commit is not None:
        figures = f"no daemon runs: of the commit, at the beginning of its block {report.commit['block']:,}"
    else:
        figures = "no daemon runs, and nothing was read yet"
    grid.add_row("figures", figures)
    if report.mixture_waits:
        grid.add_row("mixture", "the configuration's takes effect at the first block after a start or a reload")
    return grid


def _commit(commit: Json | None, now: float) -> str:
    if commit is None:
        return "none yet"
    since = ago(max(0.0, now - commit["time"]))
    return f"{since} ago, step {commit['step']:,}, {commit['batches']:,} batches trained on"


def _table(report: DataReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("source", overflow="fold", min_width=8)
    for name in ("share", "records", "held out", "rejected", "tokens", "lag", "entries"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in report.rows.items():
        rejected = f"{count(row.rejected)} ({_percent(row.rejected_fraction)})" if row.rejected else "0"
        new = f" +{count(row.new_entries)}" if row.new_entries else ""
        table.add_row(
            Text(name),
            _percent(row.share),
            count(row.records),
            count(row.held_out),
            rejected,
            count(row.tokens),
            _lag(row.lag, row),
            f"{count(row.entries)}{new}",
        )
    return table


def _notes(report: DataReport) -> Table:
    grid = _grid()
    for name, row in report.rows.items():
        for number, (style, line) in enumerate(_about(row)):
            line = line.replace(f"source {name!r}: ", "", 1)  # whose line it is stands beside it
            grid.add_row(Text("" if number else name), Text(told(line), style=style))
    return grid


def _about(row: SourceRow) -> Iterator[tuple[str, str]]:
    """Style and line, the troubles first."""
    if row.refused:
        yield "red", f"refused: {row.refused}"
    if row.unavailable:
        yield "yellow", f"does not answer: {row.unavailable}"
    if row.suspended:
        yield "red", f"suspended: {row.suspended}"
    if row.unacknowledged:
        yield "yellow", f"not acknowledged: {row.unacknowledged}"
    if row.left_out:
        yield "yellow", "left out of the draws: it had nothing to read"
    if row.share is None and row.wanted is None:
        yield "", "not in the mixture; it stays where it is"
    elif row.share != row.wanted:
        wanted = f"its share is {_percent(row.wanted)}" if row.wanted is not None else "it takes no part"
        yield "", f"by the configuration, not in force yet, {wanted}"
    if row.next is not None:
        yield "", f"next: {row.next or _nothing(row)}"
    if row.new_entries:
        more = f", {_lag(row.new_lag, row)}," if row.new_lag else ""
        yield "", f"{_many(row.new_entries, 'new entry', 'new entries')}{more} not adopted yet"
    if row.when_dry is not None:
        yield "", _when_dry(row)
    if row.rejected and row.rejected_budget and not row.suspended:
        budget = row.rejected_budget
        most = f"{_percent(budget['fraction'])} and {budget['records']:,} records"
        yield "", f"{_percent(row.rejected_fraction)} rejected; it is read no further above {most}"
    if row.quarantined:
        records = _many(row.quarantined, "record", "records")
        yield "", f"{records} in quarantine, the last one: {row.quarantine_reason}"


def _nothing(row: SourceRow) -> str:
    known = row.entries + (row.new_entries or 0)
    return "nothing, every adopted entry has been read" if known else "nothing, no entry was found yet"


def _when_dry(row: SourceRow) -> str:
    match row.when_dry:
        case "others":
            return "when it has nothing: the draws fall to the others"
        case "replay":
            return f"when it has nothing: read again, now in pass {row.pass_number:,} of {row.passes:,}"
        case _:
            return "when it has nothing: the training waits"


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """After what the samples come. commit, daemon: as in a `DataReport`."""

    commit: Json | None
    daemon: Json | None
    mask_documents: bool


def sample_lines(
    head: Head, items: Sequence[Item], tokenizer: Tokenizer, console: Console, now: float
) -> Iterator[RenderableType]:
    """Samples, each cut at SAMPLE_LINES lines of the console."""
    grid = _grid()
    grid.add_row(
        "after", f"the commit of {_commit(head.commit, now)}" if head.commit else "the beginning: no commit yet"
    )
    if head.daemon is not None:
        where = f"at step {head.daemon['step']:,} by now (pid {head.daemon['pid']})"
        grid.add_row("daemon", f"running, {where}: what it has trained on since the commit is among these")
    if head.mask_documents:
        grid.add_row("documents", f"a token attends to its own only; each ends with {END}")
    yield grid
    for item in items:
        yield ""
        if isinstance(item, Sample):
            documents = item.documents(tokenizer.end_token)
            yield _sample_head(item, len(documents))
            yield _cut(_sample_text(documents, tokenizer, console.width * SAMPLE_LINES), console)
        elif isinstance(item, PassedOver):
            yield f"batch {item.batch:,} is passed over: the guard has jumped over it"
        else:
            yield "No more for now:"
            waiting = _grid()
            for name, why in sorted(item.reasons.items()):
                waiting.add_row(Text(name), Text(told(why)))
            yield waiting


def samples_json(head: Head, items: Iterable[Item], tokenizer: Tokenizer) -> Json:
    """Everything, token ids included."""
    items = list(items)
    return {
        "commit": head.commit,
        "daemon": head.daemon,
        "mask_documents": head.mask_documents,
        "samples": [item.to_json(tokenizer) for item in items if isinstance(item, Sample)],
        "passed_over": [item.batch for item in items if isinstance(item, PassedOver)],
        "waiting": {
            name: told(why) for item in items if isinstance(item, Dry) for name, why in sorted(item.reasons.items())
        },
    }


def _sample_head(sample: Sample, documents: int) -> Text:
    targets = ", ".join(f"{name} {number:,}" for name, number in sample.targets().items())
    line = Text(f"batch {sample.batch:,}, row {sample.row}", style="bold")
    line.append(f"   tokens of {targets}   {_many(documents, 'document', 'documents')}", style="not bold")
    return line


def _sample_text(documents: Sequence[Document], tokenizer: Tokenizer, enough: int) -> Text:
    """The beginning of a sample, of more than `enough` characters if there are so many."""
    made = Text(no_wrap=False, overflow="fold")
    several = len({document.source for document in documents} - {None}) > 1
    for document in documents:
        if several and document.source:
            made.append(f"[{document.source}] ", style="dim cyan")
        _append_visible(made, text_of(document, tokenizer)[: enough + 1])
        if document.ended:
            made.append(END, style="dim")
        if len(made) > enough:
            break
    return made


def _append_visible(made: Text, text: str) -> None:
    plain = ""
    for character in text:
        sign = _SIGNS.get(character)
        if sign is None and unicodedata.category(character) in _UNSEEN:
            code = ord(character)
            sign = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
        if sign is None:
            plain += character
            continue
        made.append(plain)
        made.append(sign, style="dim")
        plain = ""
    made.append(plain)


def _cut(text: Text, console: Console) -> Text:
    """At most SAMPLE_LINES lines of the console."""
    lines = text.wrap(console, console.width, overflow="fold")
    shown = Text("\n").join(lines[:SAMPLE_LINES])
    if len(lines) > SAMPLE_LINES:
        shown.append("\n…", style="dim")
    return shown


# --- how it is written ------------------------------------------------------------------------------------------------


def count(number: int | None) -> str:
    """Whole up to ten million, three figures beyond."""
    if number is None:
        return "-"
    if number < 10_000_000:
        return f"{number:,}"
    scaled, units = number / 1e6, iter("MGTPE")
    unit = next(units)
    while scaled >= 1000:
        scaled, unit = scaled / 1000, next(units)
    return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"


def _lag(number: int | None, row: SourceRow) -> str:
    if number is None or row.lag_unit == "bytes":
        return size(number)
    return f"{count(number)} {row.lag_unit}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _many(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", overflow="fold", max_width=20)
    grid.add_column(overflow="fold")
    return grid
