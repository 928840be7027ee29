"""Language models of the sizes that people have: prepared in int4, run by an agent, and one step of the trainer, with the peak memory of each.

    python -m benchmarks.language_sizes [NAME ...] [--json FILE]

The weights are random, since no figure here depends on them; shapes are those of the published models. Every stage is a process
of its own: `coordinator backbone prepare`, `edge-agent run` with a real broker, and one step of the trainer on the frames that came.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.agent import ENVIRONMENT, agent_turn
from benchmarks.figures import write_json
from side_tuning.backbone_manifest import read_manifest
from side_tuning.wire.frame import Frame, encode_frame
from side_tuning.wire.messages import TapPlan

# Of the published configurations.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-125m": ("opt", {}),
    "qwen2.5-0.5b": ("qwen2", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151_936, "tie_word_embeddings": True,
    }),
    "llama-3.2-1b": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    }),
    "opt-1.3b": ("opt", {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "word_embed_proj_dim": 2048}),
}  # fmt: skip
SAMPLES = 4
BATCH = 2
WORDS = 12  # of a text
MAX_TOKENS = 64
SHARD_BYTES = 1 << 30
SEED = 0


@dataclass(frozen=True)
class Stage:
    peak_rss_bytes: int
    seconds: float


def make_model(name: str, folder: Path) -> None:
    """Random weights in Hugging Face's layout, a shard at a time, and a small tokenizer of RoBERTa's kind."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM

    family, shape = SHAPES[name]
    config = AutoConfig.for_model(family, **shape)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(SEED)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    total = 0

    def close() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()
        gc.collect()

    for key, parameter in model.state_dict().items():
        if key in tied:
            continue
        ones = key.endswith("norm.weight")
        value = torch.ones(parameter.shape) if ones else torch.randn(parameter.shape, generator=generator) * config.to_dict().get("initializer_range", 0.02)
        shard[key] = value.to(torch.bfloat16)
        total += shard[key].nbytes
        if sum(one.nbytes for one in shard.values()) > SHARD_BYTES:
            close()
    close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts(200), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def texts(count: int) -> list[str]:
    chance = random.Random(SEED)
    words = ["".join(chance.choices(string.ascii_lowercase, k=5)) for _ in range(100)]
    return [" ".join(chance.choices(words, k=WORDS)) for _ in range(count)]


def measure(name: str, folder: Path, say: Any) -> dict[str, Any]:
    """Every stage of one model, one after the other."""
    model, artifact = folder / "model", folder / "artifact"
    say(f"{name}: random weights")
    _watched([sys.executable, "-m", "benchmarks.language_sizes", "--make", name, str(model)])
    say(f"{name}: preparing in int4")
    prepared = _watched([
        sys.executable, "-m", "coordinator.cli", "backbone", "prepare", "--model", str(model), "--weights", "int4", "--out", str(artifact),
        "--max-tokens", str(MAX_TOKENS),
    ])  # fmt: skip
    manifest = read_manifest(artifact)
    plan = TapPlan(
        1, (), blocks=2, mode="sequence", task="causal-lm", rank=128, last_rank=176, max_tokens=MAX_TOKENS, frame_samples=BATCH, frame_bytes=1 << 20
    )
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "id": f"row-{n}"}) + "\n" for n, text in enumerate(texts(SAMPLES))), encoding="utf-8")
    say(f"{name}: the agent")
    frames: list[Frame] = []
    (folder / "turn").mkdir()
    began = time.monotonic()
    turn = agent_turn(artifact, rows, SAMPLES, folder / "turn", plan=plan, batch=BATCH, sent=frames)
    agent = Stage(turn.peak_rss_bytes, time.monotonic() - began)
    for frame in frames:
        (folder / f"frame-{frame.sequence}").write_bytes(encode_frame(frame))
    (folder / "plan").write_bytes(plan.to_bytes())
    say(f"{name}: a step of the trainer")
    step = _watched([sys.executable, "-m", "benchmarks.language_sizes", "--step", str(folder)])
    return {
        "model": name, "parameters": _parameters(model), "width": manifest.width, "layers": manifest.layers, "vocabulary": manifest.vocabulary,
        "artifact_bytes": sum(file.stat().st_size for file in artifact.iterdir()), "prepare": asdict(prepared), "agent": asdict(agent), "step": asdict(step),
        "tokens": sum(sample.tokens for frame in frames for sample in frame.samples), "payload_bytes": sum(len(encode_frame(frame)) for frame in frames),
    }  # fmt: skip


def step(folder: Path) -> None:
    """One step of the trainer on the frames in `folder`; nothing of the agent is loaded."""
    from benchmarks.language_side import language_fleet
    from coordinator.training.settings import TrainingSettings

    plan = TapPlan.from_bytes((folder / "plan").read_bytes())
    with language_fleet(folder / "coordinator", plan, TrainingSettings()) as fleet:
        fleet.register(folder / "artifact")
        fleet.receive("kitchen", [file.read_bytes() for file in sorted(folder.glob("frame-*"))])
        fleet.train(1)


def _parameters(model: Path) -> int:
    index = json.loads((model / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return int(index["metadata"]["total_size"]) // 2


def _watched(command: list[str]) -> Stage:
    """Run a program to its end; its peak memory is the kernel's own count."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command[1:5])} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    return Stage(usage.ru_maxrss * 1024, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)} (default: all but the first)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)  # the stages that this program is itself
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(options.make[0], Path(options.make[1]))
        return
    if options.step:
        step(options.step)
        return
    if unknown := [name for name in options.names if name not in SHAPES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SHAPES)}")
    console = Console()
    table = Table("model", "parameters", "artifact MB", "prepare: peak MB", "s", "agent: peak MB", "s", "trainer's step: peak MB", "s", "bytes a token")
    found = []
    for name in options.names or list(SHAPES)[1:]:
        with tempfile.TemporaryDirectory() as folder:
            one = measure(name, Path(folder), console.print)
        found.append(one)
        stages = [words for stage in ("prepare", "agent", "step") for words in (f"{one[stage]['peak_rss_bytes'] / 1e6:,.0f}", f"{one[stage]['seconds']:.0f}")]
        table.add_row(name, f"{one['parameters'] / 1e6:,.0f} M", f"{one['artifact_bytes'] / 1e6:,.0f}", *stages, f"{one['payload_bytes'] / one['tokens']:.0f}")
    console.print(table)
    if options.json is not None:
        write_json(options.json, {"models": found}, [], [SEED], {"names": options.names})


if __name__ == "__main__":
    main()
