"""The model of time against arithmetic by hand."""

from __future__ import annotations

import pytest

from benchmarks.time_model import (
    DeviceProfile,
    asynchronous,
    fleet_profile,
    hand_out_seconds,
    round_seconds,
    stream_arrivals,
)

FAST = DeviceProfile(1.0, 8_000.0)  # a thousand bytes a second
SLOW = DeviceProfile(10.0, 800.0)


def test_a_fleet_spans_all_speeds_and_links_and_the_seed_deals_them():
    fleet = fleet_profile(5, 3)
    assert sorted(device.slowness for device in fleet) == pytest.approx([1.0, 10**0.25, 10**0.5, 10**0.75, 10.0])
    assert min(device.bits_per_second for device in fleet) == pytest.approx(64_000)
    assert max(device.bits_per_second for device in fleet) == pytest.approx(10_000_000)
    assert fleet == fleet_profile(5, 3)
    assert fleet != fleet_profile(5, 4)


def test_one_device_is_the_machine_that_measured():
    assert fleet_profile(1, 0)[0].slowness == 1.0


def test_a_synchronous_round_lasts_as_long_as_its_slowest_device():
    # Fast: 0.5 down + 2 computing + 1 up. Slow: 5 down + 10 x 1 computing + 10 up.
    assert round_seconds([FAST], [2.0], down=500, up=1000) == pytest.approx(3.5)
    assert round_seconds([FAST, SLOW], [2.0, 1.0], down=500, up=1000) == pytest.approx(25.0)


def test_handing_out_waits_for_the_slowest_link():
    assert hand_out_seconds([FAST, SLOW], 1000) == pytest.approx(10.0)


def test_a_stream_computes_while_it_sends():
    # Sending is the bottleneck: the first piece is ready at 1, every further one waits for the link.
    assert stream_arrivals(FAST, [(1.0, 2000), (1.0, 2000), (1.0, 2000)]) == pytest.approx([3.0, 5.0, 7.0])
    # Computing is: the link waits for the device.
    assert stream_arrivals(FAST, [(4.0, 1000), (4.0, 1000)]) == pytest.approx([5.0, 9.0])
    assert stream_arrivals(SLOW, [(1.0, 100)]) == pytest.approx([11.0])


def test_asynchronous_devices_come_in_the_order_of_time_with_the_version_that_they_fetched():
    seen: list[tuple[int, float, int]] = []

    def turn(number: int, now: float, version: int) -> int | None:
        seen.append((number, now, version))
        return len(seen) if now < 20 else None

    quick, slack = DeviceProfile(1.0, 8_000.0), DeviceProfile(4.0, 8_000.0)
    asynchronous([quick, slack], [2.0, 2.0], down=1000, up=1000, turn=turn)  # a turn takes 4 and 10 seconds
    assert [(number, now) for number, now, _ in seen] == [(0, 4), (0, 8), (1, 10), (0, 12), (0, 16), (0, 20)]
    assert [version for number, _, version in seen if number == 0][:4] == [0, 1, 2, 4]
    assert next(version for number, _, version in seen if number == 1) == 0
