"""Tell systemd how the agent is doing: READY=1, WATCHDOG=1, STOPPING=1. Silent where systemd did not start it."""

from __future__ import annotations

import os
import socket


def notify(message: str) -> None:
    """Send one datagram to NOTIFY_SOCKET, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's abstract sockets
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(address)
            sender.sendall(message.encode())
    except OSError:
        # Nothing to be done about it here; without the datagram systemd restarts the agent, which is the right outcome.
        return


def watchdog_seconds() -> float | None:
    """How often systemd wants to hear from us, or None if it does not watch this process."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not microseconds.isdigit() or (pid is not None and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1e6
