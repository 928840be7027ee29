"""What each task is judged by: the name of its score, which way is better, and how it is written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from side_tuning.wire.messages import Task

NOTHING = "–"  # in place of a score that was not measured


@dataclass(frozen=True)
class Metric:
    """The score of a task, over held-out samples."""

    name: str
    higher_is_better: bool = True
    percent: bool = False  # 0 to 1, written as per cent

    @property
    def key(self) -> str:
        """Its name in a checkpoint's metrics, in JSON and as a label of Prometheus."""
        return self.name.replace(" ", "_")

    def rank(self, score: float) -> float:
        """Lower is worse."""
        return score if self.higher_is_better else -score

    def shown(self, score: float | None) -> str:
        """The bare score: `85.5 %`, `0.81`, `2.41`."""
        if score is None:
            return NOTHING
        return f"{score * 100:.1f} %" if self.percent else f"{score:.2f}"

    def said(self, score: float | None) -> str:
        """The score with its name: `accuracy 85.5 %`, `correlation 0.81`, `2.41 bits per byte`."""
        return f"{self.name} {self.shown(score)}" if self.higher_is_better else f"{self.shown(score)} {self.name}"


METRICS: Mapping[Task, Metric] = {
    "classification": Metric("accuracy", percent=True),
    "regression": Metric("correlation"),  # Pearson's, between predictions and targets
    "causal-lm": Metric("bits per byte", higher_is_better=False),
}


def correlation(predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Pearson's, 0 where it is not defined (fewer than two, or all alike). The order changes no bit: device and coordinator agree."""
    n = len(predictions)
    if n < 2:
        return 0.0
    mean_p, mean_t = math.fsum(predictions) / n, math.fsum(targets) / n
    p, t = [value - mean_p for value in predictions], [value - mean_t for value in targets]
    spread = math.sqrt(math.fsum(v * v for v in p) * math.fsum(v * v for v in t))
    return math.fsum(a * b for a, b in zip(p, t, strict=True)) / spread if spread > 0 else 0.0


def said_of(metrics: Mapping[str, object]) -> str:
    """The score in the metrics that a checkpoint carries, whichever task it was made for."""
    for metric in METRICS.values():
        score = metrics.get(metric.key)
        if isinstance(score, int | float):
            return metric.said(score)
    return NOTHING
