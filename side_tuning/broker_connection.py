"""One connection to an MQTT broker that stays up: TLS, MQTT 5 (falls back to 3.1.1), last will, reconnect, re-subscribe.

The only import of paho. Rules that callers build on:
- a publish belongs to the connection it was made on; when that breaks its handle fails and the caller sends again;
- each connection is an epoch with a paho client of its own, so an acknowledgement can never reach a later connection;
- callbacks run in the network thread: they enqueue or do microseconds of work, and what they raise never ends the loop.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from side_tuning.broker_failures import (
    PACKET_TOO_LARGE,
    UNSUPPORTED_PROTOCOL_VERSION,
    Failure,
    FailureKind,
    connect_failure,
    dropped,
    publish_words,
    refusal,
    tls_failure,
)
from side_tuning.broker_messages import Connected, Message, PayloadTooLarge, PublishHandle
from side_tuning.broker_settings import BrokerFilesError, BrokerSettings, read_password
from side_tuning.broker_tls import RememberingSocket, tls_context
from side_tuning.mqtt_packets import puback_packet, publish_packet

__all__ = [
    "BrokerConnection",
    "BrokerFilesError",
    "BrokerSettings",
    "Connected",
    "Message",
    "PayloadTooLarge",
    "PublishHandle",
]

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 10.0
LOOP_SECONDS = 0.5
BRIEF_CONNECTIONS_TOLD = 2
STEADY_SECONDS = 5.0  # a connection that lasts this long starts the back-off anew; shorter ones are ping-pong
PACKET_OVERHEAD_BYTES = 16  # fixed header, topic length, packet id, property length


Will = tuple[str, bytes]
Goodbye = tuple[str, bytes]


class BrokerConnection:
    """Keeps one client connected until `stop`. Thread-safe; publishes from any thread."""

    def __init__(
        self,
        settings: BrokerSettings,
        client_id: str,
        *,
        will: Will | Callable[[], Will] | None = None,
        subscriptions: Sequence[str] = (),
        on_message: Callable[[Message], None] | None = None,
        on_connected: Callable[[Connected], None] | None = None,
        on_disconnected: Callable[[str], None] | None = None,
        manual_ack: bool = False,
        clean_start: bool = True,
        session_expiry_seconds: int = 0,
        receive_maximum: int | None = None,
        reconnect_min_seconds: float = 0.5,
        trusted_time: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Prepare a connection; nothing is sent before `start`.

        Args:
            settings: host, TLS files, keepalive.
            client_id: unique per broker; two clients with one id throw each other out.
            will: retained message that the broker publishes when the connection breaks; a callable is asked anew
                before each connection, so that a will can carry that connection's session id.
            subscriptions: topics or filters, declared on every connect (QoS 1); `subscribe` adds to them.
            on_message: receives every message.
            on_connected: called on every connect, after the subscriptions were sent.
            on_disconnected: called with the reason when an established connection ends.
            manual_ack: messages count as received only after `acknowledge`.
            clean_start: False asks the broker to keep the session (and queued messages) between connections.
            session_expiry_seconds: how long it keeps it (MQTT 5).
            receive_maximum: the most unacknowledged messages that the broker may have under way to us (MQTT 5).
            reconnect_min_seconds: first pause after a failure; doubles, jittered, up to the settings' maximum.
            trusted_time: what to check dates of certificates against (see side_tuning/broker_tls.py); None: the system's clock.

        Raises:
            BrokerFilesError: a file named in the settings is missing or wrong.

        """
        self.settings = settings
        self.client_id = client_id
        self._will = will
        self._filters: dict[str, None] = dict.fromkeys(subscriptions)  # ordered set
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._manual_ack = manual_ack
        self._clean_start = clean_start
        self._session_expiry_seconds = session_expiry_seconds
        self._receive_maximum = receive_maximum
        self._reconnect_min_seconds = reconnect_min_seconds
        self._keepalive_wanted = settings.keepalive_seconds
        self._trusted_time = trusted_time
        tls_context(settings)  # wrong files are told now; each connection reads them anew
        self._password = read_password(settings)

        self._lock = threading.Lock()  # guards the fields below; never held while paho is called
        self._client: paho.Client | None = None  # the accepted connection's client, else None
        self._epoch = 0
        self._handles: dict[int, PublishHandle] = {}
        self._early_acks: dict[int, ReasonCode] = {}  # PUBACKs that overtook the publisher's own bookkeeping
        self._asked: dict[int, list[str]] = {}  # SUBSCRIBE packet id -> filters

        self._stopping = threading.Event()
        self._cut = threading.Event()  # ask the loop to drop this connection and make a new one
        self._thread: threading.Thread | None = None
        self._ticked_at = time.monotonic()
        self._attempt = _Attempt()
        self.keepalive_seconds = settings.keepalive_seconds  # in force on this connection
        self.max_packet_bytes: int | None = None
        self.peer_certificate_expires_at: float | None = None  # of the broker that accepted us last, seconds since 1970
        self.protocol: Literal["5", "3.1.1"] = "3.1.1" if settings.protocol == "3.1.1" else "5"
        self._learned_limit: int | None = None  # from a broker that states no limit but enforces one
        self.last_error = ""
        self.failure_kind: FailureKind = ""  # of last_error, where a failed or lost connection is its reason
        self.failures = 0  # in a row
        self._brief_connections = 0  # in a row, accepted but lost at once
        self._told: set[str] = set()  # reasons logged since the last steady connection
        self.refused_subscriptions: dict[str, str] = {}
        self.callback_errors = 0

    # State.

    @property
    def connected(self) -> bool:
        return self._client is not None

    @property
    def epoch(self) -> int:
        """Counts accepted connections; 0 before the first."""
        return self._epoch

    @property
    def address(self) -> str:
        return f"{self.settings.host}:{self.settings.port}"

    @property
    def tick_age_seconds(self) -> float:
        """How long ago the network thread last went round; a hung one is a reason to restart the program."""
        return time.monotonic() - self._ticked_at

    @property
    def thread_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    # Life.

    def start(self) -> None:
        if self._thread is not None:
            raise RuntimeError("a broker connection is started once")
        self._thread = threading.Thread(target=self._run, name=f"broker-{self.client_id}", daemon=True)
        self._thread.start()

    def stop(self, goodbye: Goodbye | None = None, *, timeout_seconds: float = 5.0) -> None:
        """Publish the goodbye (retained), disconnect cleanly so that the last will does not fire, end the thread."""
        if goodbye is not None and self.connected:
            try:
                self.publish(goodbye[0], goodbye[1], retain=True).wait(timeout_seconds)
            except PayloadTooLarge:
                logger.exception("the goodbye does not fit the broker's packet limit")
        self._stopping.set()
        with self._lock:
            client = self._client
        if client is not None:
            with suppress(OSError):  # it has just ended by itself
                client.disconnect()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds + CONNECT_TIMEOUT_SECONDS)

    def reconnect(self) -> None:
        """Drop the connection and make a new one, for instance so that a new keepalive takes effect."""
        self._cut.set()

    def set_keepalive(self, seconds: int) -> None:
        """The keepalive that the next connection asks for."""
        self._keepalive_wanted = min(max(int(seconds), 5), 65_535)

    # Messages.

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        qos: int = 1,
        properties: dict[str, str] | None = None,
        on_done: Callable[[PublishHandle], None] | None = None,
    ) -> PublishHandle:
        """Hand a message to the network thread. Never blocks; without a connection the handle has already failed.

        Args:
            topic: no wildcards.
            payload: the bytes; empty and retained clears the topic.
            retain: the broker keeps it for later subscribers.
            qos: 0 or 1.
            properties: MQTT 5 user properties; left out on 3.1.1.
            on_done: called once, possibly in the network thread, when the handle is finished.

        Raises:
            PayloadTooLarge: the broker would only cut the connection.

        """
        handle = PublishHandle(len(payload), on_done)
        with self._lock:
            client, epoch = self._client, self._epoch
        if client is None:
            handle.finish("not connected")
            return handle
        properties = properties if self.protocol == "5" else None
        self._check_size(topic, payload, properties)
        try:
            info = client.publish(topic, payload, qos, retain, _user_properties(properties))
        except OSError:  # the connection ends at this moment, and its wake-up socket with it
            handle.finish("connection lost")
            return handle
        if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_AGAIN):
            handle.finish("not connected" if info.rc == MQTTErrorCode.MQTT_ERR_NO_CONN else paho.error_string(info.rc))
            return handle
        with self._lock:
            if self._epoch != epoch or self._client is None:
                ended, reason = True, None
            else:
                ended, reason = False, self._early_acks.pop(info.mid, None)
                if reason is None:
                    self._handles[info.mid] = handle
        if ended:
            handle.finish("connection lost")
        elif reason is not None:
            handle.finish(_puback_words(reason))
        return handle

    def subscribe(self, topic: str) -> None:
        """Subscribe now and again on every later connect."""
        with self._lock:
            self._filters[topic] = None
            client = self._client
        if client is not None:
            with suppress(OSError):  # it has just ended; the next one declares every filter
                self._declare(client, [topic])

    def unsubscribe(self, topic: str) -> None:
        with self._lock:
            self._filters.pop(topic, None)
            client = self._client
        self.refused_subscriptions.pop(topic, None)
        if client is not None:
            with suppress(OSError):
                client.unsubscribe(topic)

    def acknowledge(self, message: Message) -> bool:
        """Tell the broker that `message` is safe; False if its connection is over (the broker sends it again)."""
        with self._lock:
            client = self._client if message.epoch == self._epoch else None
        if client is None:
            return False
        # A connection that ends right here takes its own client along: the packet goes to a closed socket.
        try:
            return client.ack(message.mid, message.qos) == MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError:
            return False

    def acknowledge_all(self, messages: Sequence[Message]) -> None:
        """Tell the broker that these are safe, in this order and in one write; those of earlier connections it sends again."""
        with self._lock:
            client, epoch = self._client, self._epoch
        if client is not None:
            mids = [message.mid for message in messages if message.epoch == epoch and message.qos == 1]
            _write(client, b"".join(puback_packet(mid) for mid in mids))

    def publish_all(self, messages: Sequence[tuple[str, bytes]], *, retain: bool = False) -> None:
        """Hand (topic, payload) messages of QoS 0 to the network thread in one write; lost if the connection ends now.

        paho takes some 100 microseconds for each message that it sends, and the interpreter's lock with it.

        Raises:
            PayloadTooLarge: the broker would only cut the connection; nothing was sent.

        """
        for topic, payload in messages:
            self._check_size(topic, payload, None)
        with self._lock:
            client = self._client
        if client is not None:
            five = self.protocol == "5"
            _write(client, b"".join(publish_packet(topic, payload, retain=retain, five=five) for topic, payload in messages))

    # The network thread.

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._ticked_at = time.monotonic()
            attempt = self._attempt = _Attempt()
            try:
                self._serve_one_connection(attempt)
            except Exception as error:  # a broken packet, a bug in paho: start over, loudly
                logger.exception("connection to the broker at %s failed unexpectedly", self.address)
                attempt.reason = attempt.reason or f"{type(error).__name__}: {error}"
            finally:
                self._connection_over(attempt)
            if self._stopping.is_set():
                break
            if self._next_protocol(attempt):
                continue
            self._note_failure(attempt)
            self._pause()

    def _serve_one_connection(self, attempt: _Attempt) -> None:
        try:
            client = self._new_client(attempt)
            client.connect(self.settings.host, self.settings.port, self._keepalive_wanted, **self._mqtt5_options())
        except BrokerFilesError as error:
            attempt.fail(Failure("files", str(error)))
            return
        except (OSError, ssl.CertificateError) as error:
            attempt.fail(connect_failure(error, self.settings, self.address))
            return
        attempt.reached = True
        attempt.socket = client.socket()
        deadline = time.monotonic() + CONNECT_TIMEOUT_SECONDS
        self._cut.clear()
        rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        while rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            rc = client.loop(LOOP_SECONDS)
            self._ticked_at = time.monotonic()
            if attempt.accepted_at is None and (self._ticked_at > deadline or self._stopping.is_set()):
                attempt.fail(Failure("unreachable", f"the broker at {self.address} accepts connections but does not answer"))
                break
            if self._cut.is_set():
                attempt.reason, attempt.wanted = "reconnecting on purpose", True
                break
        if not attempt.wanted and attempt.accepted_at is not None and not self._stopping.is_set():
            attempt.fail(Failure("lost", paho.error_string(rc)))
        _close(client)

    def _new_client(self, attempt: _Attempt) -> paho.Client:
        five = self.protocol == "5"
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            clean_session=None if five else self._clean_start,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=self._manual_ack,
        )
        client.connect_timeout = CONNECT_TIMEOUT_SECONDS
        # Having this callback keeps publishing threads from writing to the socket themselves; two writers could interleave.
        client.on_socket_register_write = _leave_writing_to_the_loop
        client.on_connect = lambda c, _u, flags, reason, props: self._accepted(attempt, c, flags, reason, props)
        client.on_disconnect = lambda _c, _u, flags, reason, _p: self._dropped(attempt, flags, reason)
        client.on_message = lambda c, _u, message: self._received(attempt, c, message)
        client.on_publish = lambda _c, _u, mid, reason, _p: self._published(mid, reason)
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._subscribed(mid, reasons)
        if self.settings.username is not None:
            client.username_pw_set(self.settings.username, self._password)
        context = tls_context(self.settings, self._trusted_time())
        if context is not None:
            client.tls_set_context(context)
        will = self._will() if callable(self._will) else self._will
        if will is not None:
            client.will_set(will[0], will[1], qos=1, retain=True)
        return client

    def _mqtt5_options(self) -> dict[str, Any]:
        if self.protocol != "5":
            return {}
        properties = _properties(PacketTypes.CONNECT)
        if self._session_expiry_seconds:
            properties.SessionExpiryInterval = self._session_expiry_seconds
        if self._receive_maximum:
            properties.ReceiveMaximum = self._receive_maximum
        return {"clean_start": self._clean_start, "properties": properties}

    def _accepted(
        self, attempt: _Attempt, client: paho.Client, flags: paho.ConnectFlags, reason: ReasonCode, properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            attempt.refused = reason
            # A 3.1.1 broker cannot state its longest keepalive, only refuse; go back to the one that was configured.
            self._keepalive_wanted = self.settings.keepalive_seconds
            attempt.fail(refusal(reason.value, str(reason), self.settings, self.client_id, self.address))
            return
        stated = vars(properties) if properties is not None else {}
        self.keepalive_seconds = stated.get("ServerKeepAlive", self._keepalive_wanted)
        self.max_packet_bytes = stated.get("MaximumPacketSize", self._learned_limit)
        # paho ignores the broker's ReceiveMaximum; nothing is in flight yet, so the limit can still be set.
        client._max_inflight_messages = min(stated.get("ReceiveMaximum", 100), 100)
        self.peer_certificate_expires_at = _peer_expiry(client)
        with self._lock:
            self._epoch += 1
            attempt.epoch = self._epoch
            attempt.accepted_at = time.monotonic()
            self._client = client
            self._early_acks.clear()
            filters = list(self._filters)
        if self.failures:
            # Ping-pong with a namesake would fill the log; that it goes on has been said.
            level = logging.DEBUG if self._brief_connections >= BRIEF_CONNECTIONS_TOLD else logging.INFO
            logger.log(level, "connected to the broker at %s again after %d failed attempts", self.address, self.failures)
        else:
            logger.info("connected to the broker at %s (MQTT %s)", self.address, self.protocol)
        self.last_error = self.failure_kind = ""
        self.refused_subscriptions.clear()
        if filters:
            self._declare(client, filters)
        connected = Connected(self._epoch, bool(flags.session_present), self.protocol, self.keepalive_seconds)
        self._guard(self._on_connected, connected)

    def _declare(self, client: paho.Client, filters: list[str]) -> None:
        # One SUBSCRIBE for all; 100 at a time keeps the packet far below any broker's limit.
        for start in range(0, len(filters), 100):
            chunk = filters[start : start + 100]
            _, mid = client.subscribe([(name, 1) for name in chunk])
            if mid is not None:
                with self._lock:
                    self._asked[mid] = chunk

    def _subscribed(self, mid: int, reasons: list[ReasonCode]) -> None:
        with self._lock:
            filters = self._asked.pop(mid, [])
        for name, reason in zip(filters, reasons, strict=False):
            if reason.is_failure:
                words = f"the broker refused the subscription to {name}: {reason}; grant it in the broker's access rules"
                self.refused_subscriptions[name] = words
                self.last_error = words
                logger.error("%s", words)

    def _received(self, attempt: _Attempt, client: paho.Client, received: paho.MQTTMessage) -> None:
        try:
            message = Message(
                received.topic,
                bytes(received.payload),
                received.retain,
                attempt.epoch,
                received.mid,
                received.qos,
                _properties_dict(received.properties),
            )
        except UnicodeDecodeError:
            logger.error("a message whose topic is no UTF-8 was dropped")
        else:
            if self._guard(self._on_message, message):
                return
        # Nobody will acknowledge what could not be handed over; left open it would stall the messages behind it.
        if self._manual_ack:
            client.ack(received.mid, received.qos)

    def _published(self, mid: int, reason: ReasonCode) -> None:
        with self._lock:
            handle = self._handles.pop(mid, None)
            if handle is None:
                self._early_acks[mid] = reason
        if handle is not None:
            handle.finish(_puback_words(reason))

    def _dropped(self, attempt: _Attempt, flags: paho.DisconnectFlags, reason: ReasonCode) -> None:
        if attempt.reason or self._stopping.is_set():
            return
        error = attempt.socket.failure if isinstance(attempt.socket, RememberingSocket) else None
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            attempt.fail(tls_failure(error, self.settings, self.address))
        answered = attempt.accepted_at is not None
        attempt.fail(dropped(reason.value, str(reason), self.settings, self.client_id, self.address, answered=answered))
        if flags.is_disconnect_packet_from_server and reason.value == PACKET_TOO_LARGE:
            with self._lock:
                largest = max((handle.payload_bytes for handle in self._handles.values()), default=0)
            if largest:
                self._learned_limit = largest
                self.max_packet_bytes = min(self.max_packet_bytes or largest, largest)

    def _connection_over(self, attempt: _Attempt) -> None:
        with self._lock:
            self._client = None
            abandoned, self._handles = list(self._handles.values()), {}
            self._early_acks.clear()
            self._asked.clear()
        for handle in abandoned:
            handle.finish("connection lost")
        if attempt.accepted_at is not None:
            self._guard(self._on_disconnected, attempt.reason)

    def _note_failure(self, attempt: _Attempt) -> None:
        steady = attempt.accepted_at is not None and time.monotonic() - attempt.accepted_at > STEADY_SECONDS
        self.failures = 1 if steady else self.failures + 1
        self.last_error, self.failure_kind = attempt.reason, attempt.kind
        if attempt.wanted:
            self.failures = 0
            return
        # mosquitto 2.0 says nothing when it throws a client out for a namesake; the pattern gives it away.
        self._brief_connections = self._brief_connections + 1 if attempt.accepted_at is not None and not steady else 0
        if self._brief_connections >= BRIEF_CONNECTIONS_TOLD:
            self.last_error = f"{attempt.reason}, again within seconds; does another client use the name {self.client_id!r} too?"
        if steady:
            self._told.clear()
        # A reason that was not told yet is news: a broker that comes up may refuse the password.
        if self.last_error not in self._told:
            self._told.add(self.last_error)
            logger.error("%s; trying again until it works", self.last_error)
        else:
            logger.debug("%s (failure %d in a row)", self.last_error, self.failures)

    def _next_protocol(self, attempt: _Attempt) -> bool:
        """Change the protocol version after a refusal; True if the other one is worth trying at once."""
        if self.settings.protocol != "auto":
            return False
        if not attempt.reached or attempt.kind.startswith(("own-", "tls")):
            self.protocol = "5"
            return False
        unanswered = attempt.accepted_at is None and attempt.refused is None
        unsupported = attempt.refused is not None and attempt.refused.value == UNSUPPORTED_PROTOCOL_VERSION
        if self.protocol == "5" and (unanswered or unsupported):
            self.protocol = "3.1.1"
            logger.info("the broker at %s does not answer MQTT 5; trying 3.1.1", self.address)
            return True
        if self.protocol == "3.1.1" and unanswered:
            self.protocol = "5"
        return False

    def _pause(self) -> None:
        longest = min(self.settings.reconnect_max_seconds, self._reconnect_min_seconds * 2 ** min(self.failures, 16))
        seconds = longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter against reconnecting all at once
        deadline = time.monotonic() + seconds
        while not self._stopping.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
            self._ticked_at = time.monotonic()
            if self._ticked_at >= deadline:
                return

    def _guard(self, callback: Callable[[Any], None] | None, argument: object) -> bool:
        if callback is None:
            return True
        try:
            callback(argument)
        except Exception:
            self.callback_errors += 1
            logger.exception("a callback of the broker connection raised (%d so far)", self.callback_errors)
            return False
        return True

    def _check_size(self, topic: str, payload: bytes, properties: dict[str, str] | None) -> None:
        if self.max_packet_bytes is None:
            return
        extra = sum(5 + len(k.encode()) + len(v.encode()) for k, v in (properties or {}).items())
        size = len(payload) + len(topic.encode()) + extra + PACKET_OVERHEAD_BYTES
        if size > self.max_packet_bytes:
            raise PayloadTooLarge(
                f"a packet of {size} bytes for {topic} exceeds the broker's limit of {self.max_packet_bytes}; "
                "raise max_packet_size at the broker or send smaller messages"
            )


@dataclass
class _Attempt:
    """What happened on one attempt to connect, from the first packet to the last."""

    epoch: int = 0
    reached: bool = False
    refused: ReasonCode | None = None
    accepted_at: float | None = None
    reason: str = ""
    kind: FailureKind = ""
    wanted: bool = False
    socket: object = None

    def fail(self, failure: Failure) -> None:
        """Keep the first reason: what follows from it says less."""
        if not self.reason:
            self.kind, self.reason = failure


def _leave_writing_to_the_loop(*_: object) -> None:
    pass


def _write(client: paho.Client, packets: bytes) -> None:
    """Send whole packets that need no answer as one; paho's public calls make a system call and a wake-up of each."""
    if packets:
        with suppress(OSError):  # the connection ends at this moment, and its wake-up socket with it
            client._packet_queue(paho.PUBACK, packets, 0, 1)  # a kind after which paho has nothing more to do


def _peer_expiry(client: paho.Client) -> float | None:
    peer = client.socket()
    if not isinstance(peer, ssl.SSLSocket):
        return None
    until = (peer.getpeercert() or {}).get("notAfter")
    return float(ssl.cert_time_to_seconds(until)) if isinstance(until, str) else None


def _close(client: paho.Client) -> None:
    """Close the socket without a DISCONNECT (that would cancel the last will); paho offers no public way."""
    client._sock_close()
    client._reset_sockets()


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]


def _user_properties(values: dict[str, str] | None) -> Properties | None:
    if not values:
        return None
    properties = _properties(PacketTypes.PUBLISH)
    properties.UserProperty = list(values.items())
    return properties


def _properties_dict(properties: Properties | None) -> dict[str, str]:
    return dict(getattr(properties, "UserProperty", ()) or ())


def _puback_words(reason: ReasonCode) -> str:
    return publish_words(reason.value, str(reason)) if reason.is_failure else "success"
