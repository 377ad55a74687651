"""A year behind the dashboard: how large its history gets, how long it takes to open, what an append costs.

PYTHONPATH=. .venv/bin/python benchmarks/dashboard.py [--records 1000000] [--appended 1000000]

A step record every second, an evaluation every 100 s, a commit every minute and an intervention every hour, with two
sources. `--appended` of the steps go through `History.append`, file and thread included, and are then opened in
Chromium (test extras, `apt-get install chromium`). `--records` of them go through the thinning as the daemon does it,
without its file: 31536000 are the whole year, and take half an hour. The year itself is gone through quickly, by the
rule on numbers alone: the lines that it leaves are written, with those of 20,000 s more that are not thinned yet, and
opened. 0 leaves one out. Results: benchmarks/results/dashboard.json.
"""

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
from anytimed.service.thinning import EARLY, FIELDS, KEEP, KEPT, Thinner, partition, short
from tests.service.browser import chromium, visiting
from tests.service.test_dashboard import staged

START = 1_700_000_000
YEAR = 365 * 24 * 3600
EVERY = {"step": 1, "evaluation": 100, "commit": 60, "spike": 3600}
"""Seconds."""


def records(count: int) -> Iterator[Json]:
    """Of so many seconds."""
    for second in range(1, count + 1):
        for record in moment(second):
            if second % EVERY[record.get("what", record["kind"])] == 0:
                yield record


def moment(second: int) -> Iterator[Json]:
    """All that could be recorded in a second."""
    draw = random.Random(second)
    at = {"time": START + second, "step": 10 * second, "tokens": 20_480 * second}
    loss = 1.6 + 8 / math.sqrt(second + 4) + draw.gauss(0, 0.05)
    yield {
        "kind": "step", **at, "loss": loss, "tokens_per_s": 20_480 + draw.gauss(0, 300), "skipped": 0,
        "grad_norm": 0.4 + draw.random() / 10, "batches_ready": 3,
        "prequential": {"main": loss + 0.01234567890123, "more": loss - 0.02345678901234},
    }  # fmt: skip
    losses = {"loss_x": loss - 0.1234567890123, "loss_y": loss - 0.0912345678901, "loss_z": loss + 0.3}
    both = {name: {"targets": 8000, **losses} for name in ("main", "more")}
    yield {"kind": "evaluation", **at, "holdout": "5c" * 32, "targets": 16_000, **losses, "by_source": both}
    told = f"Committed step {10 * second:,}: commits/{second // 60:06d}-{10 * second:010d}"
    yield {"kind": "event", "what": "commit", **at, "id": f"1-{second}", "told": told}
    told = f"Step {10 * second:,} spiked: loss 9.1, gradient norm 14"
    yield {"kind": "event", "what": "spike", **at, "id": f"1-s{second}", "told": told, "loss": 9.1, "grad_norm": 14.0}


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
    path = folder / "thinned.jsonl"
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


def year(folder: Path) -> Json:
    """What the rule leaves of a year, and 20,000 seconds after it as they came."""
    path, lines, began = folder / "year.jsonl", [], time.perf_counter()
    for group, every in (("step", 1), ("evaluation", 100), ("routine", 60), ("lasting", 3600)):
        spans: list[int] = []
        count, batch = YEAR // every, 20_000 // every + 1
        for first in range(0, count, batch):
            more = [*spans, *[1] * min(batch, count - first)]
            early = EARLY if group in FIELDS else 0
            spans = [sum(more[a:b]) for a, b in partition(more, KEEP[group], early)]
        at = 0
        for span in [*spans, *[1] * batch]:
            at += span
            lines.append(line_of(one(group, at * every, span)))
    path.write_bytes(b"".join(raw + b"\n" for raw in sorted(lines, key=lambda raw: json.loads(raw)["time"])))
    return {"records": YEAR, "took_s": round(time.perf_counter() - began, 1), **opened(path)}


def one(group: str, second: int, of: int) -> Json:
    """A line of that second, as the thinning writes one for `of` records."""
    kinds = {"step": "step", "evaluation": "evaluation", "routine": "commit", "lasting": "spike"}
    found = next(r for r in moment(second) if kinds[group] in (r["kind"], r.get("what")))
    if of == 1:
        return found
    if group not in FIELDS:
        return {**found, "of": of}
    told = {key: found[key] for key in KEPT[group] if key in found}
    told |= {field: short(found[field]) for field in FIELDS[group]}
    if group == "step":
        told["prequential"] = {name: short(loss) for name, loss in found["prequential"].items()}
    ranges = {field: [short(found[field] * 0.9), short(found[field] * 1.1)] for field in FIELDS[group]}
    return {**told, "of": of, "range": ranges}


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
    parser.add_argument("--records", type=int, default=1_000_000, help="steps that are thinned")
    parser.add_argument("--appended", type=int, default=1_000_000, help="steps that are appended")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/dashboard.json"))
    arguments = parser.parse_args()
    told: Json = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.appended:
            told["appended"] = appended(arguments.appended, Path(folder)) | page_opened(Path(folder))
        if arguments.records:
            told["thinned"] = thinned(arguments.records, Path(folder))
        told["year"] = year(Path(folder))
    told["cores"] = os.cpu_count()
    print(json.dumps(told, indent=1))
    arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
