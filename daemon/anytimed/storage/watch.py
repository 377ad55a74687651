"""Following what is published: each new checkpoint as it comes, for ever. For serving code:

    import anytimed

    for checkpoint in anytimed.watch("s3://bucket/prefix", to="model"):
        serve(checkpoint.path)  # versions/<id>, verified; model/current leads there too

A `Watcher` looks again and again. A look is one small request, of latest.json; only when that has changed (or is not
there) is the newest manifest read, and with `to` its checkpoint pulled, from where an earlier pull was cut off. What is
newer than everything before is given out, oldest things never are: order is (term, seq), as in a pull. A store that
does not answer is asked again after a growing pause; a damaged checkpoint is passed over and tried again later; while
nothing is published yet, it waits. If the store is down at the start and `to` holds a good checkpoint, that one is
given out first. `watch` is a loop around a watcher, and `anytimed pull --follow` another. Needs no torch.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anytimed.contracts import AnytimedError, ConfigError, Refused

from .manifest import POINTER_BYTES, Manifest, Pointer
from .partial import Progress
from .pull import WAITING_S, bring, newest
from .store import MissingKey, Store
from .target import Target

log = logging.getLogger(__name__)

KEEP = 3
"""Versions that stay in a folder that follows: for ever is too long to keep all of them."""
LONGEST_PAUSE_S = 120.0
"""Between two looks at a store that does not answer, unless `every_s` is longer."""
_DAMAGED_AGAIN_S, _DAMAGED_SELDOM_S = 10.0, 3600.0
"""A damaged checkpoint is pulled again after so long at first, then after twice as long each time, up to so long."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint. path: versions/<id>, which never changes; None where nothing is pulled. fell_back: it is
    not the newest, which is damaged."""

    manifest: Manifest
    path: Path | None = None
    fell_back: bool = False

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def tokens(self) -> int:
        return self.manifest.tokens


def watch(
    url: str,
    *,
    to: str | Path | None = None,
    every_s: float = 30.0,
    keep: int | None = KEEP,
    storage_options: Mapping[str, Any] | None = None,
    on_error: Callable[[AnytimedError], None] | None = None,
    stop: threading.Event | None = None,
    timeout_s: float | None = None,
) -> Iterator[Checkpoint]:
    """The newest checkpoint, then each newer one when it comes; checkpoints that came and went between two looks are
    not among them.

    to: pull each into this folder; it has its `path` then, and `keep` versions stay there (None: all). every_s: seconds
    between two looks. on_error: told of every look that failed; without it the log says when trouble begins and ends.
    stop: ends the iteration, a pull that is under way included, which the next one goes on with. timeout_s: ends it
    once no newer checkpoint has come for so long. Raises ConfigError at once, and later Refused where going on makes no
    sense: another run publishes there now, or a later version of anytimed does.
    """
    ended = stop or threading.Event()

    def going_on(_done: int, _total: int) -> None:
        if ended.is_set():
            raise _Stopped

    watcher = Watcher(url, to=to, every_s=every_s, storage_options=storage_options, progress=going_on)
    if keep is not None and keep < 1:
        raise ConfigError(f"keep: found {keep}, expected at least 1, or None for all")
    return _watched(watcher, keep, on_error, ended, timeout_s)


def _watched(
    watcher: Watcher,
    keep: int | None,
    on_error: Callable[[AnytimedError], None] | None,
    stop: threading.Event,
    timeout_s: float | None,
) -> Iterator[Checkpoint]:
    last_s = time.monotonic()
    while not stop.is_set():
        try:
            found = watcher.look()
        except _Stopped:
            return
        if watcher.problem is not None and on_error is not None:
            on_error(watcher.problem)
        if found is not None:
            if keep is not None:
                watcher.retain(keep)
            yield found
            last_s = time.monotonic()
        pause_s = watcher.pause_s()
        if timeout_s is not None:
            left_s = last_s + timeout_s - time.monotonic()
            if left_s <= 0:
                return
            pause_s = min(pause_s, left_s)
        stop.wait(pause_s)


class Watcher:
    """Looks at a published prefix, one `look` after the other. `problem`: why the last one failed, None if it did not;
    `waiting`: nothing is published yet."""

    def __init__(
        self,
        url: str,
        *,
        to: str | Path | None = None,
        every_s: float = 30.0,
        storage_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Makes no request. Raises ConfigError."""
        if not every_s > 0:
            raise ConfigError(f"every_s: found {every_s}, expected seconds above 0")
        self._store = Store(url, storage_options, deadline_s=WAITING_S)
        self._target = None if to is None else Target(Path(to))
        self._every_s, self._progress = every_s, progress
        self._pointer: bytes | None = None  # latest.json, as it was when it was last dealt with
        self._given: Manifest | None = None
        self._looked = False
        self._failures, self._failing_since = 0, 0.0
        self._damaged_pause_s, self._damaged_again_at = 0.0, 0.0
        self.problem: AnytimedError | None = None
        self.waiting = False

    @property
    def url(self) -> str:
        """The prefix, without credentials."""
        return self._store.url

    @property
    def damaged(self) -> bool:
        """Whether a newer checkpoint is named than the newest good one."""
        return self._damaged_pause_s > 0

    def look(self) -> Checkpoint | None:
        """A checkpoint that is newer than all that were given out, in place; None where there is none, or none to be
        had for now. Raises Refused, ConfigError, and what `progress` raises."""
        try:
            found = self._look()
            waiting = False
        except (ConfigError, Refused):
            raise
        except MissingKey:
            found, waiting = None, True
        except (AnytimedError, OSError) as error:
            self._failed(error if isinstance(error, AnytimedError) else AnytimedError(str(error)))
            return self._standing()
        if self._failures:
            log.info("%s: well again after %.0f s", self.url, time.monotonic() - self._failing_since)
        if waiting and not self.waiting:
            log.info("%s: nothing is published yet; waiting", self.url)
        self.problem, self._failures, self.waiting = None, 0, waiting
        return found if found is not None or not waiting else self._standing()

    def pause_s(self) -> float:
        """How long to wait before the next look. Not quite the same each time, or a thousand that were started
        together would ask together."""
        if not self._failures:
            return self._every_s * random.uniform(0.9, 1.1)
        longest_s = max(self._every_s, LONGEST_PAUSE_S)
        return min(self._every_s * 2.0 ** min(self._failures, 30), longest_s) * random.uniform(0.5, 1.0)

    def retain(self, keep: int, also: tuple[str, ...] = ()) -> None:
        """Remove old versions from the folder, see `Target.retain`. One that cannot be removed is told and stays."""
        if self._target is not None:
            try:
                for ident in self._target.retain(keep, also):
                    log.info("%s: %s removed, %d are kept", self._target.path, ident, keep)
            except AnytimedError as error:
                log.warning("%s", error)

    # --- within ---

    def _look(self) -> Checkpoint | None:
        try:
            pointer = self._store.read("latest.json", POINTER_BYTES)
        except MissingKey:
            pointer = None
        again = self.damaged and time.monotonic() >= self._damaged_again_at
        if pointer is not None and pointer == self._pointer and not again:
            return None
        manifest = newest(self._store, past_damage=True)
        found = self._checked(manifest)
        if found is not None and self._target is not None:
            pulled = bring(self._store, self._target, progress=self._progress)
            found = Checkpoint(pulled.manifest, pulled.path, pulled.fell_back)
        self._note_damage(pointer, found.manifest if found else manifest)
        self._pointer, self._looked = pointer, True
        if found is None or not self._is_newer(found.manifest):
            return None
        self._given = found.manifest
        return found

    def _checked(self, offered: Manifest) -> Checkpoint | None:
        """The checkpoint, if it is newer than what was given out. Raises Refused on another run's."""
        given = self._given
        if given is not None and offered.run_id != given.run_id and offered.order <= given.order:
            raise Refused(
                f"{self.url}: {given.id} of run {given.run_id} came from here, now the newest is {offered.id} of run "
                f"{offered.run_id}, not newer: another run publishes here. Start again to follow that one"
            )
        return Checkpoint(offered) if self._is_newer(offered) else None

    def _is_newer(self, manifest: Manifest) -> bool:
        return self._given is None or manifest.order > self._given.order

    def _note_damage(self, pointer: bytes | None, taken: Manifest) -> None:
        """Where latest.json names something newer than what could be taken, it is looked at again, more and more
        seldom."""
        named = _named(pointer)
        if named is None or named <= taken.order:
            self._damaged_pause_s = 0.0
            return
        if pointer != self._pointer:
            self._damaged_pause_s = 0.0
        self._damaged_pause_s = min(max(self._damaged_pause_s * 2, _DAMAGED_AGAIN_S), _DAMAGED_SELDOM_S)
        self._damaged_again_at = time.monotonic() + self._damaged_pause_s

    def _failed(self, error: AnytimedError) -> None:
        if not self._failures:
            self._failing_since = time.monotonic()
            log.warning("%s. It is tried again; what is in place stays", error)
        self._failures += 1
        self.problem, self.waiting = error, False

    def _standing(self) -> Checkpoint | None:
        """At the start, while nothing can be had from the store: what an earlier pull has left in place, if it is
        whole."""
        first, self._looked = not self._looked, True
        if not first or self._target is None or self._given is not None:
            return None
        manifest = self._target.current()
        if manifest is None or not self._target.whole(manifest):
            return None
        log.warning("%s: going on with %s, which is in place", self.url, manifest.id)
        self._given = manifest
        return Checkpoint(manifest, self._target.version(manifest))


class _Stopped(Exception):
    """The iteration was ended while a pull was under way."""


def _named(pointer: bytes | None) -> tuple[int, int] | None:
    """(term, seq) of the checkpoint that latest.json names; None where it is not there or garbled."""
    try:
        return Pointer.from_bytes(pointer, "latest.json").order if pointer is not None else None
    except AnytimedError:
        return None
