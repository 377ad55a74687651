"""The files of a systemd service: what they are, whether they may be written, writing and removing them.

In order: the two kinds of service, `run` (a daemon) and `pull` (a consumer); where their files lie, for the machine or
for a user (`Places`); what has to be there (`wanted`), the shipped units with this very program in them; how that
compares with what is there (`compared`); writing it (`write`); what a removal takes away, and what it leaves because
another service uses it or somebody has changed it (`removals`).

A unit that was written carries the digest of itself, so that a later version of it replaces one that nobody has
changed, and no other. Nothing here talks to systemd.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import anytimed
from anytimed.contracts import AnytimedError, ConfigError
from anytimed.storage.durable import fsync_folder, make_folders, write_durably

Kind = Literal["run", "pull"]
Found = Literal["new", "same", "outdated", "differs", "kept"]

UNIT: dict[Kind, str] = {"run": "anytimed@.service", "pull": "anytimed-pull@.service"}
FAILURE, SYSUSERS = "anytimed-failure@.service", "anytimed.sysusers.conf"
PROGRAM = "/opt/anytimed/bin/anytimed"
"""What the shipped units run; replaced by the program that installs them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}", re.ASCII)
_MARK = re.compile(r"# Written by `anytimed install-service` \(sha256 ([0-9a-f]{64})\)[^\n]*\n")
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
        if not _NAME.fullmatch(self.name):
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


@dataclass(frozen=True)
class Wanted:
    """A file that has to be there. `theirs`: written once, and the administrator's from then on. `secret`: its content
    is not shown."""

    path: Path
    text: str
    mode: int = 0o644
    theirs: bool = False
    secret: bool = False

    def found(self) -> Found:
        """How what is there compares with it."""
        try:
            there = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return "new"
        if there == self.text:
            return "same"
        return "kept" if self.theirs else "outdated" if unchanged(there) else "differs"

    def difference(self) -> str:
        """From what is there to what is wanted, as a unified diff."""
        if self.secret:
            return f"{self.path}: has been changed; what is in it is not shown"
        there = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        lines = difflib.unified_diff(there, self.text.splitlines(keepends=True), str(self.path), "would be written")
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines).rstrip("\n")


def wanted(places: Places, *, config: str = "", variables: dict[str, str] | None = None) -> list[Wanted]:
    """All files of a service. `config`: the text of its configuration (`run`); `variables`: of its environment file
    (`pull`), beside the commented ones."""
    files = [_unit(places, UNIT[places.kind])]
    if not places.user:
        files.append(_unit(places, FAILURE))
    explained = _VARIABLES.format(unit=places.unit)
    if places.kind == "run":
        files.append(Wanted(places.config, config))
        files.append(Wanted(places.environment, explained, 0o600, theirs=True))
        return files
    if not places.user:
        files.append(Wanted(places.sysusers, _marked(_shipped(SYSUSERS))))
    lines = "".join(f"{key}={value}\n" for key, value in (variables or {}).items())
    files.append(Wanted(places.environment, _marked(explained + lines), 0o600, secret=True))
    return files


def folders(places: Places) -> list[Path]:
    """Those that systemd does not make itself."""
    return [places.state, places.cache] if places.user else []


def write(files: Sequence[Wanted], *, force: bool = False) -> list[tuple[Wanted, Found]]:
    """Write what is new or outdated; what each was before. Raises ConfigError, with nothing written, where a file was
    changed by somebody; `force` keeps such a one as NAME.old. Raises OSError."""
    before = [(file, file.found()) for file in files]
    changed = [file for file, found in before if found == "differs"]
    if changed and not force:
        raise ConfigError(
            "\n".join(file.difference() for file in changed)
            + "\nNothing was written: the file above is another than would be written. --force replaces it and keeps "
            "it as NAME.old; what you want to change in a unit belongs into `systemctl edit`"
        )
    for file, found in before:
        if found in ("same", "kept"):
            continue
        make_folders(file.path.parent, 0o755)
        if found == "differs":
            file.path.rename(file.path.with_name(file.path.name + ".old"))
        # With its mode before its name: a file of credentials is never open to others, not for a moment.
        _write(file)
    return before


def removals(places: Places) -> Iterator[tuple[Path, str]]:
    """What an uninstall takes away: the path, and how: "remove", "set aside" (as NAME.removed), or why it stays."""
    for file in (places.config, places.environment) if places.kind == "run" else (places.environment,):
        if file.exists():
            pristine = file == places.environment and file.read_text() == _VARIABLES.format(unit=places.unit)
            yield file, "remove" if pristine else "set aside"
    for path, kinds in _shared(places):
        if path.exists():
            others = [name for kind in kinds for name in others_of(places, kind)]
            if others:
                yield path, f"stays, for {', '.join(others)}"
            elif not unchanged(path.read_text(encoding="utf-8", errors="replace")):
                yield path, "stays, for somebody has changed it"
            else:
                yield path, "remove"


def remove(places: Places, *, purge: bool) -> list[tuple[Path, str]]:
    """Take away what `removals` says; with `purge` configuration, environment, drop-ins, state and cache too. What was
    done with each."""
    done, left = [], kept(places)
    for path, how in list(removals(places)):
        if how == "set aside" and not purge:
            path.replace(path.with_name(path.name + ".removed"))
            how = f"kept as {path.name}.removed"
        elif how in ("remove", "set aside"):
            path.unlink()
            how = "removed"
        done.append((path, how))
    for path in left:
        if purge:
            _delete(path)
        done.append((path, "removed" if purge else "kept (--purge deletes it)"))
    return done


def kept(places: Places) -> list[Path]:
    """What only --purge deletes and is there."""
    private = [path.parents[1] / "private" / path.parent.name / path.name for path in (places.state, places.cache)]
    aside = [path.with_name(path.name + ".removed") for path in (places.config, places.environment)]
    every = (places.state, places.cache, *private, places.dropins, *aside[places.kind == "pull" :])
    return [path for path in every if path.exists() or path.is_symlink()]


def others_of(places: Places, kind: Kind) -> list[str]:
    """The other services of a kind that are configured here, as systemctl names them."""
    folder, ending = places.configuration / ("pull" if kind == "pull" else ""), {"run": ".toml", "pull": ".env"}[kind]
    units = (Places(file.stem, kind).unit for file in sorted(folder.glob(f"*{ending}")) if _NAME.fullmatch(file.stem))
    return [unit for unit in units if unit != places.unit]


def unchanged(text: str) -> bool:
    """Whether a file is as `write` left it, in this version or an earlier one."""
    mark = _MARK.match(text)
    return mark is not None and hashlib.sha256(text[mark.end() :].encode()).hexdigest() == mark[1]


def program() -> list[str]:
    """The command that runs this very installation: `anytimed` beside the interpreter, else the interpreter itself."""
    script = Path(sys.executable).with_name("anytimed")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "anytimed.cli"]


# --- within -----------------------------------------------------------------------------------------------------------


def _unit(places: Places, name: str) -> Wanted:
    text = _shipped(f"user/{name}" if places.user else name)
    return Wanted(places.units / name, _marked(text.replace(PROGRAM, " ".join(map(_quoted, program())))))


def _quoted(word: str) -> str:
    """A word of a command line in a unit: % and $ are systemd's there."""
    word = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    return '"' + word.replace('"', '\\"') + '"' if re.search(r"[\s\"'\\;]", word) else word


def _marked(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    mark = f"# Written by `anytimed install-service` (sha256 {digest}); a later version replaces it if it is unchanged"
    return f"{mark}\n{text}"


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


def _shared(places: Places) -> list[tuple[Path, tuple[Kind, ...]]]:
    """The files that several services use, each with the kinds of them."""
    files: list[tuple[Path, tuple[Kind, ...]]] = [(places.units / UNIT[places.kind], (places.kind,))]
    if not places.user:
        files.append((places.units / FAILURE, ("run", "pull")))
        if places.kind == "pull":
            files.append((places.sysusers, ("pull",)))
    return files


def _write(file: Wanted) -> None:
    before = os.umask(0o777 & ~file.mode)
    try:
        write_durably(file.path, file.text.encode())
    finally:
        os.umask(before)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    fsync_folder(path.parent)
