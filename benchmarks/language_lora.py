"""What tuning a language model on one machine achieves: the model as it is, and LoRA by PEFT on all its linear layers.

Both see token ids exactly as the devices' frames hold them: same cut, same prompts, same rows that carry the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LORA_RANK = 8
WARMUP_SHARE = 0.05
EVALUATE_AT_ONCE = 32
IGNORED = -100


@dataclass(frozen=True)
class TokenRow:
    """One sample: what stood at each row and the token after the last, (rows + 1,); the loss sits on rows from `supervised_from` on."""

    ids: np.ndarray
    supervised_from: int

    @property
    def targets(self) -> np.ndarray:
        """The tokens that carry the loss."""
        return self.ids[self.supervised_from + 1 :]


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def bits_per_byte(model: Any, rows: Sequence[TokenRow], token_bytes: np.ndarray) -> float:
    """Bits that `model` needs for the tokens that carry the loss, per byte of their text."""
    nats, size = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    with torch.inference_mode():
        for start in range(0, len(ordered), EVALUATE_AT_ONCE):
            part = ordered[start : start + EVALUATE_AT_ONCE]
            nats += float(_losses(model, part, "sum"))
            size += sum(int(token_bytes[row.targets].sum()) for row in part)
    return nats / math.log(2) / size


def lora(folder: Path, rows: Sequence[TokenRow], *, steps: int, batch: int, learning_rate: float, seed: int) -> Any:
    """LoRA on every linear layer but the head, AdamW, a short rise and then a straight fall of the learning rate to zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_model(folder), config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    warmup = max(1, int(WARMUP_SHARE * steps))
    for step, chosen in enumerate(batches(len(rows), steps, batch, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        loss = _losses(model, [rows[n] for n in chosen], "mean")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def batches(rows: int, steps: int, batch: int, seed: int) -> list[np.ndarray]:
    """Which rows each step takes: every row once before any comes again."""
    random = np.random.default_rng(seed)
    needed = -(-steps * batch // rows)
    order = np.concatenate([random.permutation(rows) for _ in range(needed)])
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]


def _losses(model: Any, rows: Sequence[TokenRow], reduction: str) -> Tensor:
    longest = max(len(row.ids) for row in rows) - 1
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), IGNORED)
    for n, row in enumerate(rows):
        length = len(row.ids) - 1
        ids[n, :length] = torch.from_numpy(row.ids[:-1])
        mask[n, :length] = 1
        targets[n, row.supervised_from : length] = torch.from_numpy(row.targets)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
