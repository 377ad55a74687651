"""`anytimed init`: a starter configuration."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import app, myself, say
from anytimed.contracts import ConfigError


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("anytimed.toml"),
) -> None:
    """Write a commented starter configuration."""
    text = files("anytimed").joinpath("starter.toml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; name another file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None
    say(f"Wrote {path}. Next: {myself()} check {path}")
