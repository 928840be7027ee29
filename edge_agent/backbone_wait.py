"""A backbone to start with: the one on the disk, or the one that the coordinator sends, however long that takes.

Neither torch nor the samples' code is loaded while it comes. The device is in touch with the coordinator meanwhile: its health
message says how far it is. Known weakness: commands that are sent to it in that time are not obeyed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.backbone import Backbone
from edge_agent.backbone_fetch import BackboneFetcher
from edge_agent.first_steps import FirstSteps
from edge_agent.health import agent_version, read_readings
from edge_agent.identity import certificate_in
from edge_agent.sd_notify import notify
from edge_agent.settings import AgentSettings
from edge_agent.trusted_clock import TrustedClock
from side_tuning.alive import touch_alive
from side_tuning.backbone_manifest import MANIFEST, BackboneError, check_artifact
from side_tuning.broker_connection import BrokerConnection
from side_tuning.repeats import Repeats
from side_tuning.wire import topics
from side_tuning.wire.messages import Health, Presence

logger = logging.getLogger(__name__)

STEP_SECONDS = 0.25
TOUCH_SECONDS = 10.0
LOG_EVERY_SECONDS = 30.0


def load_or_fetch(
    settings: AgentSettings, public_key: Ed25519PublicKey | None, first_steps: FirstSteps, stop: threading.Event
) -> Backbone | None:
    """The loaded backbone; None if `stop` was set while it was waited for.

    Raises:
        BackboneError: it cannot be used, and stands where the coordinator sends none.
        BrokerFilesError: the connection cannot be made.

    """
    unusable: dict[str, str] = {}
    while True:
        folder = settings.backbone.folder
        try:
            return Backbone.load(folder, threads=settings.backbone.threads)
        except BackboneError as error:
            if not settings.fetches_backbone:
                raise
            if (folder / MANIFEST).exists():
                logger.error("%s; waiting for the coordinator to send one", error)
            with suppress(BackboneError):  # whole, and yet it cannot be loaded: the same again would not help
                unusable[check_artifact(folder).fingerprint] = str(error)
        if not _Waiting(settings, public_key, first_steps, unusable).run(stop):
            return None


class _Waiting:
    """The program while it has no backbone: a connection, health messages, signs of life."""

    def __init__(
        self, settings: AgentSettings, public_key: Ed25519PublicKey | None, first_steps: FirstSteps, unusable: dict[str, str]
    ) -> None:
        self._settings = settings
        self._first_steps = first_steps
        self._clock = TrustedClock(settings.state_directory)
        self._started_at = time.time()
        self._session = ""
        self._said = Repeats()
        device = settings.device
        self._connection = BrokerConnection(
            settings.broker,
            device,
            will=self._last_will,
            subscriptions=BackboneFetcher.subscriptions(device),
            on_message=lambda message: self._fetcher.receive(message),  # noqa: PLW0108 - made below, with this connection
            trusted_time=self._clock.instead_of_system,
        )
        self._fetcher = BackboneFetcher(self._connection, device, settings.backbone.folder, public_key, unusable=unusable)

    def run(self, stop: threading.Event) -> bool:
        """Until the backbone is there (True) or `stop`."""
        notify("READY=1")
        self._connection.start()
        touch_at = report_at = log_at = 0.0
        epoch, done = 0, False
        try:
            while not done and not stop.is_set():
                done = self._fetcher.step(STEP_SECONDS)
                now = time.monotonic()
                if now >= touch_at:
                    touch_at = now + TOUCH_SECONDS
                    with suppress(OSError):
                        touch_alive(self._settings.alive_file)
                notify("WATCHDOG=1")
                self._note_first_steps()
                words = self._fetcher.words
                news = self._said.count(words) == 1
                if news or now >= log_at:
                    log_at = now + LOG_EVERY_SECONDS
                    logger.log(logging.INFO if news or words.startswith("fetching") else logging.DEBUG, "%s", words)
                if self._connection.connected and (news or now >= report_at or epoch != self._connection.epoch):
                    report_at, epoch = now + self._settings.health.every_seconds, self._connection.epoch
                    self._report(words)
        finally:
            if done:
                logger.info("the backbone is here and whole")
                self._report("the backbone is here; loading it")
                self._connection.stop()
            else:
                self._connection.stop((topics.health(self._settings.device), self._health("offline", "stopped, without a backbone").to_bytes()))
        return done

    def _note_first_steps(self) -> None:
        if self._connection.connected:
            clock_right = not self._clock.is_behind
            self._first_steps.note("network", *(("clock",) if clock_right else ()))
            self._first_steps.settle(clock_right=clock_right)

    def _report(self, words: str) -> None:
        if self._settings.broker.tls and self._connection.connected:
            self._clock.note()
        self._connection.publish(topics.health(self._settings.device), self._health("online", words).to_bytes(), retain=True)

    def _last_will(self) -> tuple[str, bytes]:
        self._session = secrets.token_hex(8)
        return topics.health(self._settings.device), Health("online", self._session, time.time()).as_last_will().to_bytes()

    def _health(self, presence: Presence, words: str) -> Health:
        serial, ends = certificate_in(self._settings.broker.certificate_file)
        return replace(
            read_readings(self._settings.state_directory),
            presence=presence,
            session=self._session,
            at=time.time(),
            agent_version=agent_version(),
            started_at=self._started_at,
            reason="; ".join(filter(None, (words, self._clock.trouble)))[:1000],
            certificate_serial=serial,
            certificate_expires_at=ends,
            first_steps=self._first_steps.news(self._session),
        )
