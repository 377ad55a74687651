"""Counts injected faults: a test says each one as it makes it, and the run ends with the list.

`injected(number, point)` is called once for every injection, after what must hold has been asserted: a fault that did
harm fails its test and is listed as such. `FAULTS=full` in the environment asks for every point (`make faults`);
without it a test visits a few. The full run fails where a number is missing, has fewer than ten points though it has
points to choose from, or the whole has fewer than a thousand injections.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.faults.catalogue import FAULTS, ONE_POINT

FULL = os.environ.get("FAULTS") == "full"
LEAST_POINTS, LEAST_IN_ALL = 10, 1000

Injected = Callable[[int, str], None]


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Injected:
    """`injected(number, point)`: this fault was injected at this point, and did no harm."""

    def note(number: int, point: str) -> None:
        assert number in FAULTS, f"no fault has the number {number}"
        request.node.user_properties.append(("fault", [number, point]))

    return note


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(number, ...): injects the faults of these numbers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            item.user_properties.append(("fault numbers", list(mark.args)))


def _told(terminal: Any) -> Iterator[tuple[str, Any]]:
    """Outcome and report of every test that injects faults."""
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminal.stats.get(outcome, []):
            if any(key == "fault numbers" for key, _ in getattr(report, "user_properties", ())):
                yield outcome, report


@dataclass
class Tally:
    """Of every fault by number: injections, distinct points, and the outcomes of the tests that inject it."""

    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    points: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    outcomes: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))

    @staticmethod
    def of(terminal: Any) -> Tally:
        """What the tests of this run have noted."""
        tally = Tally()
        for outcome, report in _told(terminal):
            for key, value in report.user_properties:
                if key == "fault":
                    tally.counts[value[0]] += 1
                    tally.points[value[0]].add(f"{report.nodeid} {value[1]}")
                elif key == "fault numbers":
                    for number in value:
                        tally.outcomes[number].add(outcome)
        return tally


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The list: number, fault, injections, distinct points, outcome."""
    tally = Tally.of(terminalreporter)
    counts, points, outcomes = tally.counts, tally.points, tally.outcomes
    if not outcomes:
        return
    terminalreporter.section("faults injected")
    terminalreporter.write_line(f"{'no':>3}  {'injections':>10}  {'points':>6}  {'outcome':<8}  fault")
    for number, title in FAULTS.items():
        if number in outcomes:
            told = (
                "held" if outcomes[number] == {"passed"} else ", ".join(sorted(outcomes[number] - {"passed"})).upper()
            )
            terminalreporter.write_line(
                f"{number:>3}  {counts[number]:>10}  {len(points[number]):>6}  {told:<8}  {title}"
            )
    bad = [number for number in outcomes if outcomes[number] != {"passed"}]
    terminalreporter.write_line(
        f"     {sum(counts.values())} injections into {len(counts)} of {len(FAULTS)} faults; "
        + (f"NOT HELD: {sorted(bad)}" if bad else "0 lost, 0 torn, 0 mixed")
    )
    for line in missing(counts, points) if FULL else []:
        terminalreporter.write_line(f"     MISSING: {line}", red=True)


def missing(counts: dict[int, int], points: dict[int, set[str]]) -> list[str]:
    """What a full run has to show and this one did not."""
    found = [f"fault {number} was not injected" for number in FAULTS if not counts.get(number)]
    found += [
        f"fault {number}: {len(points[number])} points, {LEAST_POINTS} expected"
        for number in FAULTS
        if number not in ONE_POINT and 0 < len(points.get(number, ())) < LEAST_POINTS
    ]
    if sum(counts.values()) < LEAST_IN_ALL:
        found.append(f"{sum(counts.values())} injections, {LEAST_IN_ALL} expected")
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A full run that did not visit everything is no success."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if not FULL or terminal is None or hasattr(session.config, "workerinput"):
        return
    tally = Tally.of(terminal)
    if missing(tally.counts, tally.points) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
