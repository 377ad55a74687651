"""The command line: the only module that sees everything.

Commands that read (`status`, `list`, `pull`, `verify`) import no torch. A failure that a person can act on is one
message on standard error and the exit code of its kind: 1 failure, 2 bad usage or config, 3 refused, 4 pulled an older
checkpoint than the newest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from anytimed.contracts import AnytimedError, ConfigError, Json
from anytimed.urls import in_environment, keep_secret, told, without_credentials

app = typer.Typer(
    help="Continual, anytime training: a daemon that never finishes, and checkpoints that anyone can pull at any time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (TOML).")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the configuration file that names it.")]
Url = Annotated[str, typer.Argument(metavar="URL", help="Published prefix: any fsspec URL or a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-adapter",
        metavar="MODULE:CLASS",
        envvar="ANYTIMED_ALLOW_ADAPTERS",
        help="Let the configuration name this class as an adapter, though no entry point does; repeatable.",
    ),
]


class FeedForm(StrEnum):
    """How `feed` reads a file."""

    AUTO, JSONL, TEXT = "auto", "jsonl", "text"


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("anytimed.toml"),
) -> None:
    """Write a commented starter configuration."""
    text = files("anytimed").joinpath("starter.toml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; name another file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None
    _say(f"Wrote {path}. Next: {_myself()} check {path}")


@app.command()
def check(
    path: ConfigFile,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A running daemon: what would a reload make of this file?")
    ] = None,
    allow_adapter: Allowed = None,
) -> None:
    """Validate everything that can be validated without training."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service.check import check as findings
    from anytimed.service.check import reload as reload_findings

    registry.allow(allow_adapter or ())
    table = Table("", "what", "found", box=None, padding=(0, 2, 0, 0))
    good, config = True, load(path)
    foreseen = None if against is None else _asked(against, "/foresee", "asking the daemon", config.to_json())
    for finding in chain(findings(config), reload_findings(foreseen)):
        good = good and finding.good
        table.add_row("[green]ok[/]" if finding.good else "[red]no[/]", finding.what, _plain(finding.told))
    out.print(table)
    if not good:
        raise ConfigError(f"{path}: not everything is in order; see the lines marked no")


@app.command()
def run(
    path: ConfigFile,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop once the run has this many steps (demos, tests).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; the old run is moved aside.")] = False,
    allow_adapter: Allowed = None,
) -> None:
    """Train until told to stop. Every start goes on from the newest commit."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service.console import View, configure_logging
    from anytimed.service.requests import Mailbox
    from anytimed.service.signals import posted_to
    from anytimed.storage.run_directory import RunDirectory

    configure_logging(out)
    registry.allow(allow_adapter or ())
    config, mailbox = load(path), Mailbox()
    with posted_to(mailbox), RunDirectory(Path(config.run.directory)) as directory:
        if not fresh:
            directory.acquire()  # before torch is imported: a second daemon is refused at once
        from anytimed.service.loop import Daemon
        from anytimed.service.recovery import recover

        session = recover(config, directory, fresh=fresh)
        with View(out, f"anytimed {path}") as view:
            daemon = Daemon(session, mailbox, view, steps=steps)
            daemon.run()
    status = daemon.status()
    with suppress(OSError):  # the terminal may be gone by now
        if status["commit"]:
            _say(f"Committed step {status['commit']['step']} in {status['commit']['path']}")
        _say(f"Go on:  {_myself()} run {path}")
        _say(f"Pull:   {_myself()} pull {without_credentials(config.exports.url)} --to DIR")


@app.command()
def status(where: Run, as_json: AsJson = False) -> None:
    """Show how a run is doing; from status.json when no daemon runs."""
    from anytimed.service.console import ago, table
    from anytimed.service.control import ask

    folder = _run_directory(where)
    try:
        found = ask(folder / "control.sock", "GET", "/status", timeout_s=5)
    except OSError:
        found = _last_status(folder)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    try:
        rows = table(found, time.time())
        since = ago(time.time() - found["time"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AnytimedError(f"{folder}: what it says is no status of this version: {error!r}") from error
    if found["state"].startswith("not running"):
        _say(f"No daemon runs; this is what it said {since} ago.")
    out.print(rows)


@app.command()
def data(
    path: ConfigFile,
    peek: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show the next N samples instead, as the model will see them."),
    ] = None,
    as_json: AsJson = False,
    allow_adapter: Allowed = None,
) -> None:
    """Show where each source stands, or the samples that come next. Only looks: changes nothing, needs no lock."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service import data_view
    from anytimed.service.assembly import parts_of
    from anytimed.service.data_report import daemon_of, report
    from anytimed.service.peek import peek as peeked
    from anytimed.service.run_on_disk import read_run

    registry.allow(allow_adapter or ())
    config = load(path)
    with err.status("looking"):
        parts, folder = parts_of(config), Path(config.run.directory)
        status = _daemon_status(folder)  # before the commit: what is read later is at least as new
        run = read_run(folder)
        if peek is None:
            found = report(parts, run, status)
        else:
            items = list(peeked(parts, run, peek))
    if peek is None:
        if as_json:
            sys.stdout.write(json.dumps(found.to_json()) + "\n")
        else:
            out.print(*data_view.report_lines(found, time.time()), sep="\n")
        return
    head = data_view.Head(run.told(), daemon_of(status), config.data.mask_documents)
    if as_json:
        sys.stdout.write(json.dumps(data_view.samples_json(head, items, parts.tokenizer)) + "\n")
    else:
        for line in data_view.sample_lines(head, items, parts.tokenizer, out, time.time()):
            out.print(line)


@app.command()
def export(where: Run) -> None:
    """Ask the running daemon to publish x now, and wait until it is there."""
    answer = _asked(where, "/export", "exporting")
    _say(f"Published {answer['checkpoint']} (step {answer['step']})")
    _say(f"Pull:  {_myself()} pull {answer['url']} --to DIR")


@app.command()
def commit(where: Run) -> None:
    """Ask the running daemon to write its resumable state now, and wait until it is durable."""
    answer = _asked(where, "/commit", "committing")
    _say(f"Committed step {answer['step']}: {answer['path']}")


@app.command()
def reload(where: Run) -> None:
    """Ask the running daemon to take its configuration file anew: all of the change, or none of it and the reason."""
    answer = _asked(where, "/reload", "reloading")
    _say(f"Reloaded {answer['config']}: {', '.join(answer['changed']) or 'nothing in it has changed'}")


@app.command()
def feed(
    where: Run,
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Files to send; - or none: standard input.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="The inbox to send to; needed where there are several.")] = None,
    form: Annotated[
        FeedForm,
        typer.Option("--format", help="jsonl: a record a line; text: a record a file; auto: by the file's name."),
    ] = FeedForm.AUTO,
) -> None:
    """Send records to an inbox of the running daemon; what is acknowledged is durable, and trained on once."""
    from anytimed.service.feeding import Feeder, packed, records_of

    folder, fed_from = _run_directory(where), paths or [Path("-")]
    known = all(path.is_file() for path in fed_from)
    total = sum(path.stat().st_size for path in fed_from) if known else None
    with _feeding() as (show, waiting):
        feeder = Feeder(folder / "control.sock", source, waiting)
        try:
            for request in packed(records_of(fed_from, form.value)):
                feeder.send(request)
                show(feeder.fed.size, total)
        except KeyboardInterrupt:
            err.print(f"Stopped: {feeder.fed.told()}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except (AnytimedError, OSError):
            err.print(feeder.fed.told(), markup=False, highlight=False, soft_wrap=True)
            raise
        finally:
            feeder.close()
    _say(feeder.fed.told())


@app.command()
def pull(
    url: Url,
    to: Annotated[Path, typer.Option(help="Folder to pull into; its `current` is the newest pulled checkpoint.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="A certain checkpoint, as `anytimed list` names it, or best.")
    ] = None,
) -> None:
    """Fetch the newest checkpoint, verified, and switch `DIR/current` to it. A pull that was cut is gone on with."""
    from anytimed.storage.pull import pull as fetch

    try:
        with _pulling() as progress:
            pulled = fetch(url, to, checkpoint=checkpoint, progress=progress)
    except KeyboardInterrupt:
        err.print(
            f"Stopped. The next pull into {to} goes on from there.", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    manifest = pulled.manifest
    _say(f"{manifest.id}: step {manifest.step:,}, {manifest.tokens:,} tokens")
    _say(f"{to / 'current'}")
    if pulled.fell_back:
        err.print(f"The newest checkpoint was damaged; {manifest.id} is the newest good one.", markup=False)
        raise typer.Exit(4)


@app.command("list")
def list_(url: Url, as_json: AsJson = False) -> None:
    """List what is published, newest first."""
    from anytimed.service.console import ago, number, size
    from anytimed.storage.pull import list_checkpoints

    manifests = sorted(list_checkpoints(url), key=lambda manifest: manifest.order, reverse=True)
    if as_json:
        sys.stdout.write(json.dumps([manifest.model_dump(mode="json") for manifest in manifests]) + "\n")
        return
    table = Table("checkpoint", "step", "tokens", "hold-out loss of x", "size", "age", box=None, padding=(0, 2, 0, 0))
    for m in manifests:
        loss = number(m.evaluation.loss_x if m.evaluation else None)
        table.add_row(m.id, f"{m.step:,}", f"{m.tokens:,}", loss, size(m.total_bytes), ago(time.time() - m.created_s))
    out.print(table if manifests else f"Nothing is published at {told(url)} yet.")


@app.command()
def verify(
    where: Annotated[
        str, typer.Argument(metavar="RUN_OR_URL", help="Run directory, its configuration, published prefix or mirror.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read everything again and compare every digest; 1 where something is not what was written."""
    from anytimed.service.console import size

    with _progress("reading") as progress:
        checked = list(_verified(where, progress))
    problems = [problem for one in checked for problem in one.problems]
    if as_json:
        told = {"good": not problems, "checked": [one.to_json() for one in checked]}
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        table = Table("", "what", "size", box=None, padding=(0, 2, 0, 0))
        table.add_column("where", overflow="fold")
        for one in checked:
            told_where = _plain(f"{one.where}\n{one.note}" if one.note else one.where)
            table.add_row("[red]no[/]" if one.problems else "[green]ok[/]", one.what, size(one.size), told_where)
        out.print(table)
        for problem in problems:
            _say(f"{problem.path}: expected {problem.expected}, found {problem.found}")
    if problems:
        raise AnytimedError(f"{where}: {len(problems)} of what was read is not what was written; nothing was changed")


@app.command()
def sample(
    where: Annotated[str, typer.Argument(metavar="DIR_OR_URL", help="Pulled folder, or a published prefix.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Draw among this many tokens.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    allow_adapter: Allowed = None,
) -> None:
    """Continue a prompt with a published checkpoint."""
    from anytimed import registry
    from anytimed.service.reader_side import load_checkpoint
    from anytimed.storage.pull import pull as fetch
    from anytimed.training.sample import continue_text, decode_stream

    registry.allow(allow_adapter or ())
    with tempfile.TemporaryDirectory(prefix="anytimed-") as scratch:
        folder = next((f for f in (Path(where), Path(where) / "current") if (f / "config.json").is_file()), None)
        if folder is None:
            with _progress("pulling") as progress:
                folder = fetch(where, Path(scratch), progress=progress).path
        module, tokenizer, context_length = load_checkpoint(folder)
    drawn = continue_text(
        module,
        tokenizer,
        prompt,
        max_new_tokens=tokens,
        context_length=context_length,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    sys.stdout.write(prompt)
    for piece in decode_stream(tokenizer, drawn, [int(t) for t in tokenizer.encode(prompt)]):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def prove(
    path: ConfigFile,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each of the two runs.")] = 60,
    kills: Annotated[int, typer.Option(min=0, help="How often one of them is killed.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments to kill at.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="New folder for both runs, kept afterwards.")] = None,
    as_json: AsJson = False,
    allow_adapter: Allowed = None,
) -> None:
    """Run a configuration undisturbed and with random SIGKILLs, and say whether both end bit for bit equal."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service.prove import planned, scratch_folder, verdict
    from anytimed.service.prove import prove as proved

    registry.allow(allow_adapter or ())
    os.environ["ANYTIMED_ALLOW_ADAPTERS"] = " ".join(registry.allowed())  # for the runs, which are processes
    config = load(path)
    plan = planned(config, steps=steps, kills=kills, seed=seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process of ours is left behind
    for line in (*plan.notes, *(f"Need not end equal: {why}" for why in plan.inexact)):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    with scratch_folder(keep) as scratch, _counted("steps") as tell:
        proof = proved(config, plan, scratch, tell)
        if not proof.found.equal:
            (scratch / "KEEP").touch()
    if as_json:
        sys.stdout.write(json.dumps({**proof.to_json(), "inexact": plan.inexact, "notes": plan.notes}) + "\n")
    else:
        for line in verdict(proof, plan):
            _say(line)
    if not proof.found.equal or keep is not None:
        err.print(f"Both runs and their logs are in {scratch}", markup=False, highlight=False, soft_wrap=True)
    if not proof.found.equal:
        raise typer.Exit(1)


# --- what the commands share ------------------------------------------------------------------------------------------


def _run_directory(where: Path) -> Path:
    """The run directory itself, or the one that a configuration names."""
    if where.is_dir():
        folder = where
    else:
        from anytimed.config import load

        folder = Path(load(where).run.directory)
    if not (folder / "OWNER").exists():
        raise ConfigError(f"{folder}: no run here yet; `anytimed run CONFIG` begins one")
    return folder


def _verified(where: str, progress: Callable[[int, int], None]) -> Iterator[Any]:
    """What `verify` looks at: a run directory; that and the mirror of a configuration; what lies at a URL."""
    from anytimed.storage.pull import WAITING_S
    from anytimed.storage.store import Store
    from anytimed.storage.verify import kind_of, verify_mirror, verify_published, verify_run

    path = Path(where)
    if path.is_file():
        from anytimed.config import load

        config = load(path)
        yield from verify_run(_run_directory(path), progress)
        if config.commits.mirror_url is not None:
            options = config.commits.mirror_storage_options
            yield from verify_mirror(Store(config.commits.mirror_url, options, deadline_s=WAITING_S), progress)
        return
    if (path / "OWNER").exists() or (path / "LOCK").exists():
        yield from verify_run(path, progress)
        return
    store = Store(where, deadline_s=WAITING_S)
    kind = kind_of(store)
    if not kind:
        raise ConfigError(
            f"{store.url}: nothing to verify; expected a run directory, its configuration, a published prefix, or a "
            "mirror"
        )
    yield from (verify_mirror if kind == "mirror" else verify_published)(store, progress)


def _asked(where: Path, route: str, what: str, body: Json | None = None) -> Json:
    """What the running daemon answers to a request. Raises AnytimedError where none runs, and what it says."""
    from anytimed.service.control import ask

    folder = _run_directory(where)
    try:
        with err.status(what):
            return ask(folder / "control.sock", "POST", route, body)
    except OSError:
        raise AnytimedError(f"no daemon answers in {folder}; start it with `anytimed run CONFIG`") from None


def _daemon_status(folder: Path) -> Json | None:
    """What the daemon of a run directory says; None where none runs."""
    from anytimed.service.control import ask

    try:
        return ask(folder / "control.sock", "GET", "/status", timeout_s=5)
    except OSError:
        return None


def _last_status(folder: Path) -> Json:
    from anytimed.storage.strangers import read_json

    try:
        found = read_json(folder / "status.json", 16 << 20)
    except FileNotFoundError:
        raise AnytimedError(f"{folder}: no daemon answers, and none has left a status") from None
    return {**found, "state": f"not running (was {found.get('state')})"}


@contextmanager
def _feeding() -> Iterator[tuple[Callable[[int, int | None], None], Callable[[str | None], None]]]:
    """The bar of a feed, and what says why it does not go on: a line each time the reason is another one."""
    with _progress("feeding") as show:
        last: str | None = None

        def waiting(why: str | None) -> None:
            nonlocal last
            if why is not None and last is None:
                err.print(f"waiting: {why}", markup=False, highlight=False, soft_wrap=True)
            last = why

        yield show, waiting


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with rate and time left on a terminal; nothing is written anywhere else."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def _pulling() -> Iterator[Callable[[int, int], None]]:
    """The bar of a pull; where an earlier one had left something, a line says so."""
    from anytimed.service.console import size

    with _progress("pulling") as show:
        begun = False

        def tell(done: int, total: int) -> None:
            nonlocal begun
            if done > 0 and not begun:
                err.print(f"resumed at {size(done)} of {size(total)}", highlight=False, soft_wrap=True)
            begun = True
            show(done, total)

        yield tell


@contextmanager
def _counted(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for everything that counts up on a terminal; a line at every quarter elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} " + unit))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}
        quarters: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)
            if not err.is_terminal and 4 * done // total > quarters.get(what, 0):
                quarters[what] = 4 * done // total
                err.print(f"{what}: {done} of {total} {unit}", markup=False, highlight=False, soft_wrap=True)

        yield show


def _say(text: str) -> None:
    """A line as it is: no colours, no wrapping, so that it can be copied."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _myself() -> str:
    """How this command was called: `anytimed` where that is on the PATH, else the path that was typed."""
    return "anytimed" if shutil.which("anytimed") else sys.argv[0]


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def main() -> None:
    """Entry point: runs the app and turns errors for people into a message and an exit code. Whatever is said, a
    traceback included, is said without credentials."""
    keep_secret(in_environment(os.environ))
    threading.excepthook = lambda caught: _trace(caught.exc_value)
    try:
        app()
    except AnytimedError as error:
        err.print(f"anytimed: {told(str(error))}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # The machine says no (permissions, a full disk, no such folder), and says where; a traceback would not help.
        err.print(f"anytimed: {told(str(error))}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except MemoryError:
        err.print("anytimed: out of memory; nothing of what was committed is lost. Free some, or raise the limit")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - a mistake of ours: Python would print it as it is
        _trace(error)
        sys.exit(1)


def _trace(error: BaseException | None) -> None:
    sys.stderr.write(told("".join(traceback.format_exception(error))))


if __name__ == "__main__":
    main()
