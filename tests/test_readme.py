"""What the README says is true: its example runs, its tree and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import typer
from torch.nn.functional import cross_entropy
from typer.core import TyperGroup

from anytimed.cli import app
from anytimed.registry import installed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_optimizer_example_learns() -> None:
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "SFNorMuon" in code)
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    model, x = scope["model"], scope["x"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(x, dict)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(x[parameter])
        tokens = torch.arange(64)
        # 64 tokens by chance alone would be ln 64 = 4.16 nats.
        assert float(cross_entropy(model(tokens), (tokens * 7 + 3) % 64)) < 0.5


def test_every_command_is_told_and_every_told_command_exists() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert set(re.findall(r"^\| `([\w-]+)", table("| command |"), re.MULTILINE)) == set(group.commands)


def test_every_source_type_is_told() -> None:
    told = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table("| `type` |").splitlines()[2:])))
    assert told == set(installed("anytimed.streams"))


def table(head: str) -> str:
    """The Markdown table that begins with `head`."""
    return README[README.index(head) :].partition("\n\n")[0]


def test_the_files_that_the_tree_names_exist() -> None:
    tree = README[README.index("## The tree") : README.index("The layers are enforced")]
    folder = ROOT
    named = 0
    for indent, name in re.findall(r"^    ( *)([\w./-]+)", tree, re.MULTILINE):
        if not indent:
            folder = ROOT / name if name.endswith("/") else ROOT
        path = folder / name if indent else ROOT / name
        assert path.exists(), path
        named += 1
    assert named >= 20


def test_every_link_into_the_project_leads_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "systemd" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), target
