"""A year behind the dashboard: how large its history gets, how long it takes to open, what an append costs.

PYTHONPATH=. .venv/bin/python benchmarks/dashboard.py [--records 31536000] [--appended 1000000]

A step record every second, an evaluation every 100 s, a commit every minute and an intervention every hour, with two
sources. `--records` of them go through the thinning as the daemon does it, without its file; `--appended` through
`History.append`, file and thread included, and are then opened in Chromium (test extras, `apt-get install chromium`).
0 leaves one out. Results: benchmarks/results/dashboard.json."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anytimed.contracts import Json
from anytimed.service.history import History, line_of
from anytimed.service.thinning import Thinner
from tests.service.browser import chromium, visiting
from tests.service.test_dashboard import staged

START = 1_700_000_000


def records(count: int, seed: int = 1) -> Iterator[Json]:
    """About a second each."""
    draw = random.Random(seed)
    for i in range(1, count + 1):
        at = {"time": START + i, "step": 10 * i, "tokens": 20_480 * i}
        loss = 1.6 + 8 / math.sqrt(i + 4) + draw.gauss(0, 0.05)
        yield {
            "kind": "step", **at, "loss": loss, "tokens_per_s": 20_480 + draw.gauss(0, 300), "skipped": 0,
            "grad_norm": 0.4 + draw.random() / 10, "batches_ready": 3,
            "prequential": {"main": loss + 0.01234567890123, "more": loss - 0.02345678901234},
        }  # fmt: skip
        if i % 100 == 0:
            losses = {"loss_x": loss - 0.1234567890123, "loss_y": loss - 0.0912345678901, "loss_z": loss + 0.3}
            both = {name: {"targets": 8000, **losses} for name in ("main", "more")}
            yield {"kind": "evaluation", **at, "holdout": "5c" * 32, "targets": 16_000, **losses, "by_source": both}
        if i % 60 == 0:
            told = f"Committed step {10 * i:,}: commits/{i // 60:06d}-{10 * i:010d}"
            yield {"kind": "event", "what": "commit", **at, "id": f"1-{i}", "told": told}
        if i % 3600 == 0:
            told = f"Step {10 * i:,} spiked: loss 9.1, gradient norm 14"
            yield {
                "kind": "event",
                "what": "spike",
                **at,
                "id": f"1-s{i}",
                "told": told,
                "loss": 9.1,
                "grad_norm": 14.0,
            }


def opened(path: Path) -> Json:
    """What a start and a page find; the best of five, for other processes run here as well."""
    loads, views = [], []
    for _ in range(5):
        began = time.perf_counter()
        history = History(path)
        history.load()
        loads.append(time.perf_counter() - began)
        began = time.perf_counter()
        answer = json.dumps(history.view(500))
        views.append(time.perf_counter() - began)
    with path.open() as file:
        lines = sum(1 for _ in file)
    told = {"bytes": path.stat().st_size, "lines": lines, "load_s": round(min(loads), 3)}
    return {**told, "view_s": round(min(views), 4), "view_bytes": len(answer)}


def thinned(count: int, folder: Path) -> Json:
    thinner, began, largest = Thinner(4 << 20), time.process_time(), 0
    for record in records(count):
        thinner.add(line_of(record))
        largest = max(largest, thinner.bytes)
    path = folder / "year.jsonl"
    path.write_bytes(b"".join(raw + b"\n" for raw in thinner.lines()))
    spent = time.process_time() - began
    return {
        "records": count,
        "largest_bytes": largest,
        "cpu_us_a_record": round(spent / count * 1e6, 1),
        **opened(path),
    }


def appended(count: int, folder: Path) -> Json:
    history, took, largest = History(folder / "metrics.jsonl", rests=False), [], 0
    for i, record in enumerate(records(count)):
        began = time.perf_counter()
        history.append(record)
        if i % 10 == 0:
            took.append(time.perf_counter() - began)
        if i % 1000 == 0:
            largest = max(largest, (folder / "metrics.jsonl").stat().st_size)
    history.settle()
    took.sort()
    told: dict[str, Any] = {"records": count, "largest_bytes": largest}
    told |= {f"append_us_p{p}": round(took[len(took) * p // 100] * 1e6, 1) for p in (50, 99)}
    return {**told, **opened(folder / "metrics.jsonl")}


def page_opened(folder: Path) -> Json:
    """Milliseconds from the navigation to what is drawn, in Chromium, sorted."""
    with staged(folder) as stage, chromium() as browser:
        took = []
        for _ in range(7):
            with visiting(browser, stage.url) as visit:
                took.append(round(visit.page.evaluate("performance.getEntriesByName('rendered')[0].startTime")))
    return {"page_ms": sorted(took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--records", type=int, default=365 * 24 * 3600, help="steps that are thinned")
    parser.add_argument("--appended", type=int, default=1_000_000, help="steps that are appended")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/dashboard.json"))
    arguments = parser.parse_args()
    told: Json = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.appended:
            told["appended"] = appended(arguments.appended, Path(folder)) | page_opened(Path(folder))
        if arguments.records:
            told["year"] = thinned(arguments.records, Path(folder))
    told["cores"] = os.cpu_count()
    print(json.dumps(told, indent=1))
    arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
