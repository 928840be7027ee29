"""What the gateway's main thread does while the others receive and store: plans, checkpoints, orders, retention."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from coordinator.commands import send_commands
from coordinator.outbox import Outbox
from coordinator.planning import follow_settings
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import OUT_OF_REACH, Store
from coordinator.store.registry import backbones
from coordinator.store.retention import apply_retention
from side_tuning.broker_connection import BrokerConnection

logger = logging.getLogger(__name__)

RETENTION_STEPS = 100


class Chores:
    """What the main thread does between looks at the others; a store that is out of reach is said once."""

    def __init__(
        self, settings: CoordinatorSettings, store: Store, outbox: Outbox, connection: BrokerConnection, now: Callable[[], datetime]
    ) -> None:
        self._settings = settings
        self._store = store
        self._outbox = outbox
        self._connection = connection
        self._now = now
        self._retention_at = time.monotonic()
        self._trouble = 0
        self._said_no_plan = False

    def run_due(self) -> None:
        try:
            follow_settings(self._settings, self._store)
            self._say_if_no_plan()
            self._outbox.run_once()
            send_commands(self._store, self._connection, self._now())
            if time.monotonic() >= self._retention_at:
                self._retention_at = time.monotonic() + self._settings.retention.every_seconds
                self._apply_retention()
        except (*OUT_OF_REACH, OSError) as error:
            self._trouble += 1
            if self._trouble == 1:
                logger.error("plans, checkpoints and orders wait: %s", error)
        else:
            self._trouble = 0

    def _say_if_no_plan(self) -> None:
        if self._said_no_plan:
            return
        self._said_no_plan = True
        with self._store.read() as session:
            if not backbones(session):
                logger.warning("no backbone is registered, so no frame can be accepted: run `coordinator backbone register FOLDER`")

    def _apply_retention(self) -> None:
        wanted = self._settings.retention
        age = None if wanted.max_age_days is None else timedelta(days=wanted.max_age_days)
        for _ in range(RETENTION_STEPS):  # what is left waits for the next time; the writer gets its turn in between
            with self._store.write() as session:
                step = apply_retention(session, age, wanted.max_bytes, self._now())
            if step.frames or step.rejections:
                logger.info("retention dropped the payloads of %d frames and %d rejected messages", step.frames, step.rejections)
            if not step.more:
                break
        self._store.checkpoint_log()
