"""`anytimed install-service` and `uninstall-service`: a systemd service, of the machine or of a user."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from anytimed.cli.app import app, err, out, plain, say
from anytimed.contracts import AnytimedError, ConfigError
from anytimed.urls import told

if TYPE_CHECKING:
    from anytimed.service.installation import Places

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the service: it becomes anytimed@NAME.")]
OfUser = Annotated[bool, typer.Option("--user", help="A service of yours (systemctl --user), not the machine's.")]
Prefix = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Before every path, as for a package; systemd is left alone.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]

_TOLD = {
    "new": "written",
    "same": "as it was",
    "outdated": "updated",
    "differs": "replaced",
    "kept": "yours, left alone",
}
_WOULD = {
    **_TOLD,
    "new": "would be written",
    "outdated": "would be updated",
    "differs": "is another: --force replaces it",
}


@app.command("install-service")
def install_service(
    name: Name,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The configuration to train by; it is copied.")
    ] = None,
    pull: Annotated[
        str | None, typer.Option(metavar="URL", help="Instead of --config: follow this published prefix.")
    ] = None,
    execute: Annotated[
        str | None, typer.Option("--exec", metavar="CMD", help="With --pull: run after every new checkpoint.")
    ] = None,
    user: OfUser = False,
    now: Annotated[bool, typer.Option("--now", help="Enable and start it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace changed files, kept as NAME.old.")] = False,
    prefix: Prefix = None,
    dry_run: DryRun = False,
) -> None:
    """Install a daemon, or with --pull a consumer, as a systemd service of this very program."""
    from anytimed.config import load
    from anytimed.service import reach
    from anytimed.service.installation import Places, folders, program, wanted
    from anytimed.service.own_files import write
    from anytimed.storage.durable import make_folders

    if (config is None) == (pull is None):
        raise ConfigError("install-service: expected --config FILE (a daemon) or --pull URL (a consumer), one of them")
    if execute is not None and pull is None:
        raise ConfigError("--exec: goes with --pull")
    places = Places(name, "run" if pull is None else "pull", user, prefix or Path("/"))
    warnings: list[str] = [] if user else list(reach.program(program()))
    if config is not None:
        text, found = _checked(config, places)
        warnings += found
        files = wanted(places, config=text)
    else:
        files = wanted(places, variables=_pulling(str(pull), execute))
    if not dry_run:
        _require_manager(places)
    if dry_run:
        results = [(file, file.found()) for file in files]
    else:
        results = write(files, force=force)
        if config is not None:
            load(places.config)  # as the daemon will, which refuses what others can write
        for folder in folders(places):
            make_folders(folder, 0o700)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("file", overflow="fold")
    table.add_column("mode")
    table.add_column("")
    for file, was in results:
        table.add_row(plain(str(file.path)), f"{file.mode:04o}", (_WOULD if dry_run else _TOLD)[was])
    for folder, what in ((places.state, "state"), (places.cache, "cache"))[: 2 if places.kind == "run" else 1]:
        table.add_row(plain(f"{folder}/"), "", what)
    out.print(table)
    for file, was in results if dry_run else ():
        if was in ("differs", "outdated"):
            say(told(file.difference()))
    for warning in warnings:
        err.print(f"warning: {told(warning)}", markup=False, highlight=False, soft_wrap=True)
    if not dry_run:
        _take_note(places)
        changed = any(was in ("new", "outdated", "differs") for _, was in results)
        _go_on(places, now=now and prefix is None, changed=changed)


@app.command("uninstall-service")
def uninstall_service(
    name: Name,
    pull: Annotated[bool, typer.Option("--pull", help="The consumer of that name, not the daemon.")] = False,
    user: OfUser = False,
    purge: Annotated[bool, typer.Option("--purge", help="Delete configuration, commits and cache too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --purge: do not ask.")] = False,
    prefix: Prefix = None,
    dry_run: DryRun = False,
) -> None:
    """Stop a service and remove what install-service wrote; what it trained stays, unless --purge."""
    from anytimed.service.installation import Places
    from anytimed.service.uninstallation import kept, removals, remove

    places = Places(name, "pull" if pull else "run", user, prefix or Path("/"))
    if not (places.environment.exists() or (not pull and places.config.exists()) or kept(places)):
        raise ConfigError(f"{places.unit}: nothing of it is installed in {places.configuration} and {places.state}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("what", overflow="fold")
    table.add_column("")
    if dry_run:
        left = [(path, "would go" if purge else "stays (--purge deletes it)") for path in kept(places)]
        done = [(path, f"would be: {how}") for path, how in removals(places)] + left
    else:
        _require_manager(places)
        if purge and not yes and kept(places):
            listed = "\n".join(map(str, kept(places)))
            typer.confirm(f"{listed}\nDelete these, and every commit in them, for good?", abort=True)
        if prefix is None:
            _systemctl(places, "disable", "--now", places.unit)
            _systemctl(places, "reset-failed", places.unit, may_fail=True)
        done = remove(places, purge=purge)
        _take_note(places)
    for path, how in done:
        table.add_row(plain(str(path)), how)
    out.print(table)


def _checked(path: Path, places: Places) -> tuple[str, list[str]]:
    """The text of a configuration that may be installed, and what will not work in the service."""
    import tomllib

    from anytimed.config import load
    from anytimed.service import reach
    from anytimed.urls import kept_in

    config = load(path)
    text = path.read_text(encoding="utf-8")
    reach.require_movable(config, text, places.config)
    if kept_in(tomllib.loads(text)):
        raise ConfigError(
            f"{path}: holds credentials, and everybody can read what is installed; expected them in "
            f"{places.environment} (AWS_ACCESS_KEY_ID and others), or in /etc/credstore: see systemd/README.md"
        )
    with suppress(ConfigError, OSError):
        load(places.config)  # what a difference from it may show: its credentials are kept secret from here on
    return text, [] if places.user else list(reach.configuration(config, Path("/var/lib/anytimed") / places.name))


def _pulling(url: str, execute: str | None) -> dict[str, str]:
    """What the unit of a consumer is told. Raises ConfigError where it cannot be said in an environment file."""
    for what, text in (("--pull", url), ("--exec", execute or "")):
        if any(character in text for character in '\n\r\\"'):
            raise ConfigError(f'{what}: found {text!r}, expected no line breaks, " or \\: put it into a script')
    options = {} if execute is None else {"ANYTIMED_PULL_OPTIONS": f'--exec "{execute}"'}
    return {"ANYTIMED_URL": url, **options}


def _require_manager(places: Places) -> None:
    """Raises AnytimedError where files could be written, but no systemd would read them."""
    if places.prefix != Path("/"):
        return
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
        raise AnytimedError(
            "systemd does not run here (no /run/systemd/system): `anytimed run CONFIG` trains in the foreground, "
            "--prefix DIR writes the files elsewhere"
        )
    if not places.user and os.geteuid() != 0:
        raise AnytimedError("a service of the machine takes root (sudo); --user installs one of yours")


def _take_note(places: Places) -> None:
    if places.prefix != Path("/"):
        return
    if places.sysusers.exists() and not places.user and places.kind == "pull":
        _called(["systemd-sysusers", str(places.sysusers)])
    _systemctl(places, "daemon-reload")


def _go_on(places: Places, *, now: bool, changed: bool) -> None:
    """Enable and start, or say how. What runs already is started anew only where something has changed."""
    control = "systemctl --user" if places.user else "systemctl"
    journal = "journalctl --user" if places.user else "journalctl"
    if now:
        _systemctl(places, "enable", places.unit)
        with err.status(f"starting {places.unit}"):
            try:
                _systemctl(places, "restart" if changed else "start", places.unit)
            except AnytimedError:
                raise AnytimedError(
                    f"{places.unit} is installed and enabled, and did not start: `{journal} -u {places.unit}` says why"
                ) from None
        say(f"{places.unit} runs. Next:")
    else:
        say("Next:")
        say(f"  {shlex.join([*control.split(), 'enable', '--now', places.unit])}")
    say(f"  {control} status {places.unit}")
    say(f"  {journal} -u {places.unit} -f")
    if places.user:
        say("  loginctl enable-linger      # so that it runs while you are not logged in")


def _systemctl(places: Places, *arguments: str, may_fail: bool = False) -> None:
    scope = ["--user"] if places.user else []
    _called(["systemctl", *scope, *arguments], may_fail=may_fail)


def _called(command: list[str], *, may_fail: bool = False) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise AnytimedError(f"{shlex.join(command)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()}")
