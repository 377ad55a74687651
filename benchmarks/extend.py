"""When the stream changes: what x is worth on the new data and on the old, by how it remembers.

The daemon itself trains, on one thread, a byte model of half a million parameters (a toy, but a real run): see
`extension/runs.py`. T is 250 steps. After 4T of Python sources the stream changes (`extension/plans.py`):

    switch       C++ headers alone from there on
    added        C++ headers and Python, 1:1; next to a run that had both from the start
    stationary   nothing changes: what does each way to remember cost there?

with the short history that it is, and as if 100 times the steps had gone before; for plain averaging, steered memory,
averaging power, windows of T and 4T; with SF-NorMuon and AMUSE, one set of hyperparameters each. Against them: NorMuon
under a cosine that knows how many steps follow the change, restarted there on the new data from the published x, with
the learning rate that is best for that (`horizons/tuning.py`).

    .venv/bin/python benchmarks/extend.py --seeds 2        48 runs of two minutes on a free core; they are kept
    .venv/bin/python benchmarks/extend.py --quick          a smaller model, some steps: does it work at all?
    .venv/bin/python benchmarks/extend.py --kept           of the runs those that were made; trains nothing
    .venv/bin/python benchmarks/extend.py --report         tables and picture from the JSON; trains nothing

Every run is a process of its own (with --quick they share one). Its curve is kept under .anytimed/extend/ and taken
from there where plan, texts, torch and Python are the same. What decides is trained first. Needs no network; texts are
what Python and torch bring (`extension/corpora.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from extension import picture, report
from extension.measuring import measured
from extension.plans import Plan
from extension.scales import FULL, QUICK
from extension.training import Trainer, keep
from horizons.command import missed, show
from keeping import machine, text_of

from anytimed.contracts import Json


def result_of(trainer: Trainer, seeds: int) -> Json:
    """Everything that is shown, without what only this machine's files are."""
    scale, found = trainer.scale, measured(trainer, seeds)
    texts = {
        name: {"sha256": corpus.digest, "stream_bytes": corpus.size, "probe_documents": len(corpus.probe)}
        for name, corpus in trainer.corpora.items()
    }
    runs = {name: {k: v for k, v in curve.items() if k not in ("key", "plan")} for name, curve in found["runs"].items()}
    return {
        "scale": scale.name,
        "unit_steps": scale.unit,
        "trunk_steps": scale.trunk,
        "machine": machine(),
        "texts": texts,
        **report.figures(runs, found["restarted"], scale),
        "restarted": found["restarted"],
        "runs": runs,
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, some steps: whether it works")
    parser.add_argument("--seeds", type=int, default=1, help="of the switch after a long history, and of a rival")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/extend.json"))
    parser.add_argument("--svg", type=Path, help="default: beside the JSON")
    parser.add_argument(
        "--scratch", type=Path, default=Path(".anytimed/extend"), help="run directories and kept curves"
    )
    parser.add_argument("--kept", action="store_true", help="of the runs those that were made; trains nothing")
    parser.add_argument("--report", action="store_true", help="tables and picture from the JSON; trains nothing")
    parser.add_argument("--assert", dest="insist", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 1 <= arguments.seeds <= 9:
        parser.error("--seeds: 1 to 9")
    return arguments


def main() -> int:
    arguments = parsed()
    scale = QUICK if arguments.quick else FULL
    scratch: Path = (arguments.scratch / scale.name).absolute()
    if arguments.one:
        keep(Plan.of(json.loads(arguments.one)), scale, scratch)
        return 0
    if arguments.report:
        result: dict[str, Any] = json.loads(arguments.json.read_text())
    else:
        program = None if arguments.quick else Path(__file__)
        result = result_of(Trainer(scale, scratch, arguments.jobs, program, only_kept=arguments.kept), arguments.seeds)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text_of(result), encoding="utf-8")
    svg = arguments.svg or arguments.json.with_suffix(".svg")
    if result["runs"].keys() >= picture.NEEDED:
        svg.write_text(picture.drawn(result), encoding="utf-8")
    else:
        print(f"no picture without {', '.join(sorted(picture.NEEDED - result['runs'].keys()))}", file=sys.stderr)
    show(report.tables(result))
    return int(arguments.insist and missed(result["bars"]))


if __name__ == "__main__":
    sys.exit(main())
