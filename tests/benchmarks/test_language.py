"""Base model, LoRA and side network are measured on the same tokens and bytes, or their comparison means nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.language import bytes_bar
from benchmarks.language_lora import TokenRow, batches, bits_per_byte, load_model, lora
from benchmarks.language_side import Device, gain_share, language_fleet, text_frames, token_rows
from coordinator.backbones import prepare
from coordinator.training.settings import TrainingSettings
from edge_agent.backbone import Backbone
from side_tuning.token_bytes import token_bytes
from side_tuning.wire.messages import TapPlan
from tests.backbones.models import stories_folder

PLAN = TapPlan(1, (), 2, mode="sequence", codec="int8", rank=64, max_tokens=48, task="causal-lm", last_rank=64, last_codec="int8", frame_bytes=1 << 20)
PAIRS = [(f"name[Eagle {n}], area[riverside]", f"The Eagle {n} is by the river.") for n in range(12)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories") / "artifact"
    prepare(stories_folder(), folder, weights="float", max_tokens=48, progress=lambda _: None)
    return folder


def test_the_model_as_it_is_costs_the_same_by_either_way(artifact, tmp_path):
    """Transformers on the frames' token ids, and the trainer's own evaluation of the frames' taps: same bits, same bytes."""
    loaded = Backbone.load(artifact)
    rows = token_rows(text_frames(loaded, PLAN, "kitchen", PAIRS, "held-out"))
    assert all(row.supervised_from > 0 for row in rows)
    base = bits_per_byte(load_model(stories_folder()), rows, token_bytes(artifact, loaded.manifest.vocabulary))
    with language_fleet(tmp_path / "fleet", PLAN, TrainingSettings()) as fleet:
        fleet.add(Device("kitchen", artifact, PAIRS, PAIRS))
        found = fleet.bits_per_byte()
        assert found["kitchen"].untuned == pytest.approx(base, rel=0.01)
        fleet.train(20)
        assert fleet.bits_per_byte()[""].tuned < found[""].tuned
        assert 32 < fleet.payload_bytes / fleet.tokens < 2 * (64 + 4) + 20  # two taps of 64 bytes and a scale, ids, headers; lz4 makes the best of pairs that are alike


def test_bits_per_byte_counts_only_what_carries_the_loss():
    """By hand: a model that knows nothing needs ln(V) nats for every token that counts."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = [TokenRow(np.array([1, 2, 3, 4, 5]), 2), TokenRow(np.array([1, 7]), 0)]
    sizes = np.arange(16)
    assert bits_per_byte(model, rows, sizes) == pytest.approx(3 * math.log2(16) / (4 + 5 + 7))


def test_lora_learns_what_the_rows_say():
    rows = [TokenRow(np.array([1, 20 + n, 30 + n, 40 + n, 50 + n]), 0) for n in range(8)]
    sizes = np.ones(512, np.int64)
    before = bits_per_byte(load_model(stories_folder()), rows, sizes)
    tuned = lora(stories_folder(), rows, steps=30, batch=8, learning_rate=1e-2, seed=0)
    assert bits_per_byte(tuned, rows, sizes) < 0.7 * before


def test_every_row_is_taken_once_before_any_comes_again():
    chosen = batches(10, 5, 4, seed=0)
    assert sorted(np.concatenate(chosen)[:10]) == list(range(10))
    assert sorted(np.concatenate(chosen)[10:]) == list(range(10))


@pytest.mark.parametrize(("base", "lora_bits", "ours", "share"), [(4.0, 2.0, 2.4, 0.8), (4.0, 2.0, 4.5, -0.25), (4.0, 4.0, 3.0, math.nan)])
def test_gain_share(base, lora_bits, ours, share):
    assert gain_share(base, lora_bits, ours) == pytest.approx(share, nan_ok=True)


def test_bytes_of_the_widest_tap_are_counted():
    """768 values in int4 would take 384 bytes and more; 128 take half a byte each and a scale."""
    assert bytes_bar(PLAN).value == pytest.approx(64 + 4, abs=1)
