"""Many devices in one process: real MQTT 5 sessions over sockets of their own, driven by one selector.

A client library for each of 2,000 devices would cost the machine more than what is measured; this speaks only as much
MQTT as a sending device needs (connect, subscribe to its receipts, publish with QoS 1, acknowledge receipts).
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from side_tuning.mqtt_packets import PUBACK, PUBLISH, packet, text, variable_length

CONNACK, SUBACK = 0x20, 0x90
LOOK_SECONDS = 0.002  # between two looks at how much is committed
CONNECTING = 64  # sessions that are opened at once


def connect_packet(name: str) -> bytes:
    return packet(0x10, text("MQTT"), b"\x05\x02", struct.pack("!H", 600), b"\x00", text(name))


def subscribe_packet(topic: str) -> bytes:
    return packet(0x82, b"\x00\x01", b"\x00", text(topic), b"\x01")


def publish_packet(topic: str, payload: bytes, properties: dict[str, str], mid: int) -> bytes:
    """A QoS 1 message with user properties, as `BrokerConnection.publish` sends it."""
    users = b"".join(b"\x26" + text(key) + text(value) for key, value in properties.items())
    return packet(PUBLISH | 2, text(topic), struct.pack("!H", mid), variable_length(len(users)), users, payload)


@dataclass
class Session:
    """One device's connection. `stored_through` is what its newest receipt said, as bytes, unread."""

    name: str
    socket: socket.socket
    unsent: deque[memoryview] = field(default_factory=deque)
    received: bytearray = field(default_factory=bytearray)
    subscribed: bool = False
    acknowledged: int = 0
    receipt: bytes = b""

    def send(self, packet: bytes) -> None:
        self.unsent.append(memoryview(packet))

    def write(self) -> None:
        while self.unsent:
            try:
                sent = self.socket.send(self.unsent[0])
            except BlockingIOError:
                return
            if sent < len(self.unsent[0]):
                self.unsent[0] = self.unsent[0][sent:]
                return
            self.unsent.popleft()

    def read(self) -> None:
        """Take in what came and answer it."""
        try:
            data = self.socket.recv(65_536)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError(f"the broker closed the connection of {self.name}")
        self.received += data
        while (came := self._next_packet()) is not None:
            self._take(*came)

    def _next_packet(self) -> tuple[int, bytes] | None:
        size, shift, place = 0, 0, 1
        while True:
            if place >= len(self.received):
                return None
            digit = self.received[place]
            size |= (digit & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if not digit & 0x80:
                break
        if len(self.received) < place + size:
            return None
        kind, body = self.received[0], bytes(self.received[place : place + size])
        del self.received[: place + size]
        return kind, body

    def _take(self, kind: int, body: bytes) -> None:
        if kind & 0xF0 == CONNACK:
            if body[1]:
                raise ConnectionError(f"the broker refused {self.name} with reason {body[1]}")
        elif kind & 0xF0 == SUBACK:
            self.subscribed = True
        elif kind & 0xF0 == PUBACK:
            if len(body) > 2 and body[2] >= 0x80:
                raise ConnectionError(f"the broker refused a message of {self.name} with reason {body[2]}")
            self.acknowledged += 1
        elif kind & 0xF0 == PUBLISH:
            (topic_bytes,) = struct.unpack_from("!H", body)
            place = 2 + topic_bytes
            if kind & 0x06:
                self.send(packet(PUBACK, body[place : place + 2]))
                place += 2
            self.receipt = body[place + 1 + body[place] :]  # properties of a receipt are shorter than 128 bytes


@dataclass(frozen=True)
class Outgoing:
    """One message, ready to be written to its device's socket."""

    device: int
    packet: bytes


@dataclass(frozen=True)
class Sent:
    """What happened: seconds (monotonic) of each publish, and (seconds, committed) at each look that saw a change."""

    published: list[float]
    commits: list[tuple[float, int]]


class Devices:
    """Open sessions of devices `names`."""

    def __init__(self, port: int, names: Sequence[str], receipt_topic: Callable[[str], str]) -> None:
        self._selector = selectors.DefaultSelector()
        self.sessions: list[Session] = []
        for start in range(0, len(names), CONNECTING):
            self._open(port, names[start : start + CONNECTING], receipt_topic)

    def _open(self, port: int, names: Sequence[str], receipt_topic: Callable[[str], str]) -> None:
        fresh = []
        for name in names:
            connection = socket.create_connection(("127.0.0.1", port), 30)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            session = Session(name, connection)
            session.send(connect_packet(name) + subscribe_packet(receipt_topic(name)))
            self._selector.register(connection, selectors.EVENT_READ, session)
            session.write()
            fresh.append(session)
        self.sessions += fresh
        deadline = time.monotonic() + 60
        while not all(session.subscribed for session in fresh):
            self.turn(0.1)
            if time.monotonic() > deadline:
                raise TimeoutError("the broker does not answer the devices")

    def turn(self, timeout_seconds: float) -> None:
        """Read and answer whatever came; write what waits."""
        for key, events in self._selector.select(timeout_seconds):
            session = key.data
            if events & selectors.EVENT_READ:
                session.read()
            session.write()
            self._watch(session)

    def _watch(self, session: Session) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if session.unsent else 0)
        if self._selector.get_key(session.socket).events != wanted:
            self._selector.modify(session.socket, wanted, session)

    def publish(
        self, messages: Sequence[Outgoing], committed: Callable[[], int], *, window: int, rate: float | None, timeout_seconds: float
    ) -> Sent:
        """Send all and wait until `committed` counts them all.

        Args:
            messages: in this order.
            committed: how many of them are durable; looked at every LOOK_SECONDS.
            window: the most messages that may be published and not committed.
            rate: messages a second; None: as fast as the window allows.
            timeout_seconds: for all of it.
        """
        published: list[float] = []
        commits: list[tuple[float, int]] = []
        began = time.monotonic()
        done, looked = 0, 0.0
        while done < len(messages):
            now = time.monotonic()
            if now - began > timeout_seconds:
                raise TimeoutError(f"{done} of {len(messages)} messages were committed within {timeout_seconds:.0f} s")
            if now - looked >= LOOK_SECONDS:
                looked = now
                if (seen := committed()) != done:
                    done = seen
                    commits.append((time.monotonic(), seen))
            allowed = len(messages) if rate is None else int((now - began) * rate) + 1
            allowed = min(allowed, done + window, len(messages), len(published) + 32)
            while len(published) < allowed:
                message = messages[len(published)]
                session = self.sessions[message.device]
                session.send(message.packet)
                published.append(time.monotonic())
                session.write()
                self._watch(session)
            self.turn(0 if len(published) < min(len(messages), done + window) and rate is None else LOOK_SECONDS / 2)
        return Sent(published, commits)

    def close(self) -> None:
        for session in self.sessions:
            self._selector.unregister(session.socket)
            session.socket.close()
        self._selector.close()
