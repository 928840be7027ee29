"""Small Llama and OPT language models of unlike depth and width with one tokenizer: python -m coordinator.demonstration.small_models

Pre-trained language models of one tokenizer and several shapes are rare, and none is small. These are trained from nothing
on short stories, in a few minutes on two cores, and kept in a folder in Hugging Face's layout; made once, then found again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.demonstration.data import Text
from coordinator.demonstration.text_rows import read_texts

if TYPE_CHECKING:
    import torch

SHARED = Path(__file__).resolve().parent.parent.parent.parent / "shared"
TOKENIZER = SHARED / "models" / "stories260K"
STORIES = SHARED / "data" / "tinystories_sample"
POSITIONS = 512
RECIPE = "recipe.json"  # beside the weights: what they were made by

SHAPES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama-96x4": ("llama", {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
    }),
    "opt-64x6": ("opt", {
        "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "dropout": 0.0,
    }),
    "llama-48x3": ("llama", {
        "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    }),
}  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything but the code that the weights depend on."""

    steps: int = 600
    batch: int = 16
    tokens: int = 128  # of a training row
    learning_rate: float = 5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    seed: int = 0


def make_models(
    folder: Path, names: Sequence[str] = tuple(SHAPES), *, recipe: Recipe | None = None, tokenizer: Path = TOKENIZER, stories: Path = STORIES, say: Say = print
) -> dict[str, Path]:
    """The models' folders by name, each trained unless `folder` holds it already, made by the same recipe from the same files.

    Args:
        folder: where each model gets a folder of its own.
        names: of SHAPES.
        recipe: how to train; the default takes about a minute and a half a model.
        tokenizer: folder of a model in Hugging Face's layout, whose tokenizer all get.
        stories: folder with train.jsonl[.gz] and test.jsonl[.gz], a `text` a row.
        say: told what goes on.

    """
    recipe = recipe or Recipe()
    found = {}
    for name in names:
        made_by = {**asdict(recipe), "shape": SHAPES[name], "files": _digest(tokenizer / "tokenizer.json", *sorted(stories.glob("*.jsonl*")))}
        out = folder / name
        wanted = json.dumps(made_by, sort_keys=True)
        if not (out / RECIPE).is_file() or (out / RECIPE).read_text(encoding="utf-8") != wanted:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as scratch:
                made = Path(scratch) / name
                _train(name, made, recipe, tokenizer=tokenizer, stories=stories, say=say)
                (made / RECIPE).write_text(wanted, encoding="utf-8")
                shutil.rmtree(out, ignore_errors=True)
                made.rename(out)
        found[name] = out
    return found


def _train(name: str, out: Path, recipe: Recipe, *, tokenizer: Path, stories: Path, say: Say) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _untrained(name, tokenizer)
        rows = {split: _rows(tokenizer, [_plain(row.text) for row in read_texts(stories, split)], recipe.tokens) for split in ("train", "test")}
        say(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {rows['train'].numel():,} tokens of {stories.name} to train on")
        matrices, others = ([p for p in model.parameters() if (p.dim() >= 2) is wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        order = torch.Generator().manual_seed(recipe.seed)
        began = time.monotonic()
        for step in range(recipe.steps):
            batch = rows["train"][torch.randint(len(rows["train"]), (recipe.batch,), generator=order)]
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
                say(f"{name}: step {step + 1} of {recipe.steps}, loss {float(loss.detach()):.3f}, {time.monotonic() - began:.0f} s")
        model.eval()
        with torch.inference_mode():
            losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in torch.split(rows["test"], 64)]
    say(f"{name}: held-out loss {sum(losses) / len(rows['test']):.3f} nats a token")
    model.save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, out / file)


def _untrained(name: str, tokenizer: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    family, shape = SHAPES[name]
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    config = AutoConfig.for_model(
        family, **shape, vocab_size=vocabulary, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        **{key: special[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(text)


def _rows(tokenizer: Path, texts: Sequence[str], tokens: int) -> torch.Tensor:
    """All texts after each other, each with its beginning, cut into rows of `tokens`; the rest of the last row is left out."""
    import torch
    from tokenizers import Tokenizer

    ids = [one for encoding in Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode_batch(list(texts)) for one in encoding.ids]
    return torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)


def _schedule(step: int, recipe: Recipe) -> float:
    """Rise in a line, then fall as a cosine to a tenth."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where the models are kept unless another folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobillm-fleet" / "small-models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--out", type=Path, default=cache_folder(), metavar="DIR", help="where each gets a folder of its own (default %(default)s)")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, metavar="DIR", help="model in Hugging Face's layout whose tokenizer they get")
    parser.add_argument("--stories", type=Path, default=STORIES, metavar="DIR", help="train.jsonl[.gz] and test.jsonl[.gz] with a text a row")
    parser.add_argument("--steps", type=int, default=Recipe.steps, metavar="N", help="training steps (default %(default)s)")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in SHAPES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SHAPES)}")
    made = make_models(
        options.out, options.names or tuple(SHAPES), recipe=Recipe(steps=options.steps), tokenizer=options.tokenizer, stories=options.stories
    )
    for name, folder in made.items():
        print(f"{name}: {folder}")


if __name__ == "__main__":
    main()
