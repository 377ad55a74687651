"""Bars of what takes long: on a terminal only, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from anytimed.cli.app import err


@contextmanager
def feeding() -> Iterator[tuple[Callable[[int, int | None], None], Callable[[str | None], None]]]:
    """The bar of a feed, and what says why it does not go on: a line each time the reason is another one."""
    with progress("feeding") as show:
        last: str | None = None

        def waiting(why: str | None) -> None:
            nonlocal last
            if why is not None and last is None:
                err.print(f"waiting: {why}", markup=False, highlight=False, soft_wrap=True)
            last = why

        yield show, waiting


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with rate and time left on a terminal; nothing is written anywhere else."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def pulling() -> Iterator[Callable[[int, int], None]]:
    """The bar of a pull; where an earlier one had left something, a line says so."""
    from anytimed.service.console import size

    with progress("pulling") as show:
        begun = False

        def tell(done: int, total: int) -> None:
            nonlocal begun
            if done > 0 and not begun:
                err.print(f"resumed at {size(done)} of {size(total)}", highlight=False, soft_wrap=True)
            begun = True
            show(done, total)

        yield tell


@contextmanager
def counted(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for everything that counts up on a terminal; a line at every quarter elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} " + unit))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}
        quarters: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)
            if not err.is_terminal and 4 * done // total > quarters.get(what, 0):
                quarters[what] = 4 * done // total
                err.print(f"{what}: {done} of {total} {unit}", markup=False, highlight=False, soft_wrap=True)

        yield show
