"""MAIN FLOW 2: stored samples -> sampler -> batch -> align -> side network -> step -> evaluate -> checkpoint.

One loop, in `train`. It begins when `min_samples` are stored, pays for its steps with new samples (the replay ratio)
and only looks for new ones, once a second, while the fleet is quiet. All of its state is in the checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

from coordinator.backbone_library import find_artifact
from coordinator.files import file_trouble, held
from coordinator.heartbeat import Heartbeat
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store, open_store
from coordinator.store.errors import StoreUnavailable
from coordinator.store.registry import newest_plan
from coordinator.store.timestamps import utc_now
from coordinator.store.training import insert_checkpoint, insert_evaluation, latest_checkpoint
from coordinator.training.anchors import AnchorError, Anchors, open_anchors, read_texts
from coordinator.training.checkpoints import Progress, metrics_of, prune_checkpoints, resume, save_checkpoint
from coordinator.training.evaluation import Measurement, evaluate, metrics
from coordinator.training.figures import Figures
from coordinator.training.language_evaluation import evaluate_language
from coordinator.training.language_learner import FrozenEnds, LanguageLearner, ladder_config
from coordinator.training.learner import Learner, side_network_config
from coordinator.training.regression import make_learner
from coordinator.training.run_state import RunIdentity, begin_or_continue, what_is_learned
from coordinator.training.sampler import GrowingArray, Sampler
from coordinator.training.settings import TrainingSettings
from coordinator.training.take_in import SAMPLES_AT_A_TIME, take_in
from coordinator.training.tap_cache import TapCache
from coordinator.training.troubles import Troubles
from coordinator.training.warm_start import anchor_rows
from side_tuning.backbone_manifest import BackboneError
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.tasks import METRICS
from side_tuning.wire.messages import TapPlan

log = logging.getLogger(__name__)

Now = Callable[[], datetime]
RECENT_BATCHES = 50


@dataclass
class Training:
    """One run under way."""

    run: RunIdentity
    plan: TapPlan
    learner: Learner | LanguageLearner
    sampler: Sampler
    cache: TapCache
    data_directory: Path
    anchors: Anchors | None = None
    anchors_file: Path | None = None
    step: int = 0
    samples_drawn: int = 0
    seen: int = 0  # cache entries that the sampler and the learner know
    numbers: GrowingArray = field(default_factory=lambda: GrowingArray(np.int64))  # train sample -> its number in the cache
    measured: tuple[int, int] = (0, 0)  # step and cache length at the last evaluation
    measurements: list[Measurement] = field(default_factory=list)
    saved_step: int = 0
    offered_step: int = 0  # the store knows of this one
    troubles: Troubles = field(default_factory=Troubles)
    told: set[str] = field(default_factory=set)  # why samples are skipped, as far as logged
    # For the heartbeat alone.
    ticked_at: float = field(default_factory=time.monotonic)
    loss: float | None = None  # of the newest step
    recent: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=RECENT_BATCHES))  # numbers in the cache


def run(settings: CoordinatorSettings, stop: threading.Event, now: Now = utc_now) -> None:
    """Train until `stop` is set; a changed plan begins a new run."""
    torch.set_num_threads(settings.training.threads)
    if settings.training.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("training.device is cuda, but torch finds no CUDA device: set it to cpu, or install a CUDA build of torch")
    taken = RuntimeError(f"another trainer runs with the data_directory {settings.data_directory}; stop that one, or give this one its own")
    with held(settings.data_directory / "trainer.lock", taken):
        _run(settings, stop, now)


def _run(settings: CoordinatorSettings, stop: threading.Event, now: Now) -> None:
    store = open_store(settings.database_url)
    troubles = Troubles()
    figures = Figures(settings, troubles)
    heartbeat = Heartbeat(
        "trainer", store=store, alive_file=settings.alive_file("trainer"), figures=figures, looping=figures.looping, now=now
    )
    waiting = False
    heartbeat.start()
    try:
        while not stop.is_set():
            figures.tick()
            plan = _fleet_plan(store)
            if plan is None:
                if not waiting:
                    log.info("waiting for a tap plan: register a backbone with `coordinator backbone register`, and start the gateway")
                waiting = True
                stop.wait(settings.training.poll_seconds)
                continue
            fitting = settings.model_copy(update={"training": settings.training.of_task(plan.task)})
            try:
                training = open_training(store, fitting, plan, now)
            except OSError as error:
                troubles.note("no run can begin or go on", error)
                stop.wait(settings.training.poll_seconds)
                continue
            troubles.over("no run can begin or go on")
            figures.training = training
            try:
                train(training, store, fitting, stop, now)
            finally:
                figures.training = None
                training.cache.close()
    finally:
        heartbeat.stop()
        store.close()


def open_training(store: Store, settings: CoordinatorSettings, plan: TapPlan, now: Now = utc_now) -> Training:
    """The last run with everything it had learned, or a new one."""
    run = begin_or_continue(store, settings.data_directory, plan, settings.training, now())
    learner: Learner | LanguageLearner
    anchors = None
    if plan.task == "causal-lm":
        learner = LanguageLearner(
            settings.training, ladder_config(settings.training, plan.blocks), partial(_frozen_ends, settings)
        )
    else:
        anchors = open_anchors(
            settings.training.anchors_file,
            settings.data_directory,
            store,
            plan,
            settings.checkpoints_directory / run.name,
            width=settings.training.anchor_width,
        )
        config = side_network_config(
            settings.training,
            blocks=plan.blocks,
            classes=1 if plan.task == "regression" else len(plan.labels),
            mode=plan.mode,
            entry_width=anchors.width if anchors else 0,
            summary=plan.summary,
            entry_summary_width=anchors.summary_width if anchors else 0,
        )
        learner = make_learner(settings.training, config, plan.task)
    cache = TapCache(settings.data_directory / "tap-cache", {"run": run.name, **run.made_for}, plan.mode, plan.task)
    sampler = Sampler(
        seed=settings.training.seed,
        tau=settings.training.tau,
        class_tau=settings.training.class_tau,
        replay_cap=settings.training.replay_cap,
    )
    training = Training(run, plan, learner, sampler, cache, settings.data_directory, anchors, settings.training.anchors_file)
    progress = resume(settings.checkpoints_directory / run.name, learner)
    if progress is not None:
        _restore(training, store, progress)
    for folder in settings.checkpoints_directory.glob("*/"):
        prune_checkpoints(folder, settings.training.keep_checkpoints if folder.name == run.name else 1)
    return training


def train(training: Training, store: Store, settings: CoordinatorSettings, stop: threading.Event, now: Now = utc_now) -> None:
    """The loop; returns when `stop` is set or the plan has changed, with everything saved."""
    knobs = settings.training
    began = time.monotonic()
    polled_at = evaluated_at = saved_at = stepped_at = arrived_at = began
    known = training.sampler.samples
    behind, waiting = True, False
    while not stop.is_set():
        clock = training.ticked_at = time.monotonic()
        if behind or clock - polled_at >= knobs.poll_seconds:
            behind, polled_at = _look_for_samples(training, store), clock
            if not (behind or waiting) and training.sampler.samples < knobs.min_samples:
                waiting = True
                log.info(
                    "waiting for samples: %d labelled train samples are stored, training begins at %d (training.min_samples)",
                    training.sampler.samples,
                    knobs.min_samples,
                )
            if _plan_changed(training, store, settings):
                break
            _offer(training, store, settings, now)
        if training.sampler.samples > known:
            known, arrived_at = training.sampler.samples, clock
        if may_step(training, settings, arriving=clock - arrived_at < knobs.settle_seconds):
            if training.step == 0:  # however long anchors and first samples took: one step is nothing to send out
                evaluated_at = saved_at = time.monotonic()
            take_step(training, settings)
            stepped_at = time.monotonic()
        elif not behind:
            stop.wait(max(0.0, polled_at + knobs.poll_seconds - clock))

        clock = time.monotonic()
        # What waits for the fleet to be quiet is still to come, and would surpass what is sent out before it.
        settled = clock - stepped_at >= knobs.settle_seconds and not may_step(training, settings)
        if _evaluation_due(training, settled=settled, seconds=clock - evaluated_at, settings=settings):
            _evaluate(training, store, settings, now)
            evaluated_at = time.monotonic()
        if checkpoint_due(training.step, training.saved_step, settled=settled, seconds=clock - saved_at, knobs=knobs):
            _save(training, store, settings, now)
            saved_at = time.monotonic()
    if training.step > training.saved_step:
        _save(training, store, settings, now)


def may_step(training: Training, settings: CoordinatorSettings, *, arriving: bool = False) -> bool:
    """Enough samples to begin with, and enough of them for the draws so far; while samples are `arriving`, some draws are kept for later."""
    knobs, stored = settings.training, training.sampler.samples
    paid_for = training.samples_drawn + knobs.batch_size <= knobs.paid_draws(stored, arriving=arriving)
    return stored >= knobs.min_samples and paid_for and not training.sampler.exhausted


def take_step(training: Training, settings: CoordinatorSettings) -> float:
    """Batch `training.step`: draw, gather, learn."""
    picked = training.sampler.draw(training.step, settings.training.batch_size)
    numbers = training.numbers.values[picked]
    batch = training.cache.gather(numbers)
    loss = training.learner.step(batch, training.step)
    training.loss = loss
    training.recent.append(numbers)
    training.step += 1
    training.samples_drawn += len(picked)
    return loss


def take_up(training: Training, until_row_id: int | None = None, counts: dict[int, int] | None = None) -> None:
    """Tell the sampler and the learner of cache entries that they do not know yet."""
    records = training.cache.records[training.seen :]
    if until_row_id is not None:
        records = records[: np.searchsorted(records["row_id"], until_row_id, side="right")]
    for number in dict.fromkeys(records["shard"].tolist()):  # in order of appearance
        shard = training.cache.shards[number]
        if shard.fingerprint not in training.learner.alignments:
            training.learner.add_backbone(
                shard.fingerprint,
                shard.width,
                step=training.step,
                anchor_map=_anchor_map(training, shard.fingerprint),
                summary_width=shard.summary_width,
            )
            log.info("backbone %s joins at step %d", shard.fingerprint, training.step)
            if isinstance(training.learner, LanguageLearner) and training.step:
                _warm_start(training, training.learner, shard.fingerprint)
    train = np.flatnonzero(~records["held_out"])
    drawn = None
    if counts is not None:
        drawn = np.array([counts.get(row_id, 0) for row_id in records["row_id"][train].tolist()], np.int32)
    training.sampler.add(records["device"][train], records["label"][train], drawn)
    training.numbers.append(train + training.seen)
    training.seen += len(records)


def _frozen_ends(settings: CoordinatorSettings, fingerprint: str) -> FrozenEnds:
    artifact = find_artifact(settings.data_directory, fingerprint)
    if artifact is None:
        raise BackboneError(
            f"backbone {fingerprint} has no artifact here, so no language model can be tuned on it: "
            "register it again with `coordinator backbone register FOLDER`"
        )
    return FrozenEnds.load(artifact, torch.device(settings.training.device))


def _warm_start(training: Training, learner: LanguageLearner, fingerprint: str) -> None:
    """Let a backbone type that joins late gain at once, where there are anchors."""
    if training.anchors_file is None:
        return
    try:
        rows = anchor_rows(read_texts(training.anchors_file), training.data_directory, fingerprint, training.plan)
    except (AnchorError, OSError) as error:
        log.warning("backbone %s joins without anchors, it learns from its own samples alone: %s", fingerprint, error)
        return
    log.info("backbone %s was fitted to the side network on %d anchors", fingerprint, len(rows.inputs))
    learner.warm_start(fingerprint, rows)


def _anchor_map(training: Training, fingerprint: str) -> AnchorMap | None:
    """The map of a backbone type that joins; without one, its alignment is trained."""
    try:
        return training.anchors.fit(fingerprint) if training.anchors else None
    except (AnchorError, OSError) as error:
        said = (file_trouble(error) if isinstance(error, OSError) else "") or error
        log.warning("backbone %s joins without anchors, its alignment is trained: %s", fingerprint, said)
        return None


def progress_of(training: Training) -> Progress:
    row_ids = training.cache.records["row_id"]
    return Progress(
        step=training.step,
        samples_drawn=training.samples_drawn,
        watermark=int(row_ids[training.seen - 1]) if training.seen else 0,
        row_ids=row_ids[training.numbers.values],
        counts=training.sampler.counts,
    )


def _restore(training: Training, store: Store, progress: Progress) -> None:
    while training.cache.watermark < progress.watermark and take_in(store, training.cache, training.plan):
        pass  # the cache was lost: fill it as far as the run had seen
    training.step, training.samples_drawn = progress.step, progress.samples_drawn
    training.saved_step = progress.step
    with store.read() as session:
        newest = latest_checkpoint(session)
    if newest is not None and newest.run == training.run.name:
        training.offered_step = newest.step
    counts = dict(zip(progress.row_ids.tolist(), progress.counts.tolist(), strict=True))
    take_up(training, progress.watermark, counts)
    if training.sampler.samples != len(counts):
        log.warning("of %d train samples that the run had seen, %d are still stored", len(counts), training.sampler.samples)
    log.info("resumed at step %d with %d train samples", training.step, training.sampler.samples)


def _fleet_plan(store: Store) -> TapPlan | None:
    with store.read() as session:
        return newest_plan(session)


def _look_for_samples(training: Training, store: Store) -> bool:
    """Take in what is new; True if there may be more."""
    try:
        read = take_in(store, training.cache, training.plan)
    except StoreUnavailable as error:
        training.troubles.note("samples cannot be read", error)
        return False
    except OSError as error:
        training.troubles.note("samples cannot be taken into the tap cache", error)
        training.cache.roll_back()
        return False
    training.troubles.over("samples cannot be read")
    if read:
        training.troubles.over("samples cannot be taken into the tap cache")
    for reason, count in training.cache.skipped.items():
        if reason not in training.told:
            training.told.add(reason)
            log.warning("samples that cannot be used, %d so far: %s", count, reason)
    try:
        take_up(training)
    except BackboneError as error:
        training.troubles.note("the samples of a backbone cannot be used yet", error)
        return False
    training.troubles.over("the samples of a backbone cannot be used yet")
    return read >= SAMPLES_AT_A_TIME


def _plan_changed(training: Training, store: Store, settings: CoordinatorSettings) -> bool:
    try:
        plan = _fleet_plan(store)
    except StoreUnavailable as error:
        training.troubles.note("the tap plan cannot be read", error)
        return False
    training.troubles.over("the tap plan cannot be read")
    if plan is None or plan == training.plan:
        return False
    if what_is_learned(plan, settings.training) != what_is_learned(training.plan, settings.training):
        log.warning("tap plan %d asks for another side network than plan %d: a new run begins", plan.version, training.plan.version)
        return True
    training.plan = plan
    return False


def _evaluation_due(training: Training, *, settled: bool, seconds: float, settings: CoordinatorSettings) -> bool:
    if training.step == 0 or training.measured == (training.step, training.seen):
        return False
    knobs = settings.training
    return seconds >= knobs.evaluate_every_seconds or (settled and seconds >= knobs.settle_seconds)


def _evaluate(training: Training, store: Store, settings: CoordinatorSettings, now: Now) -> None:
    largest = settings.training.evaluate_samples
    if isinstance(training.learner, LanguageLearner):
        training.measurements = evaluate_language(training.cache, training.learner, largest)
    else:
        training.measurements = evaluate(training.cache, training.learner, largest, training.plan.task)
    training.measured = (training.step, training.seen)
    at = now()
    try:
        with store.write() as session:
            for m in training.measurements:
                insert_evaluation(session, training.run.name, training.step, m.scope, m.name, m.score, m.loss, m.samples, at)
    except StoreUnavailable as error:
        training.troubles.note("evaluations cannot be stored", error)
    else:
        training.troubles.over("evaluations cannot be stored")
    scores = {m.scope: m.score for m in training.measurements}
    metric = METRICS[training.plan.task]
    said = f"{metric.said(scores['fleet'])}, worst device {metric.shown(scores['worst-device'])}" if scores else "no held-out samples"
    log.info("step %d: %d train samples, %s", training.step, training.sampler.samples, said)


def checkpoint_due(step: int, saved_step: int, *, settled: bool, seconds: float, knobs: TrainingSettings) -> bool:
    """Whether what was learned since `saved_step`, `seconds` ago, is worth its bytes to every device."""
    if step == saved_step:
        return False
    if saved_step == 0:  # what a fleet has learned first goes out soon
        return (settled and seconds >= knobs.settle_seconds) or seconds >= min(knobs.evaluate_every_seconds, knobs.checkpoint_every_seconds)
    if step - saved_step < knobs.checkpoint_growth * saved_step and seconds < knobs.checkpoint_longest_seconds:
        return False
    return seconds >= knobs.checkpoint_every_seconds / (4 if settled else 1)


def _save(training: Training, store: Store, settings: CoordinatorSettings, now: Now) -> None:
    if training.measured != (training.step, training.seen):
        _evaluate(training, store, settings, now)
    figures = {**metrics(training.measurements, training.plan.task), "train_samples": float(training.sampler.samples)}
    folder = settings.checkpoints_directory / training.run.name
    try:
        save_checkpoint(
            folder,
            training.learner,
            progress_of(training),
            run=training.run.name,
            plan=training.plan,
            metrics=figures,
            created_at=now().timestamp(),
        )
    except OSError as error:
        training.troubles.note("checkpoints cannot be saved", error)
        return
    training.troubles.over("checkpoints cannot be saved")
    training.saved_step = training.step
    _offer(training, store, settings, now)
    prune_checkpoints(folder, settings.training.keep_checkpoints)


def _offer(training: Training, store: Store, settings: CoordinatorSettings, now: Now) -> None:
    """Tell the store of the newest folder, unless it knows; a crash or a full disk may have come in between."""
    if training.offered_step >= training.saved_step:
        return
    path = settings.checkpoints_directory / training.run.name / f"{training.saved_step:08d}"
    try:
        with store.write() as session:
            generation = insert_checkpoint(
                session, training.run.name, training.saved_step, str(path.resolve()), metrics_of(path), now()
            )
    except StoreUnavailable as error:
        training.troubles.note("checkpoints are saved but cannot be offered", error)
        return
    training.troubles.over("checkpoints are saved but cannot be offered")
    training.offered_step = training.saved_step
    log.info("checkpoint %d: step %d in %s", generation, training.saved_step, path)
