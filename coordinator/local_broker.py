"""The broker that `coordinator run` starts on this machine: the embedded one, or mosquitto with its development file."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path
from typing import Literal

from coordinator.files import write_atomically
from coordinator.settings import ConfigError, CoordinatorSettings

BrokerChoice = Literal["embedded", "mosquitto", "external"]
LOOPBACK_HOSTS = ("127.0.0.1", "localhost")

# broker_config/mosquitto.dev.conf holds the same lines, with comments (a test compares them).
_MOSQUITTO_LINES = """
listener {port} 127.0.0.1
allow_anonymous true
persistence false
max_packet_size 1048576
max_inflight_messages 256
max_queued_messages 200000
max_queued_bytes 268435456
set_tcp_nodelay true
log_type error
log_type warning
log_type notice
"""


def mosquitto_configuration(port: int) -> str:
    return _MOSQUITTO_LINES.lstrip().format(port=port)


def find_mosquitto() -> str:
    """The path of the mosquitto program; `ConfigError` where there is none."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")
    if found is None:
        raise ConfigError("mosquitto is not installed; install it (apt install mosquitto) or use --broker embedded")
    return found


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as brokers do: a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"no broker can be started on port {port}: {error.strerror}; stop what listens there, set another "
                "broker.port, or use that broker with --broker external"
            ) from error


def broker_command(choice: BrokerChoice, settings: CoordinatorSettings) -> list[str] | None:
    """The command that starts the chosen broker where the settings say; None for one that somebody else runs.

    Raises:
        ConfigError: the settings name another machine or TLS, the port is taken, or mosquitto is not installed.
    """
    if choice == "external":
        return None
    broker = settings.broker
    if broker.host not in LOOPBACK_HOSTS or broker.tls:
        raise ConfigError(
            f"--broker {choice} serves this machine only, without TLS; the settings say {broker.host}:{broker.port}"
            f"{' with TLS' if broker.tls else ''}: set broker.host = \"127.0.0.1\" and broker.tls = false, or use --broker external"
        )
    _check_free(broker.port)
    if choice == "embedded":
        return [sys.executable, "-m", "coordinator.cli", "broker", "--port", str(broker.port)]
    path: Path = settings.data_directory / "mosquitto.conf"
    write_atomically(path, mosquitto_configuration(broker.port).encode())
    return [find_mosquitto(), "-c", str(path)]
