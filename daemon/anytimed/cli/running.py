"""Where a run lies, and what its daemon answers."""

from __future__ import annotations

from pathlib import Path

from anytimed.cli.app import err
from anytimed.contracts import AnytimedError, ConfigError, Json


def run_directory(where: Path) -> Path:
    """The run directory itself, or the one that a configuration names."""
    if where.is_dir():
        folder = where
    else:
        from anytimed.config import load

        folder = Path(load(where).run.directory)
    if not (folder / "OWNER").exists():
        raise ConfigError(f"{folder}: no run here yet; `anytimed run CONFIG` begins one")
    return folder


def asked(where: Path, route: str, what: str, body: Json | None = None) -> Json:
    """What the running daemon answers to a request. Raises AnytimedError where none runs, and what it says."""
    from anytimed.service.control import ask

    folder = run_directory(where)
    try:
        with err.status(what):
            return ask(folder / "control.sock", "POST", route, body)
    except OSError:
        raise AnytimedError(f"no daemon answers in {folder}; start it with `anytimed run CONFIG`") from None


def daemon_status(folder: Path) -> Json | None:
    """What the daemon of a run directory says; None where none runs."""
    from anytimed.service.control import ask

    try:
        return ask(folder / "control.sock", "GET", "/status", timeout_s=5)
    except OSError:
        return None


def last_status(folder: Path) -> Json:
    from anytimed.storage.strangers import read_json

    try:
        found = read_json(folder / "status.json", 16 << 20)
    except FileNotFoundError:
        raise AnytimedError(f"{folder}: no daemon answers, and none has left a status") from None
    return {**found, "state": f"not running (was {found.get('state')})"}
