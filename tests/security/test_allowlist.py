"""`type = "package.module:Class"` is code to import: only the command line or the unit can allow it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from anytimed import registry
from anytimed.contracts import ConfigError
from tests import tiny

MODULE = '''
from pathlib import Path
(Path(__file__).parent / "imported").touch()

from anytimed_adapters.streams.text import TextFiles


class Mine(TextFiles):
    """A stream of the user's own, not installed."""


class NoAdapter:
    pass


def function(): ...
'''


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a module that leaves a trace when it is imported, and a config that names its class."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted.py").write_text(MODULE)
    tiny.write_text(tmp_path / "data", 20)
    return tmp_path


def config(place: Path, name: str) -> Path:
    return tiny.config(place, **{"sources.main": {"type": name}})


def run(place: Path, *arguments: str | Path, expect: int = 0, **environment: str) -> str:
    path = os.pathsep.join([str(place / "code"), os.environ.get("PYTHONPATH", "")])
    return tiny.run(*arguments, expect=expect, PYTHONPATH=path, **environment)


def test_a_configuration_alone_imports_nothing(place: Path) -> None:
    path = config(place, "planted:Mine")
    for command in (("check", path), ("run", path, "--steps", "1", "--allow-adapter", "other:Class")):
        told = run(place, *command, expect=2)
        assert '[sources.main] type: found "planted:Mine"' in told
        assert "--allow-adapter planted:Mine" in told and "ANYTIMED_ALLOW_ADAPTERS=planted:Mine" in told
    assert not (place / "code" / "imported").exists()


def test_allowed_on_the_command_line_it_trains(place: Path) -> None:
    path = config(place, "planted:Mine")
    run(place, "run", path, "--steps", "2", "--allow-adapter", "x.y:Z", "--allow-adapter", "planted:Mine")
    assert (place / "code" / "imported").exists()
    assert "[sources.main]" in run(place, "run", path, "--steps", "3", expect=2), "allowed once is not allowed for good"


def test_allowed_by_the_unit_it_trains(place: Path) -> None:
    path = config(place, "planted:Mine")
    run(place, "run", path, "--steps", "2", ANYTIMED_ALLOW_ADAPTERS="x.y:Z planted:Mine")


@pytest.fixture
def nothing_allowed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(place / "code")
    monkeypatch.setattr(registry, "_allowed", set())
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return place


def test_allowed_and_not_named_is_not_imported(nothing_allowed: Path) -> None:
    registry.allow(["planted:Mine"])
    registry.find("anytimed.streams", "text", "here")
    assert registry.allowed() == ["planted:Mine"] and not (nothing_allowed / "code" / "imported").exists()
    assert registry.find("anytimed.streams", "planted:Mine", "here").__name__ == "Mine"
    assert (nothing_allowed / "code" / "imported").exists()


@pytest.mark.usefixtures("nothing_allowed")
@pytest.mark.parametrize(
    "name", ["os:system", "planted:function", "planted:NoAdapter", "planted:Absent", "absent:Mine"]
)
def test_what_is_allowed_and_is_no_adapter_is_named(name: str) -> None:
    registry.allow([name])
    with pytest.raises(ConfigError, match=f'here type = "{name}"'):
        registry.find("anytimed.streams", name, "here")


@pytest.mark.parametrize(
    "name", ["planted", "planted:", ":Mine", "planted:Mine()", "../planted:Mine", "a b:C", "planted:Mine\n", "os:a;b"]
)
def test_the_allowlist_takes_one_form(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected package\.module:Class"):
        registry.allow([name])
    with pytest.raises(ConfigError, match="type"):
        registry.find("anytimed.streams", name, "here")


def test_installed_adapters_need_no_leave() -> None:
    assert registry.find("anytimed.streams", "text", "here").__name__ == "TextFiles"
