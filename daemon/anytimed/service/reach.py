"""What a system service could not reach from its sandbox, said before it is started.

In order: the program itself (a DynamicUser is not root, ProtectHome hides /home and /root, PrivateTmp /tmp); what its
configuration writes (only its state folder can be written); what it reads (relative paths now mean that folder).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import anytimed
from anytimed.config import Config
from anytimed.contracts import ConfigError

_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")


def program(words: list[str]) -> Iterator[str]:
    """Each reason why the service's user could not run what installs it."""
    places = [Path(words[0]), Path(sys.executable).resolve(), Path(sys.base_prefix), Path(anytimed.__file__).parent]
    places += [Path(folder) for folder in sys.path if folder.endswith("site-packages")]
    reasons = {f"{place}: {why}" for place in places if (why := closed(place))}
    if reasons:
        yield from sorted(reasons)
        yield (
            "the service could not run this program: install anytimed where everybody can read it "
            "(`/usr/bin/python3 -m venv /opt/anytimed`), or install a service of your own with --user"
        )


def closed(path: Path) -> str:
    """Why the user of a service cannot read what lies at an absolute path; empty where it can, or nothing is there."""
    for place in dict.fromkeys((path, path.resolve())):
        for hidden in _HIDDEN:
            if place.is_relative_to(hidden):
                return f"the service does not see {hidden}"
        for folder in reversed(place.parents):
            if folder.is_dir() and not folder.stat().st_mode & 0o001:
                return f"{folder} (mode {folder.stat().st_mode & 0o7777:04o}) is closed to other users"
    return ""


def configuration(config: Config, state: Path) -> Iterator[str]:
    """Each path in a configuration that means something else in the service, or that it cannot read or write."""
    written = {
        "[run] directory": config.run.directory,
        "[exports] url": config.exports.url,
        "[commits] mirror_url": config.commits.mirror_url,
    }
    for key, url in written.items():
        if url is not None and _local(str(url)) and Path(url).is_absolute() and not Path(url).is_relative_to(state):
            yield (
                f"{key} = {url}: the service can write below {state} only, where relative paths lie; or name the "
                "folder in ReadWritePaths= and its owner in User= (`systemctl edit`)"
            )
    for name, table in config.sources.items():
        url = table.settings.get("url")
        if not isinstance(url, str) or not _local(url):
            continue
        if not Path(url).is_absolute():
            yield f"[sources.{name}] url = {url}: is relative, which is {state / url} for the service"
        elif why := closed(Path(url.partition("*")[0])):
            yield f"[sources.{name}] url = {url}: {why}"


def require_movable(config: Config, text: str, to: Path) -> None:
    """Raises ConfigError where a configuration would mean something else at another place."""
    if config.path.resolve() == to.resolve():
        return
    if config.folder != config.path.parent or "based_on" in text:
        raise ConfigError(
            f"{config.path}: based_on names a file beside it; put both where the service reads them, {to.parent}, and "
            f"install {to}"
        )
    for table, settings in (("tokenizer", config.tokenizer.settings), ("model", config.model.settings)):
        for key, value in settings.items():
            if isinstance(value, str) and not Path(value).is_absolute() and (config.folder / value).exists():
                raise ConfigError(
                    f"{config.path}: [{table}] {key}: found {value}, relative to the file, expected an absolute path, "
                    f"for the service reads the configuration at {to}"
                )


def _local(url: str) -> bool:
    return "://" not in url and "::" not in url
