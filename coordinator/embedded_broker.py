"""A broker in pure Python (amqtt) for one machine: demonstrations and tests, never a network.

What it does: MQTT 3.1.1, QoS 1, retained messages, last wills, loopback only, no passwords. What it does not do (use
mosquitto for any of it): MQTT 5, TLS, access rules, a packet size limit, bounded memory, noticing a client that
vanished without closing its socket. It keeps nothing: a restart forgets retained messages, and while a client is
away nothing is queued for it. It also drops a message that a subscriber leaves unacknowledged for 5 s. None of this
loses samples, since a device keeps its frames until the coordinator's receipt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

from amqtt.adapters import ReaderAdapter, StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig
from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10.0
REFUSE_MQTT5 = bytes([0x20, 3, 0, 0x84, 0])  # CONNACK "unsupported protocol version", in MQTT 5's own form

logger = logging.getLogger(__name__)


class BrokerStartError(RuntimeError):
    """The broker cannot listen; the text names the port and the cure."""


class _Subscriptions(dict[str, list[tuple[Session, int]]]):
    """Filter -> subscribers, iterated over a snapshot.

    amqtt iterates this dictionary with `await` inside; another client that subscribes meanwhile raised "dictionary
    changed size during iteration", and the client whose connection it hit stayed connected but was never served.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().keys()))

    def items(self) -> Any:
        return list(super().items())


class _ReplayedReader(ReaderAdapter):
    """A stream of which the first bytes were already looked at."""

    def __init__(self, head: bytes, reader: asyncio.StreamReader) -> None:
        self._head = head
        self._rest = StreamReaderAdapter(reader)

    async def read(self, n: int = -1) -> bytes:
        if not self._head:
            return await self._rest.read(n)
        taken, self._head = (self._head, b"") if n < 0 else (self._head[:n], self._head[n:])
        if n < 0 or len(taken) == n:
            return taken
        return taken + await self._rest.read(n - len(taken))

    def feed_eof(self) -> None:
        self._rest.feed_eof()


class EmbeddedBroker(Broker):
    """amqtt's broker with the cures for four of its faults."""

    def __init__(self, config: BrokerConfig) -> None:
        super().__init__(config)
        self._subscriptions = _Subscriptions()

    async def stream_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str) -> None:
        # amqtt reads an MQTT 5 CONNECT as if it were 3.1.1; with a will in it, it waits for bytes that never come.
        try:
            head = await asyncio.wait_for(_read_connect_head(reader), CONNECT_SECONDS)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return
        if head[-1] == 5:
            writer.write(REFUSE_MQTT5)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()
            return
        await self._client_connected(listener_name, _ReplayedReader(head, reader), StreamWriterAdapter(writer))

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Session) -> None:
        # On each connect amqtt offers the retained messages of everybody's subscriptions to the newcomer: a device
        # would receive its neighbours' health and receipts, and every checkpoint part there is.
        subscribers = self._subscriptions.get(subscription[0], ())
        if any(subscriber.client_id == session.client_id for subscriber, _ in subscribers):
            await super()._publish_retained_messages_for_subscription(subscription, session)

    async def _handle_disconnect(
        self, client_session: Session, handler: BrokerProtocolHandler, disconnect_waiter: asyncio.Future[Any]
    ) -> None:
        client_session.said_goodbye = isinstance(disconnect_waiter.result(), DisconnectPacket)
        await super()._handle_disconnect(client_session, handler, disconnect_waiter)

    async def _client_message_loop(self, client_session: Session, handler: BrokerProtocolHandler) -> None:
        # amqtt forgets what a client sent just before it disconnected, though it acknowledged it: a device's
        # "offline" never arrived. After a loss the last will must stay the last word, so only after a goodbye.
        client_session.said_goodbye = False
        await super()._client_message_loop(client_session, handler)
        waiting = client_session.delivered_message_queue
        while client_session.said_goodbye and not waiting.empty():
            delivery: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            delivery.set_result(waiting.get_nowait())
            await self._handle_message_delivery(client_session, handler, delivery)


def _configuration(port: int) -> BrokerConfig:
    return BrokerConfig(
        listeners={"default": ListenerConfig(bind=f"{LOOPBACK}:{port}", max_connections=0)},
        plugins={"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    )


async def _read_connect_head(reader: asyncio.StreamReader) -> bytes:
    """The first packet up to its protocol level: type, length (1 to 4 bytes), name with its length, level."""
    head = await reader.readexactly(2)
    while head[-1] & 0x80 and len(head) < 5:
        head += await reader.readexactly(1)
    return head + await reader.readexactly(7)


async def serve(port: int, stop: asyncio.Event) -> None:
    """Listen on `port` of the loopback until `stop` is set."""
    broker = EmbeddedBroker(_configuration(port))
    try:
        await broker.start()
    except Exception as error:
        cause = error.__cause__ or error
        raise BrokerStartError(
            f"the embedded broker cannot listen on {LOOPBACK}:{port}: {cause}; choose another port or stop what uses it"
        ) from error
    logger.info("embedded broker listens on %s:%d", LOOPBACK, port)
    try:
        await stop.wait()
    finally:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(broker.shutdown(), timeout=5)


def run(port: int) -> None:
    """Serve until SIGTERM or SIGINT: the `coordinator broker` program."""
    # amqtt logs every connection and, at debug, whole payloads.
    logging.getLogger("amqtt").setLevel(logging.ERROR)
    logging.getLogger("transitions").setLevel(logging.ERROR)
    asyncio.run(_run(port))


async def _run(port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unhandled)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(port, stop)


def _log_unhandled(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Subscribers that go away leave cancelled waits behind; that is ordinary, a traceback each is not.
    logger.debug("embedded broker: %s: %r", context.get("message"), context.get("exception"))
