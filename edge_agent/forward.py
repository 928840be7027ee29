"""One batch of samples through the backbone: each comes out with its taps, or is refused with a reason."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

import numpy as np

from edge_agent.backbone import Backbone, TextError
from edge_agent.open_frame import TappedSample
from edge_agent.samples import RowError, Sample, label_index, target_of
from edge_agent.taps import TapMatrices, compute_taps
from side_tuning.wire.frame import SampleInfo
from side_tuning.wire.messages import TapPlan
from side_tuning.wire.token_ids import TokenIds

logger = logging.getLogger(__name__)

Refuse = Callable[[str, str, str], None]  # sample id, reason for counting, words for the log


def tap_samples(backbone: Backbone, samples: Sequence[Sample], plan: TapPlan, refuse: Refuse) -> list[TappedSample]:
    """Run the samples forward once. Samples that cannot be used are refused one by one; the others are not held up."""
    usable: list[tuple[Sample, int | None, float | None]] = []
    for sample in samples:
        try:
            # A language model is trained on the text itself: a label that the row carries is no use to it.
            label = label_index(sample.label, plan.labels) if plan.task == "classification" else None
            usable.append((sample, label, target_of(sample.label) if plan.task == "regression" else None))
        except RowError as error:
            refuse(sample.id, error.reason, _at(sample, str(error)))
    matrices: TapMatrices | None = None
    while usable and matrices is None:
        try:
            matrices = compute_taps(backbone, [sample.text for sample, *_ in usable], plan)
        except TextError as error:
            refused, *_ = usable.pop(error.index)
            refuse(refused.id, error.kind, _at(refused, f"the text {error.reason}"))
    if matrices is None:
        return []
    tapped: list[TappedSample] = []
    counts = matrices.counts(plan.mode)
    ends = list(itertools.accumulate(counts))
    for place, (sample, label, target) in enumerate(usable):
        start, end = ends[place] - counts[place], ends[place]
        rows = {layer: values[start:end] for layer, values in matrices.values.items()}
        if not all(np.isfinite(values).all() for values in rows.values()):
            refuse(sample.id, "not finite", _at(sample, "the backbone gave values that are not finite; prepare it with other weights"))
            continue
        info = SampleInfo(sample.id, label, sample.split, matrices.tokens[place], target)
        token_ids = None
        if matrices.token_ids is not None and matrices.supervised_from is not None:
            info = info._replace(supervised_from=matrices.supervised_from[place])
            token_ids = TokenIds.of([matrices.token_ids[place]], backbone.manifest.vocabulary)
        tapped.append(TappedSample(info, rows, matrices.maps, matrices.depth, token_ids, matrices.summary_rows))
    return tapped


def _at(sample: Sample, words: str) -> str:
    return f"{sample.where}: {words}" if sample.where else words
