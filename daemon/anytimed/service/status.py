"""What `GET /status` answers, `status.json` holds and `anytimed status --json` prints: a form that stays.

Keys are added, never renamed or given another meaning, without raising `STATUS_FORMAT`. Losses are nats per token,
times seconds since 1970 unless they say `_s`. The API's description (`GET /openapi.json`) is made from these models;
the daemon builds the plain JSON itself, and tests hold it against them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from anytimed.contracts import Json

STATUS_FORMAT = 1
StateName = Literal["starting", "training", "waiting for data", "paused", "stopping", "stopped"]


class Part(BaseModel):
    """A JSON object of the status."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SourceLossesPart(Part):
    tokens: int
    loss_x: float
    loss_y: float
    loss_z: float


class EvaluationPart(Part):
    step: int
    holdout: str = Field(description="digest of the hold-out; losses are comparable where it is the same")
    tokens: int = Field(description="targets in the hold-out")
    loss_x: float = Field(description="at the averaged weights, which are exported")
    loss_y: float = Field(description="at the point where gradients are taken")
    loss_z: float = Field(description="at the fast iterate")
    by_source: dict[str, SourceLossesPart]


class CommitPart(Part):
    step: int
    path: str
    time: float


class ResumedPart(CommitPart):
    from_: Literal["local", "mirror"] = Field(alias="from")


class MirroredPart(Part):
    step: int
    id: str
    time: float


class MirrorPart(Part):
    url: str
    commit: MirroredPart | None = Field(description="what the mirror holds since this start")
    last_mirrored_age_s: float


class ExportPart(Part):
    step: int
    checkpoint: str
    digest: str | None = Field(description="SHA-256 of its manifest; null where latest.json names another one")
    time: float


class UploadPart(Part):
    checkpoint: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    left_s: float | None


class VerificationPart(Part):
    time: float
    commits: int
    rotten: list[str] = Field(description="paths of commits that are no longer what was written")
    found: str


class ReloadPart(Part):
    time: float
    changed: list[str] = Field(description="keys, as `[table] key`")
    error: str | None = Field(description="why nothing was applied; null where it was")


class StorePart(Part):
    conditions: str = Field(description="what the store does about two writers")
    enforced: bool | None = Field(description="whether it enforces conditional writes; null: not known yet")
    lease: Literal["held", "not held"]


class DiskPart(Part):
    free_bytes: int
    total_bytes: int


class AcceleratorPart(Part):
    name: str
    memory_used_bytes: int = Field(description="of the whole device, by every process")
    memory_total_bytes: int
    utilisation: float | None = Field(description="0 to 1; null without nvidia-ml-py (`anytimed[gpu]`)")


class SinkPart(Part):
    type: str
    written: int = Field(description="records that it took since this start")
    waiting: int
    dropped: int = Field(description="records that it did not take in time")
    problem: str | None


class UnitPart(Part):
    name: str
    user: bool = Field(description="whether it is a unit of a user's manager")


class SourcePart(Part):
    entries: int = Field(description="files or spans found")
    lag_bytes: int = Field(description="found and not yet read, in `lag_unit`")
    lag_unit: str
    records: int = Field(description="trained on")
    held_out: int
    rejected: int = Field(description="could not be read; set aside in quarantine/records")
    tokens: int
    place: Any = Field(description="where it is read next, in the source's own form")
    share: float = Field(description="of the draws, 0 to 1")
    when_dry: Literal["wait", "others", "replay"]
    pass_number: int
    dry: bool = Field(description="left out of the draws until there is more")
    suspended: str | None = Field(description="why it is read no further, for too many bad records")
    unavailable: str | None = Field(description="why it could not be asked for new data")
    unacknowledged: str | None = Field(description="why a broker could not be told what is not needed any more")


class Status(Part):
    """All of it."""

    format: Literal[1] = Field(description="of this status; raised where a key changes its meaning")
    version: str = Field(description="of anytimed")
    state: StateName
    since: float = Field(description="when this state began")
    reason: str = Field(description="why it waits or is paused; empty otherwise")
    degraded: list[str] = Field(description="what is not as it should be; training goes on")
    run_id: str
    term: int = Field(description="goes up with every start")
    pid: int
    unit: UnitPart | None = Field(description="the systemd unit that it runs as")
    listen: str | None = Field(description="address of HTTP over TCP")
    directory: str
    config: str = Field(description="path of the configuration file")
    device: str
    step: int
    tokens: int
    tokens_per_s: float | None
    loss: float | None = Field(description="mean training loss at y since the last report")
    skipped: int = Field(description="steps that changed nothing, for they were not finite")
    interventions: dict[str, int] = Field(description="decisions about the training, by kind, of the whole run")
    evaluation: EvaluationPart | None
    commit: CommitPart | None
    last_commit_age_s: float
    resumed: ResumedPart | None = Field(description="the commit that this start went on from")
    verification: VerificationPart | None
    mirror: MirrorPart | None
    export: ExportPart | None
    upload: UploadPart | None
    spooled: int = Field(description="exports that wait for the store")
    exports_url: str
    reload: ReloadPart | None
    configured: float = Field(description="when the configuration in force was taken")
    store: StorePart
    sources: dict[str, SourcePart]
    batches_ready: int
    disk: DiskPart | None = Field(description="of the run directory; null until it is known")
    sinks: dict[str, SinkPart] = Field(description="trackers that get the figures, by name")
    accelerator: AcceleratorPart | None
    time: float = Field(description="when this was said")


def schema() -> Json:
    """The status as JSON Schema."""
    return Status.model_json_schema(by_alias=True, ref_template="#/components/schemas/{model}")
