"""The configuration of a benchmark: in a scratch folder, without anything that is not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anytimed.config import Config

NEVER = 10**9


def quiet(config: Config, folder: Path, **exports: Any) -> Config:
    """`config` with its run, and unless `exports` says otherwise its exports, in `folder`; no timer, commit, evaluation
    or export of its own."""
    told = config.model_dump()
    told["run"]["directory"] = str(folder / "run")
    told["exports"].update({"url": str(folder / "published"), "every_steps": None, "keep": 3, **exports})
    told["evaluation"]["every_steps"] = NEVER
    told["commits"].update(every_s=None, every_steps=None)
    told["data"]["discover"]["every_s"] = 3600.0
    return Config.model_validate(told)
