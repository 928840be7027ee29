"""What every LoRA peer trains, written once: a frozen encoder with adapters on query and value, mean over tokens, linear head.

It runs in the peers' own environment as well as in this project's, so it imports nothing of the project. A job is a
folder's `job.json`: the backbone, the rows of each device, and the recipe.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

BUCKET_BATCHES = 8  # so many batches are sorted by length together: less padding, and still a fair shuffle

transformers_logging.set_verbosity_error()  # a cut backbone leaves weights unread, and says so for each of them

Texts = str | tuple[str, str]


@dataclass(frozen=True)
class Recipe:
    """How the adapters are trained: customary values, and the rates that `benchmarks.federated --search` found on trec (docs/benchmarks.md)."""

    learning_rate: float = 4e-3  # on devices
    central_learning_rate: float = 4e-3  # on all rows in one place
    batch_size: int = 16
    local_epochs: int = 1
    rounds: int = 20
    central_epochs: int = 8
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    full_learning_rate: float = 2e-4  # of the upper bound, which trains every weight
    final_share: float = 0.1  # the learning rate falls in a line to this share of itself


@dataclass(frozen=True)
class Rows:
    texts: Sequence[Texts]
    labels: Sequence[int]


@dataclass(frozen=True)
class Job:
    """One comparison: who has which rows of which task, on which backbone."""

    model: Path
    layers: int
    classes: int
    max_tokens: int
    seed: int
    train: Sequence[Rows]  # per device
    test: Sequence[Rows]
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def all_train(self) -> Rows:
        return Rows([text for rows in self.train for text in rows.texts], [label for rows in self.train for label in rows.labels])


def write_job(job: Job, path: Path) -> None:
    def plain(rows: Rows) -> dict[str, Any]:
        return {"texts": list(rows.texts), "labels": list(rows.labels)}

    content = {
        "model": str(job.model), "layers": job.layers, "classes": job.classes, "max_tokens": job.max_tokens, "seed": job.seed,
        "train": [plain(rows) for rows in job.train], "test": [plain(rows) for rows in job.test], "recipe": vars(job.recipe),
    }  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")


def read_job(path: Path) -> Job:
    content = json.loads(path.read_text(encoding="utf-8"))

    def rows(one: dict[str, Any]) -> Rows:
        return Rows([text if isinstance(text, str) else tuple(text) for text in one["texts"]], one["labels"])

    return Job(
        Path(content["model"]), content["layers"], content["classes"], content["max_tokens"], content["seed"],
        [rows(one) for one in content["train"]], [rows(one) for one in content["test"]], Recipe(**content["recipe"]),
    )  # fmt: skip


class Classifier(nn.Module):
    """The backbone's first layers, mean over real tokens, a linear head; with adapters, or with every weight trained."""

    def __init__(self, job: Job, *, adapters: bool = True) -> None:
        super().__init__()
        torch.manual_seed(job.seed)
        config = AutoConfig.from_pretrained(job.model)
        config.num_hidden_layers = job.layers
        encoder = AutoModel.from_pretrained(job.model, config=config, add_pooling_layer=False)
        recipe = job.recipe
        if adapters:
            lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=["query", "value"])
            encoder = get_peft_model(encoder, lora)
        self.encoder = encoder
        self.head = nn.Linear(config.hidden_size, job.classes)
        self.tokenizer = Tokenizer.from_file(str(job.model / "tokenizer.json"))
        self.tokenizer.enable_truncation(job.max_tokens, strategy="longest_first")
        self.tokenizer.no_padding()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * real).sum(1) / real.sum(1))

    def encode(self, texts: Sequence[Texts]) -> list[list[int]]:
        return [one.ids for one in self.tokenizer.encode_batch(list(texts))]

    def trained(self) -> dict[str, np.ndarray]:
        """What travels between a device and the server, by name."""
        return {name: p.detach().numpy().copy() for name, p in self.named_parameters() if p.requires_grad}

    def load(self, state: dict[str, np.ndarray]) -> None:
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if set(own) != set(state):
            raise ValueError(f"adapters of other names: {sorted(set(own) ^ set(state))[:3]}")
        with torch.no_grad():
            for name, values in state.items():
                own[name].copy_(torch.from_numpy(np.array(values)))


def padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
    return ids, mask


def batches(lengths: Sequence[int], size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """One shuffled epoch in batches of rows of about the same length."""
    order = random.permutation(len(lengths))
    found: list[np.ndarray] = []
    for start in range(0, len(order), size * BUCKET_BATCHES):
        bucket = order[start : start + size * BUCKET_BATCHES]
        bucket = bucket[np.argsort([lengths[n] for n in bucket], kind="stable")]
        found += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    for n in random.permutation(len(found)):
        yield found[n]


class Training:
    """AdamW on what is trainable; `rate` follows from how much of the whole has been done, which the caller knows."""

    def __init__(self, model: Classifier, learning_rate: float, recipe: Recipe) -> None:
        self.model = model
        self.learning_rate = learning_rate
        self.recipe = recipe
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.01)

    def epoch(self, rows: Rows, random: np.random.Generator, done: float) -> float:
        """One pass; `done` is the share of all training that lies behind. Returns the mean loss."""
        rate = self.learning_rate * (1.0 - (1.0 - self.recipe.final_share) * done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        encoded = self.model.encode(rows.texts)
        labels = torch.tensor(rows.labels)
        self.model.train()
        losses = []
        for picked in batches([len(one) for one in encoded], self.recipe.batch_size, random):
            ids, mask = padded([encoded[n] for n in picked])
            loss = F.cross_entropy(self.model(ids, mask), labels[picked])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return float(np.mean(losses))


@dataclass(frozen=True)
class Accuracy:
    fleet: float
    by_device: list[float]

    @property
    def worst(self) -> float:
        return min(self.by_device)


@torch.inference_mode()
def correct(model: Classifier, rows: Rows) -> int:
    model.eval()
    encoded = model.encode(rows.texts)
    order = np.argsort([len(one) for one in encoded], kind="stable")
    found = 0
    for start in range(0, len(order), 64):
        picked = order[start : start + 64]
        ids, mask = padded([encoded[n] for n in picked])
        found += int((model(ids, mask).argmax(1) == torch.tensor(rows.labels)[picked]).sum())
    return found


def accuracy(model: Classifier, test: Sequence[Rows]) -> Accuracy:
    """Of one model on every device's test rows."""
    right = [correct(model, rows) for rows in test]
    sizes = [len(rows.labels) for rows in test]
    return Accuracy(sum(right) / sum(sizes), [a / b for a, b in zip(right, sizes, strict=True)])


def copy_state(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return copy.deepcopy(state)
