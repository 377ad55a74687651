"""Weights & Biases: one run there for the run here, over all its starts.

The run's id is this run's; a start resumes it. W&B counts its own steps, which never go back, and refuses others; ours
do go back, after a kill or a rollback. So theirs is left to them, `step` and `tokens` are figures like the others, and
`step` is named as the axis of all: what is told again lies on what was told before, or beside it where it differs.

Credentials come from the environment (WANDB_API_KEY), never from the configuration. WANDB_MODE=offline, or `mode`,
writes to the disk only, for `wandb sync`. The library's own process does the sending; what cannot be sent waits there.
"""

from __future__ import annotations

from os import environ
from pathlib import Path
from typing import Any, Literal

import wandb
from pydantic import BaseModel, ConfigDict, Field

from anytimed.contracts import ConfigError, Json, SinkRun
from anytimed_adapters.sinks.figures import event, figures

_OPEN_S, _FINISH_S = 60.0, 4.0
_ON_DISK_S = 1.0
"""How much a kill costs at most; W&B's own choice is 15 s."""


class WeightsAndBiases:
    """A `Sink`. Losses are in nats per token."""

    class Settings(BaseModel):
        """Which project, and what the run is called there."""

        model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
        project: str = Field(default="anytimed", min_length=1, description="W&B project")
        entity: str | None = Field(default=None, min_length=1, description="user or team; default: the key's own")
        run_name: str | None = Field(default=None, min_length=1, description="shown name; default: W&B invents one")
        group: str | None = Field(default=None, min_length=1, description="W&B group of runs")
        tags: list[str] = Field(default_factory=list, description="W&B tags")
        mode: Literal["online", "offline"] | None = Field(
            default=None, description="default: what WANDB_MODE says, online without it"
        )
        directory: str | None = Field(
            default=None, min_length=1, description="folder for W&B's own files; default: in the run directory"
        )
        system_metrics: bool = Field(default=False, description="have W&B measure the machine as well")

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings = settings
        self._run: Any = None
        self._tokens = 0

    def check(self) -> str:
        project = "/".join(filter(None, (self._settings.entity, self._settings.project)))
        if not self._online:
            return f"{project}, offline: `wandb sync` sends what is on the disk"
        _require_key()
        return f"{project}: a key is there; it was not tried"

    def open(self, run: SinkRun) -> None:
        if self._online:
            _require_key()
        settings = self._settings
        directory = Path(settings.directory) if settings.directory is not None else run.folder
        directory.mkdir(parents=True, exist_ok=True)
        self._tokens = run.tokens
        self._run = wandb.init(
            entity=settings.entity,
            project=settings.project,
            id=run.run_id,
            name=settings.run_name,
            group=settings.group,
            tags=settings.tags or None,
            mode=settings.mode,
            dir=str(directory),
            config={**run.config, "run_id": run.run_id, "config_digest": run.config_digest},
            allow_val_change=True,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                # The terminal, the code and the machine are nobody's business; the log lines are ours to write.
                console="off",
                silent=True,
                quiet=True,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_stats=not settings.system_metrics,
                x_disable_machine_info=not settings.system_metrics,
                x_save_requirements=False,
                init_timeout=_OPEN_S,
                finish_timeout=_FINISH_S,
                x_transaction_log_flush_interval=_ON_DISK_S,
            ),
        )
        for axis in ("step", "tokens"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Json) -> None:
        found: dict[str, Any] = dict(figures(record))
        if (told := event(record)) is not None:
            found = {"event": told}
        if record["kind"] == "step":
            self._tokens = record["tokens"]
        if found:
            self._run.log({"step": record.get("step", 0), "tokens": self._tokens, "time": record["time"], **found})

    @property
    def _online(self) -> bool:
        return (self._settings.mode or environ.get("WANDB_MODE", "online")) not in ("offline", "dryrun", "disabled")

    def flush(self) -> None:
        """W&B's process has it already, and sees to it."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _require_key() -> None:
    """Otherwise the library would ask whoever sits at the terminal."""
    wandb.setup(settings=wandb.Settings(silent=True))
    if not wandb.login(prompt=False):
        raise ConfigError("no API key of W&B: set WANDB_API_KEY in the environment, or WANDB_MODE=offline")
