"""The guard: what it calls bad, and when there is too much of it."""

from __future__ import annotations

import json
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from anytimed.contracts import StepReport
from anytimed.training.guard import Guard, Span


def guard(window: int = 16, sigma: float = 6.0, skipped: int = 3, spikes: int = 0) -> Guard:
    return Guard(window_steps=window, sigma=sigma, skipped_steps=skipped, spike_steps=spikes)


def report(step: int, loss: float = 1.0) -> StepReport:
    return StepReport(step, step + 1000, loss, 1.0, not math.isfinite(loss))


def noisy(count: int, seed: int = 0, level: float = 2.0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, 0.05) for _ in range(count)]


def test_noise_is_no_spike_and_a_jump_is_one_once_the_window_is_full() -> None:
    one = guard(window=128)
    assert [one.look(report(i, loss)) for i, loss in enumerate(noisy(2_000))] == [None] * 2_000
    told = one.look(report(2_000, 2.6))
    assert told is not None
    assert (told["kind"], told["step"], told["batch"], told["loss"]) == ("spike", 2_000, 3_000, 2.6)
    assert 2.1 < told["limit"] < 2.6
    assert one.span is None, "spikes alone do not make it go back, unless asked to"
    early = guard()
    assert [early.look(report(i, loss)) for i, loss in enumerate([*noisy(15), 9.0])] == [None] * 16


def test_other_data_spikes_a_few_times_and_is_then_what_is_usual() -> None:
    one = guard(window=32)
    for i, loss in enumerate(noisy(100)):
        one.look(report(i, loss))
    spikes = [i for i, loss in enumerate(noisy(200, level=4.0)) if one.look(report(100 + i, loss))]
    assert spikes[:2] == [0, 1] or spikes == [0]
    assert len(spikes) <= 3


def test_a_loss_that_stands_still_may_move_by_a_thousandth() -> None:
    one = guard()
    for i in range(20):
        one.look(report(i, 2.0))
    assert one.look(report(20, 2.0 + 2.0 * 5e-3)) is None
    assert one.look(report(21, 2.5)) is not None


def test_too_many_skipped_steps_in_a_window_give_the_span_of_their_batches() -> None:
    one = guard(window=16, skipped=3)
    for step in range(1, 40):
        one.look(report(step, math.nan if step in (3, 10, 30, 31) else 1.0))
        assert one.span is None, step
    one.look(report(40, math.inf))
    assert one.span == Span(1030, 1040, 30, "3 skipped steps within 16")
    for step in range(41, 60):
        one.look(report(step))
    assert one.span is None, "they are out of the window"
    never = guard(skipped=0)
    for step in range(20):
        never.look(report(step, math.nan))
    assert never.span is None


def test_spikes_make_it_go_back_where_asked_to() -> None:
    one = guard(spikes=2)
    for i, loss in enumerate([*noisy(40), 5.0, 2.0, 50.0]):
        one.look(report(i, loss))
    assert one.span == Span(1040, 1042, 40, "2 spike steps within 16")


@given(st.lists(st.one_of(st.floats(0, 10), st.just(math.nan)), max_size=80), st.integers(0, 80))
def test_a_resume_judges_as_the_undisturbed_guard(losses: list[float], cut: int) -> None:
    whole, first, second = (guard(window=8, sigma=2.0, spikes=3) for _ in range(3))
    undisturbed = [(whole.look(report(i, loss)), whole.span) for i, loss in enumerate(losses)]
    found = [(first.look(report(i, loss)), first.span) for i, loss in enumerate(losses[:cut])]
    second.restore(json.loads(json.dumps(first.state())))
    found += [(second.look(report(i, loss)), second.span) for i, loss in enumerate(losses[cut:], min(cut, len(losses)))]
    assert found == undisturbed
    assert second.state() == whole.state()
