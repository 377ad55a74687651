"""From a configuration to parts: second phase of reading it, adapters looked up, model and optimizer built.

In order: `Parts` holds the adapters, found and validated; `shape` says what a commit binds a run to, and `differences`
names what does not fit; `inexact_resume` says what a resume cannot keep; `pipeline_of` and `learner_of` build the two
halves of the training from the parts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from anytimed import registry
from anytimed.config import AdapterTable, Config, SourceTable
from anytimed.contracts import (
    ConfigError,
    Journal,
    Json,
    KeepsFiles,
    Model,
    Rejected,
    Sink,
    SourceRule,
    Stream,
    Tokenizer,
)
from anytimed.data.encoding import Rebuild
from anytimed.data.pipeline import Pipeline
from anytimed.data.tokenizing import tokenizing
from anytimed.optim.settings import POLYAK
from anytimed.service.timetable import plan
from anytimed.storage.commit import Commit
from anytimed.storage.pull import pull
from anytimed.storage.store import Store
from anytimed.storage.strangers import CONFIG_BYTES, INDEX_NAME, read_json, weight_files
from anytimed.training.device import Device
from anytimed.training.learner import Learner
from anytimed.training.optimizers import Recipe
from anytimed.training.sample import load_tensors
from anytimed.urls import public, without_credentials

log = logging.getLogger("anytimed")

WORLD_SIZE = 1


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that the configuration's adapter tables name, built and validated; nothing is read or trained yet."""

    config: Config
    tokenizer: Tokenizer
    model: Model
    recipe: Recipe
    rebuild: Rebuild
    """How a worker makes the tokenizer again."""
    rules: Mapping[str, SourceRule]
    """Of the mixture that the configuration asks for."""

    def told(self) -> str:
        """The mixture for a log line."""
        total = sum(rule.weight for rule in self.rules.values())
        return ", ".join(f"{name} {rule.weight / total:.1%}" for name, rule in self.rules.items())

    def open_stream(self, name: str, rule: SourceRule | None = None) -> Stream:
        """A new stream of a source: as the configuration has it, or (a source that it no longer has, needed to replay
        what was decided before) by what the journal says of it, without its credentials."""
        config = self.config
        table = config.sources.get(name)
        if rule is not None and (table is None or rule_of(config, name).identity != rule.identity):
            url = {"url": _to(rule.reads["url"], config)} if "url" in rule.reads else {}
            table = SourceTable(**{**rule.reads, **url})
        if table is None:
            raise ConfigError(f"{config.path}: no source {name!r}, found {', '.join(config.sources)}")
        stream: Stream = registry.build("anytimed.streams", table, str(config.path), ("sources", name), name)
        if isinstance(stream, KeepsFiles):
            stream.use_folder(Path(config.run.directory) / "streams" / name)
        return stream


def parts_of(config: Config) -> Parts:
    """Look up and validate every adapter. Raises ConfigError naming file, table and key."""
    file, base = str(config.path), config.folder
    plan(config)
    tokenizer = registry.build("anytimed.tokenizers", config.tokenizer, file, ("tokenizer",), base)
    model = registry.build("anytimed.models", config.model, file, ("model",))
    recipe = registry.build("anytimed.optimizers", config.optimizer, file, ("optimizer",))
    for name, table in sorted(config.sources.items()):
        registry.build("anytimed.streams", table, file, ("sources", name), name)
    for name in sorted(config.sinks):
        sink_of(config, name)
    rules = rules_of(config)
    longest = model.hf_config(tokenizer.vocab_size, tokenizer.end_token).get("max_position_embeddings")
    if longest is not None and config.data.sequence_length > longest:
        raise ConfigError(
            f"{file}: [data] sequence_length: found {config.data.sequence_length}, "
            f"allowed: at most the model's {longest} ([model] context_length)"
        )
    _places_apart(config, file)
    if getattr(recipe.settings, "lr", None) == POLYAK and config.training.clip_grad_norm:
        raise ConfigError(
            f"{file}: [training] clip_grad_norm: found {config.training.clip_grad_norm}, allowed with [optimizer] lr = "
            '"polyak": 0, for that step is measured by the gradient, and a clipped one makes it longer'
        )
    rebuild = Rebuild(config.tokenizer, file, base, tuple(registry.allowed()))
    return Parts(config, tokenizer, model, recipe, rebuild, rules)


def sink_of(config: Config, name: str) -> Sink:
    """A new one, that has not been opened. Raises ConfigError naming file, table and key."""
    sink: Sink = registry.build("anytimed.sinks", config.sinks[name], str(config.path), ("sinks", name), name)
    return sink


def rules_of(config: Config) -> dict[str, SourceRule]:
    """Those of the sources that are drawn from, by name. Raises ConfigError where a table is wrong."""
    return {name: rule_of(config, name) for name, table in sorted(config.sources.items()) if table.weight > 0}


def rule_of(config: Config, name: str) -> SourceRule:
    """How a source takes part, and what it is: its adapter and the settings that were given, without credentials. Those
    that the adapter says may change (`passing_settings`) make no other source of it. A local path is told from the run
    directory, so that the journal does not depend on where run and data lie together."""
    table, file = config.sources[name], str(config.path)
    adapter = registry.find("anytimed.streams", table.type, f"{file}: [sources.{name}]")
    given = registry.settings(adapter, table, file, ("sources", name)).model_dump(mode="json", exclude_defaults=True)
    reads: Json = json.loads(json.dumps(public({"type": table.type, **given})))
    if isinstance(reads.get("url"), str):
        reads["url"] = _from(reads["url"], config)
    passing = getattr(adapter, "passing_settings", ())
    lasting = {key: value for key, value in reads.items() if key not in passing}
    return SourceRule(
        weight=table.weight,
        when_dry=table.when_dry,
        passes=table.passes,
        rejected_fraction=table.rejected_fraction,
        rejected_records=table.rejected_records,
        reads=reads,
        identity=hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest(),
    )


def _is_local(url: str) -> bool:
    return "://" not in url and "::" not in url


def _from(url: str, config: Config) -> str:
    return os.path.relpath(url, config.run.directory) if _is_local(url) else url


def _to(url: str, config: Config) -> str:
    return os.path.normpath(Path(config.run.directory) / url) if _is_local(url) else url


def _places_apart(config: Config, file: str) -> None:
    """Raises ConfigError where the run directory, the published prefix and the mirror lie in one another."""

    def inside(url: str, other: str) -> bool:
        one, two = (text.removeprefix("file://").rstrip("/") for text in (url, other))
        if "://" in one or "://" in two:
            return f"{one}/".startswith(f"{two}/")
        return Path(one).resolve().is_relative_to(Path(two).resolve())

    directory, published, mirror = config.run.directory, config.exports.url, config.commits.mirror_url
    if inside(published, directory):
        raise ConfigError(
            f'{file}: [exports] url: found "{published}", inside the run directory "{directory}"; '
            "allowed: anywhere else, for --fresh moves the run directory aside and what is published has to stay"
        )
    if mirror is None:
        return
    if inside(mirror, directory):
        raise ConfigError(
            f'{file}: [commits] mirror_url: found a place inside the run directory "{directory}"; '
            "allowed: anywhere else, for it has to outlive the directory"
        )
    if inside(mirror, published) or inside(published, mirror):
        raise ConfigError(
            f"{file}: [commits] mirror_url: found a place that overlaps with [exports] url; allowed: one apart, for "
            "the state is not for everyone who may pull"
        )


# --- what a commit binds a run to -------------------------------------------------------------------------------------


def shape(parts: Parts) -> Json:
    """What may not change on resume: it decides which tensors there are, or which tokens come next. Without
    credentials: those may change, and what is committed must not hold them."""

    def told(table: AdapterTable, adapter: object) -> Json:
        settings = getattr(adapter, "settings", None)
        return {"type": table.type, **(settings.model_dump(mode="json") if settings is not None else table.settings)}

    config = parts.config
    made: Json = {
        "model": told(config.model, parts.model),
        "tokenizer": told(config.tokenizer, parts.tokenizer),
        "optimizer": {"type": config.optimizer.type, "lean": parts.recipe.settings.lean},
        "data": {
            "sequence_length": config.data.sequence_length,
            "shuffle_block_sequences": config.data.shuffle_block_sequences,
            "holdout": config.data.holdout.model_dump(),
        },
        "run": {"seed": config.run.seed},
    }
    plain: Json = json.loads(json.dumps(public(made)))
    return plain


def inexact_resume(config: Config) -> Iterator[str]:
    """Why a resume of this configuration need not be bit for bit; nothing where it is."""
    run = config.run
    if run.deterministic:
        return
    if run.compile and run.threads != 1:
        yield (
            "[run] compile = true with deterministic = false and several threads: compiled sums are added up in the "
            "order in which threads finish; set deterministic = true, or threads = 1"
        )
    if run.device.startswith("cuda") or (run.device == "auto" and torch.cuda.is_available()):
        yield (
            "[run] deterministic = false on CUDA: some kernels add up in the order in which blocks finish; "
            "set deterministic = true"
        )


def differences(commit: Json, config: Json, path: str = "") -> list[str]:
    """Every key that differs between two shapes, as `model.layers: 4 in the commit, 6 in the config`."""
    found: list[str] = []
    for key in sorted(commit.keys() | config.keys()):
        here = f"{path}.{key}" if path else key
        old, new = commit.get(key), config.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, here)
        elif old != new:
            shown = [json.dumps(value) if value is not None else "nothing" for value in (old, new)]
            found.append(f"{here}: {shown[0]} in the commit, {shown[1]} in the config")
    return found


def require_fit(parts: Parts, commit: Commit) -> None:
    """Raises ConfigError naming every key in which the configuration does not fit a commit."""
    found = differences(commit.state["shape"], shape(parts))
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise ConfigError(
            f"{parts.config.path}: does not fit the commit {commit.path}:\n{listed}\n"
            "Restore these values to go on, or start over with --fresh, which moves the old run aside."
        )
    if commit.state["world_size"] != WORLD_SIZE:
        raise ConfigError(f"{commit.path}: written by {commit.state['world_size']} ranks; this version resumes 1")


# --- the two halves of the training -----------------------------------------------------------------------------------


def pipeline_of(
    parts: Parts, journal: Journal, quarantine: Callable[[str, Json, Rejected], None], fold: Path | None
) -> Pipeline:
    config = parts.config
    return Pipeline(
        parts.rules,
        parts.open_stream,
        parts.tokenizer,
        tokenizing(parts.tokenizer, config.data.tokenizer_workers, parts.rebuild),
        journal,
        seed=config.run.seed,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        shuffle_block_sequences=config.data.shuffle_block_sequences,
        holdout_fraction=config.data.holdout.fraction,
        holdout_max_tokens=config.data.holdout.max_tokens,
        holdout_record_tokens=config.data.holdout.record_tokens,
        quarantine=quarantine,
        fold=fold,
    )


def learner_of(parts: Parts, device: Device) -> Learner:
    """Model and optimizer on the device, freshly drawn from the seed. `start_from` or `restore` comes after."""
    config = parts.config
    torch.manual_seed(config.run.seed)
    module = parts.model.build(parts.tokenizer.vocab_size).to(device.torch_device)
    optimizer = parts.recipe.build(module.named_parameters(), parts.model.roles(module), parts.model.row_splits(module))
    return Learner(
        parts.model,
        module,
        optimizer,
        device,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.data.micro_batch_size,
        end_token=parts.tokenizer.end_token if config.data.mask_documents else None,
        clip_grad_norm=config.training.clip_grad_norm or None,
        evaluation_batch_size=config.evaluation.batch_size,
        compile=config.run.compile,
    )


def initial_weights(parts: Parts, where: str, cache: Path) -> Mapping[str, torch.Tensor]:
    """x of another run, or any Hugging Face checkpoint of the model's family: a local folder, a published prefix, or a
    URL of a Hugging Face folder; the latter two are fetched into `cache`. Raises ConfigError naming what does not
    fit."""
    folder, told = _fetched(where, cache), without_credentials(where)
    hf_config = read_json(folder / "config.json", CONFIG_BYTES)
    if hf_config.get("model_type") != parts.model.hf_model_type:
        raise ConfigError(
            f'init_from: {told} is a "{str(hf_config.get("model_type"))[:80]}", '
            f'[model] type = "{parts.config.model.type}" reads "{parts.model.hf_model_type}"'
        )
    files = weight_files(folder)
    if not files:
        raise ConfigError(f"init_from: no .safetensors in {told}; pickled weights are not read: convert them first")
    try:
        return parts.model.initial_weights(load_tensors(files), hf_config, parts.tokenizer.vocab_size)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"init_from: {told}/config.json describes no model of this family: {error!r}") from error


def _fetched(where: str, cache: Path) -> Path:
    """A local folder with the checkpoint's files."""
    for folder in (Path(where), Path(where) / "current"):
        if (folder / "config.json").is_file():
            return folder
    store = Store(where)
    if not store.exists("config.json"):
        return pull(where, cache).path
    wanted = [k for k in store.list() if k in ("config.json", INDEX_NAME) or re.fullmatch(r"[^/]+\.safetensors", k)]
    sizes = {key: store.size(key) for key in wanted}
    free = shutil.disk_usage(cache).free
    if sum(sizes.values()) > free:
        raise ConfigError(f"init_from: {store.url} has {sum(sizes.values())} bytes, {cache} has {free} free")
    for key, size in sizes.items():
        log.info("fetching %s/%s, %d bytes", store.url, key, size)
        with (cache / key).open("xb") as file:
            for chunk in store.download(key, size):
                file.write(chunk)
    return cache
