"""The limit that the gateway is measured against: paho -> queue -> SQLite, the same bytes, nothing looked at.

As durable as the gateway (the same PRAGMAs, the same batches, acknowledged by hand after the commit), and nothing else:
no decoding, no checks, no accounts, no receipts.

    python -m benchmarks.raw_limit PORT DATABASE
"""

from __future__ import annotations

import sqlite3
import sys
import threading
from datetime import datetime, timezone

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from coordinator.intake import Intake
from coordinator.settings import GatewaySettings
from coordinator.store.engine import set_writer_pragmas
from side_tuning.broker_connection import Message
from side_tuning.wire import topics


def main(port: int, database: str) -> None:
    settings = GatewaySettings()
    store = sqlite3.connect(database, check_same_thread=False)
    set_writer_pragmas(store, None)
    store.execute("CREATE TABLE messages (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL)")
    intake = Intake(settings.queue_messages, settings.queue_bytes)
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="raw-limit", protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True)
    client.on_message = lambda _c, _u, m: intake.put(Message(m.topic, m.payload, m.retain, 1, m.mid, m.qos), datetime.now(timezone.utc))
    client.on_connect = lambda c, *_: c.subscribe(topics.all_devices_up("activations"), 1)
    client.on_subscribe = lambda *_: print("listening", flush=True)
    properties = Properties(PacketTypes.CONNECT)
    properties.ReceiveMaximum = settings.receive_maximum
    client.connect("127.0.0.1", port, 600, properties=properties)
    threading.Thread(target=client.loop_forever, daemon=True).start()
    while True:
        batch = intake.take(settings.batch_frames, wait_seconds=1.0, gather_seconds=settings.batch_seconds)
        if not batch:
            continue
        store.execute("BEGIN IMMEDIATE")
        store.executemany("INSERT INTO messages (topic, payload) VALUES (?, ?)", [(a.message.topic, a.message.payload) for a in batch])
        store.execute("COMMIT")
        for arrived in batch:
            client.ack(arrived.message.mid, arrived.message.qos)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
