"""How fast a device writes with a side network, beside its backbone alone: `python -m benchmarks.generation [--json FILE]`.

Both run in one process and in turns, token by token after the same prompt; the ratio of their medians is the figure. The
backbone has the shape of OPT-125M with random weights, since speed does not depend on what they say.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Bar, print_bars, write_json
from coordinator.backbones import prepare
from edge_agent.backbone import Backbone
from edge_agent.generation import Generator, Side, Text
from side_tuning.network.language import (
    LanguageAlignment,
    LanguageAlignmentConfig,
    LanguageLadder,
    LanguageLadderConfig,
)
from side_tuning.wire.messages import TapPlan

PROMPT_TOKENS = 32
SLOWEST = 1.3  # times the backbone alone
VOCABULARY = 50_272


def make_backbone(folder: Path, layers: int, width: int) -> None:
    """An int8 artifact of an OPT of random weights, with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = OPTConfig(hidden_size=width, ffn_dim=4 * width, num_attention_heads=width // 64, num_hidden_layers=layers, vocab_size=VOCABULARY, word_embed_proj_dim=width)
    OPTForCausalLM(config).save_pretrained(folder / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(["<pad>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "model")
    prepare(folder / "model", folder / "artifact", weights="int8")


def make_side(backbone: Backbone, side_width: int, blocks: int) -> Side:
    manifest = backbone.manifest
    plan = TapPlan(1, (), blocks, mode="sequence", rank=128, task="causal-lm", last_rank=176)
    alignment = LanguageAlignment(LanguageAlignmentConfig(min(plan.rank, manifest.width), manifest.width, manifest.width, side_width, blocks))
    alignment.reset_projection(torch.Generator().manual_seed(1))
    return Side(alignment.eval(), LanguageLadder(LanguageLadderConfig(side_width, blocks, expansion=4)).eval(), plan)


def seconds_per_token(text: Text, prompt: list[int], tokens: int) -> float:
    """Mean over `tokens` tokens behind `prompt`, which itself is not counted."""
    token = int(text.feed(prompt).argmax())
    began = time.perf_counter()
    for _ in range(tokens):
        token = int(text.feed([token]).argmax())
    return (time.perf_counter() - began) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.generation", description=__doc__)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--side-width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16, help="of each text")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="generation-") as folder:
        make_backbone(Path(folder), options.layers, options.width)
        backbone = Backbone.load(Path(folder) / "artifact")
        writers = {"backbone": Generator(backbone), "with side network": Generator(backbone, make_side(backbone, options.side_width, options.blocks))}
        prompt = torch.randint(1, VOCABULARY, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()
        times: dict[str, list[float]] = {name: [] for name in writers}
        for turn in range(options.turns + 1):  # the first one warms up
            for name, writer in writers.items():
                seconds = seconds_per_token(writer.start(), prompt, options.tokens)
                if turn:
                    times[name].append(seconds)
    console = Console()
    table = Table("", "ms a token, median", "least", "most")
    for name, values in times.items():
        table.add_row(name, *(f"{1000 * value:.1f}" for value in (statistics.median(values), min(values), max(values))))
    console.print(table)
    ratio = statistics.median(times["with side network"]) / statistics.median(times["backbone"])
    bars = [Bar("time a token, times the backbone alone", ratio, SLOWEST, at_most=True)]
    print_bars(bars, console)
    if options.json is not None:
        write_json(options.json, {"seconds_per_token": times}, bars, [0], {k: str(v) for k, v in vars(options).items()})


if __name__ == "__main__":
    main()
