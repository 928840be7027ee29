"""What the trainer's heartbeat says: where the run is, how fast it goes, and whom the last batches came from."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from coordinator.settings import CoordinatorSettings
from coordinator.training.troubles import Troubles

if TYPE_CHECKING:
    from coordinator.training.trainer import Training

MAX_SHARES = 200  # devices named in the row; the rest is summed up
HUNG_SECONDS = 600.0  # the longest that a slow machine may evaluate, save or take in without going round


class Figures:
    """Read by the heartbeat's thread while the loop goes on: every value is one that the loop replaces whole."""

    def __init__(self, settings: CoordinatorSettings, troubles: Troubles) -> None:
        self._settings = settings
        self._troubles = troubles
        self._ticked_at = time.monotonic()
        self.training: Training | None = None
        self._last: tuple[float, int] | None = None

    def tick(self) -> None:
        """The outer loop went round."""
        self._ticked_at = time.monotonic()

    def looping(self) -> bool:
        ticked_at = max(self._ticked_at, self.training.ticked_at if self.training else 0.0)
        return time.monotonic() - ticked_at < HUNG_SECONDS

    def __call__(self) -> dict[str, Any]:
        training = self.training
        if training is None:
            return {"run": None, "error": self._troubles.words()}
        stored, drawn = training.sampler.samples, training.samples_drawn
        knobs = self._settings.training.of_task(training.plan.task)
        return {
            "run": training.run.name,
            "plan_version": training.plan.version,
            "step": training.step,
            "samples": stored,  # labelled train samples of the fleet
            "samples_drawn": drawn,
            "samples_per_second": self._rate(drawn),
            "loss": training.loss,
            "replay_ratio": drawn / stored if stored else None,
            "replay_ratio_limit": knobs.replay_ratio,
            # Draws that are paid for and not yet taken; those that wait until no more samples arrive are not among them.
            "samples_pending": max(0, knobs.paid_draws(stored, arriving=True) - drawn),
            "waiting_for_samples": stored < knobs.min_samples,
            "min_samples": knobs.min_samples,
            "saved_step": training.saved_step,
            **device_shares(training),
            "error": self._troubles.words() or training.troubles.words(),
        }

    def _rate(self, drawn: int) -> float | None:
        """Samples drawn per second since the last call."""
        now, last = time.monotonic(), self._last
        self._last = (now, drawn)
        if last is None or now <= last[0] or drawn < last[1]:
            return None
        return (drawn - last[1]) / (now - last[0])


def device_shares(training: Training) -> dict[str, Any]:
    """Each device's share of the last batches, largest first; `other_devices` sums up those beyond MAX_SHARES."""
    devices, names = training.cache.records["device"], training.cache.devices
    counts: Counter[int] = Counter()
    for batch in tuple(training.recent):
        counts.update(devices[batch].tolist())
    total = sum(counts.values())
    ranked = [(names[number], count / total) for number, count in counts.most_common() if number < len(names)]
    return {
        "shares": dict(ranked[:MAX_SHARES]),
        "other_devices": len(ranked[MAX_SHARES:]),
        "other_share": sum(share for _, share in ranked[MAX_SHARES:]),
    }
