"""From figures to what a person reads: a table for each kind of data, and the bars with their verdicts. Everything here
reads the JSON and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from rich.table import Table

from throughput.field import CONTENDERS, KINDS

Found = Mapping[str, Any]

FASTEST_BARS: Final = {"zst": 0.95, "parquet": 0.95, "bin": 1.5}
MEMORY_BAR: Final = 1.0


@dataclass(frozen=True)
class Bar:
    """Something that the benchmark must show. figure: None where it was not measured."""

    name: str
    figure: float | None
    sign: Literal[">=", "<="]
    wanted: float

    @property
    def ok(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure <= self.wanted if self.sign == "<=" else self.figure >= self.wanted

    @property
    def told(self) -> str:
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[self.ok]
        figure = "" if self.figure is None else f" {self.figure:.2f}"
        return f"{self.name}:{figure} (bar {self.sign} {self.wanted}) {verdict}"


def bars(result: Found) -> list[Bar]:
    """Speed against the fastest and memory against the leanest peer, for every kind that was measured."""
    found: list[Bar] = []
    for kind, entry in result["kinds"].items():
        measured = {key: c for key, c in entry["contenders"].items() if c["status"] == "measured"}
        if kind not in FASTEST_BARS:
            continue
        ours, peers = measured.pop("ours", None), measured
        speed = memory = None
        fastest = leanest = "any peer"
        if ours and peers:
            ahead = {key: ratio["median"] for key, ratio in ours["times_as_fast_as"].items()}
            nearest = min(ahead, key=ahead.__getitem__)
            least = min(peers, key=lambda key: peers[key]["peak_bytes"])
            speed, memory = ahead[nearest], ours["peak_bytes"] / peers[least]["peak_bytes"]
            fastest, leanest = CONTENDERS[nearest].title, CONTENDERS[least].title
        title = KINDS[kind]
        found.append(Bar(f"{title}: speed, times that of {fastest}, the fastest", speed, ">=", FASTEST_BARS[kind]))
        found.append(Bar(f"{title}: memory, times that of {leanest}, the leanest", memory, "<=", MEMORY_BAR))
    return found


def tables(result: Found) -> Iterator[Table]:
    for kind, entry in result["kinds"].items():
        table = Table(title=KINDS.get(kind, kind), title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        for column in ("M tokens/s", "quartiles", "a CPU second", "peak MiB"):
            table.add_column(column, justify="right")
        table.add_column("setting")
        for key, found in entry["contenders"].items():
            if found["status"] != "measured":
                table.add_row(CONTENDERS[key].title, found["status"], "", "", "", found["reason"].splitlines()[-1])
                continue
            speed = found["tokens_per_s"]
            low, high = (q / 1e6 for q in speed["quartiles"])
            table.add_row(
                found["title"],
                f"{speed['median'] / 1e6:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{found['tokens_per_cpu_s'] / 1e6:.2f}",
                f"{found['peak_bytes'] / 2**20:.0f}",
                found["setting"],
            )
        yield table
