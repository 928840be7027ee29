"""The arithmetic of arrivals against slow references, truth tables and properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.arrivals import (
    Ledger,
    Pace,
    RateEstimate,
    Signals,
    SpoolAccount,
    advance,
    clock_offset,
    combine,
    expected_by,
    gaps,
    ledger,
    state,
)

# Rates


@given(
    samples=st.integers(1, 64),
    every=st.floats(0.1, 30.0),
    frames=st.integers(2, 200),
)
def test_a_steady_device_has_its_true_rate_from_the_second_frame_on(samples: int, every: float, frames: int):
    """The correction for a short past: no slow climb over an hour, at most half an interval's worth of excess."""
    estimate = RateEstimate()
    for n in range(frames):
        estimate = estimate.add(samples, n * every)
    true = samples / every
    now = (frames - 1) * every
    for rate, window in zip(estimate.rates(now), (60.0, 300.0, 3600.0), strict=True):
        exact = samples / (window * -math.expm1(-every / window))  # the sum in closed form
        floor = max(every, 1.0) if frames == 2 else every
        if now >= 1.0:
            assert rate == pytest.approx(exact, rel=1e-6)
            assert true <= rate * 1.000001
            assert rate <= true * (1 + floor / window)


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(1, 100)), min_size=1, max_size=30))
def test_sums_equal_the_weighted_history(arrivals: list[tuple[float, int]]):
    estimate, now, history = RateEstimate(), 1000.0, []
    for gap, samples in arrivals:
        now += gap
        estimate = estimate.add(samples, now)
        history.append((now, samples))
    for total, window in zip(estimate.sums, (60.0, 300.0, 3600.0), strict=True):
        reference = sum(samples * math.exp(-(now - at) / window) for at, samples in history[1:])
        assert total == pytest.approx(reference, rel=1e-9, abs=1e-9)


def test_one_arrival_is_no_rate_yet_and_silence_fades():
    assert RateEstimate().rates(5.0) == (0.0, 0.0, 0.0)
    estimate = RateEstimate().add(64, 0.0)
    assert estimate.rates(10.0) == (0.0, 0.0, 0.0)
    estimate = estimate.add(64, 10.0)
    minute, five, hour = estimate.rates(400.0)
    assert 0 < minute < five < hour
    assert minute < 0.01
    assert hour == pytest.approx(64 / 400, rel=0.06)  # all that is known of it, averaged over 400 s


def test_a_clock_that_steps_back_does_no_harm():
    estimate = RateEstimate().add(1, 100.0).add(1, 110.0).add(1, 50.0)
    assert estimate.updated_at == 110.0
    assert all(0 < rate < 1 for rate in estimate.rates(60.0))
    assert Pace().add(100.0).add(90.0) == Pace(100.0, 0.0, 0.0)


# Expected by


def test_expected_by_follows_the_pace():
    assert expected_by(Pace()) is None
    assert expected_by(Pace().add(10.0)) == 70.0
    pace = Pace()
    for n in range(50):
        pace = pace.add(n * 2.0)
    assert pace.interval == pytest.approx(2.0)
    assert expected_by(pace) == pytest.approx(98.0 + 2.0 + 5.0, abs=0.1)  # steady: the least slack


def test_a_bursty_device_gets_more_patience_than_a_steady_one():
    steady, bursty = Pace(), Pace()
    at = 0.0
    for n in range(40):
        at += 1.0 if n % 2 else 19.0
        bursty = bursty.add(at)
        steady = steady.add(n * 10.0)
    assert (expected_by(bursty) or 0) - at > (expected_by(steady) or 0) - 390.0 + 10


def test_one_long_absence_does_not_spoil_the_pace():
    pace = Pace()
    for n in range(20):
        pace = pace.add(n * 2.0)
    pace = pace.add(38.0 + 86_400.0)
    assert (expected_by(pace) or 0) - (pace.last_at or 0) < 120.0


# Presence: one row per case, with times in seconds and a heartbeat of 30 s (patience 70 s)

ALIVE = Signals(
    first_seen_at=0.0, presence="online", presence_at=0.0, heartbeat_at=100.0, last_arrival_at=95.0, expected_by=105.0
)
TABLE = [
    # what is known                                                              now    state      since  word in the reason
    (ALIVE, 104.0, "on-time", 95.0, "usual pace"),
    (ALIVE, 105.0, "on-time", 95.0, "usual pace"),
    (ALIVE, 106.0, "late", 105.0, "overdue"),
    (ALIVE, 130.0, "quiet", 125.0, "no frame for long"),
    (replace(ALIVE, spooled=0), 106.0, "quiet", 105.0, "spool is empty"),
    (replace(ALIVE, spooled=7), 150.0, "late", 105.0, "7 samples wait"),
    (replace(ALIVE, paused=True), 106.0, "quiet", 105.0, "paused"),
    (replace(ALIVE, paused=True), 104.0, "on-time", 95.0, "usual pace"),
    # Silence: nobody said anything, for more than two heartbeats and ten seconds.
    (ALIVE, 170.0, "quiet", 125.0, "no frame"),
    (ALIVE, 171.0, "lost", 170.0, "no goodbye"),
    (replace(ALIVE, heartbeat_at=None, presence=None, presence_at=None), 166.0, "lost", 165.0, "no goodbye"),
    # Frames alone show life where reports are missing.
    (replace(ALIVE, heartbeat_at=10.0, last_arrival_at=150.0, expected_by=160.0), 155.0, "on-time", 150.0, "usual pace"),
    # Goodbye and last will hold however short ago the heartbeat was ...
    (replace(ALIVE, presence="offline", presence_at=101.0), 102.0, "offline", 101.0, "goodbye"),
    (replace(ALIVE, presence="offline", presence_at=101.0, presence_reason="update"), 999.0, "offline", 101.0, "update"),
    (replace(ALIVE, presence="lost", presence_at=101.0), 102.0, "lost", 101.0, "connection break"),
    (replace(ALIVE, presence="lost", presence_at=101.0, presence_reason="no goodbye"), 9e9, "lost", 101.0, "no goodbye"),
    # ... until a frame proves otherwise.
    (replace(ALIVE, presence="lost", presence_at=90.0), 104.0, "on-time", 95.0, "usual pace"),
    (replace(ALIVE, presence="offline", presence_at=90.0), 104.0, "on-time", 95.0, "usual pace"),
    # Never sent a frame.
    (Signals(0.0, "online", 0.0, "", 100.0), 110.0, "quiet", 0.0, "no frame yet"),
    (Signals(0.0, "online", 0.0, "", 100.0, paused=True), 110.0, "quiet", 0.0, "paused"),
    (Signals(0.0, "online", 0.0, "", 100.0), 171.0, "lost", 170.0, "no goodbye"),
    (Signals(0.0), 71.0, "lost", 70.0, "no goodbye"),
    (Signals(0.0), 69.0, "quiet", 0.0, "no frame yet"),
]


@pytest.mark.parametrize(("signals", "now", "expected", "since", "word"), TABLE)
def test_presence(signals: Signals, now: float, expected: str, since: float, word: str):
    found = state(signals, now)
    assert (found.state, found.since) == (expected, since)
    assert word in found.reason


maybe = st.none() | st.floats(0.0, 1000.0)


@given(
    signals=st.builds(
        Signals,
        first_seen_at=st.just(0.0),
        presence=st.sampled_from([None, "online", "offline", "lost"]),
        presence_at=maybe,
        heartbeat_at=maybe,
        last_arrival_at=maybe,
        expected_by=st.none(),
        paused=st.booleans(),
        spooled=st.none() | st.integers(0, 9),
    ),
    wait=st.floats(0.0, 1000.0),
    now=st.floats(1000.0, 2000.0),
)
def test_every_state_has_a_reason_and_began_in_the_past(signals: Signals, wait: float, now: float):
    if signals.last_arrival_at is not None:
        signals = replace(signals, expected_by=signals.last_arrival_at + wait)
    if signals.presence is None or signals.presence_at is None:
        signals = replace(signals, presence=None, presence_at=None)
    found = state(signals, now)
    assert found.reason
    assert found.since <= now


# Clock offset


def test_the_least_delayed_report_sets_the_clock_offset():
    offset = clock_offset(None, 100.0, 103.0)
    assert offset == -3.0
    offset = clock_offset(offset, 200.0, 200.5)
    assert offset == -0.5  # less delay, so closer to the truth
    assert clock_offset(offset, 300.0, 304.5) == pytest.approx(-1.0)  # a delay moves it little
    assert clock_offset(offset, 0.0, 1e9) == -1e9  # no delay explains this: the clock was set
    assert clock_offset(-1e9, 300.0, 300.5) == -0.5


# Sequences


@given(
    here=st.sets(st.integers(1, 40)),
    floor=st.integers(0, 45),
    through=st.integers(0, 10),
)
def test_advance_equals_counting_up(here: set[int], floor: int, through: int):
    reference = through
    while reference + 1 < floor or reference + 1 in here:
        reference += 1
    assert advance(through, floor, [(n, 1) for n in sorted(here)]) == reference


@given(st.lists(st.integers(1, 5), max_size=20), st.sets(st.integers(0, 19)))
def test_advance_takes_spans(spans: list[int], missing: set[int]):
    first, placed, expected, broken = 1, [], 0, False
    for place, span in enumerate(spans):
        if place in missing:
            broken = True
        else:
            placed.append((first, span))
            if not broken:
                expected = first + span - 1
        first += span
    assert advance(0, 0, placed) == expected


def test_gaps_are_what_is_neither_here_nor_given_up():
    assert gaps(highest=10, here=7, skipped=2) == 1
    assert gaps(highest=0, here=0, skipped=0) == 0
    assert gaps(highest=5, here=5, skipped=3) == 0


# Ledger


def test_the_ledger_by_example():
    settled = ledger(SpoolAccount(stored=90, rejected=4, dropped=6, produced=100, produced_seen=100, receipted=94))
    assert settled == Ledger(produced=100, stored=90, rejected=4, dropped=6, missing=0)

    waiting = ledger(SpoolAccount(stored=90, produced=100, receipted=90, spooled=10))
    assert (waiting.missing, waiting.spooled, waiting.balanced, waiting.settled) == (10, 10, True, False)


LEDGER_TABLE = [
    # account                                                                                          balanced settled
    (SpoolAccount(), True, True),
    (SpoolAccount(stored=8, produced=10, receipted=8), False, False),  # two are nowhere
    (SpoolAccount(stored=8, produced=10, receipted=8, spooled=1), False, False),  # one is nowhere
    (SpoolAccount(stored=9, produced=10, receipted=10), False, False),  # receipted and not here: the store was put back
    (SpoolAccount(stored=11, produced=10, receipted=10), False, False),  # more than was ever made
    (SpoolAccount(stored=8, stored_again=2, produced=10, receipted=10), True, True),
    (SpoolAccount(stored=8, produced=10, receipted=8, dropped=2), True, True),
    (SpoolAccount(stored=10, produced=10, receipted=8, dropped=2), True, True),  # dropped, but had arrived
    (SpoolAccount(stored=6, produced=10, receipted=10, unreadable_frames=1), True, True),
    (SpoolAccount(stored=6, produced=10, receipted=6, spooled=4, unreadable_frames=1), True, False),
    (SpoolAccount(stored=6, produced=10, receipted=10, assembling=4), True, False),
    # The report is older than the newest frame: sequence gaps explain what is missing, nothing else does.
    (SpoolAccount(stored=6, produced_seen=10, gap_frames=1, report_is_stale=True), True, False),
    (SpoolAccount(stored=6, produced_seen=10, gap_frames=1, produced=10), False, False),
    (SpoolAccount(stored=6, produced_seen=10, report_is_stale=True), False, False),
    (SpoolAccount(stored=20, produced_seen=20, produced=5, spooled=5, report_is_stale=True), True, True),
    # What was in a spool that is no more went with it.
    (SpoolAccount(stored=6, produced=10, receipted=6, spooled=4, superseded=True), True, True),
    (SpoolAccount(stored=5, produced=10, receipted=6, spooled=4, superseded=True), False, False),
]


@pytest.mark.parametrize(("account", "balanced", "settled"), LEDGER_TABLE)
def test_when_the_ledger_balances(account: SpoolAccount, balanced: bool, settled: bool):
    found = ledger(account)
    assert (found.balanced, found.settled) == (balanced, settled)


counts = st.integers(0, 50)


@given(
    stored=counts, rejected=counts, again=counts, spooled=counts, dropped=counts, arrived_of_spooled=st.integers(0, 50), lost=st.integers(1, 50)
)
def test_an_honest_ledger_balances_and_a_loss_shows(  # noqa: PLR0917 - one count each
    stored: int, rejected: int, again: int, spooled: int, dropped: int, arrived_of_spooled: int, lost: int
):
    """The device counts receipted + spooled + dropped; some of what it still holds may be here already."""
    already = min(arrived_of_spooled, spooled)
    honest = SpoolAccount(
        stored=stored + already,
        stored_again=again,
        rejected=rejected,
        produced=stored + again + rejected + spooled + dropped,
        receipted=stored + again + rejected,
        spooled=spooled,
        dropped=dropped,
    )
    found = ledger(honest)
    assert found.balanced
    assert found.settled == (found.missing == 0)
    here = found.stored + found.stored_again + found.rejected + found.dropped + found.abandoned
    assert here + found.missing == found.produced
    if lost > already and honest.stored >= lost:  # receipted samples that the store has no more
        assert not ledger(replace(honest, stored=honest.stored - lost)).balanced


@given(st.lists(st.builds(SpoolAccount, stored=counts, produced=counts, spooled=counts, superseded=st.booleans()), max_size=5))
def test_a_device_balances_only_if_each_spool_does(accounts: list[SpoolAccount]):
    ledgers = [ledger(account) for account in accounts]
    total = combine(ledgers)
    assert total.produced == sum(one.produced for one in ledgers)
    assert total.missing == sum(one.missing for one in ledgers)
    assert total.balanced == all(one.balanced for one in ledgers)
    assert total.settled == all(one.settled for one in ledgers)
