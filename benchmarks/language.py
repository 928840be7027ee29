"""How well language models are tuned: bits per byte beside LoRA on one machine, what the bytes buy, and unlike backbones together.

    python -m benchmarks.language [--json FILE] [--full]

Base model and LoRA see the very tokens that the devices' frames hold; ours are learned from those frames by the coordinator's
own trainer. Nothing is chosen on held-out text: LoRA's learning rate and every plan are compared on rows set aside from train.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.default_plan import default_plan
from benchmarks.figures import Bar, print_bars, write_json
from benchmarks.language_lora import TokenRow, bits_per_byte, load_model, lora
from benchmarks.language_side import Bits, Device, gain_share, language_fleet, text_frames, token_rows
from coordinator.backbones import prepare
from coordinator.demonstration.data import Text, write_anchors
from coordinator.demonstration.small_models import SHARED, STORIES, TOKENIZER, cache_folder, make_models
from coordinator.demonstration.text_rows import read_texts
from coordinator.training.settings import FEWEST_ANCHORS, TrainingSettings
from edge_agent.backbone import Backbone
from edge_agent.language_rows import language_rows
from side_tuning.backbone_manifest import TextError
from side_tuning.token_bytes import token_bytes
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.messages import TapPlan

DATA_SETS = ("shakespeare_roles", "e2e_nlg_small", "wikitext2_small")
LEARNING_RATES = (3e-3, 1e-2)  # of LoRA; the better one on rows set aside counts
MAX_TOKENS = 128
CALIBRATION_TEXTS = 300
ANCHORS = 200
WIDE = 768  # the width that the bar on bytes is stated for
GAIN_BAR, BYTES_BAR = 0.8, 96

# What of the default plan is changed in the table of quality against bytes.
VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "1 tap": {"blocks": 1},
    "3 taps": {"blocks": 3},
    "5 taps": {"blocks": 5},
    "rank 32": {"rank": 32},
    "rank 16": {"rank": 16},
    "int8": {"codec": "int8"},
    "int2": {"codec": "int2"},
    "last rank 48": {"last_rank": 48, "rank": 48},
    "last rank 32": {"last_rank": 32, "rank": 32},
    "last int8": {"last_codec": "int8"},
    "last int2": {"last_codec": "int2"},
}
# Of unlike shapes, one tokenizer; the last one joins when the others are trained.
FLEET = ("stories260K", "llama-96x4", "opt-64x6", "llama-48x3")


@dataclass(frozen=True)
class Texts:
    """Rows of one data set."""

    train: list[Text]
    aside: list[Text]  # of the train file: what choices are made on
    held_out: list[Text]


@dataclass(frozen=True)
class Quality:
    """Held-out bits per byte of one data set and seed."""

    data: str
    seed: int
    base: float
    lora: float
    lora_learning_rate: float
    untuned: float  # the quantized backbone through the codec
    ours: float
    share: float
    bytes_per_token: float


class Work:
    """Models, prepared backbones and options of one run of this benchmark."""

    def __init__(self, options: argparse.Namespace, folder: Path, console: Console) -> None:
        self.options, self.folder, self.console = options, folder, console
        self.stories: list[str] = [row.text for row in read_texts(STORIES, "train")[:CALIBRATION_TEXTS] if isinstance(row.text, str)]
        self._artifacts: dict[str, Path] = {}
        self._fleets = 0

    def model(self, name: str) -> Path:
        if name == "stories260K":
            return TOKENIZER
        return make_models(self.options.models, [name], say=self.say)[name]

    def artifact(self, name: str) -> Path:
        """The model in int8, its maps fitted to public stories."""
        if name not in self._artifacts:
            self._artifacts[name] = self.folder / "backbones" / name
            prepare(self.model(name), self._artifacts[name], weights="int8", max_tokens=MAX_TOKENS, calibrate=self.stories, progress=lambda _: None)
        return self._artifacts[name]

    def plan(self, **changes: Any) -> TapPlan:
        """What the coordinator asks for by default, with `changes`."""
        depth = Backbone.load(self.artifact("stories260K")).manifest.layers
        return replace(default_plan(depth, {"kind": "causal-lm"}, max_tokens=MAX_TOKENS), **changes)

    def knobs(self, seed: int, **changes: Any) -> TrainingSettings:
        return TrainingSettings(seed=seed, threads=torch.get_num_threads(), replay_ratio=1e6, **changes)

    def new_folder(self) -> Path:
        self._fleets += 1
        return self.folder / f"fleet-{self._fleets}"

    def texts(self, data: str) -> Texts:
        """So many rows as asked for, drawn once, without those that give nothing to train on."""
        tokenizer = Backbone.load(self.artifact("stories260K"))._tokenizer
        plan, random = self.plan(), np.random.default_rng(0)

        def some(split: str, count: int) -> list[Text]:
            rows = read_texts(SHARED / "data" / data, split)
            found: list[Text] = []
            for n in random.permutation(len(rows)):
                try:
                    language_rows(tokenizer, [rows[n].text], plan)
                except TextError:
                    continue
                found.append(rows[n].text)
                if len(found) == count:
                    break
            return found

        train = some("train", self.options.rows + self.options.test_rows)
        return Texts(train[self.options.test_rows :], train[: self.options.test_rows], some("test", self.options.test_rows))

    def ours(self, texts: Texts, seed: int, *, held_out: Sequence[Text], **changes: Any) -> tuple[Bits, float]:
        """Held-out bits per byte of one device's side network, and payload bytes per token, headers included."""
        with language_fleet(self.new_folder(), self.plan(**changes), self.knobs(seed)) as fleet:
            fleet.add(Device("kitchen", self.artifact("stories260K"), texts.train, held_out))
            fleet.train(self.options.steps)
            return fleet.bits_per_byte()[""], fleet.payload_bytes / fleet.tokens

    def say(self, words: str) -> None:
        self.console.print(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--full", action="store_true", help="three seeds")
    parser.add_argument("--data", nargs="+", default=list(DATA_SETS), metavar="NAME", help="folders of ../shared/data (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=("quality", "curve", "fleet"), default=["quality", "curve", "fleet"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4000, help="train rows of each data set (default %(default)s)")
    parser.add_argument("--test-rows", type=int, default=300, help="held-out rows, and train rows that choices are made on (default %(default)s)")
    parser.add_argument("--models", type=Path, default=cache_folder(), metavar="DIR", help="where the small models are kept (default %(default)s)")
    options = parser.parse_args()
    if options.test_rows < FEWEST_ANCHORS:
        parser.error(f"--test-rows {options.test_rows} is too few: {FEWEST_ANCHORS} or more")
    seeds = [0, 1, 2] if options.full else [0]
    console = Console()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options, Path(folder), console)
        bars = [bytes_bar(work.plan())]
        if "quality" in options.parts:
            found = [quality(work, data, seed) for data in options.data for seed in seeds]
            figures["quality"] = [asdict(one) for one in found]
            print_quality(found, console)
            shares = {data: [one.share for one in found if one.data == data] for data in options.data}
            bars += [Bar(f"lora_gain_share.{data}", statistics.mean(of), GAIN_BAR) for data, of in shares.items()]
        if "curve" in options.parts:
            figures["curve"] = curve(work, options.data[0])
            print_curve(figures["curve"], options.data[0], console)
        if "fleet" in options.parts:
            figures["fleet"] = unlike_backbones(work, options.data[0])
            print_fleet(figures["fleet"], console)
            bars += [Bar(f"fleet_gain.{name}", bits["untuned"] - bits["tuned"], 0.0) for name, bits in figures["fleet"]["together"].items()]
            bars.append(Bar("late_joiner_gain_at_once", figures["fleet"]["late"]["untuned"] - figures["fleet"]["late"]["tuned"], 0.0))
    print_bars(bars, console)
    if options.json is not None:
        write_json(options.json, figures, bars, seeds, {name: value for name, value in vars(options).items() if name != "json"})


def quality(work: Work, data: str, seed: int) -> Quality:
    """The model as it is, LoRA, and ours, after as many steps on as many rows of the same tokens."""
    texts = work.texts(data)
    backbone, plan = Backbone.load(work.artifact("stories260K")), work.plan()
    sizes = token_bytes(work.artifact("stories260K"), backbone.manifest.vocabulary)
    rows: dict[str, list[TokenRow]] = {
        name: token_rows(text_frames(backbone, plan, "kitchen", part, "train"))
        for name, part in (("train", texts.train), ("aside", texts.aside), ("held-out", texts.held_out))
    }
    base = bits_per_byte(load_model(TOKENIZER), rows["held-out"], sizes)
    work.say(f"{data}: {len(rows['train'])} rows of {np.mean([len(row.ids) - 1 for row in rows['train']]):.0f} tokens; the model as it is: {base:.3f}")
    best = (math.inf, math.nan, math.nan)  # on rows set aside, held out, learning rate
    for rate in LEARNING_RATES:
        tuned = lora(TOKENIZER, rows["train"], steps=work.options.steps, batch=work.knobs(seed).of_task("causal-lm").batch_size, learning_rate=rate, seed=seed)
        best = min(best, (bits_per_byte(tuned, rows["aside"], sizes), bits_per_byte(tuned, rows["held-out"], sizes), rate))
        work.say(f"{data}: LoRA at {rate:g}, best so far {best[1]:.3f}")
    ours, bytes_per_token = work.ours(texts, seed, held_out=texts.held_out)
    work.say(f"{data}: ours {ours.tuned:.3f}")
    return Quality(data, seed, base, best[1], best[2], ours.untuned, ours.tuned, gain_share(base, best[1], ours.tuned), bytes_per_token)


def curve(work: Work, data: str) -> list[dict[str, Any]]:
    """Bits per byte on rows set aside, under plans of unlike sizes."""
    texts = work.texts(data)
    found = []
    for name, changes in VARIATIONS.items():
        bits, size = work.ours(texts, 0, held_out=texts.aside, **changes)
        found.append({"plan": name, **asdict(bits), "bytes_per_token": size})
        work.say(f"{data}, {name}: {bits.tuned:.3f} at {size:.0f} bytes a token")
    return found


def unlike_backbones(work: Work, data: str) -> dict[str, Any]:
    """All but the last of FLEET train one ladder; then the last joins, and is measured before it has trained a step."""
    texts = work.texts(data)
    anchors = work.folder / "anchors.jsonl"
    write_anchors(texts.aside[:ANCHORS], anchors)
    *first, late = FLEET
    with language_fleet(work.new_folder(), work.plan(blocks=3), work.knobs(0, anchors_file=anchors)) as fleet:
        for n, name in enumerate(first):
            fleet.add(Device(name, work.artifact(name), texts.train[n :: len(FLEET)], texts.held_out[n :: len(FLEET)]))
        fleet.train(work.options.steps)
        together = fleet.bits_per_byte()
        fleet.add(Device(late, work.artifact(late), texts.train[len(first) :: len(FLEET)], texts.held_out[len(first) :: len(FLEET)]))
        joined = fleet.bits_per_byte()[late]
    return {"together": {name: asdict(together[name]) for name in first}, "late": asdict(joined), "late_backbone": late}


def bytes_bar(plan: TapPlan) -> Bar:
    """The largest tap of a token by the plan, encoded, for a backbone of width WIDE."""
    depth, tokens = plan.blocks, 256
    random = np.random.default_rng(0)
    sizes = [
        len(encode_vectors(random.standard_normal((tokens, plan.width_at(layer, depth, WIDE))), plan.codec_at(layer, depth), plan.group)) / tokens
        for layer in plan.taps(depth)
    ]
    return Bar(f"bytes_per_token_and_tap_at_{WIDE}", max(sizes), BYTES_BAR, at_most=True)


def print_quality(found: Sequence[Quality], console: Console) -> None:
    table = Table(
        "data", "seed", "base", "LoRA", "at", "ours", "share of LoRA's gain", "untuned, through the codec", "bytes a token",
        title="Held-out bits per byte", title_justify="left",
    )  # fmt: skip
    for one in found:
        table.add_row(
            one.data, str(one.seed), f"{one.base:.3f}", f"{one.lora:.3f}", f"{one.lora_learning_rate:g}", f"{one.ours:.3f}", f"{one.share:.0%}",
            f"{one.untuned:.3f}", f"{one.bytes_per_token:.0f}",
        )  # fmt: skip
    console.print(table)


def print_curve(found: Sequence[Mapping[str, Any]], data: str, console: Console) -> None:
    table = Table("plan", "bytes a token", "untuned", "tuned", title=f"Bits per byte on train rows set aside, {data}", title_justify="left")
    for one in found:
        table.add_row(one["plan"], f"{one['bytes_per_token']:.0f}", f"{one['untuned']:.3f}", f"{one['tuned']:.3f}")
    console.print(table)


def print_fleet(found: Mapping[str, Any], console: Console) -> None:
    table = Table("backbone", "untuned", "tuned", title="Unlike backbones, one ladder: held-out bits per byte of each", title_justify="left")
    for name, bits in found["together"].items():
        table.add_row(name, f"{bits['untuned']:.3f}", f"{bits['tuned']:.3f}")
    table.add_row(f"{found['late_backbone']}, late, before its first step", f"{found['late']['untuned']:.3f}", f"{found['late']['tuned']:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
