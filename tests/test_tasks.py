"""What scores are called, which way is better, and how they are written."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from side_tuning.tasks import METRICS, correlation, said_of
from side_tuning.wire.messages import Task


def test_every_task_has_a_metric_that_says_itself():
    assert set(METRICS) == set(get_args(Task))
    assert METRICS["classification"].said(0.855) == "accuracy 85.5 %"
    assert METRICS["regression"].said(0.8149) == "correlation 0.81"
    assert METRICS["causal-lm"].said(2.412) == "2.41 bits per byte"
    assert METRICS["causal-lm"].said(None) == "– bits per byte"


def test_the_worst_of_several_scores_respects_the_metrics_sense():
    scores = [0.5, 2.0, 1.0]
    assert min(scores, key=METRICS["regression"].rank) == 0.5
    assert min(scores, key=METRICS["causal-lm"].rank) == 2.0


def test_correlation_is_pearsons_whatever_the_order():
    generator = np.random.default_rng(0)
    targets = generator.normal(size=500)
    predictions = (0.7 * targets + generator.normal(size=500)).astype(np.float32)
    found = correlation(predictions.tolist(), targets.tolist())
    assert found == pytest.approx(np.corrcoef(predictions, targets)[0, 1], abs=1e-12)
    order = generator.permutation(500)
    assert correlation(predictions[order].tolist(), targets[order].tolist()) == found
    assert correlation([1.0], [2.0]) == correlation([1.0, 1.0], [2.0, 3.0]) == correlation([], []) == 0.0


def test_a_checkpoints_metrics_say_their_score_whichever_task_it_was_made_for():
    assert said_of({"loss": 0.5, "accuracy": 0.83, "worst_device_accuracy": 0.7}) == "accuracy 83.0 %", "as ever since the first release"
    assert said_of({"bits_per_byte": 2.0}) == "2.00 bits per byte"
    assert said_of({"loss": 0.5, "accuracy": "high"}) == said_of({}) == "–"
