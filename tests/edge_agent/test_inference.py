"""Inference on the device sees what training saw, and refuses checkpoints that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_agent.backbone import Backbone, TextError, read_manifest
from edge_agent.checkpoint_store import LADDER, CheckpointStore
from edge_agent.inference import CheckpointError, Predictor, open_predictor
from edge_agent.taps import compute_taps
from side_tuning.wire.codecs import round_trip
from tests.edge_agent.artifacts import LABELS, Checkpoint

TEXTS = ["turn the lamp on", "play some jazz in the kitchen please", "will it rain", "lights out", "louder"]


def install(checkpoint: Checkpoint, state):
    store = CheckpointStore(state)
    staged = store.stage(checkpoint.signed, checkpoint.manifest, checkpoint.files["ladder"], checkpoint.files["alignment"])
    store.activate(staged, checkpoint.manifest.generation)
    return store


def test_before_the_first_checkpoint_it_says_so(minilm, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_predictor(minilm, tmp_path)


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
def test_the_pooled_prediction_is_the_side_network_on_the_codecs_values(minilm, signing_key, tmp_path, codec):
    """A reference written out by hand: taps, codec, alignment, ladder, softmax."""
    checkpoint = Checkpoint(minilm, signing_key, 3, codec=codec)
    install(checkpoint, tmp_path)
    predictor = open_predictor(minilm, tmp_path, batch_size=2)
    assert predictor.generation == 3
    found = predictor.predict(TEXTS)
    backbone = Backbone.load(minilm)
    taps = compute_taps(backbone, TEXTS, checkpoint.plan).values
    x = np.stack([round_trip(taps[layer], codec, 128) for layer in (1, 2)], axis=1)
    with torch.inference_mode():
        expected = torch.softmax(checkpoint.ladder.eval()(checkpoint.alignment(torch.from_numpy(x))), dim=1).numpy()
    for prediction, row in zip(found, expected, strict=True):
        assert prediction.index == row.argmax()
        assert prediction.label == LABELS[prediction.index]
        assert prediction.probability == pytest.approx(row.max(), abs=2e-2)


@pytest.mark.parametrize("summary", [False, True])
def test_a_sequence_prediction_does_not_depend_on_batch_mates(minilm, signing_key, tmp_path, summary):
    install(Checkpoint(minilm, signing_key, 1, mode="sequence", codec="int8", summary=summary), tmp_path)
    alone = open_predictor(minilm, tmp_path, batch_size=1).predict(TEXTS)
    together = open_predictor(minilm, tmp_path, batch_size=5).predict(TEXTS)
    assert [p.label for p in alone] == [p.label for p in together]
    assert [p.probability for p in alone] == pytest.approx([p.probability for p in together], abs=2e-2)


def test_pairs_of_texts_are_predicted(minilm, signing_key, tmp_path):
    install(Checkpoint(minilm, signing_key, 1), tmp_path)
    assert len(open_predictor(minilm, tmp_path).predict([("a lamp", "a light"), ("rain", "jazz")])) == 2


def test_an_empty_text_is_named_by_its_place_in_the_whole_list(minilm, signing_key, tmp_path):
    install(Checkpoint(minilm, signing_key, 1), tmp_path)
    with pytest.raises(TextError) as caught:
        open_predictor(minilm, tmp_path, batch_size=2).predict([*TEXTS[:3], " "])
    assert caught.value.index == 3


def test_a_damaged_file_is_found(minilm, signing_key, tmp_path):
    store = install(Checkpoint(minilm, signing_key, 1), tmp_path)
    path = store.folder / "1" / LADDER
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        open_predictor(minilm, tmp_path)


def test_a_checkpoint_of_another_backbone_is_refused(minilm, other_minilm, signing_key, tmp_path):
    install(Checkpoint(other_minilm, signing_key, 1), tmp_path)
    checkpoint = CheckpointStore(tmp_path).current()
    with pytest.raises(CheckpointError, match=read_manifest(minilm).fingerprint):
        Predictor(Backbone.load(minilm), checkpoint)
