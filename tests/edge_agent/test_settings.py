"""Settings: file and environment, and errors that name the setting, its value and the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from edge_agent.settings import (
    ConfigError,
    FileSourceSettings,
    FolderSourceSettings,
    MqttSourceSettings,
    load_settings,
)

MINIMAL = """
device = "kitchen"
[broker]
host = "broker.local"
[backbone]
folder = "backbone"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_file_gets_safe_defaults(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, MINIMAL))
    assert settings.broker.port == 8883
    assert settings.broker.tls
    assert settings.spool.policy == "pause"
    assert settings.spool.max_bytes == 1024**3
    assert settings.publisher.window_frames == 16
    assert settings.health.every_seconds == 30
    assert settings.sources == ()
    assert not settings.run.exit_when_done


def test_relative_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    settings = load_settings(write(tmp_path, MINIMAL.replace('"kitchen"', '"kitchen"\nstate_directory = "state"') + """
[[sources]]
kind = "file"
path = "rows.jsonl"
[[sources]]
kind = "folder"
path = "/absolute/in"
[[sources]]
kind = "mqtt"
topic = "home/rows"
port = 1884
[checkpoint]
public_key_file = "keys/public.hex"
"""))
    assert settings.backbone.folder == tmp_path / "backbone"
    assert settings.state_directory == tmp_path / "state"
    assert settings.spool_path == tmp_path / "state" / "spool.db"
    assert settings.checkpoint.public_key_file == tmp_path / "keys" / "public.hex"
    file, folder, topic = settings.sources
    assert isinstance(file, FileSourceSettings)
    assert file.path == tmp_path / "rows.jsonl"
    assert isinstance(folder, FolderSourceSettings)
    assert folder.path == Path("/absolute/in")
    assert isinstance(topic, MqttSourceSettings)
    assert (topic.broker().host, topic.broker().port, topic.broker().tls) == ("localhost", 1884, False)


def test_the_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILLM_BROKER__HOST", "elsewhere")
    monkeypatch.setenv("MOBILLM_DEVICE", "hall")
    monkeypatch.setenv("MOBILLM_SPOOL__POLICY", "drop-oldest")
    monkeypatch.setenv("MOBILLM_SOMETHING_ELSE", "ignored")
    settings = load_settings(write(tmp_path, MINIMAL))
    assert (settings.broker.host, settings.device, settings.spool.policy) == ("elsewhere", "hall", "drop-oldest")
    assert settings.broker.port == 8883


def test_the_environment_alone_can_be_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILLM_DEVICE", "hall")
    monkeypatch.setenv("MOBILLM_BROKER__HOST", "b")
    monkeypatch.setenv("MOBILLM_BACKBONE__FOLDER", "/b")
    monkeypatch.setenv("MOBILLM_SOURCES", '[{"kind": "file", "path": "/a.jsonl"}]')
    assert len(load_settings(None).sources) == 1
    monkeypatch.setenv("MOBILLM_SOURCES", "[{")
    with pytest.raises(ConfigError, match="JSON"):
        load_settings(None)


WRONG = [
    ('"kitchen"', '"kit chen"', ["device", "'kit chen'", "letters"]),
    ('"kitchen"', '"fleet"', ["device", "'fleet'"]),
    ('host = "broker.local"', "", ["broker.host: missing", "[broker]"]),
    ('host = "broker.local"', 'hots = "b"', ["broker.hots", "did you mean 'host'?"]),
    ('host = "broker.local"', 'host = "b"\nport = 99999', ["broker.port: 99999", "65535"]),
    ('host = "broker.local"', 'host = "b"\npassword_file = "p"', ["broker", "username"]),
    ('[backbone]\nfolder = "backbone"', "", ["backbone: missing"]),
    ('folder = "backbone"', "", ["backbone.folder: missing"]),
    ('"kitchen"', '"kitchen"\nlog_level = "loud"', ["log_level: 'loud'", "debug"]),
    ("[backbone]", '[[sources]]\nkind = "fil"\npath = "a"\n[backbone]', ["sources.0", "file, folder, mqtt"]),
    ("[backbone]", '[[sources]]\nkind = "file"\npath = "a.txt"\n[backbone]', ["sources.0", "a.txt", ".jsonl"]),
    ("[backbone]", '[[sources]]\nkind = "file"\npath = "a.jsonl.gz"\nfollow = true\n[backbone]', ["sources.0", "follow = false"]),
    ("[backbone]", '[[sources]]\nkind = "file"\npath = "a.csv"\nsplit = "test"\n[backbone]', ["sources.0.split: 'test'", "held-out"]),
    ("[backbone]", '[[sources]]\nkind = "file"\npath = "a.csv"\nsplit = "train"\nheld_out_fraction = 0.1\n[backbone]', ["exclude each other"]),
    ("[backbone]", '[[sources]]\nkind = "file"\npath = "a.csv"\nrate_per_second = 0\n[backbone]', ["rate_per_second: 0", "greater than 0"]),
    ("[backbone]", '[spool]\nmax_bytes = 10\npolicy = "panic"\n[backbone]', ["spool.max_bytes: 10", "spool.policy: 'panic'", "drop-oldest"]),
    ("device", "device = \n[[", ["not valid TOML", "line 2"]),
]


@pytest.mark.parametrize(("old", "new", "words"), WRONG)
def test_wrong_settings_are_named_with_value_and_cure(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = write(tmp_path, MINIMAL.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message
    assert "pydantic" not in message


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, "device = 'a/b'\n[broker]\nport = 0\n"))
    assert str(caught.value).count("\n") == 4


def test_a_missing_or_unreadable_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'device = "caf\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings(tmp_path / "latin.toml")


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        settings.device = "other"  # type: ignore[misc]
