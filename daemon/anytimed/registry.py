"""Finds adapters by entry point and validates their tables: the second phase of reading a configuration.

An adapter is a class with a nested pydantic model `Settings`. `find` looks a name up in a group and says what is
installed when it is not there; `settings` validates a raw table with the adapter's own model.

A name with a colon, `package.module:Class`, is code to import. It is imported only if whoever started the process has
allowed just that name (`allow`); a configuration alone never is a reason to import anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import Any

from pydantic import BaseModel, ValidationError

from anytimed.config import AdapterTable, explain
from anytimed.contracts import ConfigError

GROUPS = ("anytimed.streams", "anytimed.tokenizers", "anytimed.models", "anytimed.optimizers", "anytimed.sinks")

_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_allowed: set[str] = set()


def allow(names: Iterable[str]) -> None:
    """Let configurations of this process name these classes, as `package.module:Class`. Raises ConfigError on another
    form. For the command line; nothing is imported yet."""
    for name in names:
        if not _CODE.fullmatch(name):
            raise ConfigError(f'--allow-adapter: found "{name}", expected package.module:Class')
        _allowed.add(name)


def allowed() -> list[str]:
    """The classes that `allow` was given, sorted."""
    return sorted(_allowed)


def installed(group: str) -> Mapping[str, EntryPoint]:
    """The adapters of a group by name, sorted."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def find(group: str, name: str, where: str) -> Any:
    """The adapter class called `name`. Raises ConfigError listing what is installed; `where` opens the message."""
    if ":" in name:
        return _imported(name, where)
    points = installed(group)
    if name not in points:
        names = ", ".join(points) or "none"
        raise ConfigError(
            f'{where} type: found "{name}", allowed: {names} (installed under the entry points "{group}"; '
            "after adding one, run `pip install -e .` of its package again)"
        )
    try:
        return points[name].load()
    except ImportError as error:
        raise ConfigError(
            f'{where} type = "{name}" needs a package that is not installed: {error}. '
            f"`pip install 'anytimed[{name}]'` may bring it, if it is an extra"
        ) from error


def _imported(name: str, where: str) -> Any:
    if name not in _allowed:
        told = ", ".join(allowed()) or "none"
        raise ConfigError(
            f'{where} type: found "{name}", code to import that was not allowed at the start (allowed: {told}). '
            f"If you trust it: `--allow-adapter {name}` on the command line, or ANYTIMED_ALLOW_ADAPTERS={name} in the "
            "environment of the unit; the configuration alone cannot allow it"
        )
    module, _, path = name.partition(":")
    try:
        adapter = attrgetter(path)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'{where} type = "{name}" is allowed but cannot be imported: {error}. Expected an installed module, or one '
            "on PYTHONPATH, with that class"
        ) from error
    if not (isinstance(adapter, type) and isinstance(getattr(adapter, "Settings", None), type)):
        raise ConfigError(f'{where} type = "{name}": expected a class with a pydantic model Settings, as adapters have')
    return adapter


def settings(adapter: Any, table: AdapterTable, file: str, path: tuple[str, ...]) -> Any:
    """The adapter's validated `Settings` from its raw table. Raises ConfigError, one line a mistake."""
    model: type[BaseModel] = adapter.Settings
    try:
        return model.model_validate(table.settings)
    except ValidationError as error:
        raise ConfigError(explain(error, model, table.settings, file, path)) from None


def build(group: str, table: AdapterTable, file: str, path: tuple[str, ...], *context: Any) -> Any:
    """Look up, validate, construct: `Adapter(settings, *context)`. Raises ConfigError naming file and table."""
    where = f"{file}: [{'.'.join(path)}]"
    adapter = find(group, table.type, where)
    validated = settings(adapter, table, file, path)
    try:
        return adapter(validated, *context)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error
