"""What a prepared backbone's folder holds, when its fingerprint changes, and how bad input is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coordinator.backbones import prepare
from edge_agent.backbone import Backbone
from side_tuning.backbone_manifest import (
    FINGERPRINTED,
    MANIFEST,
    BackboneError,
    BackboneManifest,
    TextError,
    fingerprint_of,
    read_manifest,
)
from tests.backbones.conftest import Prepared
from tests.backbones.models import LAYERS, SENTENCES, save_encoder_decoder, save_random_model


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_random_model("bert", tmp_path / "bert")


def fingerprint(model: Path, out: Path, **options: Any) -> str:
    return prepare(model, out, **{"layers": 2, "weights": "int8", "max_tokens": 32, **options}).fingerprint


def test_manifest_states_the_facts_and_survives_a_round_trip(prepared: Prepared) -> None:
    folder = prepared("llama", "int4", layers=3)
    manifest = read_manifest(folder)
    assert (manifest.family, manifest.kind, manifest.layers, manifest.layers_total) == ("llama", "decoder", 3, LAYERS)
    assert (manifest.width, manifest.weights, manifest.map_rank) == (64, "int4", 64)
    assert manifest.fingerprint == fingerprint_of(folder)
    assert BackboneManifest.from_json(manifest.to_json()) == manifest
    assert manifest.info().fingerprint == manifest.fingerprint
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *FINGERPRINTED}


@pytest.mark.parametrize("weights", ["float", "int8", "int4"])
def test_fingerprint_is_stable(bert: Path, tmp_path: Path, weights: str) -> None:
    first = fingerprint(bert, tmp_path / "a", weights=weights)
    moved = bert.rename(tmp_path / "elsewhere")  # where the model lies does not matter
    assert fingerprint(moved, tmp_path / "b", weights=weights) == first
    for name in FINGERPRINTED:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fingerprint_changes_with_everything_that_matters(bert: Path, tmp_path: Path) -> None:
    found = [
        fingerprint(bert, tmp_path / "base"),
        fingerprint(bert, tmp_path / "layers", layers=3),
        fingerprint(bert, tmp_path / "weights", weights="int4"),
        fingerprint(bert, tmp_path / "map", seed=1),
    ]
    weights = load_file(bert / "model.safetensors")
    weights["encoder.layer.0.output.LayerNorm.bias"][3] += np.float32(1e-3)
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    found.append(fingerprint(bert, tmp_path / "byte"))
    tokenizer = json.loads((bert / "tokenizer.json").read_text())
    tokenizer["model"]["max_input_chars_per_word"] = 50
    (bert / "tokenizer.json").write_text(json.dumps(tokenizer))
    found.append(fingerprint(bert, tmp_path / "tokenizer"))
    assert len(set(found)) == len(found)


def test_fingerprint_does_not_change_with_what_the_device_never_runs(bert: Path, tmp_path: Path) -> None:
    first = fingerprint(bert, tmp_path / "a")
    weights = load_file(bert / "model.safetensors")
    weights["encoder.layer.3.output.LayerNorm.bias"] += np.float32(1)
    weights["pooler.dense.bias"] += np.float32(1)
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((bert / "config.json").read_text())
    config |= {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    (bert / "config.json").write_text(json.dumps(config))
    assert fingerprint(bert, tmp_path / "b") == first


def test_maps_are_orthonormal_and_named_by_their_bytes(prepared: Prepared) -> None:
    backbone = Backbone.load(prepared("qwen2", "int8"))
    for layer in (1, 2):
        for rank in (16, 64):
            columns = backbone.map_matrix(layer, rank)
            assert columns.shape == (192, rank)
            assert np.allclose(columns.T @ columns, np.eye(rank), atol=1e-5)
    assert len(set(backbone.manifest.maps.values())) == LAYERS


def test_preparing_again_replaces_the_artifact(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fingerprint(bert, out, layers=1) != fingerprint(bert, out, layers=2)
    assert read_manifest(out).layers == 2
    assert {path.name for path in tmp_path.iterdir()} == {"bert", "out"}  # nothing half-made is left


def test_progress_is_told(bert: Path, tmp_path: Path) -> None:
    told: list[str] = []
    fingerprint(bert, tmp_path / "out", progress=told.append)
    assert "2 of 4 layers to int8" in told[1]


# Each: what is asked, and what the complaint must name.
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model": "MISSING"}, "does not exist"),
    ({"layers": 9}, "layers 9 .* has 4; use 1 to 4"),
    ({"layers": 0}, "layers 0"),
    ({"weights": "int3"}, "'int3' .* float, int8, int4"),
    ({"max_tokens": 500}, "500 tokens: use a smaller max_tokens"),
    ({"max_tokens": 1}, "max_tokens 1"),
]


@pytest.mark.parametrize(("options", "complaint"), REFUSALS)
def test_bad_options_are_refused(options: dict[str, Any], complaint: str, bert: Path, tmp_path: Path) -> None:
    options = dict(options)
    model = tmp_path / "missing" if options.pop("model", None) else bert
    with pytest.raises(BackboneError, match=complaint):
        fingerprint(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="t5 encoder-decoder: use an encoder"):
        prepare(save_encoder_decoder(tmp_path / "t5"), tmp_path / "out", layers=1)


def test_unknown_architecture_is_refused(bert: Path, tmp_path: Path) -> None:
    (bert / "config.json").write_text('{"model_type": "abacus", "hidden_size": 3}')
    with pytest.raises(BackboneError, match="abacus"):
        prepare(bert, tmp_path / "out")


def test_folder_without_a_model_is_refused(bert: Path, tmp_path: Path) -> None:
    (bert / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"no config.json"):
        prepare(bert, tmp_path / "out")


def test_model_without_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"weights of .* cannot be read"):
        prepare(bert, tmp_path / "out")


def test_model_with_some_weights_missing_is_refused(bert: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lack encoder.layer.0.output.dense.weight"):
        prepare(bert, tmp_path / "out")


def test_model_without_tokenizer_is_refused(bert: Path, tmp_path: Path) -> None:
    for path in bert.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BackboneError, match="has no tokenizer"):
        prepare(bert, tmp_path / "out")


def test_a_folder_with_something_else_is_not_overwritten(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(BackboneError, match="photos holds something that is not a backbone"):
        prepare(bert, out)
    assert (out / "cat.jpg").exists()


@pytest.mark.parametrize("name", FINGERPRINTED)
def test_a_missing_file_is_named(name: str, prepared: Prepared, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared("bert", "int8"), tmp_path / "copy"))
    (folder / name).unlink()
    with pytest.raises(BackboneError, match=f"{name} is missing.*copy or prepare it again"):
        Backbone.load(folder)


@pytest.mark.parametrize("name", FINGERPRINTED)
def test_a_changed_byte_is_noticed(name: str, prepared: Prepared, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared("bert", "int8"), tmp_path / "copy"))
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BackboneError, match="is damaged: its files hash to"):
        Backbone.load(folder)


MANIFESTS = [
    ("", "not valid JSON"),
    ("[]", "not a JSON object"),
    ('{"format": 99}', "format 99 is unknown, this program reads format 1"),
    ('{"format": 1}', "field"),
]


@pytest.mark.parametrize(("text", "complaint"), MANIFESTS)
def test_a_broken_manifest_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(BackboneError, match=complaint):
        read_manifest(tmp_path)


@pytest.mark.parametrize("field", ["fingerprint", "layers", "width", "weights", "kind", "maps", "max_tokens", "map_rank"])
def test_every_manifest_field_is_checked(field: str, prepared: Prepared) -> None:
    body = json.loads(read_manifest(prepared("bert", "int8")).to_json())
    for value in (None, True, -1, "x" * 500, {"0": "x"}):
        body[field] = value
        with pytest.raises(BackboneError, match="prepare the backbone again"):
            BackboneManifest.from_json(json.dumps(body))


def test_no_backbone_at_all(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no backbone in .*`coordinator backbone prepare"):
        Backbone.load(tmp_path)


def test_layers_that_are_not_there(prepared: Prepared) -> None:
    folder = prepared("bert", "int8")
    with pytest.raises(BackboneError, match="layer 5 is not in the backbone"):
        Backbone.load(folder, last_layer=5)
    with pytest.raises(BackboneError, match=r"layers \[3\] were asked of a backbone that has 1 to 2"):
        Backbone.load(folder, last_layer=2).hidden_states(SENTENCES, [3], 16)


@pytest.mark.parametrize("empty", ["", "  \n\t", ("words", ""), ("", "words"), ("one", "two", "three")])
def test_an_empty_text_is_named(empty: Any, prepared: Prepared) -> None:
    backbone = Backbone.load(prepared("gpt2", "int8"))
    with pytest.raises(TextError, match="text 1 of the batch") as caught:
        backbone.hidden_states(["words", empty], [1], 16)
    assert caught.value.index == 1


def test_source_names_the_model_and_not_its_place(source: Callable[[str], Path], prepared: Prepared) -> None:
    assert read_manifest(prepared("minilm", "int8")).source == "nreimers/MiniLM-L6-H384-uncased"
