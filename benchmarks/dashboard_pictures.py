"""Takes the README's pictures of the dashboard from a run of its own, with Debian's Chromium.

PYTHONPATH=. .venv/bin/python benchmarks/dashboard_pictures.py [--to benchmarks/results] [--steps 400]

Needs the test extras (playwright) and `apt-get install chromium`. The run is small: two sources of generated text, a
few hundred steps. Writes dashboard-light.png and dashboard-dark.png at 1280 pixels, with --narrow dashboard-390.png.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import tiny
from tests.service.browser import bridged, chromium, visiting
from tests.service.test_daemon import running, status, until


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--narrow", action="store_true", help="one of a narrow window as well")
    arguments = parser.parse_args()
    to = arguments.to.resolve()
    # From inside, so that no picture shows where this machine keeps its scratch folders.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder = Path("books")
        tiny.write_text(folder / "data", 400)
        tiny.write_text(folder / "notes", 200, prefix="note", seed=5)
        notes = {"type": "text", "url": str(folder / "notes" / "*.txt"), "weight": 0.5}
        every = {"evaluation": {"every_steps": 10}, "commits": {"every_steps": 40}, "exports": {"every_steps": 60}}
        config = tiny.config(folder, **every, **{"sources.notes": notes})
        with running(config) as process, bridged(folder / "run" / "control.sock") as url, chromium() as browser:
            until(process, lambda: status(folder)["step"] >= arguments.steps, 600)
            wanted = [("light", 1280, "light"), ("dark", 1280, "dark"), *([("390", 390, "light")] * arguments.narrow)]
            for name, width, scheme in wanted:
                with visiting(browser, url, width=width, color_scheme=scheme) as visit:
                    time.sleep(2)
                    # Without its foot, which names the run's folder on this machine.
                    height = visit.page.evaluate("document.getElementById('main').getBoundingClientRect().bottom + 16")
                    clip: Any = {"x": 0, "y": 0, "width": width, "height": height}
                    visit.page.screenshot(path=to / f"dashboard-{name}.png", full_page=True, clip=clip)


if __name__ == "__main__":
    main()
