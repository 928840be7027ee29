"""What a sample costs on the device: the whole agent with a prepared backbone, beside plain `transformers` in float32.

    python -m benchmarks.agent [--json FILE] [--full]

Each side is a process of its own, the sides take turns. The agent is the shipped command with spool, broker and receipts;
docs/benchmarks.md says what is measured and what is not.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Bar, print_bars, write_json
from coordinator.demonstration.data import load_dataset
from coordinator.demonstration.toml import write_toml
from side_tuning.backbone_manifest import BackboneError, Weights, check_artifact
from side_tuning.wire.frame import Frame
from side_tuning.wire.messages import TapPlan
from tests.backbones.models import minilm_folder
from tests.brokers import mosquitto
from tests.receiving import Receiver
from tests.waiting import wait_until

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "mrpc"
SEED = 0
BATCH = 16
MAX_TOKENS = 128
BLOCKS = 2  # as plans have by default
TIMEOUT_SECONDS = 600.0
LIMIT = "transformers float32"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

# Shapes of the published models; their weights are random, since no figure here depends on them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "opt-125m": ("opt", {}),
    "opt-350m": (
        "opt",
        {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    ),
}
SAMPLES = {"minilm": 320, "roberta-base": 80, "opt-125m": 80, "opt-350m": 48}
BAR_BACKBONE = "roberta-base"


@dataclass(frozen=True)
class Turn:
    """One process from its start to its end. Seconds a sample: from the first batch that was done to the last, everything included."""

    seconds_per_sample: float
    cpu_seconds_per_sample: float
    peak_rss_bytes: int
    ready_seconds: float  # from the start of the process to the agent being online; of the limit: to its model being loaded
    first_frame_seconds: float  # ... to the first batch being done


def make_model(name: str, folder: Path, texts: list[str]) -> Path:
    """A model of that shape in Hugging Face's layout: MiniLM as published, the others with random weights and a tokenizer of RoBERTa's kind."""
    if name == "minilm":
        return minilm_folder()
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModel

    family, shape = SHAPES[name]
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(family, **shape)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    # As large as RoBERTa's, since it stays in memory (30 MB): invented words make up for what the texts do not have.
    chance = random.Random(SEED)
    words = ("".join(chance.choices(string.ascii_lowercase, k=9)) for _ in range(20_000))
    tokenizer.train_from_iterator(
        itertools.chain(texts, words),
        trainers.BpeTrainer(
            vocab_size=config.vocab_size, min_frequency=0, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def prepare_backbone(model: Path, weights: Weights, out: Path) -> Path:
    """By the shipped command, in a process of its own."""
    try:
        check_artifact(out)
    except BackboneError:
        command = [sys.executable, "-m", "coordinator.cli", "backbone", "prepare", "--model", str(model), "--weights", weights, "--out", str(out)]
        _run([*command, "--max-tokens", str(MAX_TOKENS)])
    return out


def agent_turn(backbone: Path, rows: Path, samples: int, folder: Path, *, plan: TapPlan | None = None, batch: int = BATCH, sent: list[Frame] | None = None) -> Turn:
    """`edge-agent run` over the rows until everything is receipted.

    A frame is a batch, and the time it bears is the end of that batch's forward pass: the clock runs from the first to the last.
    (Arrivals would flatter: frames are held back for the first second of a connection.)

    Args:
        backbone: prepared.
        rows: the device's file.
        samples: how many it holds.
        folder: for everything of this turn.
        plan: the default tells classes apart.
        batch: texts run forward at once, and in a frame.
        sent: gets the frames.

    """
    device = "kitchen"
    plan = plan or TapPlan(1, ("0", "1"), blocks=BLOCKS, max_tokens=MAX_TOKENS, frame_samples=batch)
    spent: list[tuple[float, float]] = []  # time, and the agent's processor seconds up to then
    with (
        mosquitto(folder / "broker") as broker, Receiver(broker.settings, device, persistent=False) as receiver, (folder / "log").open("wb") as log,
    ):  # fmt: skip
        write_toml(folder / "agent.toml", {
            "device": device, "state_directory": "state", "broker": {"host": "127.0.0.1", "port": broker.port, "tls": False},
            "backbone": {"folder": str(backbone), "batch_size": batch, "threads": 1}, "sources": [{"kind": "file", "path": str(rows)}],
            "health": {"every_seconds": 3600.0}, "run": {"exit_when_done": True},
        })  # fmt: skip
        wait_until(lambda: receiver.connection.connected, 30, "the receiver is connected")
        receiver.publish_plan(plan)
        began, ready = time.time(), 0.0
        command = [sys.executable, "-m", "edge_agent.cli", "run", "--config", str(folder / "agent.toml")]
        agent = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})
        watched = psutil.Process(agent.pid)
        try:
            while agent.poll() is None:
                now = time.time()
                spent.append((now, _processor_seconds(watched)))
                if now - began > TIMEOUT_SECONDS:
                    raise RuntimeError(f"the agent is not done after {TIMEOUT_SECONDS:g} s; see {folder / 'log'}")
                if not ready and receiver.health:
                    ready = now - began
                time.sleep(0.01)
        finally:
            agent.kill()
            agent.wait()
        if agent.returncode or len(receiver.sample_ids()) != samples:
            raise RuntimeError(f"the agent ended with {agent.returncode}, {len(receiver.sample_ids())} of {samples} samples came:\n{(folder / 'log').read_text()[-2000:]}")
        wait_until(lambda: receiver.health[-1].presence == "offline", 10, "the agent's goodbye")
        peak = receiver.health[-1].peak_rss_bytes
        frames = [frame for frame in receiver.frames.values() if isinstance(frame, Frame)]
    if sent is not None:
        sent += frames
    assert peak is not None
    ends = sorted(frame.captured_at for frame in frames)
    first, last = ends[0], ends[-1]
    seconds, processor = last - first, _spent_at(spent, last) - _spent_at(spent, first)
    return Turn(seconds / (samples - batch), processor / (samples - batch), peak, ready, first - began)


def limit_turn(model: Path, rows: Path) -> Turn:
    said = _run([sys.executable, "-m", "benchmarks.plain_forward", str(model), str(rows), str(MAX_TOKENS), str(BATCH)])
    return Turn(**json.loads(said.splitlines()[-1]))


def measure(name: str, given: argparse.Namespace, texts: list[str], folder: Path) -> dict[str, Any]:
    """Every side of one backbone, in turns, the order turned round each time."""
    model = make_model(name, folder / name / "model", texts)
    backbones = {weights: prepare_backbone(model, weights, folder / name / weights) for weights in given.weights}
    samples = given.samples or SAMPLES[name]
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": "0", "id": f"row-{n}"}) + "\n" for n, text in enumerate(texts[:samples])), encoding="utf-8")
    turns: dict[str, list[Turn]] = {LIMIT: [], **{weights: [] for weights in given.weights}}
    for number in range(given.turns):
        for side in list(turns)[:: 1 if number % 2 == 0 else -1]:
            if side == LIMIT:
                turn = limit_turn(model, rows)
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    turn = agent_turn(backbones[side], rows, samples, Path(scratch))
            turns[side].append(turn)
            print(f"{name}, {side}: {turn.seconds_per_sample * 1e3:.1f} ms a sample, {turn.peak_rss_bytes / 1e6:.0f} MB", file=sys.stderr, flush=True)
    found: dict[str, Any] = {"backbone": name, "samples": samples, "sides": {}}
    for side, of_side in turns.items():
        ratios = [one.seconds_per_sample / limit.seconds_per_sample for one, limit in zip(of_side, turns[LIMIT], strict=True)]
        found["sides"][side] = {
            **{key: statistics.median(getattr(one, key) for one in of_side) for key in ("seconds_per_sample", "cpu_seconds_per_sample", "ready_seconds", "first_frame_seconds")},
            "peak_rss_bytes": max(one.peak_rss_bytes for one in of_side), "seconds_vs_float32": statistics.median(ratios), "turns": [vars(one) for one in of_side],
        }  # fmt: skip
    return found


def bars_of(cells: list[dict[str, Any]]) -> list[Bar]:
    """Speed and memory against float32 are those of the worst backbone."""
    quantized = [(cell["sides"]["int8"], cell["sides"][LIMIT]) for cell in cells if "int8" in cell["sides"]]
    bars = [Bar("agent_peak_rss_gb", cell["sides"]["int8"]["peak_rss_bytes"] / 1e9, 0.38, at_most=True) for cell in cells if cell["backbone"] == BAR_BACKBONE and "int8" in cell["sides"]]
    if quantized:
        bars.append(Bar("forward_vs_float32", max(one["seconds_vs_float32"] for one, _ in quantized), 1.0, at_most=True))
        bars.append(Bar("memory_vs_float32", max(one["peak_rss_bytes"] / limit["peak_rss_bytes"] for one, limit in quantized), 1.0, at_most=True))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a data set's folder; pairs are joined; by default MRPC, or else the shipped home commands")
    parser.add_argument("--backbones", nargs="+", choices=list(SAMPLES), default=["minilm", "roberta-base"])
    parser.add_argument("--weights", nargs="+", choices=get_args(Weights), default=["float", "int8", "int4"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--samples", type=int, help=f"a turn, more than one batch of {BATCH}; by default fewer for larger backbones")
    parser.add_argument("--full", action="store_true", help="the OPTs too, and 7 turns")
    parser.add_argument("--folder", type=Path, help="keep models and prepared backbones here, and use those that are there")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.full:
        given.backbones, given.turns = list(SAMPLES), 7
    if given.samples is not None and given.samples <= BATCH:
        parser.error(f"--samples {given.samples} is not more than one batch of {BATCH}")
    if given.data is None and DATA.is_dir():
        given.data = DATA
    texts = [row.text if isinstance(row.text, str) else " ".join(row.text) for row in load_dataset(given.data).train]
    with tempfile.TemporaryDirectory() as scratch:
        cells = [measure(name, given, texts, given.folder or Path(scratch)) for name in given.backbones]
    console = Console()
    table = Table(
        "backbone", "side", "ms/sample", "of float32", "CPU ms", "peak MB", "online s", "1st frame s",
        title=f"One thread, batches of {BATCH}, {'pairs' if given.data == DATA else 'texts'} of {given.data.name if given.data else 'home commands'}", title_justify="left",
    )
    for cell in cells:
        for side, one in cell["sides"].items():
            table.add_row(
                cell["backbone"], side if side == LIMIT else f"agent {side}", f"{one['seconds_per_sample'] * 1e3:.1f}", f"{one['seconds_vs_float32']:.2f}",
                f"{one['cpu_seconds_per_sample'] * 1e3:.1f}", f"{one['peak_rss_bytes'] / 1e6:.0f}", f"{one['ready_seconds']:.1f}", f"{one['first_frame_seconds']:.1f}",
            )
    console.print(table)
    bars = bars_of(cells)
    print_bars(bars, console)
    if given.json:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        write_json(given.json, {"cells": cells}, bars, [SEED], options)


def _spent_at(spent: list[tuple[float, float]], at: float) -> float:
    """Processor seconds when the clock showed `at`, to a look's precision."""
    return spent[max(bisect.bisect_left(spent, (at,)) - 1, 0)][1]


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
