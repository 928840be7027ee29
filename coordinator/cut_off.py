"""Throws revoked devices out of the broker.

A broker looks at its revocation list when somebody connects; a connection that lives goes on. What ends it is another
client of the same name: brokers let the newer one win. So the enrolment program, which can sign for any name, comes in
as the device for a moment, with a certificate good for minutes that never leaves its memory and a private folder, takes
the device's queued session with it, and goes.

Needs a broker that takes the client id from the certificate (`use_username_as_clientid` in mosquitto): elsewhere a
hostile device could have chosen another client id, and stays until its connection ends by itself.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

from coordinator.authority import PRIVATE_FILE, Authority, certificate_pem, key_pem, new_key
from coordinator.files import write_atomically
from side_tuning.broker_connection import BrokerConnection
from side_tuning.broker_settings import BrokerSettings

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
CERTIFICATE_DAYS = 10 / 1440
# After the list was written the broker needs a moment to read it (start-broker looks once a second). Until then a device
# that was thrown out comes back; so it is thrown out again, and once more for a broker that is slow.
AFTER_SECONDS = (0.0, 4.0, 20.0, 90.0)
RETRY_SECONDS = 5.0
MOST_AT_ONCE = 20
RECENT = timedelta(hours=1)  # after a start: devices revoked within this time are thrown out once more


def cut_off(broker: BrokerSettings, device: str, authority: Authority, now: datetime) -> bool:
    """End the connection of `device`, if it has one, and its queued session; False if the broker did not let us in."""
    if not broker.tls:
        return _take_over(broker, device)
    key = new_key()
    certificate = authority.issue(key.public_key(), device, now=now, days=CERTIFICATE_DAYS, usage="client")
    with tempfile.TemporaryDirectory(prefix="cut-off-") as name:  # readable by this user alone
        folder = Path(name)
        write_atomically(folder / "client.pem", certificate_pem(certificate))
        write_atomically(folder / "client.key", key_pem(key), PRIVATE_FILE)
        files = {"certificate_file": folder / "client.pem", "key_file": folder / "client.key"}
        return _take_over(broker.model_copy(update=files), device)


def _take_over(broker: BrokerSettings, device: str) -> bool:
    connected = threading.Event()
    connection = BrokerConnection(broker, device, on_connected=lambda _: connected.set(), clean_start=True)
    connection.start()
    try:
        return connected.wait(CONNECT_SECONDS)
    finally:
        connection.stop(timeout_seconds=CONNECT_SECONDS)


class CutOffs:
    """Which devices are to be thrown out, and when next."""

    def __init__(self, broker: BrokerSettings, authority: Authority) -> None:
        self._broker = broker
        self._authority = authority
        self._due: dict[str, list[float]] = {}  # device -> moments (monotonic), ascending
        self._known: dict[str, datetime] = {}

    def note(self, revoked: dict[str, datetime], now: datetime, *, list_changed: bool) -> None:
        """Plan for every device in `revoked` (device -> when) that is new here; the revocation list has been written.

        After a start all are new: then those count that were revoked lately or that the list did not have yet.
        """
        moment = time.monotonic()
        for device, at in revoked.items():
            if self._known.get(device) != at and (list_changed or at > now - RECENT):
                self._due[device] = [moment + seconds for seconds in AFTER_SECONDS]
                logger.info("%s was revoked: it is thrown out of the broker", device)
        for device in self._due.keys() - revoked.keys():  # let in again
            del self._due[device]
        self._known = dict(revoked)

    @property
    def pending(self) -> int:
        return len(self._due)

    def run_due(self, now: datetime) -> None:
        """Throw out those whose time has come; one that could not be is tried again."""
        moment = time.monotonic()
        ready = [device for device, times in self._due.items() if times[0] <= moment]
        for device in ready[:MOST_AT_ONCE]:
            if not cut_off(self._broker, device, self._authority, now):
                self._due[device][0] = time.monotonic() + RETRY_SECONDS
                logger.warning("could not throw %s out of the broker; trying again", device)
                return  # the broker has other troubles; everybody waits
            if left := [later for later in self._due[device] if later > moment]:
                self._due[device] = left
            else:
                del self._due[device]
