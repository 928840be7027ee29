"""The comparison must be fair: same step, same draws, only the data differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coordinator.training.reference import Activations, train_centrally, train_per_device
from coordinator.training.settings import TrainingSettings

SETTINGS = TrainingSettings(side_width=16, batch_size=32, replay_ratio=30, replay_cap=200, dropout=0.1, input_dropout=0.1)


def devices(samples: int, seed: int, *, tokens: bool = False) -> list[Activations]:
    generator = np.random.default_rng(seed)
    meaning = np.random.default_rng(50).normal(size=(4, 6))
    made = []
    for name, fingerprint, width in (("attic", "aa", 8), ("barn", "bb", 12)):
        labels = generator.integers(0, 4, samples)
        counts = generator.integers(1, 5, samples) if tokens else np.ones(samples, int)
        view = np.random.default_rng(width).normal(size=(2, 6, width))
        values = np.einsum("nm,bmd->nbd", meaning[labels] + 0.7 * generator.normal(size=(samples, 6)), view)
        inputs = np.repeat(values, counts, axis=0).astype(np.float32)
        made.append(Activations(name, fingerprint, inputs, labels, counts.tolist() if tokens else None))
    return made


def part(device: Activations, classes: list[int]) -> Activations:
    kept = np.isin(device.labels, classes)
    return replace(device, inputs=device.inputs[kept], labels=device.labels[kept])


def test_central_training_learns_and_repeats_itself() -> None:
    first = train_centrally(devices(200, 0), devices(100, 1), SETTINGS, classes=4)
    again = train_centrally(devices(200, 0), devices(100, 1), SETTINGS, classes=4)
    assert first == again
    assert first.score > 0.75
    assert first.worst_device_score == min(first.by_device.values())
    assert first.steps == 400 * 30 // 32


def test_the_number_of_samples_drawn_can_be_the_fleets() -> None:
    score = train_centrally(devices(50, 0), devices(20, 1), SETTINGS, classes=4, samples_drawn=320)
    assert score.steps == 10


def test_sequences_train_too() -> None:
    score = train_centrally(devices(100, 0, tokens=True), devices(100, 1, tokens=True), SETTINGS, classes=4)
    assert score.score > 0.6


def test_one_side_network_for_all_beats_one_each_where_devices_lack_classes() -> None:
    """With one backbone type: what one device lacks, the other teaches."""
    lacking = [replace(d, device=f"{d.device}-{n}") for n in (0, 1) for d in devices(400, n)[:1]]
    lacking = [part(lacking[0], [0, 1]), part(lacking[1], [2, 3])]
    held_out = [replace(devices(100, 2)[0], device=d.device) for d in lacking]
    shared = train_centrally(lacking, held_out, SETTINGS, classes=4)
    alone = train_per_device(lacking, held_out, SETTINGS, classes=4)
    assert set(alone.by_device) == {"attic-0", "attic-1"}
    assert np.isclose(alone.score, np.mean(list(alone.by_device.values())))
    assert shared.score > alone.score + 0.2
