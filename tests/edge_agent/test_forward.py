"""A batch through the backbone: what cannot be used is refused by itself and holds nobody up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_agent.backbone import Backbone
from edge_agent.forward import tap_samples
from edge_agent.open_frame import OpenFrame
from edge_agent.samples import Sample
from edge_agent.taps import compute_taps
from side_tuning.wire.frame import decode_frame
from tests.edge_agent.artifacts import plan


@pytest.fixture(scope="module")
def backbone(minilm):
    return Backbone.load(minilm)


def sample(number, text="turn the lamp on", label="light"):
    return Sample(f"{number:08x}", text, label, "train")


@pytest.mark.parametrize("kind", [{}, {"mode": "sequence"}, {"mode": "sequence", "summary": True}])
def test_each_sample_gets_its_own_rows(backbone, kind):
    texts = ["lights", "play some jazz in the kitchen please", "will it rain tomorrow"]
    used = plan(**kind)
    tapped = tap_samples(backbone, [sample(n, text) for n, text in enumerate(texts)], used, print)
    assert [t.info.id for t in tapped] == ["00000000", "00000001", "00000002"]
    for text, found in zip(texts, tapped, strict=True):
        alone = compute_taps(backbone, [text], used)
        assert found.info.tokens == alone.tokens[0]
        for layer, rows in found.rows.items():
            assert rows.shape == alone.values[layer].shape
            assert np.linalg.norm(rows - alone.values[layer]) < 0.05 * np.linalg.norm(rows)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_summary_is_the_pooled_vector_folded_before_the_tokens(backbone, pooling):
    texts = ["lights", "play some jazz in the kitchen please"]
    used = plan(mode="sequence", rank=7, summary=True, pooling=pooling, codec="fp16")
    whole = compute_taps(backbone, texts, used)
    tokens = compute_taps(backbone, texts, replace(used, summary=False))
    pooled = compute_taps(backbone, texts, replace(used, mode="pooled", summary=False))
    k = whole.summary_rows
    assert k == used.summary_rows(384) == 55  # of seven values each, and one of them filled up
    assert whole.tokens == tokens.tokens
    for layer, rows in whole.values.items():
        at = seen = 0
        for number, count in enumerate(whole.tokens):
            folded = rows[at : at + k].ravel()
            assert np.array_equal(folded[:384], pooled.values[layer][number])
            assert not folded[384:].any()
            assert np.array_equal(rows[at + k : at + k + count], tokens.values[layer][seen : seen + count])
            at, seen = at + k + count, seen + count
        assert at == len(rows)
    frame = OpenFrame(used, 1e9, 0.0)
    for one in tap_samples(backbone, [sample(n, text) for n, text in enumerate(texts)], used, print):
        frame.add(one)
    (payload,) = frame.payloads(("kitchen", "5b00" * 4, 1), 2, backbone.manifest.fingerprint, 1 << 20)
    sent = decode_frame(payload)
    assert sent.summary_rows == k
    assert [one.tokens for one in sent.samples] == whole.tokens


def test_unknown_labels_and_empty_texts_are_refused_one_by_one(backbone):
    refused = {}
    batch = [
        sample(1),
        sample(2, label="elephant"),
        sample(3, text="   "),
        sample(4, label=None),
        sample(5, label=2),
        sample(6, label=3),
        sample(7, text=("a", "")),
    ]
    told = {}
    batch[1] = replace(batch[1], where="rows.jsonl:2")
    batch[2] = replace(batch[2], where="rows.jsonl:3")
    tapped = tap_samples(backbone, batch, plan(), lambda name, reason, words: (refused.update({name: reason}), told.update({name: words})))
    assert [(t.info.id, t.info.label) for t in tapped] == [("00000001", 0), ("00000004", None), ("00000005", 2)]
    assert refused == {"00000002": "unknown label", "00000003": "no text", "00000006": "unknown label", "00000007": "no text"}
    assert told["00000002"].startswith("rows.jsonl:2: label 'elephant' is not among the plan's 3 labels (light, music, weather); correct it, or add")
    assert told["00000003"].startswith("rows.jsonl:3: the text is empty")


def test_the_numbers_of_a_regression_go_with_their_samples(backbone):
    refused = {}
    batch = [sample(1, label=4.5), sample(2, label="2"), sample(3, label=None), sample(4, text=("a", "b"), label="light")]
    tapped = tap_samples(backbone, batch, plan(labels=(), task="regression"), lambda name, reason, words: refused.update({name: (reason, words)}))
    assert [(t.info.label, t.info.target) for t in tapped] == [(None, 4.5), (None, 2.0), (None, None)]
    assert refused["00000004"][0] == "no number"
    assert "the tap plan's task is regression" in refused["00000004"][1]


def test_a_batch_without_a_usable_sample_gives_nothing(backbone):
    assert tap_samples(backbone, [sample(1, text=" ")], plan(), lambda *_: None) == []
