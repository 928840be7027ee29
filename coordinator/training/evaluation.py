"""Held-out scores with the averaged weights: fleet, per device, per backbone type, worst device.

It computes what the devices themselves would predict: same rounded weights, same quantized activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.store.training import Scope
from coordinator.training.learner import Learner
from coordinator.training.tap_cache import TapCache
from side_tuning.tasks import METRICS, correlation
from side_tuning.wire.messages import Task

_ROWS_AT_A_TIME = 512
_TOKEN_ROWS_AT_A_TIME = 32  # `sequence` mode: attention over padded tokens takes memory


@dataclass(frozen=True)
class Measurement:
    """One figure; `name` is a device or fingerprint, "fleet", or the worst device's name."""

    scope: Scope
    name: str
    score: float  # of the task (side_tuning/tasks.py)
    loss: float  # cross entropy, nats per sample; of a regression the squared error
    samples: int


def held_out_samples(cache: TapCache, largest: int) -> np.ndarray:
    """Numbers of up to `largest` held-out samples, spread evenly over all; by backbone type, so that every batch is one group in order."""
    held_out = np.flatnonzero(cache.records["held_out"])
    if len(held_out) > largest:
        held_out = held_out[np.linspace(0, len(held_out) - 1, largest).astype(np.int64)]
    return held_out[np.argsort(cache.records["shard"][held_out], kind="stable")]


def evaluate(cache: TapCache, learner: Learner, largest: int, task: Task = "classification") -> list[Measurement]:
    """Measure on up to `largest` held-out samples, spread evenly over all; empty where there are none."""
    held_out = held_out_samples(cache, largest)
    if not len(held_out):
        return []
    records = cache.records[held_out]
    answers, truths = np.empty(len(held_out), np.float64), np.empty(len(held_out), np.float64)  # classes, or numbers
    losses = np.empty(len(held_out), np.float64)
    size = _ROWS_AT_A_TIME if cache.mode == "pooled" else _TOKEN_ROWS_AT_A_TIME
    published = learner.published()
    for start in range(0, len(held_out), size):
        done = start
        for rows in cache.gather(held_out[start : start + size]):
            logits = published.logits(rows).astype(np.float64)
            here = slice(done, done + len(rows.labels))
            truths[here] = rows.labels
            done = here.stop
            if task == "regression":
                answers[here] = logits[:, 0]
                losses[here] = (logits[:, 0] - rows.labels) ** 2
                continue
            answers[here] = logits.argmax(1)
            logits -= logits.max(1, keepdims=True)
            losses[here] = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), rows.labels]

    def measure(scope: Scope, name: str, chosen: np.ndarray) -> Measurement:
        return Measurement(scope, name, score_of(task, answers[chosen], truths[chosen]), float(losses[chosen].mean()), int(chosen.sum()))

    devices = [measure("device", cache.devices[d], records["device"] == d) for d in np.unique(records["device"])]
    shards = [measure("backbone", cache.shards[s].fingerprint, records["shard"] == s) for s in np.unique(records["shard"])]
    worst = min(devices, key=lambda device: (METRICS[task].rank(device.score), device.name))
    return [
        measure("fleet", "fleet", np.ones(len(held_out), bool)),
        *devices,
        *shards,
        Measurement("worst-device", worst.name, worst.score, worst.loss, worst.samples),
    ]


def score_of(task: Task, answers: np.ndarray, truths: np.ndarray) -> float:
    """The task's score of predicted classes or numbers (N,)."""
    return correlation(answers.tolist(), truths.tolist()) if task == "regression" else float((answers == truths).mean())


def metrics(measurements: Sequence[Measurement], task: Task) -> dict[str, float]:
    """The headline figures that travel with a checkpoint, by the names of the task's metric."""
    name = METRICS[task].key
    found: dict[str, float] = {}
    for measurement in measurements:
        if measurement.scope == "fleet":
            found |= {
                name: measurement.score,
                "loss": measurement.loss,
                "held_out_samples": float(measurement.samples),
            }
        if measurement.scope == "worst-device":
            found[f"worst_device_{name}"] = measurement.score
    return found
