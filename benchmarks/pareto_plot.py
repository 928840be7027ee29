"""Draws accuracy against bytes per sample, the Pareto front and the default plan's place, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"fp16": "#444444", "int8": "#0072b2", "int4": "#009e73", "rot4": "#cc79a7", "int2": "#d55e00"}


def draw(points: Mapping[str, tuple[float, float]], front: Sequence[str], default: str, limit: float, folder: Path) -> None:
    """Write `pareto.svg` and `pareto.png`; names of `points` are those of `benchmarks.accuracy.Case`."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for codec, colour in COLOURS.items():
        for mode, marker in (("pooled", "o"), ("sequence", "^")):
            own = [point for name, point in points.items() if name.startswith(mode) and codec in name]
            if own:
                axes.scatter(*zip(*own, strict=True), color=colour, marker=marker, label=f"{mode}, {codec}", zorder=3)
    axes.plot(*zip(*(points[name] for name in front), strict=True), color="#888888", linewidth=1, label="Pareto front")
    axes.scatter(*points[default], s=220, facecolors="none", edgecolors="black", linewidths=1.5, label="default plan", zorder=4)
    axes.axhline(limit, color="#888888", linestyle=":", label="pooled, best in full precision")
    axes.set_xscale("log", base=2)
    ticks = [128 * 2**n for n in range(9)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes per sample, as sent (frame headers included)")
    axes.set_ylabel("accuracy, mean over data sets (%)")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.25)
    figure.savefig(folder / "pareto.svg", metadata={"Date": None})
    figure.savefig(folder / "pareto.png", dpi=110)
    plt.close(figure)
