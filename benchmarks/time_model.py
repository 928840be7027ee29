"""The model of time: how long a fleet takes, from costs measured on one machine. The same for every method.

Rules, written down once:
1. The fleet's fastest device works as fast as one core of the machine that measured; the slowest ten times as slow. Speeds
   lie evenly on a logarithmic scale in between, links from 64 kbit/s to 10 Mbit/s likewise, dealt independently by the seed.
   A link carries either direction at its rate; a device computes and sends at the same time.
2. Computing n samples takes n x (measured seconds per sample) x slowness. Sending n bytes takes 8 n / rate. Bytes are what
   was measured on the wire, headers and acknowledgements included. There is no latency, and nothing fails.
3. The server's side-network steps take what they took when they were run. A peer's aggregation takes nothing, and
   measuring accuracy takes nothing.
4. A synchronous round ends when its slowest device has fetched the model, trained and sent it back. An asynchronous device
   goes on with the newest model as soon as its last one is sent. A device that only sends taps never waits.
5. Time to a target accuracy is when the server first has a model that reaches it, plus handing that model to every device.

Favours: rule 3 favours the peers; no rule favours this project.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SLOWEST = 10.0  # times the fastest device's time
LINK_SLOWEST, LINK_FASTEST = 64_000.0, 10_000_000.0  # bits a second


@dataclass(frozen=True)
class DeviceProfile:
    """How slow a device and its link are."""

    slowness: float  # 1 is the machine that measured
    bits_per_second: float

    def computing(self, seconds: float) -> float:
        return seconds * self.slowness

    def sending(self, count: float) -> float:
        """Seconds for so many bytes, up or down."""
        return 8.0 * count / self.bits_per_second


def fleet_profile(devices: int, seed: int) -> list[DeviceProfile]:
    """Rule 1."""
    chance = random.Random(seed)
    speeds = _spread(1.0, SLOWEST, devices)
    links = _spread(LINK_SLOWEST, LINK_FASTEST, devices)
    chance.shuffle(speeds)
    chance.shuffle(links)
    return [DeviceProfile(slowness, link) for slowness, link in zip(speeds, links, strict=True)]


def _spread(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (n / max(1, count - 1)) for n in range(count)]


def round_seconds(fleet: Sequence[DeviceProfile], seconds: Sequence[float], down: float, up: float) -> float:
    """One synchronous round; `seconds` is each device's computing at slowness 1."""
    return max(
        device.sending(down) + device.computing(own) + device.sending(up) for device, own in zip(fleet, seconds, strict=True)
    )


def hand_out_seconds(fleet: Sequence[DeviceProfile], down: float) -> float:
    """Until every device has fetched a model."""
    return max(device.sending(down) for device in fleet)


def stream_arrivals(device: DeviceProfile, pieces: Sequence[tuple[float, float]]) -> list[float]:
    """When each piece of a device's stream is at the server; a piece is (computing at slowness 1, bytes).

    Computing goes on while earlier pieces are being sent.
    """
    ready = free = 0.0
    arrivals = []
    for seconds, count in pieces:
        ready += device.computing(seconds)
        free = max(free, ready) + device.sending(count)
        arrivals.append(free)
    return arrivals


def asynchronous(
    fleet: Sequence[DeviceProfile], seconds: Sequence[float], down: float, up: float, turn: Callable[[int, float, int], int | None]
) -> None:
    """Devices fetch, train and send, each at its own pace, in the order of simulated time (rule 4).

    Args:
        fleet: the devices.
        seconds: computing of one turn at slowness 1, per device.
        down: bytes fetched a turn.
        up: bytes sent a turn.
        turn: called with device, time and the version that the device had fetched, when its result is at the server;
            returns the version that it fetches next, or None to end everything.

    """
    waiting = [
        (device.sending(down) + device.computing(own) + device.sending(up), number, 0)
        for number, (device, own) in enumerate(zip(fleet, seconds, strict=True))
    ]
    heapq.heapify(waiting)
    while waiting:
        now, number, version = heapq.heappop(waiting)
        newest = turn(number, now, version)
        if newest is None:
            return
        device = fleet[number]
        took = device.sending(down) + device.computing(seconds[number]) + device.sending(up)
        heapq.heappush(waiting, (now + took, number, newest))
