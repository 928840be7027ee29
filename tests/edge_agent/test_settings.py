"""Settings: file and environment, and errors that name the setting, its value and the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from edge_agent.identity_file import IdentityFacts
from edge_agent.settings import (
    ConfigError,
    FileSourceSettings,
    FolderSourceSettings,
    MqttSourceSettings,
    load_settings,
)
from side_tuning.bundle import Bundle

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
    ('[backbone]\nfolder = "backbone"', "backbone = 3", ["backbone:"]),
    ('folder = "backbone"', 'fodler = "backbone"', ["backbone.fodler", "did you mean 'folder'?"]),
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


@pytest.mark.parametrize("backbone", ["", "[backbone]\nthreads = 2", '[backbone]\nfolder = "state/backbone"'])
def test_a_backbone_without_a_folder_is_fetched_into_the_state_directory(tmp_path: Path, backbone: str) -> None:
    settings = load_settings(write(tmp_path, f'device = "kitchen"\nstate_directory = "state"\n[broker]\nhost = "b"\n{backbone}\n'))
    assert settings.backbone.folder == tmp_path / "state" / "backbone"
    assert settings.fetches_backbone


def test_a_backbone_of_its_owner_stays_his(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, 'device = "kitchen"\nstate_directory = "state"\n[broker]\nhost = "b"\n[backbone]\nfolder = "mine"\n'))
    assert settings.backbone.folder == tmp_path / "mine"
    assert not settings.fetches_backbone


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
    assert str(caught.value).count("\n") == 3


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


# With an identity, or the bundle that will become one.

BUNDLED = """
state_directory = "state"
bundle_file = "bundle.json"
[backbone]
folder = "backbone"
"""


def write_bundle(path: Path, device: str = "kitchen", claim: str = "claim-0123456789abcdef") -> None:
    bundle = Bundle(
        device=device, claim=claim, claim_certificate="c", claim_key="k", host="broker.example", port=8883, claims_port=8884,
        authorities="a", checkpoint_public_key="ab" * 32, issued_at=1, expires_at=2,
    )
    path.write_text(bundle.to_text())


def write_identity(state: Path, host: str = "broker.example") -> None:
    (state / "identity").mkdir(parents=True)
    facts = IdentityFacts(device="kitchen", host=host, port=8883, claim="claim-0123456789abcdef", checkpoint_key=True)
    (state / "identity" / "identity.json").write_text(facts.model_dump_json())


def test_a_bundle_names_device_broker_and_checkpoint_key(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle.json")
    settings = load_settings(write(tmp_path, BUNDLED))
    folder = tmp_path / "state" / "identity"
    assert (settings.device, settings.broker.host, settings.broker.port, settings.uses_identity) == ("kitchen", "broker.example", 8883, True)
    assert settings.broker.certificate_file == folder / "client.pem"
    assert settings.checkpoint.public_key_file == folder / "checkpoint.pub"


def test_an_identity_needs_no_bundle_any_more(tmp_path: Path) -> None:
    write_identity(tmp_path / "state", host="elsewhere.example")
    settings = load_settings(write(tmp_path, BUNDLED.replace("[backbone]", "[broker]\nkeepalive_seconds = 30\n[backbone]")))
    assert (settings.broker.host, settings.broker.keepalive_seconds) == ("elsewhere.example", 30)
    write_bundle(tmp_path / "bundle.json")  # the spent one: what enrolment found goes first
    assert load_settings(write(tmp_path, BUNDLED)).broker.host == "elsewhere.example"
    (tmp_path / "bundle.json").write_bytes(b"\0" * 500)  # a power cut while it was wiped
    assert load_settings(write(tmp_path, BUNDLED)).broker.host == "elsewhere.example"
    write_bundle(tmp_path / "bundle.json", claim="claim-00000000000000aa")  # a new one is meant to replace it
    assert load_settings(write(tmp_path, BUNDLED)).broker.host == "broker.example"


def test_a_broker_that_is_named_stands_as_it_is(tmp_path: Path) -> None:
    write_identity(tmp_path / "state")
    settings = load_settings(write(tmp_path, MINIMAL.replace('"kitchen"', '"hall"\nstate_directory = "state"')))
    assert (settings.device, settings.broker.host, settings.broker.certificate_file, settings.uses_identity) == ("hall", "broker.local", None, False)


@pytest.mark.parametrize(("text", "words"), [
    ('[backbone]\nfolder = "b"\n', "coordinator enrol"),
    (BUNDLED, "bundle.json cannot be read"),
    (BUNDLED.replace("bundle.json", "agent.toml"), "is no bundle"),
])
def test_without_either_it_says_what_to_do(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(write(tmp_path, text))


def test_a_device_name_that_contradicts_the_identity_is_told(tmp_path: Path) -> None:
    write_identity(tmp_path / "state")
    with pytest.raises(ConfigError, match="identity or bundle is for 'kitchen'"):
        load_settings(write(tmp_path, 'device = "hall"\n' + BUNDLED))
    (tmp_path / "state" / "identity" / "identity.json").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"identity\.json is damaged"):
        load_settings(write(tmp_path, BUNDLED))
