"""What the uplink carries, and the limits that follow from it. Pure arithmetic: no sockets, no clock of its own.

paho never delivers a packet that takes longer than two keepalives to write: the broker's answer to its ping stands behind
the packet, so it gives up, reconnects, and starts the packet again, for ever (measured). Hence the rules, with
goodput = payload bytes per second as the broker acknowledged them:
- one frame takes at most a quarter of the keepalive to write;
- the bytes in flight take at most half a keepalive;
- where frames that are already spooled break the first rule by far, the keepalive grows instead.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN_LINK_IN_FLIGHT_BYTES = 131_072  # one default frame, until the first acknowledgement tells more
SMALLEST_FRAME_BYTES = 4096  # below this the header outweighs the savings
ENVELOPE_BYTES = 1024  # room in a packet for topic and properties
LONGEST_KEEPALIVE_SECONDS = 1200
MEMORY = 0.8  # weight of the past at each acknowledgement: the last five or so count
SHORTEST_SPAN_SECONDS = 1e-3


@dataclass
class Link:
    """Running measurement of one uplink. Times are any monotonic seconds."""

    keepalive_seconds: float  # in force on the connection
    goodput: float | None = None  # bytes per second
    _bytes: float = 0.0
    _seconds: float = 0.0
    _last_acknowledged_at: float = float("-inf")

    def acknowledged(self, payload_bytes: int, sent_at: float, acknowledged_at: float) -> None:
        """A frame handed over at `sent_at` was acknowledged; frames ahead of it had the link until the acknowledgement before."""
        span = max(acknowledged_at - max(sent_at, self._last_acknowledged_at), SHORTEST_SPAN_SECONDS)
        self._last_acknowledged_at = acknowledged_at
        self._bytes = MEMORY * self._bytes + payload_bytes
        self._seconds = MEMORY * self._seconds + span
        self.goodput = self._bytes / self._seconds

    def stalled(self, in_flight_bytes: int, oldest_sent_at: float, broken_at: float) -> None:
        """The connection broke with bytes in flight: they are more than the link carried in that time.

        A link that just went away says nothing about its speed, so only a stall of a keepalive or more counts.
        """
        span = broken_at - max(oldest_sent_at, self._last_acknowledged_at)
        if in_flight_bytes <= 0 or span < self.keepalive_seconds:
            return
        most = in_flight_bytes / span
        if self.goodput is None or most < self.goodput:
            self._bytes, self._seconds, self.goodput = most, 1.0, most

    def in_flight_limit(self) -> int:
        """How many payload bytes may be under way unacknowledged. One frame always may, however large."""
        if self.goodput is None:
            return UNKNOWN_LINK_IN_FLIGHT_BYTES
        return int(self.goodput * self.keepalive_seconds / 2)

    def frame_bytes(self, plan_bytes: int, max_packet_bytes: int | None) -> int:
        """The size to close frames at: never above the plan's and the broker's limit, nor too long to write."""
        limit = plan_bytes
        if max_packet_bytes is not None:
            limit = min(limit, max_packet_bytes - ENVELOPE_BYTES)
        if self.goodput is not None:
            limit = min(limit, max(SMALLEST_FRAME_BYTES, int(self.goodput * self.keepalive_seconds / 4)))
        return max(limit, 1)

    def fits(self, payload_bytes: int) -> bool:
        """Whether a frame of this size can be written without danger under the keepalive in force."""
        return self.goodput is None or payload_bytes / self.goodput <= self.keepalive_seconds / 2

    def keepalive_for(self, payload_bytes: int, configured_seconds: int) -> int:
        """The keepalive that a frame of this size needs: the configured one unless writing takes over half of that."""
        if self.goodput is None or payload_bytes / self.goodput <= configured_seconds / 2:
            return configured_seconds
        return min(LONGEST_KEEPALIVE_SECONDS, max(configured_seconds, -int(-4 * payload_bytes // self.goodput)))
