"""Accuracy against bytes per sample, for codecs, taps, modes and ranks over several data sets: `python -m benchmarks.accuracy`.

Plans are compared on a split of the training rows. The test rows are looked at for the default plan alone, and for the
same taps in full precision. Every plan goes through real frames and the trainer's own step.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import tap_cache
from benchmarks.default_plan import default_plan
from benchmarks.figures import Bar, print_bars, write_json
from benchmarks.pareto_plot import draw
from benchmarks.tap_cache import Taps
from coordinator.demonstration.data import load_dataset
from coordinator.demonstration.fleet import cache_folder, prepare_backbones
from coordinator.training.reference import train_centrally
from coordinator.training.settings import TrainingSettings
from edge_agent.backbone import Backbone
from side_tuning.wire.messages import CodecName, Mode, TapPlan

DATA = Path(__file__).parents[2] / "shared" / "data"
SETS = ("trec", "hwu64", "snips7", "sst2", "mrpc")
MORE_SETS = ("rte", "sent140_users")  # with --full
VALIDATION_SHARE = 0.25


@dataclass(frozen=True)
class Case:
    """One way of sending taps; without a codec: full precision, which no device sends."""

    mode: Mode
    blocks: int
    codec: CodecName | None
    group: int = 128
    rank: int = 0  # `sequence` mode
    summary: bool = False
    tested: bool = False  # on the test rows, too

    @property
    def name(self) -> str:
        rank = f" rank {self.rank}{' and summary' if self.summary else ''}" if self.rank else ""
        group = f"/{self.group or 'vector'}" if self.codec and self.group != 128 else ""
        return f"{self.mode}{rank}, {self.blocks} taps, {self.codec or 'fp32'}{group}"

    def plan(self) -> TapPlan:
        """With labels that mean nothing."""
        return TapPlan(
            1, ("a", "b"), self.blocks, self.mode, codec=self.codec or "fp16", group=self.group, rank=self.rank or 32, summary=self.summary
        )

    def taps_file(self, folder: Path, dataset: str) -> Path:
        return folder / f"{dataset}-{self.mode}-{self.rank}-{self.summary}.npz"


@dataclass(frozen=True)
class Result:
    case: Case
    dataset: str
    bytes_per_sample: float
    validation: tuple[float, ...]  # per cent, one per seed
    test: tuple[float, ...]


def default_case(depth: int, mode: Mode | None = None) -> Case:
    """What a coordinator with nothing but labels, and perhaps the mode, in its settings asks of a fleet whose shallowest backbone has `depth` layers."""
    plan = default_plan(depth, {"labels": ("no", "yes")}, mode=mode)
    rank = plan.rank if plan.mode == "sequence" else 0
    return Case(plan.mode, plan.blocks, plan.codec, plan.group, rank, plan.summary, tested=mode is None)


def cases(depth: int, full: bool) -> list[Case]:
    """The plans compared, the default one first, then its taps in full precision."""
    default = default_case(depth)
    reference = replace(default, codec=None, group=128)
    counts = sorted({min(depth, n) for n in (1, 2, 3, depth)})
    codecs: tuple[CodecName, ...] = ("fp16", "int8", "int4", "rot4", "int2")
    found = [default, reference]
    for blocks in counts:
        found.append(Case("pooled", blocks, None))
        found += [Case("pooled", blocks, codec) for codec in codecs if full or codec in ("int4", "int2") or blocks == default.blocks]
    sequence = default_case(depth, "sequence")
    found += [sequence, replace(sequence, summary=False)]
    if full:
        for rank in (16, 32, sequence.rank):
            found += [replace(sequence, rank=rank, codec=codec, summary=summary) for codec in (None, "int8", "int4", "int2") for summary in (True, False)]
        found += [replace(sequence, blocks=1, rank=rank) for rank in (16, 32, sequence.rank)]
    known = {replace(case, tested=False): case for case in reversed(found)}  # of two alike the first
    return sorted(known.values(), key=found.index)


def measure(case: Case, dataset: str, folder: Path, classes: int, seeds: Sequence[int]) -> Result:
    """Train and score `case` once per seed; run in a process of its own."""
    torch.set_num_threads(1)
    taps = Taps.load(case.taps_file(folder, dataset))
    depth = max(taps.layers)
    plan = replace(case.plan(), labels=tuple(map(str, range(classes))))
    layers = plan.layers(depth)
    if case.codec is None:
        size = float(4 * taps.values.shape[2] * len(layers) * taps.counts.mean())
    else:
        taps, size = tap_cache.through_the_wire(taps, plan, plan.taps(depth))
    validation, test = [], []
    for seed in seeds:
        rows = np.random.default_rng((seed, 1)).permutation(np.flatnonzero(~taps.test))
        cut = int(len(rows) * (1 - VALIDATION_SHARE))
        held_out = [taps.activations(rows[cut:], layers, "validation")]
        if case.tested:
            held_out.append(taps.activations(np.flatnonzero(taps.test), layers, "test"))
        score = train_centrally([taps.activations(rows[:cut], layers, "train")], held_out, TrainingSettings(seed=seed), classes=classes)
        validation.append(100 * score.by_device["validation"])
        test += [100 * score.by_device["test"]] if case.tested else []
    return Result(case, dataset, size, tuple(validation), tuple(test))


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of those `(bytes, accuracy)` that no other beats in both, by bytes."""
    front: list[str] = []
    best = -np.inf
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            front.append(name)
            best = accuracy
    return front


def prepare_taps(
    folders: Sequence[Path], backbone: Backbone, folder: Path, wanted: Sequence[Case], *, rows: tuple[int, int], say: Console
) -> dict[str, int]:
    """Compute every data set's taps once; returns how many classes each has."""
    classes = {}
    depth = backbone.manifest.layers
    for data in folders:
        began = time.monotonic()
        dataset = load_dataset(data)
        chosen, test = tap_cache.draw_rows(dataset, *rows)
        for case in {case.taps_file(folder, dataset.name): case for case in wanted}.values():
            # In `sequence` mode the two layers of the default plan alone: all of them take a gigabyte.
            plan = replace(case.plan(), blocks=depth if case.mode == "pooled" else min(2, depth))
            tap_cache.compute(backbone, dataset, chosen, test, plan).save(case.taps_file(folder, dataset.name))
        classes[dataset.name] = len(dataset.labels)
        say.print(f"{dataset.name}: taps of {len(chosen)} samples in {time.monotonic() - began:.0f} s")
    return classes


def summary(results: Sequence[Result]) -> tuple[dict[str, tuple[float, float]], list[dict[str, object]]]:
    """Mean over data sets: points for the plot, and rows for the file."""
    points, rows = {}, []
    for case in dict.fromkeys(result.case for result in results):
        own = [result for result in results if result.case == case]
        size, accuracy = float(np.mean([r.bytes_per_sample for r in own])), float(np.mean([r.validation for r in own]))
        points[case.name] = (size, accuracy)
        spread = float(np.std(np.mean([r.validation for r in own], axis=0)))
        tested = float(np.mean([r.test for r in own])) if case.tested else None
        by_set = {r.dataset: {"validation": r.validation, "test": r.test, "bytes_per_sample": r.bytes_per_sample} for r in own}
        rows.append({"name": case.name, "case": asdict(case), "bytes_per_sample": size, "validation": accuracy, "spread": spread, "test": tested, "sets": by_set})
    return points, rows


def print_table(results: Sequence[Result], names: Sequence[str], front: Sequence[str], console: Console) -> None:
    table = Table("plan", "bytes", *names, "mean", "front", title="Accuracy on held-back training rows, per cent", title_justify="left")
    for case in sorted({r.case for r in results}, key=lambda case: (case.mode, case.blocks, case.rank, case.name)):
        own = {r.dataset: r for r in results if r.case == case}
        means = [float(np.mean(own[name].validation)) for name in names]
        marked = "default, " * (case.tested and case.codec is not None) + "front" * (case.name in front)
        size = np.mean([r.bytes_per_sample for r in own.values()])
        table.add_row(case.name, f"{size:,.0f}", *(f"{mean:.1f}" for mean in means), f"{np.mean(means):.2f}", marked.rstrip(", "))
    console.print(table)
    tested = Table("plan", *names, "mean", title="Accuracy on test rows, per cent", title_justify="left")
    for case in dict.fromkeys(r.case for r in results if r.case.tested):
        means = [float(np.mean(r.test)) for name in names for r in results if r.case == case and r.dataset == name]
        tested.add_row(case.name, *(f"{mean:.1f}" for mean in means), f"{np.mean(means):.2f}")
    console.print(tested)


def bars_of(rows: Sequence[dict[str, object]]) -> list[Bar]:
    by_name = {bool(row["case"]["codec"]): row for row in rows if row["test"] is not None}  # type: ignore[index]
    default, reference = by_name[True], by_name[False]
    loss = float(reference["test"]) - float(default["test"])  # type: ignore[arg-type]
    return [
        Bar("pooled_bytes_per_sample", float(default["bytes_per_sample"]), 512, at_most=True),  # type: ignore[arg-type]
        Bar("pooled_accuracy_loss", loss, 0.5, at_most=True),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", metavar="DIR", help="folders with train and test rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="every codec at every tap count, sequence mode by rank, more rows and data sets")
    parser.add_argument("--rows", type=int, nargs=2, metavar=("TRAIN", "TEST"), help="at most so many of each data set")
    parser.add_argument("--no-sequence", dest="sequence", action="store_false", help="pooled plans only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write pareto.svg and pareto.png there")
    given = parser.parse_args(arguments)
    if given.data is None:
        given.data = [DATA / name for name in (*SETS, *(MORE_SETS if given.full else ()))]
    console = Console(width=160)
    began = time.monotonic()
    train, test = given.rows or ((4000, 2000) if given.full else (1000, 600))
    rows = (train, test)
    backbone = Backbone.load(prepare_backbones(1, cache_folder(), console.print)[0].folder)
    wanted = [case for case in cases(backbone.manifest.layers, given.full) if given.sequence or case.mode == "pooled"]
    seeds = list(range(given.seeds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classes = prepare_taps(given.data, backbone, folder, wanted, rows=rows, say=console)
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(measure, case, dataset, folder, count, seeds) for case in wanted for dataset, count in classes.items()]
            results = [job.result() for job in jobs]
    points, figures = summary(results)
    sent = {case.name: points[case.name] for case in wanted if case.codec is not None}
    front = pareto(sent)
    print_table(results, list(classes), front, console)
    bars = bars_of(figures)
    print_bars(bars, console)
    console.print(f"{time.monotonic() - began:.0f} s in all")
    if given.plot:
        limit = max((points[case.name][1] for case in wanted if case.codec is None and case.mode == "pooled"), default=float("nan"))
        draw(sent, front, wanted[0].name, limit, given.plot)
    if given.json:
        options = {"data": [str(path.name) for path in given.data], "rows": rows, "full": given.full, "seconds": round(time.monotonic() - began)}
        write_json(given.json, {"plans": figures, "front": front, "default": wanted[0].name}, bars, seeds, options)


if __name__ == "__main__":
    main()
