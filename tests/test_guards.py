"""Promises that a later change could break without anybody noticing."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import BaseModel
from typer.core import TyperGroup

import anytimed
from anytimed import optim, registry
from anytimed.cli import app
from anytimed.config import Config
from tests import tiny

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "daemon/anytimed", ROOT / "adapters/anytimed_adapters")

HORIZON = re.compile(
    r"horizon|epoch|passes|decay_steps|cooldown|anneal|t_max|^(steps|tokens|iterations|updates)$"
    r"|(total|max|num|n|train|training|final|last|until|stop)_?(steps?|tokens?|iters?|iterations?|batches|updates?|records)$"
)
ALLOWED = {
    "data.holdout.max_tokens": "the size of the hold-out",
    "sources.passes": "how often a source that has ended is read, while the training goes on",
    "cli run --steps": "the limit for demos and tests",
    "cli prove --steps": "the length of a proof",
    "cli sample --tokens": "the length of a sample",
    "cli eval --max-tokens": "how much text is scored",
}


def config_fields(model: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        here = f"{path}{name}"
        yield here
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from config_fields(inner, f"{here}.")


def adapter_fields() -> Iterator[str]:
    for group in registry.GROUPS:
        for name in registry.installed(group):
            for field in registry.find(group, name, "test").Settings.model_fields:
                yield f"{group}:{name} {field}"


def optimizer_arguments() -> Iterator[str]:
    for name in optim.__all__:
        for argument in inspect.signature(getattr(optim, name)).parameters:
            yield f"optim.{name} {argument}"


def cli_options() -> Iterator[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        for parameter in command.params:
            for option in parameter.opts:
                yield f"cli {name} {option}"


@pytest.mark.parametrize("names", [config_fields(Config), adapter_fields(), optimizer_arguments(), cli_options()])
def test_nothing_names_a_horizon(names: Iterator[str]) -> None:
    listed = list(names)
    assert len(listed) > 10
    found = [n for n in listed if HORIZON.search(re.split(r"[ .]", n)[-1].lstrip("-").replace("-", "_"))]
    assert set(found) <= ALLOWED.keys(), set(found) - ALLOWED.keys()


def test_the_guard_would_see_a_horizon() -> None:
    for name in ("total_steps", "max_steps", "num_epochs", "horizon", "max_tokens", "decay_steps", "steps", "t_max"):
        assert HORIZON.search(name), name
    for name in ("every_steps", "warmup_steps", "record_tokens", "averaging_window_steps", "sequence_length", "keep"):
        assert not HORIZON.search(name), name


def test_imports_keep_the_layers() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def test_no_pickle_and_no_torch_load() -> None:
    files = [path for package in PACKAGES for path in package.rglob("*.py")]
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not FORBIDDEN & {alias.name.partition(".")[0] for alias in node.names}, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in FORBIDDEN, where
                assert not (node.module == "torch" and "load" in {alias.name for alias in node.names}), where
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), where
            elif isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle" or getattr(node.value, "value", True) is False, where


def test_a_run_does_not_import_the_compiler(tmp_path: Path) -> None:
    """It costs a second of every start, and torch's optimizers import it at their first call."""
    tiny.write_text(tmp_path / "data", 20)
    code = (
        "import sys; from anytimed.cli import main\n"
        "try: main()\n"
        "finally: print('compiler:', 'torch._dynamo' in sys.modules, 'torch.nn' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "run", str(tiny.config(tmp_path)), "--steps", "8"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "compiler: False True" in told, told


def test_the_reader_needs_no_torch() -> None:
    code = (
        "import sys, anytimed; anytimed.pull, anytimed.latest, anytimed.watch; import anytimed.cli\n"
        "from anytimed.service import following\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    assert anytimed.__all__ == ["latest", "pull", "watch"]
    assert optim.__all__ == ["AMUSE", "SFAdamW", "SFNorMuon", "ScheduleFree", "param_groups"]


def test_no_room_is_called_utils() -> None:
    names = {path.stem for package in PACKAGES for path in package.rglob("*")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}
