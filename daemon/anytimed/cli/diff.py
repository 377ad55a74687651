"""`anytimed diff`: what moved between two checkpoints."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anytimed.cli.app import AsJson, app, out, say
from anytimed.cli.progress import progress, pulling
from anytimed.contracts import AnytimedError, Json

if TYPE_CHECKING:
    from anytimed.storage.manifest import Manifest
    from anytimed.storage.movement import Differs, Moved

_WHICH = "DIR, DIR@ID, URL or URL@ID; ID as `anytimed list` tells it, or best; without one it is the newest."


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The earlier checkpoint: {_WHICH}")],
    b: Annotated[str, typer.Argument(metavar="B", help="The later one, in the same way.")],
    weights: Annotated[
        bool, typer.Option(help="Read the weights too; without them two manifests are enough, and nothing is pulled.")
    ] = True,
    top: Annotated[int, typer.Option(min=0, help="How many of the tensors that moved the most are shown.")] = 8,
    all_: Annotated[bool, typer.Option("--all", help="Show every tensor.")] = False,
    as_json: AsJson = False,
) -> None:
    """What moved between two checkpoints: steps, data, evaluation, and each layer's weights."""
    from anytimed.service.diff_view import manifest_lines, weight_lines
    from anytimed.storage.changes import ancestry, changes
    from anytimed.storage.located import describe

    found: Json | None = None
    line: Json = {}
    tensors: list[Moved | Differs] = []
    if weights:
        before, after = _moved(a, b, tensors)
    else:
        before, after = describe(a), describe(b)
    if before is not None and after is not None:
        found, line = changes(before, after), ancestry(before, after, _published(b, after))
    if as_json:
        sys.stdout.write(json.dumps(_as_json(found, line, tensors if weights else None)) + "\n")
        return
    if found is not None:
        out.print(*manifest_lines(found, line), sep="\n", highlight=False)
    else:
        say("One of them has no manifest.json, so only the weights are compared.\n")
    if weights:
        out.print(*weight_lines(tensors, top, all_), sep="\n", highlight=False)


def _moved(a: str, b: str, tensors: list[Moved | Differs]) -> tuple[Manifest | None, Manifest | None]:
    """Both manifests; appends what became of every tensor."""
    from anytimed.storage.located import locate
    from anytimed.storage.movement import moved

    with tempfile.TemporaryDirectory(prefix="anytimed-") as scratch:
        located = []
        for name, side in ((a, "a"), (b, "b")):
            with pulling() as show:
                located.append(locate(name, Path(scratch) / side, progress=show))
        with progress("comparing") as bar:
            tensors.extend(moved(located[0].folder, located[1].folder, bar))
    return located[0].manifest, located[1].manifest


def _published(name: str, manifest: Manifest) -> list[Manifest]:
    """The checkpoints through which the line of parents may lead; none where they cannot be had, or need not be."""
    from anytimed.storage.located import published_at, versions_beside
    from anytimed.storage.pull import list_checkpoints

    if manifest.parent is None:
        return []
    url = published_at(name)
    with suppress(AnytimedError):  # it is a detail: what can be told without it is told
        return versions_beside(name) if url is None else list_checkpoints(url)
    return []


def _as_json(found: Json | None, line: Json, tensors: list[Moved | Differs] | None) -> Json:
    from anytimed.storage.movement import Moved, grouped, together

    told: Json = {"manifest": None if found is None else {**found, "ancestry": line}}
    if tensors is not None:
        compared = [t for t in tensors if isinstance(t, Moved)]
        told["layers"] = [together(name, members).to_json() for name, members in grouped(compared).items()]
        told["tensors"] = [t.to_json() for t in compared]
        told["not_compared"] = [t.to_json() for t in tensors if not isinstance(t, Moved)]
    return told
