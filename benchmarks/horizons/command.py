"""What the commands on one configuration and its horizons share: options, the JSON that they write, what they show."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from keeping import machine, text_of
from rich.console import Console
from rich.table import Table

from anytimed.contracts import Json
from horizons.plans import Scale
from horizons.trainer import Trainer

RESULTS: Final = Path("benchmarks/results")


def parser(doc: str, result: str) -> argparse.ArgumentParser:
    """doc: of the command's module; result: the name of its JSON."""
    found = argparse.ArgumentParser(description=doc.split("\n", maxsplit=1)[0])
    found.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    found.add_argument("--json", type=Path, default=RESULTS / f"{result}.json")
    found.add_argument("--scratch", type=Path, default=Path(".anytimed/anytime"), help="where finished runs are kept")
    found.add_argument("--from", dest="earlier", type=Path, help="take runs from this result where they are the same")
    found.add_argument("--report", action="store_true", help="what is shown, from the JSON; trains nothing")
    return found


def result_of(
    arguments: argparse.Namespace,
    scale: Scale,
    measured: Callable[[Trainer], Json],
    *,
    here: bool = False,
    texts: str | None = None,
) -> Json:
    """What `measured` makes of a trainer, with what every result tells, written as JSON; with --report what was."""
    if arguments.report:
        told: Json = json.loads(arguments.json.read_text())
        return told
    earlier = json.loads(arguments.earlier.read_text())["runs"] if arguments.earlier else {}
    scratch = (arguments.scratch / scale.name).absolute()
    trainer = Trainer(scale, scratch, arguments.jobs, here=here, earlier=earlier, texts=texts)
    found, corpus = measured(trainer), trainer.corpus
    result = {
        "scale": scale.name,
        "machine": machine(),
        "text": {
            "sha256": corpus.digest,
            "stream_bytes": corpus.size,
            "probe_documents": len(corpus.probe),
            "probe_bytes": sum(len(text.encode()) for text in corpus.probe),
        },
        "parameters": next(iter(trainer.found.values()))["parameters"],
        "tokens_per_step": scale.tokens,
        "horizons": list(scale.horizons),
        "seconds_of_training": round(sum(run["seconds"] for run in trainer.found.values())),
        **found,
        "runs": {name: {k: v for k, v in run.items() if k != "run"} for name, run in sorted(trainer.found.items())},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(text_of(result), encoding="utf-8")
    return result


def show(tables: Iterable[Table], width: int = 120) -> None:
    """On a terminal as wide as that is, elsewhere `width` characters."""
    out = Console() if sys.stdout.isatty() else Console(width=width)
    for table in tables:
        out.print(table)


def missed(bars: Sequence[Json]) -> bool:
    """Whether one of them does not hold; each that does not is told."""
    found = [bar for bar in bars if not bar["ok"]]
    for bar in found:
        print(f"missed: {bar['name']}: {bar['figure']}, expected {bar['expected']}", file=sys.stderr)
    return bool(found)
