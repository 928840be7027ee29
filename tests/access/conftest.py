"""One broker with the production files for each module here, and an observer that sees and may do everything.

The observer has a third listener, on the loopback and without rules, which only these tests add: nobody may read `#` on the
two that ship. "Denied" means that it saw nothing and that nothing was retained.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from side_tuning.broker_connection import BrokerConnection
from side_tuning.broker_messages import Message
from side_tuning.broker_settings import BrokerSettings
from tests.brokers import free_port
from tests.tls_broker import HOST, TlsBroker, tls_broker
from tests.waiting import wait_until

WAIT_SECONDS = 60.0  # generous: a machine may be ten times slower; nothing waits that long where all is well

_numbers = itertools.count(1)


def token(what: str = "message") -> bytes:
    """A payload that no other message has."""
    return f"{what} {next(_numbers)}".encode()


class Client:
    """A connection that keeps what it receives."""

    def __init__(self, settings: BrokerSettings, client_id: str, filters: Sequence[str] = (), **options: object) -> None:
        self.received: list[Message] = []
        self._lock = threading.Lock()
        self.connection = BrokerConnection(settings, client_id, subscriptions=filters, on_message=self._keep, **options)  # type: ignore[arg-type]

    def _keep(self, message: Message) -> None:
        with self._lock:
            self.received.append(message)

    def messages(self) -> list[Message]:
        with self._lock:
            return list(self.received)

    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages()]

    def start(self) -> Client:
        """Returns when the broker has accepted or refused."""
        self.connection.start()
        wait_until(lambda: self.connection.connected or self.connection.failures, WAIT_SECONDS, "accepted or refused")
        return self

    @property
    def connected(self) -> bool:
        return self.connection.connected

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> str:
        """What became of it: "success" or the broker's refusal."""
        handle = self.connection.publish(topic, payload, retain=retain)
        handle.wait(WAIT_SECONDS)
        return handle.rc

    def wait_for(self, payload: bytes) -> None:
        wait_until(lambda: payload in self.payloads(), WAIT_SECONDS, f"{payload!r} arrives at {self.connection.client_id}")

    def break_off(self) -> None:
        """End the connection without a goodbye, as a power failure does, so that the last will goes out."""
        client, thread = self.connection._client, self.connection._thread
        socket = client.socket() if client else None
        assert socket is not None
        assert thread is not None
        self.connection._stopping.set()
        socket.shutdown(2)
        thread.join(WAIT_SECONDS)

    def stop(self) -> None:
        self.connection.stop()


def retained(observer: Client, topic: str) -> list[bytes]:
    """What the broker holds for a topic: a second subscription makes it send that again."""
    seen = len(observer.messages())
    observer.connection.subscribe(topic)
    settle(observer)
    found = [message.payload for message in observer.messages()[seen:] if message.topic == topic and message.retain]
    observer.connection.unsubscribe(topic)
    return found


def settle(observer: Client) -> None:
    """All that the observer was to receive until now has arrived."""
    last = token("settled")
    observer.publish("observer/settled", last)
    observer.wait_for(last)


def confirm(observer: Client, reader: Client, topic: str) -> None:
    """A message that the reader may see has arrived: its subscription stands, and so have all before it."""
    sentinel = token("sentinel")

    def arrived() -> bool:
        observer.publish(topic, sentinel)
        return sentinel in reader.payloads()

    wait_until(arrived, WAIT_SECONDS, f"{topic} arrives at {reader.connection.client_id}")


MakeClient = Callable[..., Client]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TlsBroker, BrokerSettings]]:
    port = free_port()
    with tls_broker(tmp_path_factory.mktemp("access"), extra=f"listener {port} {HOST}\nallow_anonymous true") as broker:
        yield broker, BrokerSettings(host=HOST, port=port, tls=False)


@pytest.fixture(scope="module")
def broker(site: tuple[TlsBroker, BrokerSettings]) -> TlsBroker:
    return site[0]


@pytest.fixture(scope="module")
def observer(site: tuple[TlsBroker, BrokerSettings]) -> Iterator[Client]:
    """Sees every message but `$SYS`; may write anything."""
    client = Client(site[1], "observer", ["#"]).start()
    # Its subscription stands once a message of its own comes back.
    payload = token("observer")
    client.publish("observer/ready", payload)
    client.wait_for(payload)
    yield client
    client.stop()


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """Clients that end with the test."""
    clients: list[Client] = []

    def make(settings: BrokerSettings, client_id: str = "any", filters: Sequence[str] = (), **options: object) -> Client:
        clients.append(Client(settings, client_id, filters, **options))
        return clients[-1].start()

    yield make
    for client in clients:
        client.stop()
