"""Reading the configuration again while it runs: all of the change, or none of it and the reason."""

from __future__ import annotations

from anytimed.config import Config, load
from anytimed.contracts import ConfigError
from anytimed.service.assembly import parts_of

LIVE_TABLES = ("logging", "evaluation", "commits", "exports")
"""Tables whose keys may change between two steps: they leave the numbers of the training alone."""

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


def reloaded(running: Config) -> Config:
    """The file of a running configuration as it is now. Raises ConfigError where it is wrong, or changes what only a
    restart can change."""
    new = load(running.path)
    parts_of(new)
    fixed = changes_that_need_a_restart(running, new)
    if fixed:
        raise ConfigError(f"{new.path}: not reloaded; only a restart changes {', '.join(fixed)}")
    return new


def changes_that_need_a_restart(old: Config, new: Config) -> list[str]:
    """The keys that differ and may not change while it runs, as `[table] key`."""
    before, after = old.model_dump(), new.model_dump()
    for dumped in (before, after):
        for name in LIVE_TABLES:
            dumped[name] = {key: dumped[name][key] for key in FIXED_KEYS.get(name, ())}
        dumped["data"].pop("discover")
    return [
        f"[{table}] {key}"
        for table in before
        for key in sorted(before[table].keys() | after[table].keys())
        if before[table].get(key) != after[table].get(key)
    ]
