"""The coordinator's side of the wire for tests of the agent: stores each frame once and issues real cumulative receipts."""

from __future__ import annotations

import threading
from collections import Counter

from typing_extensions import Self

from side_tuning.broker_connection import BrokerConnection, BrokerSettings, Message
from side_tuning.wire import topics
from side_tuning.wire.frame import Frame, Part, decode, join_parts
from side_tuning.wire.messages import Command, Health, Receipt, TapPlan


class Receiver:
    """Keeps everything in memory; survives its broker. With `silent` it stores and issues no receipts."""

    def __init__(self, settings: BrokerSettings, device: str, *, persistent: bool = True) -> None:
        self.device = device
        self.silent = False
        self.frames: dict[tuple[str, int], Frame | Part] = {}  # by (spool, sequence)
        self.arrivals: Counter[tuple[str, int]] = Counter()
        self.order: list[int] = []
        self.properties: list[dict[str, str]] = []
        self.health: list[Health] = []
        self.plans: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.connection = BrokerConnection(
            settings,
            "coordinator",
            subscriptions=[topics.all_devices_up("activations"), topics.all_devices_up("health")],
            on_message=self._receive,
            on_connected=lambda _: self._declare(),
            manual_ack=True,
            clean_start=not persistent,
            session_expiry_seconds=3600 if persistent else 0,
            reconnect_min_seconds=0.05,
        )

    def __enter__(self) -> Self:
        self.connection.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.stop()

    def _declare(self) -> None:
        """A broker that was killed has forgotten everything retained."""
        for topic, payload in self.plans.items():
            self.connection.publish(topic, payload, retain=True)
        self.send_receipts()

    def publish_plan(self, plan: TapPlan | bytes | None, device: str | None = None) -> None:
        topic = topics.device_plan(device) if device else topics.fleet_plan()
        payload = plan if isinstance(plan, bytes) else plan.to_bytes() if plan else b""
        self.plans[topic] = payload
        self.connection.publish(topic, payload, retain=True)

    def command(self, command: Command) -> None:
        self.connection.publish(topics.command(self.device), command.to_bytes())

    def _receive(self, message: Message) -> None:
        if topics.parse_topic(message.topic).channel == "health":
            if message.payload:
                self.health.append(Health.from_bytes(message.payload))
        else:
            frame = decode(message.payload)
            with self._lock:
                self.arrivals[frame.spool, frame.sequence] += 1
                self.frames[frame.spool, frame.sequence] = frame
                self.order.append(frame.sequence)
                self.properties.append(message.properties)
            if not self.silent:
                self.send_receipts()
        self.connection.acknowledge(message)

    def receipts(self) -> list[Receipt]:
        with self._lock:
            keys = list(self.frames)
        found = []
        for spool in {key[0] for key in keys}:
            held = {sequence for name, sequence in keys if name == spool}
            through = 0
            while through + 1 in held:
                through += 1
            found.append(Receipt(spool, through, tuple(sorted(n for n in held if n > through)[: Receipt.MAX_AHEAD])))
        return found

    def send_receipts(self) -> None:
        for receipt in self.receipts():
            self.connection.publish(topics.receipt(self.device), receipt.to_bytes(), retain=True)

    # What came in.

    def whole_frames(self) -> list[Frame]:
        """All frames by sequence, parts joined."""
        with self._lock:
            held = sorted(self.frames.items(), key=lambda item: item[0])
        whole = [frame for _, frame in held if isinstance(frame, Frame)]
        first = {(p.spool, p.first) for _, p in held if isinstance(p, Part)}
        for spool, start in sorted(first):
            parts = [p for _, p in held if isinstance(p, Part) and (p.spool, p.first) == (spool, start)]
            if len(parts) == parts[0].count:
                joined = decode(join_parts(parts))
                assert isinstance(joined, Frame)
                whole.append(joined)
        return sorted(whole, key=lambda frame: frame.sequence)

    def sample_ids(self) -> list[str]:
        return [sample.id for frame in self.whole_frames() for sample in frame.samples]

    @property
    def newest_health(self) -> Health | None:
        return self.health[-1] if self.health else None
