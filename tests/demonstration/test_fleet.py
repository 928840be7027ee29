"""The configuration files that the demonstration writes are what both programs read."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib

from coordinator.demonstration.data import Partition, deal, load_dataset
from coordinator.demonstration.fleet import (
    DemoDevice,
    PreparedBackbone,
    make_devices,
    prepare_backbones,
    write_agent_config,
    write_coordinator_config,
)
from coordinator.demonstration.options import parse_options
from coordinator.demonstration.toml import write_toml
from coordinator.settings import load_settings
from edge_agent.settings import load_settings as load_agent_settings
from side_tuning.backbone_manifest import BackboneManifest

MANIFEST = BackboneManifest(
    fingerprint="ab" * 16, source="test", family="bert", kind="encoder", layers=2, layers_total=6, width=8, weights="float",
    max_tokens=128, vocabulary=10, maps={1: "0" * 32, 2: "0" * 32}, map_rank=8,
)  # fmt: skip


@pytest.fixture
def devices(tmp_path: Path) -> list[DemoDevice]:
    shares = deal(load_dataset(), Partition.parse("iid"), 10, seed=1)
    return make_devices(shares, [PreparedBackbone(MANIFEST, tmp_path / "backbone")], tmp_path, producing_seconds=50, seed=1)


def test_the_coordinator_reads_its_file(tmp_path):
    dataset = load_dataset()
    config = tmp_path / "coordinator.toml"
    anchors_file = tmp_path / "anchors.jsonl"
    write_coordinator_config(
        config, dataset, data=tmp_path / "data", port=4711, seconds=100, seed=3, train_samples=400, anchors_file=anchors_file
    )
    settings = load_settings(config)
    assert settings.task.labels == dataset.labels
    assert (settings.broker.port, settings.broker.tls, settings.training.seed, settings.training.min_samples) == (4711, False, 3, 50)


def test_the_agent_reads_its_file(devices, tmp_path):
    device = devices[0]
    write_agent_config(device, port=4711, public_key_file=tmp_path / "key.pub")
    settings = load_agent_settings(device.config_file)
    assert settings.device == device.name
    assert settings.checkpoint.public_key_file == tmp_path / "key.pub"
    assert settings.sources[0].path == device.samples_file
    assert settings.state_directory == device.state_directory


def test_devices_have_names_of_their_own_and_unlike_speeds(devices):
    assert len({device.name for device in devices}) == 10
    assert len({device.rate_per_second for device in devices[:4]}) == 4
    assert all(40 <= 480 / device.rate_per_second <= 50 for device in devices[1:2])
    assert max(device.samples / device.rate_per_second for device in devices) <= 50


def test_whatever_a_label_holds_survives_the_file(tmp_path):
    labels = ['"quoted"', "back\\slash", "new\nline", "tab\there", "größer → ☃ 😀", "del\x7f", "[table]", "a = b # c", "'single'"]
    write_toml(tmp_path / "a.toml", {"top": 1, "task": {"labels": labels, "on": True, "rate": 0.5}, "sources": [{"kind": "file"}, {"kind": "folder"}]})
    read = tomllib.loads((tmp_path / "a.toml").read_text(encoding="utf-8"))
    assert read == {"top": 1, "task": {"labels": labels, "on": True, "rate": 0.5}, "sources": [{"kind": "file"}, {"kind": "folder"}]}


def test_a_prepared_backbone_is_taken_from_the_cache_and_a_damaged_one_made_anew(tmp_path):
    said: list[str] = []
    first = prepare_backbones(1, tmp_path, said.append)[0]
    assert (first.manifest.layers, first.manifest.weights, len(said)) == (6, "int8", 1)
    assert prepare_backbones(1, tmp_path, said.append) == [first]
    assert len(said) == 1
    (first.folder / "model.safetensors").write_bytes(b"damaged")
    assert prepare_backbones(1, tmp_path, said.append) == [first]
    assert len(said) == 2


def test_options_have_defaults():
    options = parse_options([])
    assert options.dashboard is None
    assert [parse_options(words).dashboard for words in (["--dashboard"], ["--dashboard", "8100"])] == [8080, 8100]
    assert (options.devices, options.partition, options.broker, options.compare, options.data, options.task) == (4, None, "embedded", True, None, "classification")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "0"], "from 1 to"),
        (["--seconds", "5"], "from 30"),
        (["--seconds", "soon"], "from 30"),
        (["--partition", "dirichlet"], "dirichlet:ALPHA"),
        (["--json", "no/such/folder/out.json"], "a folder that exists"),
        (["--broker", "rabbit"], "invalid choice"),
    ],
)
def test_wrong_options_say_what_is_right(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert said in capsys.readouterr().err
