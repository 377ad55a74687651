"""Reading the configuration again while it runs: all of the change, or none of it and the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from anytimed.config import Config, load
from anytimed.contracts import ConfigError, Json, SourcePosition
from anytimed.data.sources import require_same_sources
from anytimed.service.assembly import Parts, parts_of, rules_of

LIVE_TABLES = ("logging", "evaluation", "commits", "exports", "guard", "sources", "sinks")
"""Tables whose keys may change between two steps. Those that change the numbers (when to evaluate, the guard, and the
sources, whose change takes effect at the start of a block) are journalled with the step or block of the change."""

FIXED_KEYS = {
    "exports": (
        "url",
        "storage_options",
        "max_shard_bytes",
        "deadline_s",
        "lease_s",
        "require_conditions",
        "verify_uploads",
    ),
    "commits": ("mirror_url", "mirror_storage_options"),
    "evaluation": ("batch_size",),
}
"""Their keys that may not."""


def reloaded(running: Parts, read: Mapping[str, SourcePosition]) -> Parts:
    """The parts of a running configuration by its file as it is now. `read`: where every source stands that was ever
    read. Raises ConfigError where the file is wrong, or changes what only a restart can change."""
    new = load(running.config.path)
    parts = parts_of(new)
    fixed = changes_that_need_a_restart(running.config, new)
    if fixed:
        raise ConfigError(f"{new.path}: not reloaded; only a restart changes {', '.join(fixed)}")
    try:
        require_same_sources(parts.rules, read)
    except ConfigError as error:
        raise ConfigError(f"{new.path}: not reloaded; {error}") from None
    return replace(running, config=new, rules=parts.rules)


def foreseen(running: Config, new: Config, read: Mapping[str, SourcePosition]) -> Json:
    """What `reloaded` would do with a configuration: the keys that change, those that only a restart changes, and what
    else speaks against it. Raises ConfigError where an adapter's table is wrong."""
    rules = rules_of(new)
    try:
        require_same_sources(rules, read)
        problem = None
    except ConfigError as error:
        problem = str(error)
    return {"changed": changes(running, new), "restart": changes_that_need_a_restart(running, new), "problem": problem}


def changes_that_need_a_restart(old: Config, new: Config) -> list[str]:
    """The keys that differ and may not change while it runs, as `[table] key`."""
    before, after = old.model_dump(), new.model_dump()
    for dumped in (before, after):
        for name in LIVE_TABLES:
            dumped[name] = {key: dumped[name][key] for key in FIXED_KEYS.get(name, ())}
        dumped["data"].pop("discover")
    return _differing(before, after)


def changes(old: Config, new: Config) -> list[str]:
    """All keys that differ, as `[table] key`."""
    return _differing(old.model_dump(), new.model_dump())


def _differing(before: Json, after: Json) -> list[str]:
    return [
        f"[{table}] {key}"
        for table in before
        for key in sorted(before[table].keys() | after[table].keys())
        if before[table].get(key) != after[table].get(key)
    ]
