"""The step must be the plain one: same numbers as a slow reference, same bits when repeated."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coordinator.training.learner import Learner, Rows, side_network_config
from coordinator.training.settings import TrainingSettings
from side_tuning.network.anchor_map import AnchorMap

SETTINGS = TrainingSettings(side_width=16, dropout=0.2, warmup_steps=3, ema_decay=0.9)


def make(settings: TrainingSettings = SETTINGS, mode: str = "pooled") -> Learner:
    return Learner(settings, side_network_config(settings, blocks=2, classes=3, mode=mode.removesuffix("+summary"), summary=mode.endswith("summary")))


def rows(fingerprint: str, width: int, n: int, seed: int, tokens: int | None = None) -> Rows:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    if tokens is None:
        return Rows(fingerprint, generator.normal(size=(n, 2, width)).astype(np.float32), None, labels)
    mask = np.arange(tokens) < generator.integers(1, tokens + 1, n)[:, None]
    return Rows(fingerprint, generator.normal(size=(n, 2, tokens, width)).astype(np.float32), mask, labels)


def weights(learner: Learner) -> list[torch.Tensor]:
    networks = [learner.ladder, learner.average_ladder, *learner.alignments.values(), *learner.average_alignments.values()]
    return [tensor for network in networks for tensor in network.state_dict().values()]


def run_steps(learner: Learner, steps: int) -> list[float]:
    learner.add_backbone("aa", 5, step=0)
    losses = []
    for step in range(steps):
        if step == 2:
            learner.add_backbone("bb", 7, step=step)
        batch = [rows("aa", 5, 6, step)] + ([rows("bb", 7, 4, step)] if step >= 2 else [])
        losses.append(learner.step(batch, step))
    return losses


def test_the_same_steps_give_the_same_bits_whatever_torch_drew_before() -> None:
    torch.manual_seed(1)
    first = make()
    first_losses = run_steps(first, 6)
    torch.manual_seed(2)
    second = make()
    assert run_steps(second, 6) == first_losses
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_a_step_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run_steps(make(), 2)
    assert torch.equal(torch.rand(4), expected)


def test_loss_and_first_update_match_plain_adamw() -> None:
    settings = SETTINGS.model_copy(update={"dropout": 0.0, "input_dropout": 0.0, "warmup_steps": 0, "gradient_clip": 1e9, "label_smoothing": 0.0})
    learner = make(settings)
    learner.add_backbone("aa", 5, step=0)
    batch = rows("aa", 5, 8, 0)
    ladder, alignment = copy.deepcopy(learner.ladder), copy.deepcopy(learner.alignments["aa"])
    alignment.observe(torch.from_numpy(batch.inputs))
    logits = ladder(alignment(torch.from_numpy(batch.inputs)))
    loss = -F.log_softmax(logits, -1)[torch.arange(8), torch.from_numpy(batch.labels)].mean()
    loss.backward()
    assert np.isclose(learner.step([batch], 0), loss.item(), atol=1e-6)
    before, gradient = ladder.head.weight.detach(), ladder.head.weight.grad
    # AdamW's first step: decay, then one learning rate against the sign of the gradient.
    expected = before * (1 - settings.learning_rate * settings.weight_decay)
    expected = expected - settings.learning_rate * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(learner.ladder.head.weight, expected, atol=1e-6)
    gates, gate_gradient = ladder.gate_logits.detach(), ladder.gate_logits.grad
    expected_gates = gates - settings.learning_rate * gate_gradient / (gate_gradient.abs() + 1e-8)
    assert torch.allclose(learner.ladder.gate_logits, expected_gates, atol=1e-6)  # gates do not decay


def test_average_follows_the_weights_and_starts_as_a_true_mean() -> None:
    learner = make()
    learner.add_backbone("aa", 5, step=0)
    expected = learner.average_ladder.head.weight.clone()
    for step in range(30):
        learner.step([rows("aa", 5, 6, step)], step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * learner.ladder.head.weight.detach()
    assert torch.allclose(learner.average_ladder.head.weight, expected, atol=1e-5)
    assert torch.equal(learner.average_alignments["aa"].mean, learner.alignments["aa"].mean)


def test_a_backbone_that_is_not_in_the_batch_stays_as_it_is() -> None:
    learner = make()
    run_steps(learner, 4)
    before = copy.deepcopy(learner.alignments["bb"].state_dict())
    learner.step([rows("aa", 5, 6, 9)], 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.alignments["bb"].state_dict().items())


def test_alignments_start_alike_for_the_same_backbone_and_unlike_for_others() -> None:
    first, second = make(), make()
    first.add_backbone("aa", 5, step=0)
    first.add_backbone("bb", 5, step=0)
    second.add_backbone("bb", 5, step=7)
    assert torch.equal(first.alignments["bb"].project, second.alignments["bb"].project)
    assert not torch.equal(first.alignments["aa"].project, first.alignments["bb"].project)


@pytest.mark.parametrize("mode", ["sequence", "sequence+summary"])
def test_sequences_of_unlike_length_mix_in_one_batch(mode: str) -> None:
    """Padding one group to the other's length must not change the loss."""
    settings = SETTINGS.model_copy(update={"dropout": 0.0, "input_dropout": 0.0})
    short, long = rows("aa", 5, 4, 0, tokens=3), rows("bb", 7, 4, 1, tokens=9)
    mixed = make(settings, mode)
    summary_widths = {"aa": 5, "bb": 6} if "summary" in mode else {"aa": 0, "bb": 0}  # a row each
    mixed.add_backbone("aa", 5, step=0, summary_width=summary_widths["aa"])
    mixed.add_backbone("bb", 7, step=0, summary_width=summary_widths["bb"])
    apart = copy.deepcopy(mixed), copy.deepcopy(mixed)
    together = mixed.step([short, long], 0)
    assert np.isclose(together, (apart[0].step([short], 0) + apart[1].step([long], 0)) / 2, atol=1e-5)


def test_what_goes_out_in_int4_has_anchor_maps_in_int8() -> None:
    """A map is fetched once and never trained, so its rounding would stay."""
    learner = Learner(SETTINGS, side_network_config(SETTINGS, blocks=2, classes=3, mode="pooled", entry_width=16))
    anchor_map = AnchorMap(40, 16, 2)
    anchor_map.matrix.copy_(torch.randn(anchor_map.matrix.shape))
    learner.add_backbone("aa", 40, step=0, anchor_map=anchor_map)
    learner.add_backbone("bb", 40, step=0)
    published = learner.published()
    assert SETTINGS.checkpoint_precision == "int4"
    sent = published.alignments["aa"].matrix.float()
    lost = (sent - anchor_map.matrix.float()).norm() / anchor_map.matrix.float().norm()
    assert 0.001 < lost < 0.01
    exact = learner.average_alignments["bb"].project
    assert (published.alignments["bb"].project - exact).norm() / exact.norm() > 0.05
