"""Renews the device's certificate in good time: new key -> request -> checked, stored beside the old -> switch -> reconnect.

The old one stays until a connection with the new one stands; if that is refused, the device goes back. A loop of the agent;
the network thread only leaves answers where it picks them up.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.enrol import believe
from edge_agent.identity import (
    Identity,
    IdentityStore,
    certificate_request,
    check_authorities,
    check_certificate,
    key_digest,
)
from edge_agent.identity_file import CHECKPOINT_KEY, IdentityError
from edge_agent.trusted_clock import TrustedClock
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.certificates import CertificateAnswer, CertificateRequest

logger = logging.getLogger(__name__)

RENEWAL = "renewal"  # what the key is for, where a first certificate has its claim's name
LOOK_SECONDS = 1.0
LIFE_BEFORE_RENEWAL = (0.64, 0.69)  # around two thirds, drawn, so that devices enrolled together do not ask together
REPEAT_MIN_SECONDS = 15.0
REPEAT_MAX_SECONDS = 3600.0
REFUSED_SECONDS = 6 * 3600.0  # after a refusal, or a certificate that the broker did not take
SETTLED_SECONDS = 600.0  # certificates that live for minutes must not be renewed all the time
FAILURES_BEFORE_GOING_BACK = 2
BLAMES_THE_IDENTITY = ("own-", "broker-untrusted", "files")


class Renewal:
    """Keeps the identity in `state_directory` fresh while the agent runs."""

    def __init__(
        self,
        connection: BrokerConnection,
        state_directory: Path,
        clock: TrustedClock,
        *,
        on_change: Callable[[], None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `IdentityError` if there is no identity that can be used."""
        self._connection = connection
        self._store = IdentityStore(state_directory)
        self._clock = clock
        self._on_change = on_change
        self._monotonic = monotonic
        self._answers: deque[bytes] = deque(maxlen=16)
        self._key: ec.EllipticCurvePrivateKey | None = None  # asked for and not answered yet
        self._ask_at = self._put_off_until = self._settled_until = 0.0  # monotonic
        self._repeat = REPEAT_MIN_SECONDS
        self._wanted = False
        self._share = random.uniform(*LIFE_BEFORE_RENEWAL)  # noqa: S311 - jitter
        identity = self._store.load()
        if identity is None:
            raise IdentityError(f"there is no identity in {state_directory}; enrol this device with a bundle")
        self.identity: Identity = identity
        self._on_trial_since: int | None = 0 if self._store.leftovers() else None  # the epoch; a crash may have come between switch and proof
        self._expiry_told = False
        self.error = ""
        self.ticked_at = monotonic()

    @property
    def due_at(self) -> float:
        """Seconds since 1970."""
        return self.identity.begins + self._share * (self.identity.ends - self.identity.begins)

    def ask_now(self) -> None:
        """By command: renew although it is not time yet."""
        self._wanted = True
        self._put_off_until = 0.0

    def offer(self, message: Message) -> bool:
        """Take an answer in the network thread; False if the message is none."""
        if message.topic != topics.certificate_answer(self.identity.facts.device):
            return False
        self._answers.append(message.payload)
        return True

    def run(self, ending: threading.Event) -> None:
        while not ending.wait(LOOK_SECONDS):
            self.ticked_at = self._monotonic()
            try:
                self.step()
            except (IdentityError, OSError) as error:  # a full disk, say: try again later
                self._put_off(f"the certificate cannot be renewed: {error}", REPEAT_MAX_SECONDS)

    def step(self) -> None:
        """One look at everything: what came, what is due, whether the new one proved itself."""
        if self._on_trial_since is not None:
            self._judge_trial(self._on_trial_since)
            return
        self._tell_expiry()
        while self._answers and self._on_trial_since is None:
            self._take(self._answers.popleft())
        now = self._monotonic()
        if self._key is None:
            if now < max(self._put_off_until, self._settled_until) or not (self._wanted or self._clock.now() >= self.due_at):
                return
            self._key, self._ask_at, self._repeat = self._store.next_key(RENEWAL), now, REPEAT_MIN_SECONDS
            logger.info("asking for the next certificate; the present one ends on %s", _day(self.identity.ends))
        if self._connection.connected and now >= self._ask_at:
            device = self.identity.facts.device
            request = CertificateRequest(certificate_request(self._key, device), self._clock.now())
            self._connection.publish(topics.certificate_request(device), request.to_bytes())
            self._ask_at = now + self._repeat * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
            self._repeat = min(self._repeat * 2, REPEAT_MAX_SECONDS)

    def _take(self, payload: bytes) -> None:
        try:
            answer = CertificateAnswer.from_bytes(payload)
        except FrameError as error:
            logger.error("an answer about the certificate was not understood: %s", error)
            return
        if self._key is None or answer.key_digest != key_digest(self._key.public_key()):
            logger.log(logging.DEBUG if self._key is None else logging.WARNING, "an answer about another key's certificate was ignored")
            return
        if answer.status == "waiting":
            return
        if answer.status == "refused":
            self._store.forget_next()
            self._put_off(f"the coordinator refused a new certificate ({answer.reason}): {answer.text or 'ask its operator'}", REFUSED_SECONDS)
            return
        old = self.identity
        try:
            certificate = check_certificate(answer.certificate, self._key, old.facts.device, old.authorities)
            authorities = check_authorities(answer.authorities) if answer.authorities else old.authorities
        except IdentityError as error:
            logger.error("an answer about the certificate was not accepted: %s", error)
            return
        checkpoint_key = self._store.link / CHECKPOINT_KEY
        self.identity = self._store.install(
            old.facts, answer.certificate, authorities, checkpoint_key.read_text(encoding="ascii") if checkpoint_key.exists() else "",
        )
        believe(self._clock, answer.at, certificate, self._connection.peer_certificate_expires_at)
        logger.info("a new certificate came, good until %s; connecting with it", _day(self.identity.ends))
        self._key, self._wanted, self._settled_until = None, False, self._monotonic() + SETTLED_SECONDS
        self._on_trial_since = self._connection.epoch
        self._connection.reconnect()

    def _judge_trial(self, since: int) -> None:
        if self._connection.connected and self._connection.epoch > since:
            self._store.drop_others()
            self._on_trial_since, self.error, self._expiry_told = None, "", False
            self._on_change()
        elif self._connection.failures >= FAILURES_BEFORE_GOING_BACK and self._connection.failure_kind.startswith(BLAMES_THE_IDENTITY):
            why = self._connection.last_error
            self._on_trial_since = None
            if self._store.go_back():
                identity = self._store.load()
                assert identity is not None, "it was switched to"
                self.identity = identity
                self._put_off(f"the broker does not take the new certificate, the old one is in use again: {why}", REFUSED_SECONDS)

    def _put_off(self, error: str, seconds: float) -> None:
        self._key, self._wanted = None, False
        self._put_off_until = self._monotonic() + seconds * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        if error != self.error:
            logger.error("%s", error)
        self.error = error
        self._on_change()

    def _tell_expiry(self) -> None:
        if self._clock.now() > self.identity.ends and not self._expiry_told:
            self._expiry_told = True
            self.error = (
                f"this device's certificate ended on {_day(self.identity.ends)}: enrol anew (`coordinator enrol {self.identity.facts.device}`, "
                "then `edge-agent enrol --bundle BUNDLE`)"
            )
            logger.error("%s", self.error)


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, tz=timezone.utc):%Y-%m-%d}"
