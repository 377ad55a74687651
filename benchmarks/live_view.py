"""Draws the README's picture of the live view from a run's own status.

.venv/bin/python benchmarks/live_view.py .anytimed/quickstart/run
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

from rich.console import Console

from anytimed.service.console import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path, help="run directory, of a daemon that runs or has run")
    parser.add_argument("--svg", type=Path, default=Path("benchmarks/results/live.svg"))
    arguments = parser.parse_args()
    status = json.loads((arguments.run / "status.json").read_text())
    console = Console(record=True, width=78, file=io.StringIO(), force_terminal=True)
    console.print(table(status, status["time"]))
    svg = console.export_svg(title="make run")
    # No font from elsewhere: the reader's own monospace.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    arguments.svg.parent.mkdir(parents=True, exist_ok=True)
    arguments.svg.write_text(svg)


if __name__ == "__main__":
    main()
