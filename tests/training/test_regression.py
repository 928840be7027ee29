"""A number is learned from what devices sent, and comes back in its own unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.store.engine import Store
from coordinator.store.training import evaluations, latest_checkpoint
from coordinator.training.reference import Activations, train_centrally, train_per_device
from coordinator.training.regression import RegressionLearner, TargetScale
from coordinator.training.take_in import take_in
from coordinator.training.trainer import Training, _save, open_training, take_step, take_up
from side_tuning.network.files import load_alignment, load_ladder
from side_tuning.network.side_network import predict_logits
from side_tuning.tasks import correlation
from side_tuning.wire.frame import Frame
from side_tuning.wire.messages import TapPlan
from tests.training.small_fleet import AT, DEEP, SHALLOW, arrive, mixed_fleet, plan, prepare, settings

NUMBER = plan(labels=(), task="regression")


def numbered(frames: list[Frame]) -> list[Frame]:
    """The small fleet's frames with a number in place of each class: 100, 110 or 120."""
    return [replace(f, samples=tuple(s._replace(label=None, target=100.0 + 10 * (s.label or 0)) for s in f.samples)) for f in frames]


def opened(store: Store, folder: Path, tap_plan: TapPlan = NUMBER, **training: object) -> Training:
    found = open_training(store, settings(folder, replay_ratio=1000, **training), tap_plan)
    while take_in(store, found.cache, tap_plan):
        pass
    take_up(found)
    return found


@pytest.mark.parametrize(
    ("precision", "tap_plan"),
    [*((precision, NUMBER) for precision in ("float", "int8", "int4")), ("int4", replace(NUMBER, mode="sequence", rank=8, summary=True))],
)
def test_a_fleet_learns_a_number_and_devices_say_it_in_its_own_unit(store: Store, tmp_path: Path, precision: str, tap_plan: TapPlan) -> None:
    chosen = settings(tmp_path, replay_ratio=1000, checkpoint_precision=precision)
    prepare(store, tap_plan)
    arrive(store, numbered(mixed_fleet(tap_plan=tap_plan)))
    training = opened(store, tmp_path, tap_plan, checkpoint_precision=precision)
    for _ in range(150):
        take_step(training, chosen)
    _save(training, store, chosen, lambda: AT)
    with store.read() as session:
        newest = latest_checkpoint(session)
        assert newest is not None
        fleet = evaluations(session, newest.run, "fleet")[-1]
        by_device = evaluations(session, newest.run, "device")
        worst = evaluations(session, newest.run, "worst-device")[-1]
    assert fleet.score > 0.9
    assert worst.score == min(one.score for one in by_device)
    assert newest.metrics["correlation"] == fleet.score
    assert fleet.loss < 20, "the numbers themselves vary by 67"

    ladder = load_ladder(Path(newest.folder) / "ladder.safetensors")
    said, wanted = [], []
    for rows in training.cache.gather(np.flatnonzero(training.cache.records["held_out"])):
        alignment = load_alignment(Path(newest.folder) / f"alignment-{rows.fingerprint}.safetensors")
        said += predict_logits(alignment, ladder, rows.inputs, rows.mask)[:, 0].astype(np.float64).tolist()
        wanted += rows.labels.tolist()
    assert set(wanted) == {100.0, 110.0, 120.0}
    assert correlation(said, wanted) == fleet.score
    assert abs(np.mean(said) - np.mean(wanted)) < 3


def test_a_resumed_run_goes_on_bit_for_bit(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path, replay_ratio=1000)
    prepare(store, NUMBER)
    arrive(store, numbered(mixed_fleet()))
    straight = opened(store, tmp_path)
    for step in range(40):
        if step == 20:
            _save(straight, store, chosen, lambda: AT)
        take_step(straight, chosen)
    fresh = opened(store, tmp_path)
    assert fresh.step == 20
    for _ in range(20):
        take_step(fresh, chosen)
    assert isinstance(fresh.learner, RegressionLearner)
    assert isinstance(straight.learner, RegressionLearner)
    assert fresh.learner.targets.count == straight.learner.targets.count > 0
    assert fresh.learner.published().ladder_file == straight.learner.published().ladder_file


def test_samples_without_a_number_are_counted_and_left_out(store: Store, tmp_path: Path) -> None:
    prepare(store, NUMBER)
    [frame, *_] = numbered(mixed_fleet())
    arrive(store, [replace(frame, samples=(frame.samples[0]._replace(target=None), *frame.samples[1:]))])
    training = opened(store, tmp_path)
    assert len(training.cache) == len(frame.samples) - 1
    assert training.cache.skipped == {"no number": 1}


def test_the_running_scale_is_that_of_all_targets() -> None:
    scale, targets = TargetScale(), np.random.default_rng(0).normal(1e4, 3, 300)
    for batch in np.array_split(targets, 7):
        scale.observe(torch.from_numpy(batch))
    assert float(scale.mean) == pytest.approx(targets.mean())
    assert float(scale.spread) == pytest.approx(targets.std())
    alike = TargetScale()
    alike.observe(torch.full((5,), 3.0))
    assert float(alike.spread) == 1.0, "nothing is divided by nothing"


def test_the_comparisons_learn_numbers_too() -> None:
    def devices(samples: int, seed: int) -> list[Activations]:
        random = np.random.default_rng(seed)
        made = []
        for name, fingerprint, width in (("attic", SHALLOW, 8), ("barn", DEEP, 12)):
            hidden = random.normal(size=(samples, 4))
            view = np.random.default_rng(width).normal(size=(2, 4, width))
            made.append(Activations(name, fingerprint, np.einsum("nm,bmd->nbd", hidden, view).astype(np.float32), 50 + 5 * hidden[:, 0]))
        return made

    knobs = settings(Path(), replay_ratio=25).training
    central = train_centrally(devices(120, 0), devices(100, 1), knobs, classes=1, task="regression")
    assert central.score > 0.8
    assert central.worst_device_score == min(central.by_device.values())
    assert train_per_device(devices(120, 0), devices(100, 1), knobs, classes=1, task="regression").score > 0.6
