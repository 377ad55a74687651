"""The files of a systemd service: which they are, where they lie, what is in them.

In order: the two kinds of service, `run` (a daemon) and `pull` (a consumer); where their files lie, for the machine or
for a user (`Places`); what has to be there (`wanted`): the shipped units with this very program in them, the
configuration, the environment file. `own_files` writes them, `uninstallation` takes them away; nothing of it talks to
systemd."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import anytimed
from anytimed.contracts import AnytimedError, ConfigError
from anytimed.service.own_files import Wanted, marked

Kind = Literal["run", "pull"]

UNIT: dict[Kind, str] = {"run": "anytimed@.service", "pull": "anytimed-pull@.service"}
FAILURE, SYSUSERS = "anytimed-failure@.service", "anytimed.sysusers.conf"
PROGRAM = "/opt/anytimed/bin/anytimed"
"""What the shipped units run; replaced by the program that installs them."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}", re.ASCII)
_VARIABLES = """\
# Variables of {unit}: KEY=value, one a line, read at its start. Mode 0600: credentials may stand here, for
# they never belong into the configuration. `install-service` leaves what you write here alone.
#AWS_ACCESS_KEY_ID=
#AWS_SECRET_ACCESS_KEY=
#AWS_ENDPOINT_URL=
#HF_TOKEN=
"""


@dataclass(frozen=True)
class Places:
    """Where the files of the service NAME lie: of the machine, or of a user; `prefix` stands before each of them."""

    name: str
    kind: Kind
    user: bool = False
    prefix: Path = Path("/")

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f'NAME: found "{self.name}", expected at most 48 letters, digits, "-" and "_", a letter or digit first'
            )

    @property
    def unit(self) -> str:
        """The instance, as systemctl names it."""
        return UNIT[self.kind].replace("@", f"@{self.name}")

    @property
    def units(self) -> Path:
        return (
            self._home("XDG_CONFIG_HOME", ".config") / "systemd/user" if self.user else self._at("etc/systemd/system")
        )

    @property
    def configuration(self) -> Path:
        folder = self._home("XDG_CONFIG_HOME", ".config") if self.user else self._at("etc")
        return folder / "anytimed"

    @property
    def config(self) -> Path:
        """What the unit runs; of the kind `run`."""
        return self.configuration / f"{self.name}.toml"

    @property
    def environment(self) -> Path:
        return self.configuration / ("pull" if self.kind == "pull" else "") / f"{self.name}.env"

    @property
    def sysusers(self) -> Path:
        return self._at("etc/sysusers.d/anytimed.conf")

    @property
    def state(self) -> Path:
        """Where the service works: its relative paths lie there."""
        return self._below("var/lib", ".local/state")

    @property
    def cache(self) -> Path:
        return self._below("var/cache", ".cache")

    @property
    def dropins(self) -> Path:
        return self.units / f"{self.unit}.d"

    def _below(self, system: str, user: str) -> Path:
        folder = "anytimed" if self.kind == "run" else "anytimed-pull"
        return (self._home("", user) if self.user else self._at(system)) / folder / self.name

    def _at(self, path: str) -> Path:
        return self.prefix / path

    def _home(self, variable: str, otherwise: str) -> Path:
        if self.prefix != Path("/"):
            return self.prefix / "home" / otherwise
        return Path(os.environ.get(variable) or Path.home() / otherwise)


def wanted(places: Places, *, config: str = "", variables: dict[str, str] | None = None) -> list[Wanted]:
    """All files of a service. `config`: the text of its configuration (`run`); `variables`: of its environment file
    (`pull`), beside the commented ones."""
    files = [_unit(places, UNIT[places.kind])]
    if not places.user:
        files.append(_unit(places, FAILURE))
    explained = variables_of(places)
    if places.kind == "run":
        files.append(Wanted(places.config, config))
        files.append(Wanted(places.environment, explained, 0o600, theirs=True))
        return files
    if not places.user:
        files.append(Wanted(places.sysusers, marked(_shipped(SYSUSERS))))
    lines = "".join(f"{key}={value}\n" for key, value in (variables or {}).items())
    files.append(Wanted(places.environment, marked(explained + lines), 0o600, secret=True))
    return files


def variables_of(places: Places) -> str:
    """An environment file as it is first written: comments only."""
    return _VARIABLES.format(unit=places.unit)


def folders(places: Places) -> list[Path]:
    """Those that systemd does not make itself."""
    needed = [places.state, places.cache] if places.kind == "run" else [places.state]
    return needed if places.user else []


def program() -> list[str]:
    """The command that runs this very installation: `anytimed` beside the interpreter, else the interpreter itself."""
    script = Path(sys.executable).with_name("anytimed")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "anytimed.cli"]


# --- within -----------------------------------------------------------------------------------------------------------


def _unit(places: Places, name: str) -> Wanted:
    text = _shipped(f"user/{name}" if places.user else name)
    return Wanted(places.units / name, marked(text.replace(PROGRAM, " ".join(map(_quoted, program())))))


def _quoted(word: str) -> str:
    """A word of a command line in a unit: % and $ are systemd's there."""
    word = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    return '"' + word.replace('"', '\\"') + '"' if re.search(r"[\s\"'\\;]", word) else word


def _shipped(name: str) -> str:
    """A file of the distribution's systemd folder: where it was installed, or in the clone that it runs from."""
    found = [Path(anytimed.__file__).parents[2] / "systemd" / name]
    with contextlib.suppress(PackageNotFoundError):
        installed = distribution("anytimed").files or []
        found += [Path(str(file.locate())) for file in installed if str(file).endswith(f"anytimed/systemd/{name}")]
    for path in found:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise AnytimedError(f"systemd/{name} is not part of this installation of anytimed; install it again")
