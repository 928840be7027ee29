"""Real brokers for tests: mosquitto on a free loopback port (kill -9 and restart on the same port), amqtt in a child process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from side_tuning.broker_connection import BrokerSettings
from tests.waiting import wait_until

AMQTT_PROGRAM = """
import asyncio, sys
from amqtt.broker import Broker

async def main(port):
    broker = Broker({
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    })
    await broker.start()
    await asyncio.Event().wait()

asyncio.run(main(int(sys.argv[1])))
"""


def mosquitto_program() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


needs_mosquitto = pytest.mark.skipif(mosquitto_program() is None, reason="mosquitto is not installed (apt install mosquitto)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class RunningBroker:
    """A broker process that can be killed and started again on its port."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.command = command
        self.port = port
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> BrokerSettings:
        return BrokerSettings(host="127.0.0.1", port=self.port, tls=False, reconnect_max_seconds=0.5)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        wait_until(self._listening, 30, f"the broker listens on port {self.port}; see {self.log}")

    def _listening(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the broker ended with {self.process.returncode}:\n{self.log.read_text(errors='replace')}")
        return accepts_connections(self.port)

    def kill(self) -> None:
        """kill -9: nothing is flushed, no goodbye."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def suspend(self) -> None:
        """SIGSTOP: connections stay up and nothing answers, like a link that went dead."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def _end(self, sign: signal.Signals) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(sign)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@contextmanager
def mosquitto(
    folder: Path, extra: str = "", *, port: int | None = None, anonymous: bool = True, listener_extra: str = "",
) -> Iterator[RunningBroker]:
    """A running mosquitto without persistence; `extra` are global lines of its configuration, `listener_extra` follow the listener."""
    program = mosquitto_program()
    assert program is not None, "mark the test with needs_mosquitto"
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"mosquitto-{port}.conf"
    config.write_text(
        # Started as root (containers), mosquitto would drop to a user that cannot read the test's files.
        f"per_listener_settings false\nlog_type all\n{'user root' if os.geteuid() == 0 else ''}\nset_tcp_nodelay true\n{extra}\n"
        f"allow_anonymous {'true' if anonymous else 'false'}\nlistener {port} 127.0.0.1\n{listener_extra}\n"
    )
    broker = RunningBroker([program, "-c", str(config)], port, folder / f"mosquitto-{port}.log")
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@contextmanager
def amqtt(folder: Path) -> Iterator[RunningBroker]:
    """A running amqtt (pure Python, MQTT 3.1.1 only)."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    broker = RunningBroker([sys.executable, "-c", AMQTT_PROGRAM, str(port)], port, folder / f"amqtt-{port}.log")
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()
