"""A decoder's artifact holds its frozen head, and maps that may be fitted to a public sample."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from coordinator.backbones import prepare
from edge_agent.backbone import Backbone
from side_tuning.backbone_manifest import BackboneError
from side_tuning.language_head import LanguageHead
from side_tuning.wire.messages import TapPlan
from tests.backbones.models import SENTENCES, VOCABULARY, save_random_model, stories_folder, tiny_stories

DECODERS = ["opt", "opt-projected", "gpt2", "llama", "qwen2"]


def logits(folder: Path, text: str) -> torch.Tensor:
    """What the artifact says comes after each token of `text`."""
    backbone, head = Backbone.load(folder), LanguageHead.load(folder)
    states = backbone.hidden_states([text], [backbone.last_layer], 32).states[backbone.last_layer][0]
    return head.before_vocabulary(states) @ head.vocabulary.rows(0, head.vocabulary.size).T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_the_artifact_predicts_what_the_model_predicts(name: str, tied: bool, tmp_path: Path) -> None:
    model = save_random_model(name, tmp_path / "model", tie_word_embeddings=tied)
    manifest = prepare(model, tmp_path / "artifact", weights="float", max_tokens=32)
    assert manifest.last_rank == manifest.width if manifest.width <= 256 else 256
    original = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = Backbone.load(tmp_path / "artifact")._encode([SENTENCES[2]], 32)[0].ids
    with torch.no_grad():
        wanted = original(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(tmp_path / "artifact", SENTENCES[2]), wanted, atol=2e-3, rtol=1e-3)
    head = LanguageHead.load(tmp_path / "artifact")
    torch.testing.assert_close(head.embed(torch.tensor(ids)), original.get_input_embeddings()(torch.tensor(ids)).detach())
    assert head.vocabulary.size == VOCABULARY


def test_a_backbone_without_a_head_is_refused(tmp_path: Path) -> None:
    manifest = prepare(save_random_model("bert", tmp_path / "model"), tmp_path / "artifact", max_tokens=32)
    assert manifest.last_rank == 0
    with pytest.raises(BackboneError, match="without its language model's head"):
        LanguageHead.load(tmp_path / "artifact")
    plan = TapPlan(1, (), 2, mode="sequence", max_tokens=32, task="causal-lm", last_rank=64)
    assert "has no language model's head" in (manifest.refusal(plan) or "")


def test_a_last_rank_above_the_maps_is_refused(tmp_path: Path) -> None:
    wide = save_random_model("gpt2", tmp_path / "model", n_embd=320, n_layer=1)
    manifest = prepare(wide, tmp_path / "artifact", weights="float", max_tokens=32)
    assert (manifest.map_rank, manifest.last_rank) == (128, 256)
    plan = TapPlan(1, (), 1, mode="sequence", max_tokens=32, task="causal-lm", last_rank=300)
    assert re.search(r"rank 300 of the last layer.* 256 columns", manifest.refusal(plan) or "")
    assert manifest.refusal(TapPlan(1, (), 1, mode="sequence", max_tokens=32, task="causal-lm", last_rank=256)) is None


def test_maps_fitted_to_a_sample_lose_less_than_random_ones(tmp_path: Path) -> None:
    """Held-out texts; the token losses after the last hidden state went through a map of half its width."""
    texts = tiny_stories(120)
    errors: dict[str, Any] = {}
    for name, calibrate in (("random", []), ("fitted", texts[:100])):
        prepare(stories_folder(), tmp_path / name, weights="int8", max_tokens=128, calibrate=calibrate)
        backbone, head = Backbone.load(tmp_path / name), LanguageHead.load(tmp_path / name)
        states = torch.cat([backbone.hidden_states([t], [5], 128).states[5][0] for t in texts[100:]])
        matrix = torch.from_numpy(np.ascontiguousarray(backbone.map_matrix(5, 32)))
        errors[name] = float((head.restore(states @ matrix) - states).norm() / states.norm())
        whole = torch.from_numpy(np.ascontiguousarray(backbone.map_matrix(5, 64)))
        torch.testing.assert_close(head.restore(states @ whole), states, atol=1e-3, rtol=1e-3)
    assert errors["fitted"] < 0.8 * errors["random"], errors


def test_too_little_to_fit_maps_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"the calibration texts have .* tokens; give at least 1000"):
        prepare(save_random_model("llama", tmp_path / "model"), tmp_path / "artifact", max_tokens=32, calibrate=SENTENCES)
    assert not (tmp_path / "artifact").exists()
