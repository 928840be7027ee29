"""Sends the orders that people wrote for devices: a row in the store becomes one MQTT message.

An order counts as sent once the broker has it. Sent twice (a crash in between) it does no harm: every order names a
state, and the device sees by its id that it knows it.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime
from typing import cast

from coordinator.store.commands import commands_to_send, mark_commands_sent
from coordinator.store.engine import Store
from coordinator.store.timestamps import to_seconds
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Command, CommandName

logger = logging.getLogger(__name__)

ACK_SECONDS = 5.0


def send_commands(store: Store, connection: BrokerConnection, now: datetime) -> int:
    """Send what waits; returns how many the broker took. Without a connection everything waits on."""
    if not connection.connected:
        return 0
    with store.read() as session:
        rows = commands_to_send(session, now)
    handles = []
    for row in rows:
        command = Command(str(row.id), cast(CommandName, row.name), to_seconds(row.expires_at))
        try:
            handles.append((row, connection.publish(topics.command(row.device), command.to_bytes())))
        except FrameError as error:  # a name that no device can have; the row expires by itself
            logger.debug("order %d is not sent: %s", row.id, error)
    deadline = time.monotonic() + ACK_SECONDS
    sent = [row for row, handle in handles if handle.wait(max(0.0, deadline - time.monotonic()))]
    if sent:
        with store.write() as session:
            mark_commands_sent(session, [row.id for row in sent], now)
    for row in sent:
        logger.info("sent the order %r of %s to %s", row.name, row.created_by, row.device)
    return len(sent)
