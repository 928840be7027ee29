"""The loop on a real store: it learns, idles, resumes bit for bit, and takes in backbones and plans that change."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_arrays

from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.registry import insert_plan
from coordinator.store.training import checkpoints, evaluations
from coordinator.training import trainer
from coordinator.training.anchors import fit_anchor_map
from coordinator.training.checkpoints import (
    CheckpointError,
    load_checkpoint,
    resume,
    save_checkpoint,
    saved_steps,
)
from coordinator.training.evaluation import evaluate
from coordinator.training.run_state import begin_or_continue, what_is_learned
from coordinator.training.settings import TrainingSettings
from coordinator.training.take_in import take_in
from coordinator.training.trainer import (
    Training,
    checkpoint_due,
    may_step,
    open_training,
    progress_of,
    take_step,
    take_up,
)
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.files import load_alignment, load_ladder, save_alignment
from side_tuning.network.side_network import predict_logits
from side_tuning.wire.messages import TapPlan
from tests.training import small_fleet
from tests.training.small_fleet import DEEP, SHALLOW, arrive, frame, mixed_fleet, plan, prepare, settings
from tests.waiting import wait_until


def opened(store: Store, chosen: CoordinatorSettings, tap_plan: TapPlan | None = None) -> Training:
    training = open_training(store, chosen, tap_plan or plan())
    take_in(store, training.cache, training.plan)
    take_up(training)
    return training


def save(training: Training, chosen: CoordinatorSettings) -> Path:
    return save_checkpoint(
        chosen.checkpoints_directory / training.run.name, training.learner, progress_of(training),
        run=training.run.name, plan=training.plan, metrics={}, created_at=0.0,
    )  # fmt: skip


def state(training: Training) -> dict[str, torch.Tensor]:
    learner = training.learner
    tensors = {f"ladder/{name}": t for name, t in learner.ladder.state_dict().items()}
    tensors |= {f"average/{name}": t for name, t in learner.average_ladder.state_dict().items()}
    for fingerprint in learner.alignments:
        tensors |= {f"{fingerprint}/{name}": t for name, t in learner.alignments[fingerprint].state_dict().items()}
        tensors |= {f"average {fingerprint}/{name}": t for name, t in learner.average_alignments[fingerprint].state_dict().items()}
    for number, moments in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": t for name, t in moments.items()}
    tensors["counts"] = torch.from_numpy(training.sampler.counts.copy())
    tensors["progress"] = torch.tensor([training.step, training.samples_drawn, progress_of(training).watermark])
    return tensors


def same_bits(first: Training, second: Training) -> bool:
    a, b = state(first), state(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lost", ["nothing", "cache"])
def test_two_hundred_steps_equal_one_hundred_a_crash_and_one_hundred(store: Store, tmp_path: Path, lost: str) -> None:
    """A backbone joins before the crash, and more samples come after it."""
    chosen = settings(tmp_path, replay_ratio=1000)
    prepare(store)
    early = [f for f in mixed_fleet() if f.backbone == SHALLOW]
    late = [f for f in mixed_fleet() if f.backbone == DEEP]
    arrive(store, early)
    straight = opened(store, chosen)
    for step in range(200):
        if step in (50, 150):
            arrive(store, late[:6] if step == 50 else late[6:])
            take_in(store, straight.cache, straight.plan)
            take_up(straight)
        if step == 100:
            save(straight, chosen)
        take_step(straight, chosen)
    straight.cache.close()

    # The crash: everything after the checkpoint is forgotten, except what lies on disk.
    if lost == "cache":
        shutil.rmtree(chosen.data_directory / "tap-cache")
    resumed = open_training(store, chosen, plan())
    assert resumed.step == 100
    for step in range(100, 200):
        if step == 150:
            take_in(store, resumed.cache, resumed.plan)
            take_up(resumed)
        take_step(resumed, chosen)
    assert resumed.run == straight.run
    assert set(resumed.learner.alignments) == {SHALLOW, DEEP}
    assert same_bits(straight, resumed)


def test_another_task_begins_a_new_run_and_one_from_before_there_were_others_goes_on(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path)

    def run(tap_plan: TapPlan) -> str:
        return begin_or_continue(store, chosen.data_directory, tap_plan, chosen.training, small_fleet.AT).name

    number, language = plan(labels=(), task="regression"), plan(labels=(), task="causal-lm", mode="sequence", last_rank=16)
    assert "task" not in what_is_learned(plan(), chosen.training), "as runs of earlier releases are noted"
    runs = [run(plan()), run(number), run(language), run(replace(language, last_rank=8)), run(plan())]
    assert len(set(runs)) == len(runs)
    assert run(plan(codec="int4")) == runs[-1]
    tokens = plan(mode="sequence", rank=8)
    assert "summary" not in what_is_learned(tokens, chosen.training)
    assert run(tokens) != run(replace(tokens, summary=True))


SUMMARISED = {"mode": "sequence", "rank": 8, "summary": True}


@pytest.mark.parametrize(
    ("anchored", "kind"),
    [({SHALLOW, DEEP}, {}), ({SHALLOW}, {}), ({DEEP}, {}), ({SHALLOW, DEEP}, SUMMARISED), ({SHALLOW}, SUMMARISED)],
    ids=["both", "not the late one", "only the late one", "both, summaries", "not the late one, summaries"],
)
def test_anchors_change_nothing_about_resuming(store: Store, tmp_path: Path, anchored: set[str], kind: dict[str, Any]) -> None:
    """A backbone without a map falls back to a trained alignment; one joins late, after the checkpoint."""
    file = tmp_path / "anchors.txt"
    file.write_text("".join(f"text {n}\n" for n in range(60)))
    chosen = settings(tmp_path, replay_ratio=1000, anchors_file=file)
    tap_plan = plan(**kind)
    prepare(store, tap_plan)
    arrive(store, [f for f in mixed_fleet(tap_plan=tap_plan) if f.backbone == SHALLOW])
    # The maps as an earlier start would have kept them; the small fleet's backbones have no artifacts.
    run = begin_or_continue(store, chosen.data_directory, tap_plan, chosen.training, small_fleet.AT)
    folder = chosen.checkpoints_directory / run.name
    folder.mkdir(parents=True)
    target = np.random.default_rng(0).normal(size=(60, 2, 8)).astype(np.float32)
    kept = {"rows": target, "tokens": np.ones(60, np.int64)}
    of_summaries = np.random.default_rng(2).normal(size=(60, 2, 11)).astype(np.float32)
    if kind:
        kept["summaries"] = of_summaries
    (folder / "anchor-target.safetensors").write_bytes(save_arrays(kept))
    for fingerprint in anchored:
        width = small_fleet.WIDTHS[fingerprint]
        taps = np.random.default_rng(1).normal(size=(60, 2, width)).astype(np.float32)
        anchor_map = fit_anchor_map(taps, target)
        if kind:
            anchor_map = fit_anchor_map(taps[..., :8], target).with_summary(fit_anchor_map(taps, of_summaries))
        save_alignment(anchor_map, folder / f"anchor-map-{fingerprint}.safetensors")
    straight = opened(store, chosen, tap_plan)
    assert straight.run == run
    for step in range(200):
        if step == 100:
            save(straight, chosen)
        if step == 150:
            arrive(store, [f for f in mixed_fleet(tap_plan=tap_plan) if f.backbone == DEEP])
            take_in(store, straight.cache, straight.plan)
            take_up(straight)
        take_step(straight, chosen)
    straight.cache.close()
    resumed = open_training(store, chosen, tap_plan)
    assert resumed.step == 100
    for step in range(100, 200):
        if step == 150:
            take_in(store, resumed.cache, resumed.plan)
            take_up(resumed)
        take_step(resumed, chosen)
    assert {f for f, a in resumed.learner.alignments.items() if isinstance(a, AnchorMap)} == anchored
    assert same_bits(straight, resumed)
    published = resumed.learner.published()
    for fingerprint, alignment in published.alignments.items():
        manifest, width_in = small_fleet.manifest(fingerprint), alignment.config.width_in
        assert width_in == (8 if kind else manifest.width)
        assert (alignment.config.width_out, alignment.config.summary_width_out) == (published.ladder.config.width_in, 11 if kind else 0)


def test_a_stopped_trainer_goes_on_where_it_was(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path, replay_ratio=20)
    prepare(store)
    arrive(store, mixed_fleet())
    training = opened(store, chosen)
    while may_step(training, chosen):
        take_step(training, chosen)
    assert training.samples_drawn <= 20 * training.sampler.samples < training.samples_drawn + chosen.training.batch_size
    save(training, chosen)
    training.cache.close()
    resumed = open_training(store, chosen, plan())
    assert same_bits(training, resumed)
    assert not may_step(resumed, chosen)  # a restart does not pay twice


def test_while_samples_arrive_some_draws_are_kept_for_later(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path, replay_ratio=20, replay_ratio_arriving=5)
    prepare(store)
    arrive(store, mixed_fleet())
    training = opened(store, chosen)
    while may_step(training, chosen, arriving=True):
        take_step(training, chosen)
    assert training.samples_drawn <= 5 * training.sampler.samples < training.samples_drawn + chosen.training.batch_size
    assert may_step(training, chosen)
    few = settings(tmp_path, replay_ratio=2, replay_ratio_arriving=5)
    assert not may_step(training, few, arriving=True)  # all draws are the limit of those


def test_training_waits_for_enough_samples(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path, min_samples=30)
    prepare(store)
    arrive(store, [frame("attic", n, [0, 1, 2] * 3) for n in (1, 2, 3)])
    training = opened(store, chosen)
    assert not may_step(training, chosen)
    arrive(store, [frame("attic", 4, [0, 1, 2])])
    take_in(store, training.cache, training.plan)
    take_up(training)
    assert may_step(training, chosen)


def test_batches_are_grouped_by_backbone(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, mixed_fleet())
    training = opened(store, chosen)
    batch = training.cache.gather(training.numbers.values[training.sampler.draw(0, 32)])
    assert [rows.fingerprint for rows in batch] == [SHALLOW, DEEP]
    assert sum(len(rows.labels) for rows in batch) == 32
    assert not training.cache.records["held_out"][training.numbers.values].any()


@pytest.mark.parametrize("kind", [{}, {"mode": "sequence", "rank": 6}, {"mode": "sequence", "rank": 8, "summary": True}])
def test_the_loop_learns_evaluates_and_offers_what_devices_can_use(store: Store, tmp_path: Path, kind: dict[str, Any]) -> None:
    chosen = settings(tmp_path)
    tap_plan = plan(**kind)
    prepare(store, tap_plan)
    frames = mixed_fleet(tap_plan=tap_plan)
    arrive(store, frames)
    stop = threading.Event()
    thread = threading.Thread(target=trainer.run, args=(chosen, stop), daemon=True)
    thread.start()

    def settled() -> bool:
        with store.read() as session:
            done = checkpoints(session)
            return bool(done) and done[0].step >= 190

    wait_until(settled, 120, "a checkpoint after all paid steps")
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    with store.read() as session:
        newest = checkpoints(session)[0]
        fleet = evaluations(session, newest.run)[-1]
        by_device = [e for e in evaluations(session, newest.run, "device") if e.step == fleet.step]
        by_backbone = {e.name for e in evaluations(session, newest.run, "backbone")}
        worst = evaluations(session, newest.run, "worst-device")[-1]
    assert fleet.score > 0.9
    assert {e.name for e in by_device} == {"attic", "barn", "cellar", "den"}
    assert by_backbone == {SHALLOW, DEEP}
    assert worst.score == min(e.score for e in by_device)
    assert worst.name in {e.name for e in by_device}
    assert newest.metrics["accuracy"] == fleet.score
    assert len(saved_steps(Path(newest.folder).parent)) <= chosen.training.keep_checkpoints

    # A device that loads the files predicts what the coordinator measured.
    folder = Path(newest.folder)
    description = json.loads((folder / "checkpoint.json").read_text())
    assert description["plan"]["labels"] == list(tap_plan.labels)
    assert description["side_width"] == 16
    ladder = load_ladder(folder / "ladder.safetensors")
    resumed = open_training(store, chosen, tap_plan)
    correct = 0
    held_out = np.flatnonzero(resumed.cache.records["held_out"])
    for rows in resumed.cache.gather(held_out):
        alignment = load_alignment(folder / f"alignment-{rows.fingerprint}.safetensors")
        correct += int((predict_logits(alignment, ladder, rows.inputs, rows.mask).argmax(1) == rows.labels).sum())
    assert correct / len(held_out) == fleet.score


@pytest.mark.parametrize(
    ("step", "saved_step", "settled", "seconds", "due"),
    [
        (0, 0, True, 1e6, False),  # nothing learned
        (30, 0, False, 14, False),
        (30, 0, False, 15, True),  # the first goes out soon
        (30, 0, True, 3, True),
        (109, 100, False, 899, False),  # hardly anything new
        (109, 100, True, 899, False),
        (101, 100, False, 900, True),  # but some day it goes out
        (100, 100, True, 1e6, False),
        (110, 100, False, 59, False),
        (110, 100, False, 60, True),
        (110, 100, True, 15, True),
    ],
)
def test_a_checkpoint_goes_out_when_it_is_worth_its_bytes(step: int, saved_step: int, settled: bool, seconds: float, due: bool) -> None:
    assert checkpoint_due(step, saved_step, settled=settled, seconds=seconds, knobs=TrainingSettings()) is due


def test_a_trickle_of_samples_does_not_send_out_what_is_soon_surpassed(store: Store, tmp_path: Path) -> None:
    chosen = settings(
        tmp_path, settle_seconds=3.0, replay_ratio_arriving=5, replay_ratio=20, batch_size=128, checkpoint_every_seconds=600,
        evaluate_every_seconds=600,
    )  # fmt: skip
    prepare(store)
    arrive(store, mixed_fleet())
    stop = threading.Event()
    thread = threading.Thread(target=trainer.run, args=(chosen, stop), daemon=True)
    thread.start()
    for sequence in range(100, 120):  # for longer than the trainer waits; all of these together pay for no step yet
        arrive(store, [frame("attic", sequence, [0])])
        time.sleep(0.25)
    wait_until(lambda: len(_all_checkpoints(store)) > 0, 60, "a checkpoint once the fleet is quiet")
    stop.set()
    thread.join(20)
    (only,) = _all_checkpoints(store)
    stored = only.metrics["train_samples"]
    assert stored == 200 + 20
    assert 20 * stored - chosen.training.batch_size < only.step * chosen.training.batch_size <= 20 * stored


def _all_checkpoints(store: Store) -> list[Any]:
    with store.read() as session:
        return list(checkpoints(session))


def test_a_quiet_fleet_costs_nothing(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path, poll_seconds=0.5)
    prepare(store)
    stop = threading.Event()
    thread = threading.Thread(target=trainer.run, args=(chosen, stop), daemon=True)
    thread.start()
    wait_until((chosen.data_directory / "tap-cache" / "cache.json").exists, 30, "the trainer to be up")
    used, began = time.process_time(), time.monotonic()
    thread.join(2.0)
    share = (time.process_time() - used) / (time.monotonic() - began)
    stop.set()
    thread.join(20)
    assert share < 0.2


def test_a_changed_task_begins_a_new_run_and_says_why(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, mixed_fleet())
    training = opened(store, chosen)
    take_step(training, chosen)
    save(training, chosen)
    training.cache.close()
    again = open_training(store, chosen, plan(2, codec="int4", frame_samples=8))  # how it travels is not what is learned
    assert again.run == training.run
    again.cache.close()
    with caplog.at_level(logging.INFO):
        other = open_training(store, chosen, plan(3, blocks=3))
    assert other.run != training.run
    assert other.step == 0
    assert "blocks changed from 2 to 3" in caplog.text


def test_a_live_plan_change_ends_the_loop_with_everything_saved(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, mixed_fleet())
    training = open_training(store, chosen, plan())
    take_in(store, training.cache, training.plan)
    take_up(training)
    take_step(training, chosen)
    with store.write() as session:
        insert_plan(session, plan(2, labels=("on", "off")), at=small_fleet.AT)
    trainer.train(training, store, chosen, threading.Event())
    assert training.saved_step == training.step == training.offered_step > 0


def test_a_store_that_was_made_anew_begins_a_new_run(store: Store, tmp_path: Path) -> None:
    from coordinator.store.engine import open_store
    from coordinator.store.schema import upgrade

    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, mixed_fleet())
    first = opened(store, chosen)
    first.cache.close()
    url = f"sqlite:///{tmp_path}/other.db"
    upgrade(url)
    other = open_store(url)
    prepare(other)
    second = open_training(other, chosen, plan())
    assert second.run != first.run
    assert not len(second.cache)
    other.close()


def test_a_checkpoint_that_was_saved_but_not_offered_is_offered_later(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path, replay_ratio=0.5)
    prepare(store)
    arrive(store, mixed_fleet())
    training = opened(store, chosen)
    take_step(training, chosen)
    save(training, chosen)  # and then the power fails
    training.cache.close()
    resumed = open_training(store, chosen, plan())
    stop = threading.Event()
    thread = threading.Thread(target=trainer.train, args=(resumed, store, chosen, stop))
    thread.start()

    def offered() -> bool:
        with store.read() as session:
            return any(c.step == 1 for c in checkpoints(session))

    wait_until(offered, 20, "the checkpoint in the store")
    stop.set()
    thread.join(20)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, mixed_fleet())
    training = opened(store, chosen)
    for _ in range(2):
        take_step(training, chosen)
        newest = save(training, chosen)
    content = bytearray((newest / "trainer.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "trainer.safetensors").write_bytes(bytes(content))
    fresh = open_training(store, settings(tmp_path / "elsewhere"), plan()).learner
    with pytest.raises(CheckpointError, match=r"trainer\.safetensors"):
        load_checkpoint(newest, fresh)
    progress = resume(newest.parent, fresh)
    assert progress is not None
    assert progress.step == 1


def test_evaluation_can_be_limited_to_an_even_choice(store: Store, tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, mixed_fleet())
    training = opened(store, chosen)
    limited = evaluate(training.cache, training.learner, 12)
    assert limited[0].samples == 12
    assert {m.name for m in limited if m.scope == "device"} == {"attic", "barn", "cellar", "den"}
    whole = evaluate(training.cache, training.learner, 10_000)
    assert whole[0].samples == 40
    assert np.isclose(whole[0].score, np.average([m.score for m in whole if m.scope == "device"], weights=[m.samples for m in whole if m.scope == "device"]))
