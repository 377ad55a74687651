"""A scrape costs nothing that matters: CPU of one, and 10-step wall times under 1 Hz scraping against none.

The quickstart configuration with its text dealt out to 50 sources, the daemon's own loop in one process, a client in
another that asks the real endpoint for /metrics over a new connection, as Prometheus does. First the loop stands still
and every scrape's CPU time is that of the whole daemon's process, all threads; standing still for as long costs what
`idle` says. Then segments of 10 steps alternate between one with a scrape a second and one without. Timers,
evaluations, commits and exports are off in both.

    .venv/bin/python benchmarks/scrape.py [--segments 80] [--assert]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quiet import quiet
from rich.console import Console
from segments import Segments, compared

from anytimed.config import Config, load
from anytimed.service.console import View
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.storage.run_directory import RunDirectory

WARMUP_SEGMENTS = 4
SCRAPED, PLAIN = True, False
SETTLED_S = 0.01
"""Between two scrapes, so that closing one connection is not counted with the next."""
CPU_BAR_S, RATIO_BAR = 0.005, 1.02

CLIENT = """
import select, socket, sys, time

def scrape():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(sys.argv[1])
        s.sendall(b"GET /metrics HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
        size = 0
        while data := s.recv(1 << 20):
            if not size: assert data.startswith(b"HTTP/1.1 200"), data
            size += len(data)
    return size

every, due, done = None, 0.0, 0
while True:
    left = None if every is None else max(0.0, due - time.monotonic())
    if select.select([sys.stdin], [], [], left)[0]:
        match sys.stdin.readline().strip():
            case "one": print(scrape(), flush=True)
            case "on": every, due = 1.0, time.monotonic()
            case "off": every = None; print(done, flush=True)
            case _: break
    else:
        scrape(); done += 1; due += every
"""


class Client:
    """Scrapes in a process of its own, when told to."""

    def __init__(self, socket: Path) -> None:
        command = [sys.executable, "-S", "-c", CLIENT, str(socket)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0)

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def one(self) -> int:
        """A scrape now; the bytes of its answer."""
        self._say("one")
        return self._answer()

    def on(self) -> None:
        self._say("on")

    def off(self) -> int:
        """How many there were since the beginning."""
        self._say("off")
        return self._answer()

    def close(self) -> None:
        self._say("end")
        self._process.wait(10)


class Timed(Segments):
    """The daemon, with a clock around its steps and a client that scrapes during every other segment."""

    def begin(self, segments: int, scrapes: int) -> None:
        self.take_turns((PLAIN, SCRAPED), segments, warmup=WARMUP_SEGMENTS)
        self.scrapes = scrapes
        self.cpu: list[float] = []
        self.idle: list[float] = []
        self.answer_bytes = self.scraped = 0
        self.client = Client(self._session.run.control_socket)

    def begins(self) -> None:
        if self.segment == WARMUP_SEGMENTS:
            self._stand_still(self.client)
        if self.kind is SCRAPED:
            self.client.on()

    def ended(self) -> None:
        if self.kind is SCRAPED:
            self.scraped = self.client.off()

    def _stand_still(self, client: Client) -> None:
        """The reader fills its queue and sleeps; then only scrapes cost anything."""
        time.sleep(1.0)
        for _ in range(self.scrapes):
            before = time.process_time()
            self.answer_bytes = client.one()
            time.sleep(SETTLED_S)
            self.cpu.append(time.process_time() - before)
            before = time.process_time()
            time.sleep(SETTLED_S + self.cpu[-1])
            self.idle.append(time.process_time() - before)


def dealt(config: Config, folder: Path, count: int) -> Config:
    """The same text in `count` sources."""
    told = config.model_dump()
    (table,) = told["sources"].values()
    library = Path(table["url"].removesuffix("/**/*.py"))
    files = sorted(
        p for p in library.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts
    )
    names = [f"source-{number:02d}" for number in range(count)]
    for name in names:
        (folder / name).mkdir()
    for number, path in enumerate(files):
        shutil.copyfile(path, folder / names[number % count] / f"{number:05d}.py")
    told["sources"] = {
        name: {**{k: v for k, v in table.items() if k != "exclude"}, "url": str(folder / name / "*.py")}
        for name in names
    }
    return Config.model_validate(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--segments", type=int, default=80, help="measured segments of 10 steps, half of them scraped")
    parser.add_argument("--scrapes", type=int, default=200, help="scrapes whose CPU time is measured")
    parser.add_argument("--sources", type=int, default=50)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/scrape.json"))
    parser.add_argument("--assert", dest="insist", action="store_true", help="exit with 1 where a bar is missed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scrape-") as scratch:
        config = dealt(quiet(load(arguments.config), Path(scratch)), Path(scratch), arguments.sources)
        mailbox = Mailbox()
        run = RunDirectory(Path(config.run.directory))
        run.acquire()
        session = recover(config, run)
        with View(Console(quiet=True), "scrape") as view:
            daemon = Timed(session, mailbox, view)
            daemon.begin(arguments.segments, arguments.scrapes)
            daemon.run()
            daemon.client.close()
        run.release()
    cpu = statistics.median(daemon.cpu)
    result: dict[str, Any] = {
        "config": str(arguments.config),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "device": str(session.learner.device),
        "sources": arguments.sources,
        "answer_bytes": daemon.answer_bytes,
        "scrapes": len(daemon.cpu),
        "cpu_a_scrape_ms": {
            "p50": round(1e3 * cpu, 3),
            "p95": round(1e3 * statistics.quantiles(daemon.cpu, n=20)[-1], 3),
            "idle p50": round(1e3 * statistics.median(daemon.idle), 3),
        },
        "scrapes_in_segments": daemon.scraped,
        **compared(daemon.times, (PLAIN, "not scraped"), (SCRAPED, "scraped every second")),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    missed = []
    if cpu > CPU_BAR_S:
        missed.append(f"a scrape takes {1e3 * cpu:.2f} ms of CPU, at most {1e3 * CPU_BAR_S:.0f} are allowed")
    if result["ratio"] > RATIO_BAR:
        missed.append(f"scraped steps take {result['ratio']} times as long, at most {RATIO_BAR} is allowed")
    if arguments.insist and missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
