"""Taking a service away: what goes, what is kept under another name, and what stays because another service uses it or
somebody has changed it. What was trained goes with `purge` only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from anytimed.service.installation import FAILURE, NAME, UNIT, Kind, Places, variables_of
from anytimed.service.own_files import unchanged
from anytimed.storage.durable import fsync_folder


def removals(places: Places) -> Iterator[tuple[Path, str]]:
    """What an uninstall takes away: the path, and how: "remove", "set aside" (as NAME.removed), or why it stays."""
    for file in (places.config, places.environment) if places.kind == "run" else (places.environment,):
        if file.exists():
            pristine = file == places.environment and file.read_text() == variables_of(places)
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
    units = (Places(file.stem, kind).unit for file in sorted(folder.glob(f"*{ending}")) if NAME.fullmatch(file.stem))
    return [unit for unit in units if unit != places.unit]


def _shared(places: Places) -> list[tuple[Path, tuple[Kind, ...]]]:
    """The files that several services use, each with the kinds of them."""
    files: list[tuple[Path, tuple[Kind, ...]]] = [(places.units / UNIT[places.kind], (places.kind,))]
    if not places.user:
        files.append((places.units / FAILURE, ("run", "pull")))
        if places.kind == "pull":
            files.append((places.sysusers, ("pull",)))
    return files


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    fsync_folder(path.parent)
