"""What the fleet is compared with: the same side network, the same step and the same number of samples drawn, on
full-precision activations in memory; centrally on all of them, or one network per device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from coordinator.training.evaluation import score_of
from coordinator.training.learner import Learner, Rows, side_network_config
from coordinator.training.regression import make_learner
from coordinator.training.sampler import Sampler
from coordinator.training.settings import TrainingSettings
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.side_network import pad_tokens
from side_tuning.wire.messages import Mode, Task

AnchorMaps = Mapping[str, AnchorMap]


@dataclass(frozen=True)
class Activations:
    """Block inputs of one device: `(N, B, d)` in `pooled` mode, `(rows, B, d)` with `rows_each` per sample else."""

    device: str
    fingerprint: str
    inputs: np.ndarray
    labels: np.ndarray  # classes; of a regression the targets, float64
    rows_each: Sequence[int] | None = None  # tokens, and the rows of the summary before them
    summary_width: int = 0

    def rows(self, picked: np.ndarray) -> Rows:
        """The picked samples as one group of a batch."""
        labels = self.labels[picked]
        if labels.dtype != np.float64:
            labels = labels.astype(np.int64)
        if self.rows_each is None:
            return Rows(self.fingerprint, self.inputs[picked].astype(np.float32), None, labels)
        ends = np.cumsum(self.rows_each)
        parts = [self.inputs[ends[n] - self.rows_each[n] : ends[n]] for n in picked]
        padded, mask = pad_tokens(np.concatenate(parts).astype(np.float32), [len(part) for part in parts])
        return Rows(self.fingerprint, padded.transpose(0, 2, 1, 3), mask, labels)


@dataclass(frozen=True)
class Score:
    """Held-out scores of one way of training."""

    score: float
    worst_device_score: float
    by_device: Mapping[str, float]
    steps: int


def train_centrally(
    train: Sequence[Activations],
    held_out: Sequence[Activations],
    settings: TrainingSettings,
    *,
    classes: int,
    samples_drawn: int | None = None,
    anchor_maps: AnchorMaps = MappingProxyType({}),
    task: Task = "classification",
) -> Score:
    """One side network on everything at once.

    Args:
        train: one entry per device.
        held_out: one entry per device.
        settings: as for the fleet.
        classes: of the head; 1 for a regression.
        samples_drawn: as many as the fleet drew; by default what the replay ratio allows.
        anchor_maps: the fleet's, by fingerprint, where it has them.
        task: "classification" or "regression".

    """
    learner, steps = _train(train, settings, classes=classes, samples_drawn=samples_drawn, anchor_maps=anchor_maps, task=task)
    return _score(learner, held_out, steps, task)


def train_per_device(
    train: Sequence[Activations],
    held_out: Sequence[Activations],
    settings: TrainingSettings,
    *,
    classes: int,
    anchor_maps: AnchorMaps = MappingProxyType({}),
    task: Task = "classification",
) -> Score:
    """One side network per device, trained on its own samples only and scored on that device's held-out samples."""
    found: dict[str, float] = {}
    samples: dict[str, int] = {}
    total_steps = 0
    for own in train:
        own_held_out = [group for group in held_out if group.device == own.device]
        learner, steps = _train([own], settings, classes=classes, samples_drawn=None, anchor_maps=anchor_maps, task=task)
        total_steps += steps
        found[own.device] = _score(learner, own_held_out, steps, task).score
        samples[own.device] = sum(len(group.labels) for group in own_held_out)
    weights = np.array([samples[device] for device in found], np.float64)
    mean = float(np.average(list(found.values()), weights=weights))
    return Score(mean, min(found.values()), found, total_steps)


def _train(
    train: Sequence[Activations],
    settings: TrainingSettings,
    *,
    classes: int,
    samples_drawn: int | None,
    anchor_maps: AnchorMaps,
    task: Task,
) -> tuple[Learner, int]:
    mode: Mode = "pooled" if train[0].rows_each is None else "sequence"
    shared = next((anchor_map.config for anchor_map in anchor_maps.values()), None)
    config = side_network_config(
        settings,
        blocks=train[0].inputs.shape[1],
        classes=classes,
        mode=mode,
        entry_width=shared.width_out if shared else 0,
        summary=train[0].summary_width > 0,
        entry_summary_width=shared.summary_width_out if shared else 0,
    )
    learner = make_learner(settings, config, task)
    sampler = Sampler(
        seed=settings.seed, tau=settings.tau, class_tau=settings.class_tau, replay_cap=settings.replay_cap
    )
    for number, group in enumerate(train):
        if group.fingerprint not in learner.alignments:
            anchor_map = anchor_maps.get(group.fingerprint)
            learner.add_backbone(
                group.fingerprint, group.inputs.shape[-1], step=0, anchor_map=anchor_map, summary_width=group.summary_width
            )
        sampler.add(np.full(len(group.labels), number), np.zeros(len(group.labels), np.int64) if task == "regression" else group.labels)
    ends = np.cumsum([len(group.labels) for group in train])
    budget = int(settings.replay_ratio * sampler.samples) if samples_drawn is None else samples_drawn
    step = drawn = 0
    while drawn + settings.batch_size <= budget:
        picked = sampler.draw(step, settings.batch_size)
        if not len(picked):
            break
        owners = np.searchsorted(ends, picked, side="right")
        learner.step([train[k].rows(picked[owners == k] - (ends[k] - len(train[k].labels))) for k in np.unique(owners)], step)
        step += 1
        drawn += len(picked)
    return learner, step


def _score(learner: Learner, held_out: Sequence[Activations], steps: int, task: Task) -> Score:
    answers: dict[str, list[np.ndarray]] = {}
    truths: dict[str, list[np.ndarray]] = {}
    published = learner.published()
    for group in held_out:
        for start in range(0, len(group.labels), 512):
            rows = group.rows(np.arange(start, min(start + 512, len(group.labels))))
            logits = published.logits(rows)
            answers.setdefault(group.device, []).append(logits[:, 0] if task == "regression" else logits.argmax(1))
            truths.setdefault(group.device, []).append(rows.labels)
    if not answers:
        return Score(0.0, 0.0, {}, steps)
    by_device = {device: score_of(task, np.concatenate(answers[device]), np.concatenate(truths[device])) for device in answers}
    everywhere = [np.concatenate([part for parts in found.values() for part in parts]) for found in (answers, truths)]
    return Score(score_of(task, *everywhere), min(by_device.values()), by_device, steps)
