"""Anchors as training rows of a language model: what a backbone type that joins late is fitted to the ladder with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coordinator.training.anchors import export_anchors
from coordinator.training.learner import LanguageColumns, Rows
from coordinator.training.tap_cache import NO_TARGET
from side_tuning.network.side_network import pad_tokens
from side_tuning.wire.codecs import round_trip
from side_tuning.wire.messages import TapPlan

MOST_ANCHORS = 300


def anchor_rows(texts: list[object], data_directory: Path, fingerprint: str, plan: TapPlan) -> Rows:
    """The first texts as a device with this backbone would send them and the tap cache would give them.

    Raises:
        AnchorError: the backbone's artifact is not at hand, or cannot run the texts.

    """
    tensors, manifest = export_anchors(texts[:MOST_ANCHORS], data_directory, fingerprint, plan)
    depth, width = manifest.layers, min(plan.rank, manifest.width)
    tokens = tensors["tokens"].tolist()
    taps = {
        layer: round_trip(tensors[f"layer.{layer}"], plan.codec_at(layer, depth), plan.group) for layer in plan.taps(depth)
    }
    blocks, mask = pad_tokens(np.stack([taps[layer][:, :width] for layer in plan.layers(depth)], axis=1), tokens)
    last, _ = pad_tokens(taps[depth], tokens)
    ids, targets = np.zeros(mask.shape, np.int64), np.full(mask.shape, NO_TARGET, np.int64)
    ends = np.cumsum([count + 1 for count in tokens])
    for place, (end, count, first) in enumerate(zip(ends, tokens, tensors["supervised_from"].tolist(), strict=True)):
        own = tensors["token_ids"][end - count - 1 : end]
        ids[place, :count] = own[:-1]
        targets[place, first:count] = own[1 + first :]
    inputs = np.ascontiguousarray(blocks.swapaxes(1, 2))
    return Rows(fingerprint, inputs, mask, np.zeros(len(tokens), np.int64), LanguageColumns(last, ids, targets))
