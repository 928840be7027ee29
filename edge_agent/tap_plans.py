"""Which tap plan is in use: the device's own before the fleet's, each persisted, a wrong one refused and told.

The network thread only leaves payloads here; `settle` takes them in, between two batches. Known weakness: a device's own
plan that is taken back while the device is away stays in use, since a cleared topic says nothing to those who come later
(and neither does one that the broker forgot); publish another plan for it instead. What is retained is the coordinator's
newest word, whatever its version: one whose database was started anew counts its plans from 1 again.
"""

from __future__ import annotations

import logging
import threading

from edge_agent.spool import Spool
from edge_agent.taps import PlanError, check_plan
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import TapPlan

logger = logging.getLogger(__name__)


class TapPlans:
    """Starts with the plans of the last run, so that a restart without a broker goes on sampling."""

    def __init__(self, spool: Spool, manifest: BackboneManifest, device: str) -> None:
        self._spool = spool
        self._manifest = manifest
        # In the order in which they count.
        self._settings_key = {topics.device_plan(device): "plan.device", topics.fleet_plan(): "plan.fleet"}
        self._plans: dict[str, TapPlan] = {}
        self._errors: dict[str, str] = {}
        self._lock = threading.Lock()
        self._offered: dict[str, bytes] = {}
        for topic, key in self._settings_key.items():
            stored = spool.get_setting(key)
            if stored:
                self._take(topic, bytes.fromhex(stored))

    @property
    def topics(self) -> list[str]:
        return list(self._settings_key)

    @property
    def current(self) -> TapPlan | None:
        return next((self._plans[topic] for topic in self._settings_key if topic in self._plans), None)

    @property
    def error(self) -> str:
        return next((self._errors[topic] for topic in self._settings_key if topic in self._errors), "")

    def offer(self, topic: str, payload: bytes) -> bool:
        """Leave a payload for `settle`; False if the topic is none of ours. The newest one per topic counts."""
        if topic not in self._settings_key:
            return False
        with self._lock:
            self._offered[topic] = payload
        return True

    def settle(self) -> bool:
        """Take in what was offered; True if the plan in use or the error has changed."""
        if not self._offered:
            return False
        with self._lock:
            offered, self._offered = self._offered, {}
        before = (self.current, self.error)
        for topic, payload in offered.items():
            if self._take(topic, payload):
                stored = self._spool.get_setting(self._settings_key[topic]) or ""
                if stored != payload.hex():
                    self._spool.set_setting(self._settings_key[topic], payload.hex())
        if self.current != before[0] and self.current is not None:
            ignored = ": it tunes a language model, so labels in the rows are ignored" if self.current.task == "causal-lm" else ""
            logger.info("tap plan %d is in use%s", self.current.version, ignored)
        return (self.current, self.error) != before

    def _take(self, topic: str, payload: bytes) -> bool:
        if not payload:  # cleared by the coordinator: the fleet's plan counts again
            self._plans.pop(topic, None)
            self._errors.pop(topic, None)
            return True
        try:
            plan = TapPlan.from_bytes(payload)
            check_plan(plan, self._manifest)
        except (FrameError, PlanError) as error:
            words = f"tap plan refused: {error}"
            if self._errors.get(topic) != words:
                logger.error("%s; the plan before it stays in use", words)
            self._errors[topic] = words[:1000]
            return False
        self._plans[topic] = plan
        self._errors.pop(topic, None)
        return True

