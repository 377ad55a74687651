"""The application that the commands join, its two consoles, and the arguments that several of them take."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Continual, anytime training: a daemon that never finishes, and checkpoints that anyone can pull at any time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (TOML).")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the configuration file that names it.")]
Url = Annotated[str, typer.Argument(metavar="URL", help="Published prefix: any fsspec URL or a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-adapter",
        metavar="MODULE:CLASS",
        envvar="ANYTIMED_ALLOW_ADAPTERS",
        help="Let the configuration name this class as an adapter, though no entry point does; repeatable.",
    ),
]


def say(text: str) -> None:
    """A line as it is: no colours, no wrapping, so that it can be copied."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def myself() -> str:
    """How this command was called: `anytimed` where that is on the PATH, else the path that was typed."""
    return "anytimed" if shutil.which("anytimed") else sys.argv[0]


def plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
