"""Finds adapters by entry point and validates their tables: the second phase of reading a configuration.

An adapter is a class with a nested pydantic model `Settings`. `find` looks a name up in a group and says what is
installed when it is not there; `settings` validates a raw table with the adapter's own model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from anytimed.config import AdapterTable, explain
from anytimed.contracts import ConfigError

GROUPS = ("anytimed.streams", "anytimed.tokenizers", "anytimed.models", "anytimed.optimizers")


def installed(group: str) -> Mapping[str, EntryPoint]:
    """The adapters of a group by name, sorted."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def find(group: str, name: str, where: str) -> Any:
    """The adapter class called `name`. Raises ConfigError listing what is installed; `where` opens the message."""
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
