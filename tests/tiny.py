"""A tiny run for tests: a config of a few thousand parameters, text to read, and the command line in a process of its
own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from anytimed.contracts import Json

WORDS = ["stream", "batch", "step", "weight", "average", "gradient", "commit", "export", "token", "record", "block"]

OPTIMIZERS = {
    "sf_normuon": {"lr": 0.03, "aux_lr": 0.02, "warmup_steps": 10},
    "amuse": {"lr": 0.02, "mu": 0.8, "rho": 0.4, "warmup_steps": 10},
    "sf_adamw": {"lr": 0.01, "warmup_steps": 10},
}


def write_text(folder: Path, count: int, *, seed: int = 3, words: int = 120, prefix: str = "doc") -> list[Path]:
    """`count` files of a few hundred bytes, each with a line of its own that says which it is. Written at the same
    moment whenever they are written: the time of a file is part of its identity in the journal."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    made = []
    for i in range(count):
        path = folder / f"{prefix}{i:04d}.txt"
        beside = path.with_suffix(".tmp")
        beside.write_text(f"{prefix} {i}\n" + " ".join(draw.choice(WORDS) for _ in range(words)) + ".\n")
        os.utime(beside, (1_700_000_000, 1_700_000_000 + i))
        beside.rename(path)
        made.append(path)
    return made


def config(folder: Path, kind: str = "sf_normuon", *, without: Sequence[str] = (), **changes: dict[str, Any]) -> Path:
    """A config file in `folder` that reads folder/data/*.txt; `changes` update its tables, those `without` are left
    out."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"directory": str(folder / "run"), "seed": 7, "threads": 1, "device": "cpu"},
        "model": {"type": "llama", "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64},
        "tokenizer": {"type": "bytes"},
        "data": {
            "sequence_length": 32,
            "batch_size": 4,
            "shuffle_block_sequences": 64,
            "prefetch_batches": 2,
            "discover": {"every_s": 0.1},
            "holdout": {"fraction": 0.25, "max_tokens": 512, "record_tokens": 128},
        },
        "sources.main": {"type": "text", "url": str(folder / "data" / "*.txt")},
        "optimizer": {"type": kind, **OPTIMIZERS[kind]},
        "evaluation": {"every_steps": 20},
        "commits": {"every_steps": 7, "keep": 3},
        "exports": {"url": str(folder / "published"), "every_steps": 9, "keep": 100},
        "logging": {"every_steps": 5},
    }
    for name, table in changes.items():
        tables.setdefault(name, {}).update(table)
    for name in without:
        del tables[name]
    path = folder / "config.toml"
    path.write_text("\n".join(f"[{name}]\n{_toml(table)}" for name, table in tables.items()))
    return path


def _toml(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items() if value is not None)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`anytimed ARGUMENTS` in a process of its own, output captured as text."""
    return subprocess.Popen(
        [sys.executable, "-m", "anytimed.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
    )


def run(*arguments: str | Path, expect: int = 0, timeout_s: float = 120, **environment: str) -> str:
    """The output of `anytimed ARGUMENTS`, which has to end with the exit code `expect`."""
    process = start(*arguments, **environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{output}") from None
    assert process.returncode == expect, f"exit {process.returncode}, expected {expect}:\n{output}"
    return output


def newest_commit(folder: Path) -> Path:
    """The newest commit of the run in `folder`."""
    return max(path for path in (folder / "run" / "commits").iterdir() if not path.name.startswith("."))


def state_of(commit: Path) -> tuple[dict[str, torch.Tensor], Json]:
    """Tensors and state of a commit."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(commit.glob("rank-*.safetensors")):
        tensors.update(load_file(file))
    return tensors, json.loads((commit / "state.json").read_text())


def assert_same_state(one: Path, other: Path) -> None:
    """x, z and everything else in the tensors, Position, hold-out and clocks: bit for bit."""
    (ours, our_state), (theirs, their_state) = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("x.") for name in ours)
    assert any(name.startswith("z.") for name in ours)
    assert "holdout.tokens" in ours
    differing = [name for name in sorted(ours) if not torch.equal(ours[name], theirs[name])]
    assert not differing, differing
    for key in ("position", "holdout", "evaluation"):
        assert our_state[key] == their_state[key], key
    for key in ("step", "tokens", "skipped", "clocks"):
        assert our_state["learner"][key] == their_state["learner"][key], key
