"""The arithmetic that keeps a slow uplink out of paho's livelock."""

from __future__ import annotations

import pytest

from edge_agent.link import (
    LONGEST_KEEPALIVE_SECONDS,
    SMALLEST_FRAME_BYTES,
    UNKNOWN_LINK_IN_FLIGHT_BYTES,
    Link,
)


def steady(bytes_per_second: float, keepalive: float = 60.0, size: int = 10_000) -> Link:
    link = Link(keepalive)
    at = 0.0
    for _ in range(20):
        link.acknowledged(size, at, at + size / bytes_per_second)
        at += size / bytes_per_second
    return link


@pytest.mark.parametrize("speed", [1_000, 8_000, 100_000, 5_000_000])
def test_goodput_is_measured(speed):
    assert steady(speed).goodput == pytest.approx(speed, rel=1e-3)


def test_pipelined_frames_share_the_link():
    """Ten frames handed over at once and acknowledged one per second: the link carries one frame per second."""
    link = Link(60)
    for n in range(10):
        link.acknowledged(5_000, 0.0, n + 1.0)
    assert link.goodput == pytest.approx(5_000)


@pytest.mark.parametrize("speed", [1_000, 8_000, 100_000, 5_000_000])
@pytest.mark.parametrize("keepalive", [5, 60, 300])
def test_a_frame_takes_a_quarter_and_all_in_flight_half_a_keepalive(speed, keepalive):
    link = steady(speed, keepalive)
    size = link.frame_bytes(10**9, None)
    assert size / speed <= max(keepalive / 4, SMALLEST_FRAME_BYTES / speed) * 1.01
    assert link.in_flight_limit() / speed == pytest.approx(keepalive / 2, rel=0.01)


def test_frames_obey_the_plan_and_the_broker():
    link = steady(10**7)
    assert link.frame_bytes(131_072, None) == 131_072
    assert link.frame_bytes(131_072, 50_000) == 50_000 - 1024
    assert Link(60).frame_bytes(131_072, None) == 131_072


def test_before_the_first_acknowledgement_one_frame_is_under_way():
    assert Link(60).in_flight_limit() == UNKNOWN_LINK_IN_FLIGHT_BYTES


def test_a_stall_without_any_acknowledgement_still_teaches():
    """128 KiB at 8 kbit/s with keepalive 60: paho gives up after 120 s and would do so for ever."""
    link = Link(60)
    assert link.fits(131_072)
    link.stalled(131_072, oldest_sent_at=0.0, broken_at=120.0)
    assert link.goodput == pytest.approx(131_072 / 120)
    assert not link.fits(131_072)
    needed = link.keepalive_for(131_072, 60)
    assert 2 * needed > 131_072 / 1000, "at the link's true 1000 bytes/s the frame must get through now"


def test_a_link_that_just_went_away_says_nothing_about_its_speed():
    link = steady(100_000)
    link.stalled(131_072, oldest_sent_at=100.0, broken_at=110.0)
    assert link.goodput == pytest.approx(100_000, rel=1e-3)


def test_the_keepalive_grows_only_where_frames_need_it_and_has_an_end():
    assert steady(100_000).keepalive_for(131_072, 60) == 60
    assert steady(2_000).keepalive_for(131_072, 60) == 263
    assert steady(10).keepalive_for(131_072, 60) == LONGEST_KEEPALIVE_SECONDS


def test_a_link_that_recovers_is_believed_soon():
    link = steady(1_000)
    for n in range(15):
        link.acknowledged(100_000, 100.0 + n, 100.1 + n)
    assert link.goodput > 100_000
