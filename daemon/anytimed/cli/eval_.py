"""`anytimed eval`: how well checkpoints predict a text."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from anytimed.cli.app import Allowed, AsJson, app, err, out, plain
from anytimed.cli.progress import progress, pulling
from anytimed.contracts import ConfigError
from anytimed.urls import told

if TYPE_CHECKING:
    from anytimed.service.scoring import Score


@app.command("eval")
def eval_(
    where: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR_OR_URL…",
            help="Pulled folders, Hugging Face models, published prefixes; URL@ID is a certain one, URL@best the best.",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(metavar="GLOB", help="Files of text, JSON Lines or Parquet, plain, .gz or .zst; repeatable."),
    ],
    checkpoint: Annotated[
        str | None, typer.Option(help="Of each URL that names none: an id, as `anytimed list` tells it, or best.")
    ] = None,
    form: Annotated[
        Literal["text", "jsonl", "parquet"] | None,
        typer.Option("--format", help="Of all files; else their names tell, and text is what they do not."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window; what the checkpoints were trained on.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows at a time; as fits 128 MB of logits.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="End with the document that brings the first checkpoint to so many.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
    allow_adapter: Allowed = None,
) -> None:
    """Loss, perplexity and bits per byte of checkpoints on text files. The same files, the same figures."""
    from anytimed import registry
    from anytimed.service.documents import documents
    from anytimed.service.scoring import score, window
    from anytimed.storage.located import locate

    registry.allow(allow_adapter or ())
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(f'--device: found "{device}", expected auto, cpu, cuda or cuda:N')
    scores: list[Score] = []
    with tempfile.TemporaryDirectory(prefix="anytimed-") as scratch:
        located = []
        for number, name in enumerate(_named(where, checkpoint)):
            with pulling() as show:
                located.append(locate(name, Path(scratch) / str(number), progress=show))
        on, length = _device(device), window(located, sequence_length)
        for at in located:
            with progress(at.label) as bar:
                scores.append(
                    score(
                        at,
                        lambda bar=bar: documents(data, form=form, text_field=text_field, progress=bar),  # type: ignore[misc]
                        on,
                        sequence_length=length,
                        batch_size=batch_size,
                        most_tokens=max_tokens,
                        most_documents=scores[0].documents if scores and max_tokens else None,
                    )
                )
    if as_json:
        told_data = [told(glob) for glob in data]
        results = [one.to_json() for one in scores]
        sys.stdout.write(json.dumps({"data": told_data, "sequence_length": length, "results": results}) + "\n")
    else:
        _show(scores, length)


def _named(where: Sequence[str], checkpoint: str | None) -> list[str]:
    """Every checkpoint by its full name."""
    from anytimed.storage.located import published_at, split

    if checkpoint is None:
        return list(where)
    return [f"{w}@{checkpoint}" if split(w)[1] is None and published_at(w) else w for w in where]


def _device(name: str):  # type: ignore[no-untyped-def]  # torch is imported only here
    from anytimed.training.device import Device

    try:
        return Device(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("[run] device:", "--device:")) from None


def _show(scores: Sequence[Score], length: int) -> None:
    from anytimed.service.console import size

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("checkpoint", overflow="fold", min_width=23)
    for name in ("step", "loss", "perplexity", "bits/byte", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    best = min(score.bits_per_byte for score in scores)
    for score in scores:
        manifest = score.at.manifest
        best_of_many = len(scores) > 1 and score.bits_per_byte == best
        name = score.at.name
        if manifest is not None and manifest.id not in name:
            name += f"\n{manifest.id}"
        table.add_row(
            plain(name),
            f"{manifest.step:,}" if manifest else "-",
            f"{score.loss:.4f}",
            f"{score.perplexity:,.2f}",
            f"{score.bits_per_byte:.4f}",
            f"{score.targets:,}",
            style="bold" if best_of_many else None,
        )
    out.print(table)
    first = scores[0]
    out.print(
        f"{first.documents:,} documents, {size(first.size_bytes)} of text, windows of {length:,} tokens. Loss: nats a "
        "token, but for documents' first ones. Bits/byte: of the whole text, comparable between tokenizers.",
        highlight=False,
    )
    if first.rejected:
        err.print(f"{first.rejected:,} documents could not be read and are left out.", highlight=False)
