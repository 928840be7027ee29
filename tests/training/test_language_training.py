"""A language model's side network is trained from stored frames: it learns, resumes bit for bit, and late types gain at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.store.engine import Store
from coordinator.training.language_evaluation import evaluate_language
from coordinator.training.language_learner import LanguageLearner
from coordinator.training.take_in import take_in
from coordinator.training.trainer import Training, open_training, progress_of, take_step, take_up
from side_tuning.language_head import LanguageHead
from tests.training import language_fleet
from tests.training.language_fleet import PLAN, backbone, frames, register, texts
from tests.training.small_fleet import arrive

BACKBONES = {"porch": "llama", "attic": "opt"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("llama", "opt", "gpt2"):
        found[name] = tmp_path_factory.mktemp(name)
        backbone(found[name], name)
    return found


def fill(store: Store, tmp_path: Path, folders: dict[str, Path]) -> None:
    register(store, language_fleet.settings(tmp_path), [folders[name] for name in BACKBONES.values()], PLAN)
    for seed, (device, name) in enumerate(BACKBONES.items()):
        arrive(store, frames(folders[name], device, texts(64, seed)))
        arrive(store, frames(folders[name], device, texts(16, 100 + seed), held_out=True, first=9))


def opened(store: Store, tmp_path: Path, **training: object) -> Training:
    found = open_training(store, language_fleet.settings(tmp_path, **training), PLAN)
    while take_in(store, found.cache, PLAN):
        pass
    take_up(found)
    return found


def measured(training: Training) -> dict[tuple[str, str], float]:
    assert isinstance(training.learner, LanguageLearner)
    return {(m.scope, m.name): m.loss for m in evaluate_language(training.cache, training.learner, 1000)}


def test_two_unlike_backbones_train_one_ladder_and_both_gain(store: Store, tmp_path: Path, folders: dict[str, Path]) -> None:
    fill(store, tmp_path, folders)
    training = opened(store, tmp_path)
    assert training.cache.skipped == {}
    assert training.sampler.samples == 128
    before = measured(training)
    assert before["fleet", "fleet"] == pytest.approx(before["untuned", "fleet"], rel=1e-3)  # nothing learned, nothing changed
    for _ in range(60):
        take_step(training, language_fleet.settings(tmp_path))
    after = measured(training)
    for device in BACKBONES:
        assert after["device", device] < 0.5 * before["untuned", device], (before, after)
    assert after["worst-device", max(BACKBONES, key=lambda d: after["device", d])] == max(after["device", d] for d in BACKBONES)


def test_the_untuned_loss_is_that_of_the_original_backbone(store: Store, tmp_path: Path, folders: dict[str, Path]) -> None:
    """Through frame, store and cache, int8 included; the whole width travels, so only the codec is between."""
    fill(store, tmp_path, folders)
    training = opened(store, tmp_path)
    found = measured(training)["untuned", "porch"]
    from edge_agent.backbone import Backbone

    loaded, head = Backbone.load(folders["llama"] / "artifact"), LanguageHead.load(folders["llama"] / "artifact")
    losses = []
    for text in texts(16, 100):
        ids = torch.tensor(loaded._encode([text], 24)[0].ids)
        states = loaded.hidden_states([text], [4], 24).states[4][0]
        logits = head.before_vocabulary(states) @ head.vocabulary.rows(0, head.vocabulary.size).T
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    assert found == pytest.approx(float(torch.cat(losses).mean()), rel=0.02)


def test_a_resumed_run_goes_on_bit_for_bit(store: Store, tmp_path: Path, folders: dict[str, Path]) -> None:
    from coordinator.training.checkpoints import save_checkpoint

    fill(store, tmp_path, folders)
    settings = language_fleet.settings(tmp_path)
    one = opened(store, tmp_path)
    for _ in range(6):
        take_step(one, settings)
    save_checkpoint(
        settings.checkpoints_directory / one.run.name, one.learner, progress_of(one), run=one.run.name, plan=PLAN, metrics={}, created_at=0.0
    )
    losses = [take_step(one, settings) for _ in range(3)]
    one.cache.close()
    two = opened(store, tmp_path)
    assert two.step == 6
    assert [take_step(two, settings) for _ in range(3)] == losses
    for name, value in two.learner.ladder.state_dict().items():
        assert torch.equal(value, one.learner.ladder.state_dict()[name]), name


@pytest.mark.slow
def test_a_type_that_joins_late_gains_before_its_first_step(store: Store, tmp_path: Path, folders: dict[str, Path]) -> None:
    anchors = tmp_path / "anchors.jsonl"
    anchors.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n, text in enumerate(texts(80, 7))))
    fill(store, tmp_path, folders)
    training = opened(store, tmp_path, anchors_file=anchors)
    settings = language_fleet.settings(tmp_path)
    for _ in range(60):
        take_step(training, settings)
    register(store, settings, [folders["gpt2"]])
    arrive(store, frames(folders["gpt2"], "late", texts(16, 300), held_out=True))
    arrive(store, frames(folders["gpt2"], "late", texts(8, 301), first=3))
    ladder = {name: value.clone() for name, value in training.learner.ladder.state_dict().items()}
    while take_in(store, training.cache, PLAN):
        pass
    take_up(training)
    found = measured(training)
    assert found["device", "late"] < 0.7 * found["untuned", "late"], found
    for name, value in ladder.items():
        assert torch.equal(value, training.learner.ladder.state_dict()[name]), name


def test_what_the_cache_gives_is_what_was_sent(store: Store, tmp_path: Path, folders: dict[str, Path]) -> None:
    fill(store, tmp_path, folders)
    training = opened(store, tmp_path)
    [rows] = training.cache.gather(np.array([0, 1]))
    assert rows.language is not None
    assert rows.mask is not None
    assert rows.inputs.shape == (2, 2, rows.mask.shape[1], 24)
    assert rows.language.last.shape[-1] == 64
    for place in range(2):
        count = int(rows.mask[place].sum())
        ids, targets = rows.language.ids[place], rows.language.targets[place]
        assert (targets[: count - 1] == ids[1:count]).all()  # each row is to say what stands at the next one
        assert (targets[count:] == -1).all()
        assert targets[count - 1] >= 0
