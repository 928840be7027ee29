"""Held-out bits per byte of a language model with the weights that devices get: fleet, per device, per backbone type.

Bits per byte is the sum of the targets' cross entropies, over ln 2 and the bytes of text that they stand for. Unlike a
loss per token it compares backbones of different tokenizers.
"""

from __future__ import annotations

import numpy as np

from coordinator.store.training import Scope
from coordinator.training.evaluation import Measurement, held_out_samples
from coordinator.training.language_learner import LanguageLearner
from coordinator.training.tap_cache import TapCache
from side_tuning.token_bytes import bits_per_byte

_SAMPLES_AT_A_TIME = 16


def evaluate_language(cache: TapCache, learner: LanguageLearner, largest: int) -> list[Measurement]:
    """Measure on up to `largest` held-out samples, spread evenly over all; empty where there are none.

    The scope "untuned" has what the backbones do without the side network, per device and for the fleet.
    """
    held_out = held_out_samples(cache, largest)
    if not len(held_out):
        return []
    records = cache.records[held_out]
    sums = np.zeros((len(held_out), 4))  # nats, untuned nats, tokens, bytes
    published = learner.published()
    for start in range(0, len(held_out), _SAMPLES_AT_A_TIME):
        done = start
        for rows in cache.gather(held_out[start : start + _SAMPLES_AT_A_TIME]):
            found = published.losses(rows)
            parts = (found.nats, found.untuned, found.tokens, found.text_bytes)
            sums[done : done + len(rows.inputs)] = np.stack([part.sum(1) for part in parts], axis=1)
            done += len(rows.inputs)

    def measure(scope: Scope, name: str, chosen: np.ndarray, column: int = 0) -> Measurement:
        total = sums[chosen].sum(0)
        nats = float(total[column])
        return Measurement(scope, name, bits_per_byte(nats, int(total[3])), nats / max(1.0, float(total[2])), int(chosen.sum()))

    everywhere = np.ones(len(held_out), bool)
    of_device = {cache.devices[d]: records["device"] == d for d in np.unique(records["device"])}
    devices = [measure("device", name, chosen) for name, chosen in of_device.items()]
    shards = [measure("backbone", cache.shards[s].fingerprint, records["shard"] == s) for s in np.unique(records["shard"])]
    worst = max(devices, key=lambda device: (device.score, device.name))
    return [
        measure("fleet", "fleet", everywhere),
        *devices,
        *shards,
        measure("worst-device", worst.name, of_device[worst.name]),
        measure("untuned", "fleet", everywhere, 1),
        *(measure("untuned", name, chosen, 1) for name, chosen in of_device.items()),
    ]
