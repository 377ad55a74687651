"""`anytimed sample`: a checkpoint continues a text."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import Allowed, app
from anytimed.cli.progress import progress


@app.command()
def sample(
    where: Annotated[str, typer.Argument(metavar="DIR_OR_URL", help="Pulled folder, or a published prefix.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Draw among this many tokens.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    allow_adapter: Allowed = None,
) -> None:
    """Continue a prompt with a published checkpoint."""
    from anytimed import registry
    from anytimed.service.reader_side import load_checkpoint
    from anytimed.storage.pull import pull as fetch
    from anytimed.training.sample import continue_text, decode_stream

    registry.allow(allow_adapter or ())
    with tempfile.TemporaryDirectory(prefix="anytimed-") as scratch:
        folder = next((f for f in (Path(where), Path(where) / "current") if (f / "config.json").is_file()), None)
        if folder is None:
            with progress("pulling") as show:
                folder = fetch(where, Path(scratch), progress=show).path
        module, tokenizer, context_length = load_checkpoint(folder)
    drawn = continue_text(
        module,
        tokenizer,
        prompt,
        max_new_tokens=tokens,
        context_length=context_length,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    sys.stdout.write(prompt)
    for piece in decode_stream(tokenizer, drawn, [int(t) for t in tokenizer.encode(prompt)]):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
