"""The daemon's figures as Prometheus reads them: `GET /metrics`.

Everything is made from one status, when it is asked for; nothing is counted twice. What has no figure yet is left out.
Names follow Prometheus' own rules: base units, `_total` for what only grows (and begins again where the run goes back),
times as seconds since 1970, so that an age is `time() - …`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.utils import floatToGoString

from anytimed.contracts import Json

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
STATES: Final = ("starting", "training", "waiting for data", "paused", "stopping", "stopped")

INTERVENTIONS: Final = ("skipped", "spike", "forget", "rollback", "jump", "evaluations")
"""Kinds that are told from the beginning: a counter that begins with its first event would hide that one."""

_COUNTS: Final = {
    "step": ("anytimed_steps", "Optimizer steps."),
    "tokens": ("anytimed_tokens", "Tokens trained on."),
    "skipped": ("anytimed_skipped_steps", "Steps that changed nothing, for they were not finite."),
}
_FIGURES: Final = {
    "tokens_per_s": ("anytimed_tokens_per_second", "Speed since the last report."),
    "loss": ("anytimed_loss_nats", "Mean training loss at y since the last report, per token."),
    "batches_ready": ("anytimed_batches_ready", "Batches that are read ahead."),
    "since": ("anytimed_state_since_timestamp_seconds", "When the daemon came into the state that it is in."),
    "time": ("anytimed_status_timestamp_seconds", "When these figures were made; older where the loop stands still."),
    "spooled": ("anytimed_export_waiting", "Exports that wait for the store."),
}
_SOURCE_COUNTS: Final = {
    "records": "Records that were trained on.",
    "held_out": "Records that were held out.",
    "rejected": "Records that could not be read, set aside in quarantine.",
    "tokens": "Tokens of the records that were trained on.",
    "entries": "Files or spans that were found.",
}
_SOURCE_STATES: Final = {
    "suspended": "Whether the source is read no further, for too many bad records.",
    "unavailable": "Whether the source did not answer when it was last asked for new data.",
    "unacknowledged": "Whether the broker could not be told what is not needed any more.",
}


def exposed(status: Json) -> bytes:
    """The text format. status: as `GET /status` answers."""
    global _form
    families = [*figures_of(status), *_process.collect()]
    series = [(sample.name, *sample.labels.values()) for family in families for sample in family.samples]
    form = _form
    if form is None or form.series != series:
        form = _form = _Form(series, _heads(families))
    values = (sample.value for family in families for sample in family.samples)
    told = [f"{head}{_number(value)}" for head, value in zip(form.heads, values, strict=True)]
    return "".join(told).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class _Form:
    """An answer without its numbers. While the series stay the same only those are new, and checking and escaping every
    name and label again would be most of the work of a scrape."""

    series: list[tuple[str, ...]]
    heads: list[str]
    """What stands before each number: the end of the line before, HELP and TYPE where a family begins, the series."""


_number: Callable[[float], str] = floatToGoString
_form: _Form | None = None
"""Of the last answer; any thread may replace it."""
_process = ProcessCollector(registry=None)


def _heads(families: Sequence[Metric]) -> list[str]:
    """By the library, which writes a sample a line."""
    heads, head = [], ""
    for line in generate_latest(_Made(families)).decode().splitlines(keepends=True):
        head += line
        if not line.startswith("#"):
            before, number = head.rstrip("\n").rsplit(" ", 1)
            float(number)
            heads.append(f"{before} ")
            head = "\n"
    return heads


class _Made(CollectorRegistry):
    def __init__(self, families: Sequence[Metric]) -> None:
        super().__init__(auto_describe=False)
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def figures_of(status: Json) -> Iterator[Metric]:
    """Everything that the status tells."""
    yield InfoMetricFamily(
        "anytimed_run", "Which run this is.", {key: str(status[key]) for key in ("run_id", "term", "device")}
    )
    now = status["state"]
    yield _by("anytimed_state", "1 for the state that the daemon is in.", "state", {
        state: float(state == now) for state in dict.fromkeys((*STATES, now))
    })  # fmt: skip
    yield from _training(status)
    yield from _kept(status)
    yield from _store(status)
    yield from _machine(status)
    yield from _sources(status["sources"])
    yield from _sinks(status.get("sinks") or {})


def _training(status: Json) -> Iterator[Metric]:
    for key, (name, what) in _COUNTS.items():
        yield CounterMetricFamily(name, what, value=status[key])
    for key, (name, what) in _FIGURES.items():
        yield from _gauge(name, what, status.get(key))
    yield from _gauge("anytimed_degraded", "Things that are not as they should be; status names them.", len(
        status["degraded"]
    ))  # fmt: skip
    decided = CounterMetricFamily(
        "anytimed_interventions", "Decisions about the training, by kind.", labels=["kind"]
    )  # fmt: skip
    for kind, count in (dict.fromkeys(INTERVENTIONS, 0) | (status.get("interventions") or {})).items():
        decided.add_metric([kind], count)
    yield decided
    if evaluation := status["evaluation"]:
        yield _by(
            "anytimed_holdout_loss_nats", "Loss on the hold-out, per token: averaged x, y of the gradients, fast z.",
            "weights", {which: evaluation[f"loss_{which}"] for which in "xyz"},
        )  # fmt: skip
        yield from _gauge("anytimed_holdout_step", "The step of that evaluation.", evaluation["step"])


def _kept(status: Json) -> Iterator[Metric]:
    for name, what, told in (
        ("commit", "the last commit", status["commit"]),
        ("export", "the last published checkpoint", status["export"]),
        ("mirrored_commit", "the last mirrored commit", (status["mirror"] or {}).get("commit")),
        ("verification", "the last verification of commits", status["verification"]),
    ):
        if told:
            yield from _gauge(f"anytimed_last_{name}_timestamp_seconds", f"When {what} was made.", told["time"])
            yield from _gauge(f"anytimed_last_{name}_step", f"The step of {what}.", told.get("step"))
    if reload := status["reload"]:
        ok = float(reload["error"] is None)
        yield from _gauge("anytimed_config_last_reload_successful", "Whether the last reload was taken.", ok)
    yield from _gauge(
        "anytimed_config_last_reload_success_timestamp_seconds", "When the configuration in force was taken.",
        status["configured"],
    )  # fmt: skip


def _store(status: Json) -> Iterator[Metric]:
    """Where checkpoints are published."""
    store, upload = status.get("store"), status.get("upload")
    if store:
        yield from _gauge(
            "anytimed_store_enforces_conditions", "Whether the store itself keeps two writers apart.",
            store["enforced"],
        )  # fmt: skip
        yield from _gauge("anytimed_lease_held", "Whether this daemon may publish.", store["lease"] == "held")
    if upload:
        yield from _gauge("anytimed_upload_done_bytes", "Sent of the upload under way.", upload["done_bytes"])
        yield from _gauge("anytimed_upload_size_bytes", "Size of the upload under way.", upload["total_bytes"])


def _machine(status: Json) -> Iterator[Metric]:
    if disk := status.get("disk"):
        yield from _gauge(
            "anytimed_disk_available_bytes", "Free on the run directory's file system.", disk["free_bytes"]
        )  # fmt: skip
        yield from _gauge(
            "anytimed_disk_size_bytes", "Size of the run directory's file system.", disk["total_bytes"]
        )  # fmt: skip
    if gpu := status.get("accelerator"):
        for key, name, what in (
            ("memory_used_bytes", "memory_used_bytes", "Memory of the accelerator in use."),
            ("memory_total_bytes", "memory_size_bytes", "Memory of the accelerator."),
            ("utilisation", "utilisation_ratio", "Share of the time that the accelerator computed, 0 to 1."),
        ):
            if gpu.get(key) is not None:
                yield _by(f"anytimed_accelerator_{name}", what, "accelerator", {str(gpu["name"]): gpu[key]})


def _sources(sources: Mapping[str, Json]) -> Iterator[Metric]:
    for key, what in _SOURCE_COUNTS.items():
        counted = CounterMetricFamily(f"anytimed_source_{key}", what, labels=["source"])
        for name, source in sources.items():
            counted.add_metric([name], source[key])
        yield counted
    lag = GaugeMetricFamily("anytimed_source_lag", "What is found and not yet read.", labels=["source", "unit"])
    for name, source in sources.items():
        lag.add_metric([name, source["lag_unit"]], source["lag_bytes"])
    yield lag
    yield _by("anytimed_source_share_ratio", "Share of the draws.", "source", {
        name: source["share"] for name, source in sources.items()
    })  # fmt: skip
    for key, what in _SOURCE_STATES.items():
        yield _by(f"anytimed_source_{key}", what, "source", {
            name: float(source[key] is not None) for name, source in sources.items()
        })  # fmt: skip


def _sinks(sinks: Mapping[str, Json]) -> Iterator[Metric]:
    for key, what in (
        ("written", "Records that the tracker took."),
        ("dropped", "Records that the tracker did not take in time, and will not get."),
    ):
        counted = CounterMetricFamily(f"anytimed_sink_records_{key}", what, labels=["sink"])
        for name, sink in sinks.items():
            counted.add_metric([name], sink[key])
        yield counted
    yield _by("anytimed_sink_records_waiting", "Records that wait for the tracker.", "sink", {
        name: sink["waiting"] for name, sink in sinks.items()
    })  # fmt: skip
    yield _by("anytimed_sink_failing", "Whether the tracker failed when it was last tried.", "sink", {
        name: float(sink["problem"] is not None) for name, sink in sinks.items()
    })  # fmt: skip


def _gauge(name: str, what: str, value: Any) -> Iterator[Metric]:
    """One gauge; none where there is no figure."""
    if value is not None:
        yield GaugeMetricFamily(name, what, value=float(value))


def _by(name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, what, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
