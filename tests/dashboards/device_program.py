"""A device in a process of its own that can be killed: last will, reports, a frame a second, pause and resume.

    python -m tests.dashboards.device_program NAME PORT KEEPALIVE_SECONDS
"""

from __future__ import annotations

import secrets
import sys
import threading
import time

from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.broker_settings import BrokerSettings
from side_tuning.wire import topics
from side_tuning.wire.messages import BackboneInfo, Command, Health, Receipt, SpoolCount
from tests.coordinator.fleet import MANIFEST, make_payload

SAMPLES = 2
SPOOL = "5b001"


class Device:
    def __init__(self, name: str, port: int, keepalive: int) -> None:
        self.name = name
        self.session = ""
        self.sequence = 0
        self.receipted = 0
        self.paused = False
        self.report = threading.Event()
        self.connection = BrokerConnection(
            BrokerSettings(host="127.0.0.1", port=port, tls=False, keepalive_seconds=keepalive, reconnect_max_seconds=0.5),
            name,
            will=self.will,
            subscriptions=[topics.receipt(name), topics.command(name)],
            on_message=self.hear,
        )

    def will(self) -> tuple[str, bytes]:
        self.session = secrets.token_hex(8)
        return topics.health(self.name), Health("online", self.session, time.time()).as_last_will().to_bytes()

    def hear(self, message: Message) -> None:
        if topics.parse_topic(message.topic).channel == "receipt":
            self.receipted = max(self.receipted, Receipt.from_bytes(message.payload).stored_through)
        else:
            self.paused = Command.from_bytes(message.payload).name == "pause"
            self.report.set()

    def health(self) -> bytes:
        produced, waiting = self.sequence * SAMPLES, (self.sequence - self.receipted) * SAMPLES
        count = SpoolCount(SPOOL, produced, produced - waiting, waiting, 0, self.sequence - self.receipted, 700 * waiting, 1.0, self.receipted + 1, self.sequence + 1)
        return Health(
            "online", self.session, time.time(), backbone=BackboneInfo(MANIFEST.fingerprint, "bert", 4, 32, "float"), plan_version=1, spool=count,
            paused=self.paused, forward_seconds=0.02, bytes_sent=700 * produced, temperature_celsius=48.0, throttled=False, agent_version="test",
        ).to_bytes()

    def run(self) -> None:
        self.connection.start()
        while True:
            if self.connection.connected:
                if not self.paused:
                    self.sequence += 1
                    frame = make_payload(self.name, self.sequence, spool=SPOOL, samples=SAMPLES)
                    self.connection.publish(topics.activations(self.name), frame, properties={"spool": SPOOL, "sequence": str(self.sequence)})
                self.connection.publish(topics.health(self.name), self.health(), retain=True)
            self.report.wait(1.0)
            self.report.clear()


if __name__ == "__main__":
    Device(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).run()
