"""Everything about a configuration that can be found out without training.

In order: adapters and their tables; every source listed and its first record read; trackers asked; the store written,
read back and the trace removed; model and optimizer built without storage and counted, and who will do the optimizer's
work. Each becomes one `Finding`; a failure does not hide the rest."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anytimed.config import Config
from anytimed.contracts import AnytimedError, ConfigError, Json, Record, Rejected, Stream
from anytimed.data.inbox import Inbox
from anytimed.optim import compiled, native
from anytimed.service.assembly import Parts, parts_of, sink_of
from anytimed.service.console import size
from anytimed.storage.probe import probe
from anytimed.storage.store import Store
from anytimed.training.device import Device
from anytimed.training.footprint import Footprint, estimate
from anytimed.urls import told

READ_AT_MOST = 100
CHECK_S = 10.0
"""Budget of one request to a store: a person waits for the answer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. `good` is False where the daemon would fail or wait."""

    what: str
    good: bool
    told: str


def check(config: Config) -> Iterator[Finding]:
    """One finding after the other, as each is known. Raises ConfigError where the adapters' tables are wrong."""
    parts = parts_of(config)
    yield Finding("config", True, f"{config.path}: every table and key is known, every adapter is installed")
    yield _tried("device", lambda: str(_device(config)))
    for name in config.sources:
        yield _tried(f"source {name}", partial(_read, parts.open_stream(name)))
    for name in sorted(config.sinks):
        yield _tried(f"sink {name}", sink_of(config, name).check)
    yield _tried("run directory", lambda: _directory(Path(config.run.directory)))
    exports, commits = config.exports, config.commits
    yield _tried("exports", lambda: _probe(exports.url, exports.storage_options, require=exports.require_conditions))
    if (mirror := commits.mirror_url) is not None:
        yield _tried("mirror", lambda: _probe(mirror, commits.mirror_storage_options))
    try:
        device = _device(config)
        found = footprint(parts, device.torch_device.type, device.precision)
    except ConfigError as error:
        yield Finding("model", False, str(error))
        return
    yield Finding(
        "model", True, f"{config.model.type}, {found.parameters:,} parameters, {parts.tokenizer.vocab_size:,} tokens"
    )
    yield Finding("optimizer", True, f"{config.optimizer.type}, {_elements_by(device, found.parameters)}")
    for what, count in memory(config, found):
        yield Finding(what, True, told_bytes(count))
    if config.run.device == "auto" and not device.is_cuda:
        there = footprint(parts, "cuda", config.run.precision)
        yield Finding("memory: together on CUDA", True, f"{told_bytes(there.total_bytes)}, in {config.run.precision}")


def footprint(parts: Parts, device_type: str, precision: str) -> Footprint:
    """Bytes of the configured model and optimizer, built on `meta`, on a device that need not be there."""
    data = parts.config.data
    module = parts.model.build(parts.tokenizer.vocab_size, device="meta")
    optimizer = parts.recipe.build(module.named_parameters(), parts.model.roles(module), parts.model.row_splits(module))
    return estimate(
        parts.model,
        module,
        optimizer,
        micro_batch=data.micro_batch_size or data.batch_size,
        evaluation_batch=parts.config.evaluation.batch_size,
        length=data.sequence_length,
        vocab_size=parts.tokenizer.vocab_size,
        element_bytes=2 if precision == "bfloat16" else 4,
        device_type=device_type,
        documents=data.mask_documents,
    )


def memory(config: Config, found: Footprint) -> Iterator[tuple[str, int]]:
    """The lines of the memory table: what, and how many bytes."""
    yield "memory: parameters", found.parameter_bytes
    yield "memory: gradients", found.gradient_bytes
    yield f"memory: optimizer ({config.optimizer.type})", found.optimizer_bytes
    yield "memory: activations (estimate)", found.activation_bytes
    yield "memory: an evaluation (estimate)", found.evaluation_bytes
    yield "memory: copy for a commit", found.copy_bytes
    yield "memory: together", found.total_bytes


def told_bytes(count: int) -> str:
    return f"{count:,} bytes ({size(count)})"


def _elements_by(device: Device, parameters: int) -> str:
    """Who does the work on single elements: the same bits on a CPU, another speed."""
    if device.is_cuda:
        return "elements by torch's compiler" if compiled.decided(device.torch_device) else "elements by torch"
    if parameters < native.ELEMENTS:
        return "elements by torch: too small a model for a compiler to pay"
    why_not = native.why_not()
    return "elements in C" if why_not is None else f"elements by torch, which is slower than C; {why_not}"


def _device(config: Config) -> Device:
    return Device(config.run.device, precision=config.run.precision, deterministic=False)


def reload(foreseen: Json | None) -> Iterator[Finding]:
    """What a reload would make of it, by what the daemon said; nothing where none was asked."""
    if foreseen is None:
        return
    if restart := foreseen["restart"]:
        yield Finding("reload", False, f"refused as a whole: only a restart changes {', '.join(restart)}")
    elif foreseen["problem"]:
        yield Finding("reload", False, f"refused: {foreseen['problem']}")
    else:
        changed = foreseen["changed"]
        yield Finding("reload", True, f"would change {', '.join(changed)}" if changed else "would change nothing")


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except (AnytimedError, OSError) as error:
        return Finding(what, False, told(str(error)))


def _read(stream: Stream) -> str:
    entries = stream.discover()
    if not entries and isinstance(stream, Inbox):
        return "an inbox, empty: the daemon waits for what `anytimed feed` or POST /records sends"
    if not entries:
        raise AnytimedError("nothing there yet: the daemon would wait for data")
    stream.adopt(entries)
    waiting = size(stream.lag(None))
    for count, (item, _) in enumerate(stream.read(None)):
        if isinstance(item, Record):
            return f"{len(entries):,} entries, {waiting}; the first record has {len(item.text):,} characters"
        if isinstance(item, Rejected) and count >= READ_AT_MOST:
            raise AnytimedError(f"no readable record among the first {READ_AT_MOST}: {item.reason}")
    raise AnytimedError(f"{len(entries):,} entries and no readable record in them")


def _directory(path: Path) -> str:
    there = path.resolve()
    known = (there / "OWNER").exists()
    while not there.exists():
        there = there.parent
    probe = there / f".anytimed-check-{uuid.uuid4().hex}"
    probe.touch()
    probe.unlink()
    return f"{path}: writable, " + ("holds a run to resume" if known else "a new run would begin")


def _probe(url: str, options: Mapping[str, Any], *, require: bool = False) -> str:
    """`require`: a store that does not enforce conditions will not do."""
    store = Store(url, options, deadline_s=CHECK_S)
    ability = probe(store, uuid.uuid4().hex)
    if require and not ability.fences:
        raise AnytimedError(
            f"{store.url}: {ability.told}; [exports] require_conditions = true asks for a store that does"
        )
    return f"{store.url}: written, read back and removed a probe; the store {ability.told}"
