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
from coordinator.training.tap_cache import NO_TARGET, RECORD, Entry, TapCache
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.frame import Frame, decode_frame
from side_tuning.wire.messages import TapPlan, folded_rows
from side_tuning.wire.summaries import join_summaries, split_summaries

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
        manifests = {fingerprint: row.manifest for fingerprint, row in backbones(session).items()}
        known_plans = {row.version: row.plan for row in plans(session)}
    by_frame: dict[int, list[StoredSample]] = defaultdict(list)
    for sample in samples:
        reason = _useless(sample, plan, known_plans, manifests)
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
                records.append(_keep(cache, plan, decode_frame(payloads[frame_id]), wanted, manifests[wanted[0].backbone]))
            except FrameError as error:
                log.warning("stored frame %d cannot be decoded: %s", frame_id, error)
                cache.skipped["stored frame cannot be decoded"] += len(wanted)
            except _Skip as skip:
                cache.skipped[str(skip)] += len(wanted)
    kept = np.concatenate(records)
    cache.commit(kept[np.argsort(kept["row_id"])], samples[-1].row_id)
    return len(samples)


def _useless(sample: StoredSample, plan: TapPlan, known: dict[int, TapPlan], manifests: dict[str, BackboneManifest]) -> str | None:
    if sample.label is None and plan.task == "classification":
        return "no label"
    if sample.backbone not in manifests:
        return "unknown backbone"
    made_for = known.get(sample.plan_version)
    if made_for is None:
        return "unknown tap plan"
    if made_for.labels != plan.labels:
        return "other labels"
    if made_for.task != plan.task:
        return "other task"
    if (made_for.mode, made_for.pooling) != (plan.mode, plan.pooling):
        return "other mode or pooling"
    return "label out of range" if plan.task == "classification" and (sample.label or 0) >= len(plan.labels) else None


def _keep(cache: TapCache, plan: TapPlan, frame: Frame, wanted: list[StoredSample], manifest: BackboneManifest) -> np.ndarray:
    layers = _vectors(frame, plan, manifest)
    if len({len(values) for values in layers}) != 1:
        raise _Skip("taps of unlike shapes")
    width = manifest.width if plan.mode == "pooled" else min(plan.rank, manifest.width)
    shard = cache.open_shard(frame.backbone, plan.layers(manifest.layers), width, layers[-1].shape[1], plan.summary_width(manifest.width))
    counts = [1 if frame.mode == "pooled" else sample.tokens + plan.summary_rows(manifest.width) for sample in frame.samples]
    ends = np.cumsum(counts)
    vectors = np.concatenate(layers, axis=1)
    tokens = _tokens(frame) if plan.task == "causal-lm" else None
    if plan.task == "regression":
        everything = len(wanted)
        wanted = [sample for sample in wanted if frame.samples[sample.position].target is not None]
        if len(wanted) < everything:
            cache.skipped["no number"] += everything - len(wanted)
    entries = [
        Entry(
            sample.row_id,
            sample.device,
            int(sample.label or 0),
            sample.split == "held-out",
            vectors[ends[sample.position] - counts[sample.position] : ends[sample.position]],
            frame.samples[sample.position].target or 0.0,
            None if tokens is None else tokens[sample.position],
        )
        for sample in wanted
        if counts[sample.position]
    ]
    if len(entries) < len(wanted):
        cache.skipped["no tokens"] += len(wanted) - len(entries)
    return cache.append(shard, entries)


def _tokens(frame: Frame) -> list[np.ndarray]:
    """Per sample (rows, 2): each row's token, and the one that it is trained to predict or `NO_TARGET`."""
    if frame.token_ids is None:
        raise _Skip("no token ids")
    found = []
    for sample, ids in zip(frame.samples, frame.token_ids.sequences([sample.tokens for sample in frame.samples]), strict=True):
        targets = np.where(np.arange(sample.tokens) >= sample.supervised_from, ids[1:], NO_TARGET)
        found.append(np.stack([ids[:-1], targets], axis=1))
    return found


def _vectors(frame: Frame, plan: TapPlan, manifest: BackboneManifest) -> list[np.ndarray]:
    """The plan's layers, each (rows, width); a language model's last one may be wider."""
    taps = {tap.layer: tap for tap in frame.taps}
    layers = plan.taps(manifest.layers)
    if not set(layers) <= set(taps):
        raise _Skip("taps do not cover the plan's layers")
    if plan.summary and not frame.summary_rows:
        raise _Skip("no summary")
    found = []
    for layer in layers:
        tap, width = taps[layer], plan.width_at(layer, manifest.layers, manifest.width)
        if tap.width != width and (plan.mode == "pooled" or tap.width < width):
            raise _Skip("other width than the backbone's" if plan.mode == "pooled" else "rank below the plan's")
        if frame.summary_rows not in (0, folded_rows(manifest.width, tap.width)):
            raise _Skip("summary of another width than the backbone's")
        vectors = decode_vectors(tap.data, tap.rows, tap.width, tap.codec, tap.group)
        if frame.summary_rows and (tap.width != width or not plan.summary):
            vectors = _refolded(vectors, frame, manifest.width, width, with_summary=plan.summary)
        # Rank r is the first r columns of the map, so a larger rank holds the smaller one.
        found.append(vectors[:, :width])
    return found


def _refolded(vectors: np.ndarray, frame: Frame, summary_width: int, width: int, *, with_summary: bool) -> np.ndarray:
    """Rows whose summary was folded to a larger rank: the first `width` columns of the tokens, the summary before them folded anew or left out."""
    tokens = [sample.tokens for sample in frame.samples]
    summaries, rows = split_summaries(vectors, tokens, summary_width)
    return join_summaries(summaries, rows[:, :width], tokens) if with_summary else rows
