"""Moves new samples from the store into the tap cache: decodes their frames, once.

A sample that the current plan cannot use (no label, other labels, taps of other layers) is skipped and counted.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import numpy as np

from coordinator.store.engine import Store
from coordinator.store.registry import backbones, plans
from coordinator.store.training import StoredSample, frame_payloads, training_samples_after
from coordinator.training.tap_cache import RECORD, Entry, TapCache
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.frame import Frame, decode_frame
from side_tuning.wire.messages import TapPlan

log = logging.getLogger(__name__)

SAMPLES_AT_A_TIME = 2048  # between two looks at the clock and the stop signal
_FRAMES_AT_A_TIME = 64  # payloads in memory


class _Skip(Exception):  # noqa: N818 - no error: a sample that is of no use to this plan
    """Why the samples of a frame cannot be used."""


def take_in(store: Store, cache: TapCache, plan: TapPlan, limit: int = SAMPLES_AT_A_TIME) -> int:
    """Read up to `limit` samples after the cache's watermark; returns how many were read (0: nothing new)."""
    with store.read() as session:
        samples = training_samples_after(session, cache.watermark, limit)
        if not samples:
            return 0
        depths = {fingerprint: row.manifest.layers for fingerprint, row in backbones(session).items()}
        known_plans = {row.version: row.plan for row in plans(session)}
    by_frame: dict[int, list[StoredSample]] = defaultdict(list)
    for sample in samples:
        reason = _useless(sample, plan, known_plans, depths)
        if reason:
            cache.skipped[reason] += 1
        else:
            by_frame[sample.frame_id].append(sample)
    records = [np.empty(0, RECORD)]
    frame_ids = list(by_frame)
    for start in range(0, len(frame_ids), _FRAMES_AT_A_TIME):
        some = frame_ids[start : start + _FRAMES_AT_A_TIME]
        with store.read() as session:
            payloads = frame_payloads(session, some)
        for frame_id in some:
            wanted = by_frame[frame_id]
            if frame_id not in payloads:
                cache.skipped["dropped by retention before it was read"] += len(wanted)
                continue
            try:
                records.append(_keep(cache, plan, decode_frame(payloads[frame_id]), wanted, depths[wanted[0].backbone]))
            except FrameError as error:
                log.warning("stored frame %d cannot be decoded: %s", frame_id, error)
                cache.skipped["stored frame cannot be decoded"] += len(wanted)
            except _Skip as skip:
                cache.skipped[str(skip)] += len(wanted)
    kept = np.concatenate(records)
    cache.commit(kept[np.argsort(kept["row_id"])], samples[-1].row_id)
    return len(samples)


def _useless(sample: StoredSample, plan: TapPlan, known: dict[int, TapPlan], depths: dict[str, int]) -> str | None:
    if sample.label is None:
        return "no label"
    if sample.backbone not in depths:
        return "unknown backbone"
    made_for = known.get(sample.plan_version)
    if made_for is None:
        return "unknown tap plan"
    if made_for.labels != plan.labels:
        return "other labels"
    if (made_for.mode, made_for.pooling) != (plan.mode, plan.pooling):
        return "other mode or pooling"
    return None if sample.label < len(plan.labels) else "label out of range"


def _keep(cache: TapCache, plan: TapPlan, frame: Frame, wanted: list[StoredSample], depth: int) -> np.ndarray:
    vectors = _vectors(frame, plan, depth)  # (rows, layers, width)
    counts = [1 if frame.mode == "pooled" else sample.tokens for sample in frame.samples]
    ends = np.cumsum(counts)
    shard = cache.open_shard(frame.backbone, plan.layers(depth), vectors.shape[2])
    if cache.shards[shard].width != vectors.shape[2]:
        raise _Skip("other width than the backbone's earlier samples")
    entries = [
        Entry(
            sample.row_id,
            sample.device,
            int(sample.label or 0),
            sample.split == "held-out",
            vectors[ends[sample.position] - counts[sample.position] : ends[sample.position]],
        )
        for sample in wanted
        if counts[sample.position]
    ]
    if len(entries) < len(wanted):
        cache.skipped["no tokens"] += len(wanted) - len(entries)
    return cache.append(shard, entries)


def _vectors(frame: Frame, plan: TapPlan, depth: int) -> np.ndarray:
    taps = {tap.layer: tap for tap in frame.taps}
    layers = plan.taps(depth)
    if not set(layers) <= set(taps):
        raise _Skip("taps do not cover the plan's layers")
    decoded = []
    for layer in layers:
        tap = taps[layer]
        values = decode_vectors(tap.data, tap.rows, tap.width, tap.codec, tap.group)
        if plan.mode == "sequence":
            # Rank r is the first r columns of the map, so a larger rank holds the smaller one.
            if tap.width < plan.rank:
                raise _Skip("rank below the plan's")
            values = values[:, : plan.rank]
        decoded.append(values)
    if len({values.shape for values in decoded}) != 1:
        raise _Skip("taps of unlike shapes")
    return np.stack(decoded, axis=1)
