"""Texts for a language model become rows, token ids and frames; what cannot be predicted is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.backbones import prepare
from edge_agent.backbone import Backbone
from edge_agent.export_taps import export_taps
from edge_agent.forward import tap_samples
from edge_agent.open_frame import OpenFrame
from edge_agent.samples import Sample
from edge_agent.taps import compute_taps
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.frame import Frame, decode
from side_tuning.wire.messages import TapPlan
from tests.backbones.models import SENTENCES, save_random_model, stories_folder, tiny_stories

PLAN = TapPlan(
    version=1, labels=(), blocks=2, mode="sequence", codec="int4", rank=16, max_tokens=32, task="causal-lm", last_rank=48, last_codec="int8",
)
DECODERS = ["opt", "opt-projected", "gpt2", "llama", "qwen2", "qwen3"]
PAIR = ("what is the weather going to be like", "play some music tomorrow")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory):
    kept: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            model = stories_folder() if name == "stories" else save_random_model(name, folder / "model")
            prepare(model, folder / "artifact", weights="int8", max_tokens=64 if name == "stories" else 32)
            kept[name] = Backbone.load(folder / "artifact")
        return kept[name]

    return get


def ids_of(backbone: Backbone, text: str) -> list[int]:
    backbone._tokenizer.no_truncation()
    return list(backbone._tokenizer.encode(text).ids)


def sample(number: int, text: str | tuple[str, str], label: str | None = None) -> Sample:
    return Sample(f"{number:08x}", text, label, "train", f"rows.jsonl:{number}")


@pytest.mark.parametrize("name", DECODERS)
def test_every_token_with_a_next_one_is_a_row_through_its_layers_map(name, backbones):
    backbone = backbones(name)
    manifest = backbone.manifest
    if not manifest.last_rank:  # a family without a known head
        assert "has no language model's head" in (manifest.refusal(PLAN) or "")
        return
    texts = [SENTENCES[0], SENTENCES[1], SENTENCES[2]]
    taps = compute_taps(backbone, texts, PLAN)
    ids = [ids_of(backbone, text) for text in texts]
    assert taps.tokens == [len(numbers) - 1 for numbers in ids]
    assert taps.supervised_from == [0, 0, 0]
    assert taps.token_ids is not None
    assert [list(numbers) for numbers in taps.token_ids] == ids
    assert {layer: values.shape for layer, values in taps.values.items()} == {2: (sum(taps.tokens), 16), 4: (sum(taps.tokens), 48)}
    start = taps.tokens[0]
    for layer, rank in ((2, 16), (4, 48)):
        states = backbone.hidden_states([texts[1]], [layer], 32).states[layer][0].numpy()[:-1]
        wanted = states @ backbone.map_matrix(layer, rank)
        np.testing.assert_allclose(taps.values[layer][start : start + len(wanted)], wanted, atol=2e-3)


def test_a_long_text_is_cut_to_the_plans_rows_and_keeps_the_token_after_them(backbones):
    backbone = backbones("llama")
    ids = ids_of(backbone, SENTENCES[2])
    taps = compute_taps(backbone, [SENTENCES[2]], replace(PLAN, max_tokens=5))
    assert taps.tokens == [5]
    assert taps.token_ids is not None
    assert list(taps.token_ids[0]) == ids[:6]


@pytest.mark.parametrize("every", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("name", ["gpt2", "stories"])
def test_of_a_pair_the_response_is_trained_and_every_kth_token_of_the_prompt_is_context(name, every, backbones):
    backbone = backbones(name)
    plan = replace(PLAN, context_every=every, rank=8, last_rank=32, max_tokens=backbone.manifest.max_tokens)
    taps = compute_taps(backbone, [PAIR], plan)
    end = json.loads((backbone.folder / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    whole = [*ids_of(backbone, "\n".join(PAIR)), end]
    response = [*ids_of(backbone, PAIR[1]), end]
    if name == "stories":  # its tokenizer writes a space before the first word of a text, but not after the line break
        assert taps.token_ids is not None
        assert taps.supervised_from is not None
        predicted = taps.token_ids[0][taps.supervised_from[0] + 1 :]
        assert backbone._tokenizer.decode(list(predicted[:-1])) == PAIR[1]
        response = list(predicted)
    first = len(whole) - len(response) - 1  # the row whose next token is the response's first
    context = [place for place in range(first) if every and (first - place) % every == 0]
    assert taps.supervised_from == [len(context)]
    assert taps.tokens == [len(context) + len(response)]
    kept = context + list(range(first, len(whole) - 1))
    assert taps.token_ids is not None
    assert list(taps.token_ids[0]) == [whole[place] for place in kept] + [whole[-1]]
    for layer, values in taps.values.items():
        states = backbone.hidden_states(["\n".join(PAIR)], [layer], backbone.manifest.max_tokens).states[layer][0].numpy()
        np.testing.assert_allclose(values, states[kept] @ backbone.map_matrix(layer, values.shape[1]), atol=1e-5)


def test_a_response_ends_with_the_end_token_unless_it_is_cut(backbones):
    backbone = backbones("stories")
    end = backbone.end_tokens[0]
    whole = ids_of(backbone, "\n".join(PAIR))
    for rows, last in ((64, end), (len(whole), end), (len(whole) - 1, whole[-1]), (len(whole) - 2, whole[-2])):
        taps = compute_taps(backbone, [PAIR], replace(PLAN, rank=8, last_rank=32, max_tokens=rows))
        assert taps.token_ids is not None
        assert taps.token_ids[0][-1] == last


def test_e2e_rows_come_in_through_renamed_columns(tmp_path):
    from edge_agent.sample_rows import parse_fields
    from edge_agent.settings import FileSourceSettings

    row = {"mr": "name[Aromi]", "ref": "Aromi is a coffee shop."}
    pair = ("name[Aromi]", "Aromi is a coffee shop.")
    for columns in ({"text_a": "mr", "text_b": "ref"}, {"prompt": "mr", "response": "ref"}):
        settings = FileSourceSettings(kind="file", path=tmp_path / "rows.jsonl", columns=columns)
        assert parse_fields(row, settings)[0] == pair
    plain = FileSourceSettings(kind="file", path=tmp_path / "rows.jsonl")
    assert parse_fields({"prompt": pair[0], "response": pair[1]}, plain)[0] == pair
    assert parse_fields({"text": "one", "prompt": "of another kind"}, plain)[0] == "one"


def test_what_cannot_be_predicted_is_refused_with_its_cure(backbones):
    backbone = backbones("gpt2")
    told: dict[str, tuple[str, str]] = {}
    batch = [
        sample(1, "stop"),
        sample(2, "play some music", label="no label of any plan"),
        sample(3, (" ".join(SENTENCES[:3] * 3), "stop")),
        sample(4, ("stop", "\u3000\n")),
        sample(5, PAIR),
    ]
    tapped = tap_samples(backbone, batch, PLAN, lambda name, kind, words: told.update({name: (kind, words)}))
    assert [(found.info.id, found.info.label) for found in tapped] == [("00000002", None), ("00000005", None)]
    assert {name: kind for name, (kind, _) in told.items()} == {"00000001": "too short", "00000003": "prompt too long", "00000004": "no text"}
    assert "rows.jsonl:1: the text is a single token, after which nothing comes to be predicted: leave it out" in told["00000001"][1]
    assert "leaves none of the plan's 32 for the response: shorten the prompt, or raise" in told["00000003"][1]


def test_a_frame_carries_rows_and_ids_of_every_sample(backbones):
    backbone = backbones("llama")
    batch = [sample(1, SENTENCES[0]), sample(2, PAIR), sample(3, SENTENCES[2])]
    plan = replace(PLAN, context_every=2)
    tapped = tap_samples(backbone, batch, plan, lambda *_: pytest.fail("nothing is refused"))
    frame = OpenFrame(plan, 12.5, 0.0)
    for found in tapped:
        assert frame.has_room_for(found, 10**6)
        frame.add(found)
    estimate = frame.payload_bytes
    [payload] = frame.payloads(("kitchen", "ab" * 8, 5), 3, backbone.manifest.fingerprint, 10**6)
    assert len(payload) <= estimate + 240  # two tap headers
    whole = decode(payload)
    assert isinstance(whole, Frame)
    matrices = compute_taps(backbone, [row.text for row in batch], plan)
    assert [info.tokens for info in whole.samples] == matrices.tokens
    assert [info.supervised_from for info in whole.samples] == matrices.supervised_from
    assert whole.samples[1].supervised_from > 0
    assert whole.token_ids is not None
    assert matrices.token_ids is not None
    for found, wanted in zip(whole.token_ids.sequences(matrices.tokens), matrices.token_ids, strict=True):
        assert list(found) == list(wanted)
    assert [(tap.layer, tap.width, tap.codec) for tap in whole.taps] == [(2, 16, "int4"), (4, 48, "int8")]
    for tap, error in zip(whole.taps, (0.2, 0.02), strict=True):
        rows = decode_vectors(tap.data, tap.rows, tap.width, tap.codec, tap.group)
        values = matrices.values[tap.layer]
        assert np.linalg.norm(rows - values) < error * np.linalg.norm(values)


def test_exported_taps_carry_the_ids_and_where_training_starts(backbones, tmp_path):
    backbone = backbones("stories")
    plan = replace(PLAN, rank=8, last_rank=32, max_tokens=64)
    stories = [story[:150] for story in tiny_stories(3)]
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "label"])
        for story in stories:
            writer.writerow([story[:60], story[60:], "ignored"])
    folder: Path = backbone._folder
    assert export_taps(folder, plan, rows, tmp_path / "taps.safetensors") == 3
    tensors = load_file(tmp_path / "taps.safetensors")
    matrices = compute_taps(backbone, [(story[:60], story[60:]) for story in stories], plan)
    assert tensors["tokens"].tolist() == matrices.tokens
    assert tensors["supervised_from"].tolist() == matrices.supervised_from
    assert matrices.token_ids is not None
    assert tensors["token_ids"].tolist() == np.concatenate(matrices.token_ids).tolist()
    assert tensors["label"].tolist() == [-1, -1, -1]
    assert tensors["layer.5"].shape == (sum(matrices.tokens), 32)
