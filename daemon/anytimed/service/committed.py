"""What a commit says beside its tensors: the state that a session wrote, read back by a start and by who only looks.

In order: errors of a state that is none of ours; the position of the stream, with its hold-out; a learner that stands
where the commit does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from anytimed.contracts import AnytimedError, CorruptError, Holdout, Json, Position, Tokens
from anytimed.storage.commit import Commit

if TYPE_CHECKING:
    from anytimed.training.learner import Learner

log = logging.getLogger("anytimed")

HOLDOUT_TENSOR = "holdout.tokens"
"""Of a commit's tensors the one with the hold-out's tokens, shape (n,), int32."""


@contextlib.contextmanager
def described_by(commit: Commit | None, remedy: str = "restore another one") -> Iterator[None]:
    """A state that is no state of ours, though its digest is right, is a CorruptError that names the commit."""
    try:
        yield
    except AnytimedError as error:
        if commit is None or not isinstance(error, CorruptError) or str(commit.path) in str(error):
            raise
        raise CorruptError(f"{commit.path}: {error}; {remedy}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if commit is None:
            raise
        raise CorruptError(f"{commit.path}: its state is none of anytimed's: {error!r}; {remedy}") from error


def position_of(state: Json, held: Tokens) -> Position:
    """Where the stream resumes. held: the hold-out's tokens, shape (n,)."""
    told = state["position"]
    weights = {name: float(rule["weight"]) for name, rule in told["mixture"].items()}
    return Position.from_json(told, Holdout.from_arrays(held, state["holdout"], weights))


def restored(learner: Learner, commit: Commit) -> Position:
    """Put the learner where the commit stands; the position of the stream there. What is not the same machine as the
    one that wrote it is told."""
    state = commit.state
    for name, now in learner.device.facts().items():
        then = state["learner"]["facts"].get(name)
        if then != now:
            log.warning(
                "%s was %s when the commit was written and is %s now: not bit for bit from here", name, then, now
            )
    rest = learner.restore(commit.tensor_files, state)
    return position_of(state, rest[HOLDOUT_TENSOR].numpy())
