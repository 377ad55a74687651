"""The configuration: one TOML file into frozen models, and errors a person can act on.

In order: the tables that anytimed itself owns, as pydantic models whose field names carry their units; `load`, which
reads a file, and first the one that it is based on (first phase: an adapter's table is kept raw, the registry validates
it with the adapter's own model); `explain`, which turns pydantic's errors into lines that name file, table, key, what
was found and what is allowed; and `digest`.

No field names a horizon: the stream has no end, and neither has the training.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sysconfig
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from anytimed.contracts import ConfigError, Json
from anytimed.trust import others_who_can_write
from anytimed.urls import is_secret, keep_secret, kept_in, public, told

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Interval = Annotated[float, Field(ge=0.001, le=1e9)]
"""Seconds between two times of something that happens over and over: up to thirty years."""


class Table(BaseModel):
    """A table of the file. Unknown keys are errors; nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AdapterTable(BaseModel):
    """A table whose `type` names an installed adapter; the other keys are the adapter's own and stay raw here."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    type: str = Field(description="name of an installed adapter")

    @property
    def settings(self) -> Json:
        """The adapter's own keys."""
        return dict(self.model_extra or {})


class RunTable(Table):
    """Where the state lives and on what it is computed."""

    directory: str = Field(min_length=1, description="folder of the resumable state; relative to the working directory")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seeds the initial weights, the mixture and the shuffling")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (CUDA if there is one), cpu, cuda, cuda:N",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 leaves torch's choice")
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of the matrix products on CUDA (autocast); the CPU always computes in float32"
    )
    deterministic: bool = Field(
        default=True,
        description="only deterministic kernels: resume is bit for bit; an operation that has none is refused",
    )
    compile: bool = Field(default=False, description="torch.compile the model")
    stop_within_s: Seconds | None = Field(
        default=None,
        description="time to live after SIGTERM, on a machine that is taken away: the commit comes first, uploads get "
        "what is left of it",
    )


class ModelTable(AdapterTable):
    init_from: str | None = Field(
        default=None, description="directory or URL of an exported or Hugging Face checkpoint to start from"
    )


class SourceTable(AdapterTable):
    weight: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="share of the draws, relative to the others; 0: it takes no part, and stays where it is",
    )
    when_dry: Literal["wait", "others", "replay"] = Field(
        default="wait",
        description="a draw that finds nothing: wait for data, fall to the others, or read the source again",
    )
    passes: int = Field(default=1, ge=1, description='how often when_dry = "replay" reads the source in all')
    rejected_fraction: float = Field(
        default=0.01, ge=0, le=1, description="the source is read no further while more of its records are unreadable"
    )
    rejected_records: int = Field(default=1000, ge=0, description="and more than this many")

    @model_validator(mode="after")
    def _passes(self) -> SourceTable:
        if self.when_dry == "replay" and self.passes < 2:
            raise ValueError('passes: at least 2 with when_dry = "replay", the first one included')
        if self.when_dry != "replay" and self.passes != 1:
            raise ValueError('passes: only with when_dry = "replay"')
        return self


class HoldoutTable(Table):
    """The hold-out: whole records, chosen by a hash of their content, never trained on."""

    fraction: float = Field(default=0.01, gt=0, lt=0.5, description="share of the records held out")
    max_tokens: Positive = Field(default=65_536, description="bound over all sources; older records thin out")
    record_tokens: Positive = Field(default=4_096, description="a held-out record keeps its first tokens")


class Schedule(Table):
    """When something happens. Steps are counted by the loop; seconds and cron by the wall clock."""

    every_s: Interval | None = Field(default=None, description="interval in seconds")
    cron: str | None = Field(default=None, description='five cron fields, as in "0 * * * *"')

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, value: str | None) -> str | None:
        if value is not None and len(value.split()) != 5:
            raise ValueError('five cron fields (minute hour day month weekday), as in "0 * * * *"')
        return value

    @model_validator(mode="after")
    def _one_clock(self) -> Schedule:
        if self.every_s is not None and self.cron is not None:
            raise ValueError("every_s or cron, not both")
        return self


class DataTable(Table):
    """From records to batches."""

    sequence_length: Positive = Field(description="tokens a sequence predicts")
    batch_size: Positive = Field(description="sequences a step")
    micro_batch_size: Positive | None = Field(
        default=None, description="sequences a forward pass; gradients accumulate over batch_size / this"
    )
    shuffle_block_sequences: Positive = Field(default=4096, description="sequences shuffled together")
    mask_documents: bool = Field(
        default=False, description="a token attends to its own document only, where several share a sequence"
    )
    prefetch_batches: Positive = Field(default=16, description="batches read ahead")
    tokenizer_workers: int = Field(
        default=0,
        ge=0,
        le=64,
        description="processes that encode; 0: threads beside the reading, which is best on a CPU; beside a GPU 1 or 2",
    )
    discover: Schedule = Field(default=Schedule(every_s=10.0), description="when to look for new data")
    holdout: HoldoutTable = HoldoutTable()

    @model_validator(mode="after")
    def _accumulation(self) -> DataTable:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size has to divide batch_size = {self.batch_size}")
        return self


class TrainingTable(Table):
    steered_memory: bool = Field(
        default=True, description="where y does better than x on the hold-out, x forgets half of what it averages over"
    )
    clip_grad_norm: float = Field(
        default=1.0, ge=0, description="global norm the gradient is clipped to; 0: not clipped"
    )


class GuardTable(Table):
    """What is done when the training does not go well."""

    window_steps: int = Field(default=128, ge=8, description="of the losses that a spike is measured by")
    sigma: float = Field(default=6.0, gt=0, description="a loss beyond so many standard deviations is a spike")
    skipped_steps: int = Field(
        default=3, ge=0, description="so many steps in a window that are not finite: back to a commit; 0: never"
    )
    spike_steps: int = Field(
        default=0,
        ge=0,
        description="so many spikes in a window: back to a commit; 0: never, a change of data spikes too",
    )
    rollbacks: int = Field(default=3, ge=0, description="how often within `rollback_batches`; then the run stops")
    rollback_batches: Positive = Field(default=10_000, description="batches that the budget counts over")


class EvaluationTable(Table):
    every_steps: Positive = Field(default=100, description="evaluate x, y and z on the hold-out")
    batch_size: Positive = Field(default=16, description="sequences a forward pass of the evaluation")


class CommitsTable(Schedule):
    """Resumable state on the local disk."""

    every_s: Interval | None = 300.0
    every_steps: Positive | None = None
    keep: int = Field(default=3, ge=2, description="verified commits kept")
    give_up_after_s: Seconds = Field(
        default=3600.0, description="where commits fail, training goes on for this long after the last good one"
    )

    verify_every_s: float = Field(
        default=86_400.0, ge=0, le=1e9, description="how often kept commits are read again from the disk; 0: never"
    )
    acknowledge: bool = Field(
        default=True,
        description="tell brokers and the inbox what no kept commit needs any more; they may delete it then",
    )
    mirror_url: str | None = Field(
        default=None, min_length=1, description="fsspec URL of a second place for commits, for machines that vanish"
    )
    mirror_storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="passed to fsspec; no secrets here"
    )
    mirror_keep: int | None = Field(default=None, ge=2, description="commits kept in the mirror; default: keep")

    @model_validator(mode="before")
    @classmethod
    def _cron_replaces_the_default(cls, value: Any) -> Any:
        return {"every_s": None, **value} if isinstance(value, dict) and "cron" in value else value


class ExportsTable(Schedule):
    """The averaged weights x, published for anyone to pull."""

    url: str = Field(min_length=1, description="fsspec URL of the published prefix; a plain path is a local folder")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="passed to fsspec; no secrets here"
    )
    every_steps: Positive | None = None
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the exported tensors")
    max_shard_bytes: Positive = Field(default=5_000_000_000, description="a larger model is split into shards")
    keep: Positive = Field(default=10, description="newest checkpoints kept; what latest or best names is always kept")
    keep_every_s: Seconds | None = Field(default=None, description="beyond `keep`, one checkpoint per period stays")
    delete_after_s: float = Field(
        default=3600.0, ge=0, description="data outlives its manifest by this: the longest pull"
    )
    drain_s: float = Field(default=60.0, ge=0, description="how long a stop waits for uploads")
    deadline_s: Seconds = Field(
        default=60.0,
        description="budget of one operation on the store, retries included; a transfer gets 1 s a MiB more",
    )
    lease_s: float = Field(
        default=60.0, ge=1, le=86_400, description="another writer takes the prefix over after this long without a sign"
    )
    require_conditions: bool = Field(
        default=False, description="refuse a store that does not enforce If-None-Match and If-Match"
    )
    verify_uploads: bool = Field(
        default=True, description="read every uploaded file back and compare it before a manifest names it"
    )
    gate_margin_nats: float = Field(
        default=0.5,
        ge=0,
        description="an x worse than the published one by more, per token of the hold-out, is kept aside; inf: none",
    )
    model_license: str | None = Field(default=None, description="license named in the model card")


class LoggingTable(Table):
    every_steps: Positive = Field(
        default=10, description="read losses from the device, refresh the view, write metrics"
    )


class ControlTable(Table):
    """HTTP over TCP, beside the socket in the run directory."""

    listen: str | None = Field(
        default=None,
        description='loopback address and port, as in "127.0.0.1:8765"; without a token it only answers questions',
    )

    @field_validator("listen")
    @classmethod
    def _loopback(cls, value: str | None) -> str | None:
        if value is not None:
            match = re.fullmatch(r"(localhost|127(?:\.\d{1,3}){3}|\[::1\]):(\d{1,5})", value, re.ASCII)
            if match is None or int(match[2]) > 65_535:
                raise ValueError(
                    'a loopback address and a port, as in "127.0.0.1:8765" or "[::1]:8765"; for other machines put a '
                    "proxy before it that knows who may see it, or use an SSH tunnel"
                )
        return value


class Config(Table):
    """A whole file. `path` is where it was read from."""

    run: RunTable
    model: ModelTable
    tokenizer: AdapterTable
    data: DataTable
    sources: dict[str, SourceTable] = Field(min_length=1)
    optimizer: AdapterTable
    training: TrainingTable = TrainingTable()
    guard: GuardTable = GuardTable()
    evaluation: EvaluationTable = EvaluationTable()
    commits: CommitsTable = CommitsTable()
    exports: ExportsTable
    logging: LoggingTable = LoggingTable()
    control: ControlTable = ControlTable()
    sinks: dict[str, AdapterTable] = Field(default_factory=dict, description="trackers that get the figures too")

    _path: Path = Path()
    _folder: Path = Path()

    @field_validator("sources", "sinks")
    @classmethod
    def _names(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(f"{str(info.field_name)[:-1]} name {name!r}: letters, digits, '-' and '_', at most 64")
        return value

    @field_validator("sources")
    @classmethod
    def _weights(cls, value: dict[str, SourceTable]) -> dict[str, SourceTable]:
        if not any(table.weight > 0 for table in value.values()):
            raise ValueError("every weight is 0: at least one source has to be drawn from")
        return value

    @property
    def path(self) -> Path:
        return self._path

    @property
    def folder(self) -> Path:
        """What an adapter's paths are relative to: the folder of the file, or of the one that it is based on."""
        return self._folder

    def to_json(self) -> Json:
        """All of it, credentials included, for somebody who may know them."""
        where = {"path": str(self._path.absolute()), "folder": str(self._folder.absolute())}
        return {**where, "tables": self.model_dump(mode="json")}

    @staticmethod
    def from_json(value: Json) -> Config:
        """The inverse of `to_json`. Raises ConfigError where it is none; credentials are kept secret from then on."""
        try:
            path, folder, tables = Path(value["path"]), Path(value["folder"]), value["tables"]
            keep_secret(kept_in(tables))
            return _placed(Config.model_validate(tables), path, folder)
        except ValidationError as error:
            raise ConfigError(explain(error, Config, tables, str(path))) from None
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"not a configuration: {type(error).__name__}: {error}") from None

    def digest(self) -> str:
        """SHA-256 (hex) over the whole configuration, storage options and credentials left out."""
        return hashlib.sha256(json.dumps(public(self.model_dump(mode="json")), sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Config:
    """Read and validate a file that nobody else can write. Raises ConfigError with one line for every mistake found.

    `based_on = "FILE"` at the top of a file (relative to it) takes every key from there that is not given here, but
    those listed in `without = ["table.key", …]`. Paths mean what they mean in that file. Credentials are kept secret
    from then on."""
    data, folder = _read(path, ())
    try:
        config = Config.model_validate(_placeholders(data))
    except ValidationError as error:
        raise ConfigError(explain(error, Config, data, str(path))) from None
    return _placed(config, path, folder)


def _placed(config: Config, path: Path, folder: Path) -> Config:
    object.__setattr__(config, "_path", path)
    object.__setattr__(config, "_folder", folder)
    return config


def _read(path: Path, above: tuple[Path, ...]) -> tuple[Json, Path]:
    """A file's tables over those it is based on, and the folder of the lowest one."""
    try:
        with path.open(encoding="utf-8") as file:
            reason = others_who_can_write(path, file.fileno())
            if reason is not None:
                raise ConfigError(f"{path}: not read: {reason}")
            data = tomllib.loads(file.read())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `anytimed init {path}` writes a starter") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    keep_secret(kept_in(data))
    if "based_on" not in data:
        return data, path.parent
    based_on, without = data.pop("based_on"), data.pop("without", [])
    if not isinstance(based_on, str) or not isinstance(without, list) or path.resolve() in above:
        raise ConfigError(
            f"{path}: based_on: found {json.dumps(based_on)}, without {json.dumps(without)}; allowed: another file, "
            'and a list of keys as "table.key"'
        )
    below, folder = _read(path.parent / based_on, (*above, path.resolve()))
    for key in without:
        *tables, last = str(key).split(".")
        table: Any = below
        for name in tables:
            table = table.get(name) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table.pop(last, None)
    return _over(below, data), folder


def _over(below: Json, above: Json) -> Json:
    """`above`'s keys over `below`'s, table by table."""
    both = below.keys() & above.keys()
    tables = {
        key: _over(below[key], above[key])
        for key in both
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return {**below, **above, **tables}


def _placeholders(value: Any) -> Any:
    """`{stdlib}` stands for the folder of Python's standard library, so that a config can name text every machine
    has."""
    if isinstance(value, str):
        return value.replace("{stdlib}", sysconfig.get_path("stdlib"))
    if isinstance(value, dict):
        return {key: _placeholders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_placeholders(item) for item in value]
    return value


# --- errors that say what to do ---------------------------------------------------------------------------------------


def explain(error: ValidationError, model: type[BaseModel], data: Any, file: str, table: tuple[str, ...] = ()) -> str:
    """One line a mistake: file, table, key, what was found, what is allowed. `table` is where `data` sits in the
    file."""
    return "\n".join(_line(item, model, data, file, table) for item in error.errors(include_url=False))


def _line(item: ErrorDetails, model: type[BaseModel], data: Any, file: str, table: tuple[str, ...]) -> str:
    path = [str(part) for part in item["loc"]]
    owner, found = _walk(model, data, path[:-1])
    key = path[-1] if path else None
    # A rule over a whole table is reported at the table: the key of the message is then that table's name.
    if (
        key is not None
        and isinstance(found, Mapping)
        and isinstance(found.get(key), Mapping)
        and item["type"] != "extra_forbidden"
    ):
        path, key = [*path, ""], None
    where = ".".join([*table, *path[:-1]]) if path else ".".join(table)
    head = f"{file}: [{where}]" if where else f"{file}:"
    what = f"{head} {key}" if key else head
    match item["type"]:
        case "missing":
            is_table = owner is not None and key in owner.model_fields and _table_of(owner.model_fields[key].annotation)
            need = f"the table [{'.'.join([*table, *path])}]" if is_table else f"{key} ({_describe(owner, key)})"
            return f"{head} missing: {need} has to be given"
        case "extra_forbidden":
            known = sorted(owner.model_fields) if owner else []
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{head} unknown key {key}{hint} Known here: {', '.join(known)}"
        case _:
            value = item["input"]
            shown = "a table" if isinstance(value, Mapping) else told(json.dumps(value, default=str))[:200]
            if any(map(is_secret, path)):
                shown = f"a value of type {type(value).__name__}, which is not shown"
            return f"{what}: found {shown}, allowed: {_allowed(item, owner, key)}"


def _allowed(item: ErrorDetails, owner: type[BaseModel] | None, key: str | None) -> str:
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    about = _describe(owner, key)
    return f"{message} ({about})" if about else message


def _describe(owner: type[BaseModel] | None, key: str | None) -> str:
    field = owner.model_fields.get(key) if owner and key else None
    return (field.description or "") if field else ""


def _walk(model: type[BaseModel] | None, data: Any, path: list[str]) -> tuple[type[BaseModel] | None, Any]:
    """The model that owns the last key of a path, and the data there."""
    owner: type[BaseModel] | None = model
    annotation: Any = model
    for part in path:
        if owner is not None and part in owner.model_fields:
            annotation = owner.model_fields[part].annotation
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        data = data.get(part) if isinstance(data, Mapping) else None
        owner = _table_of(annotation)
    return owner, data


def _table_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _table_of(part))), None)
    return None
