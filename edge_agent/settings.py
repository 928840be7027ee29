"""The agent's settings: one frozen model, from a TOML file and `MOBILLM_*` environment variables.

The environment goes before the file, nested with `__` (`MOBILLM_BROKER__HOST`). Relative paths in the file are
relative to the file. Secrets are never settings: they stand in files that the settings name.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from typing_extensions import Self

from edge_agent.identity_file import CERTIFICATE, IDENTITY, fill_in
from side_tuning.broker_settings import BrokerSettings
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.topics import check_device_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "MOBILLM_"
Split = Literal["train", "held-out"]
SAMPLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".jsonl.gz", ".ndjson.gz", ".csv.gz")
Column = Literal["text", "text_a", "text_b", "prompt", "response", "label", "id", "split"]


class ConfigError(ValueError):
    """Settings that cannot work; the text names each setting, its value and the cure. A restart would not help."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Source(_Section):
    name: str | None = Field(default=None, min_length=1, max_length=128)
    """Part of every sample's identity; by default the file's own name. Give one to keep it when the file is renamed."""
    split: Split | None = None
    held_out_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    rate_per_second: float | None = Field(default=None, gt=0.0)
    columns: dict[Column, str] = Field(default_factory=dict)
    """What the rows call their fields, where that differs: `columns = {text = "sentence", label = "intent"}`; prompt and response are other names of text_a and text_b."""
    labels: tuple[str, ...] | None = None
    """The names of the whole-number labels in this source, in order."""
    send_labels: bool = True

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        if self.split is not None and self.held_out_fraction > 0:
            raise ValueError("split and held_out_fraction exclude each other; give one")
        return self


class FileSourceSettings(_Source):
    """One file with a row per sample: .jsonl, .ndjson or .csv, each also as .gz."""

    kind: Literal["file"]
    path: Path
    follow: bool = False  # go on reading when rows are appended

    @model_validator(mode="after")
    def _format_is_known(self) -> Self:
        if not self.path.name.lower().endswith(SAMPLE_SUFFIXES):
            raise ValueError(f"path {self.path} ends in none of {', '.join(SAMPLE_SUFFIXES)}; the ending states the format")
        if self.follow and self.path.name.lower().endswith(".gz"):
            raise ValueError(f"path {self.path} is compressed and cannot be followed; set follow = false")
        return self


class FolderSourceSettings(_Source):
    """Every such file in a folder, in the order of their names; with `follow` also those that come later."""

    kind: Literal["folder"]
    path: Path
    follow: bool = True


class MqttSourceSettings(_Source):
    """A topic of a local broker; each message is one row as JSON, or plain text."""

    kind: Literal["mqtt"]
    topic: str = Field(min_length=1, max_length=1024)
    host: str = "localhost"
    port: int = Field(default=1883, ge=1, le=65_535)
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    username: str | None = None
    password_file: Path | None = None
    tls: bool = False
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    inbox_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)  # kept on the disk until forwarded; then the broker waits

    @model_validator(mode="after")
    def _broker_is_consistent(self) -> Self:
        self.broker()
        return self

    def broker(self) -> BrokerSettings:
        names = ("host", "port", "protocol", "username", "password_file", "tls", "ca_file", "certificate_file", "key_file")
        return BrokerSettings(**{name: getattr(self, name) for name in names})


SourceSettings = Annotated[FileSourceSettings | FolderSourceSettings | MqttSourceSettings, Field(discriminator="kind")]


class BackboneSettings(_Section):
    folder: Path
    """Without it, `backbone` in the state directory: where `edge-agent flash` puts one, or the coordinator sends one."""
    batch_size: int = Field(default=16, ge=1, le=1024)
    threads: int = Field(default=1, ge=1, le=256)


class SpoolSettings(_Section):
    max_bytes: int = Field(default=1024**3, ge=64 * 1024)
    policy: Literal["pause", "drop-oldest"] = "pause"


class PublisherSettings(_Section):
    window_frames: int = Field(default=16, ge=1, le=1024)
    resend_seconds: float = Field(default=30.0, gt=0.0, le=86_400.0)


class HealthSettings(_Section):
    every_seconds: float = Field(default=30.0, gt=0.0, le=86_400.0)


class CheckpointSettings(_Section):
    public_key_file: Path | None = None  # Ed25519: 32 bytes as hex, or PEM; without it no checkpoint is accepted


class RunSettings(_Section):
    exit_when_done: bool = False  # end with 0 once every source is read and every frame is receipted


DEFAULT_STATE = Path("/var/lib/mobillm-fleet")
FETCHED_BACKBONE = "backbone"  # below the state directory


class AgentSettings(BaseSettings):
    """Everything that `edge-agent` can be told. Keyword arguments are the file's values; the environment goes before them."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", validate_default=True,
    )

    device: str
    state_directory: Path = DEFAULT_STATE
    bundle_file: Path | None = None
    """From `coordinator enrol`: the agent enrols itself with it on its first start. Names the device and the broker."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    broker: BrokerSettings
    backbone: BackboneSettings
    sources: tuple[SourceSettings, ...] = ()
    spool: SpoolSettings = SpoolSettings()
    publisher: PublisherSettings = PublisherSettings()
    health: HealthSettings = HealthSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="before")
    @classmethod
    def _identity_fills_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = fill_in(values, DEFAULT_STATE)
        backbone = values.get("backbone", {})
        if isinstance(backbone, dict) and "folder" not in backbone:
            folder = Path(values.get("state_directory") or DEFAULT_STATE) / FETCHED_BACKBONE
            values = {**values, "backbone": {**backbone, "folder": folder}}
        return values

    @field_validator("device")
    @classmethod
    def _device_can_be_a_topic(cls, value: str) -> str:
        try:
            return check_device_name(value)
        except FrameError as error:
            raise ValueError(str(error)) from error

    @property
    def spool_path(self) -> Path:
        return self.state_directory / "spool.db"

    @property
    def fetches_backbone(self) -> bool:
        """Whether the coordinator may send the backbone; one that stands elsewhere is its owner's."""
        return self.backbone.folder == self.state_directory / FETCHED_BACKBONE

    @property
    def alive_file(self) -> Path:
        """Touched while every loop of the agent goes round (side_tuning/alive.py)."""
        return self.state_directory / "alive"

    @property
    def uses_identity(self) -> bool:
        """Whether the device shows the certificate that it got by enrolment (and renews), not one named under [broker]."""
        return self.broker.certificate_file == self.state_directory / IDENTITY / CERTIFICATE

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def load_settings(path: Path | None) -> AgentSettings:
    """Read the file (None: the environment alone) and check it.

    Raises:
        ConfigError: unreadable, not TOML, or settings that are wrong, all of them at once.

    """
    try:
        return AgentSettings(**(_read_toml(path) if path else {}))
    except ValidationError as error:
        raise ConfigError(_in_words(error, path)) from error
    except SettingsError as error:
        raise ConfigError(f"an environment variable {ENVIRONMENT_PREFIX}* cannot be read: {error}; lists and tables are given as JSON") from error


class EnrolmentPlaces(NamedTuple):
    """What enrolment needs of settings that may not be usable yet otherwise."""

    state_directory: Path
    bundle_file: Path | None
    names_broker: bool  # a [broker] host of their own: then the identity is not used


def enrolment_places(path: Path | None) -> EnrolmentPlaces:
    """From the file (None: the environment alone). Raises `ConfigError`."""
    values = _read_toml(path) if path else {}
    state, bundle = (os.environ.get(f"{ENVIRONMENT_PREFIX}{name.upper()}") or values.get(name) for name in ("state_directory", "bundle_file"))
    broker = values.get("broker")
    names_broker = bool(os.environ.get(f"{ENVIRONMENT_PREFIX}BROKER__HOST") or (isinstance(broker, dict) and broker.get("host")))
    return EnrolmentPlaces(Path(state or DEFAULT_STATE), Path(bundle) if bundle else None, names_broker)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"the configuration file {path} cannot be read: {why}; give --config FILE") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not valid TOML: {error}") from error
    _resolve_paths(values, path.absolute().parent)
    return values


def _resolve_paths(value: Any, folder: Path) -> None:
    """Make relative paths in the file relative to the file, so that the agent can be started from anywhere."""
    if isinstance(value, list):
        for item in value:
            _resolve_paths(item, folder)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        is_path = key in ("path", "folder", "state_directory") or key.endswith("_file")
        if is_path and isinstance(item, str) and item:
            value[key] = str(folder / Path(item).expanduser())
        else:
            _resolve_paths(item, folder)


def _in_words(error: ValidationError, path: Path | None) -> str:
    where = f"the configuration file {path}" if path else f"the environment ({ENVIRONMENT_PREFIX}*)"
    lines = [_one_in_words(_location(entry["loc"]), dict(entry)) for entry in error.errors()]
    return f"{where} cannot be used:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(lines))


def _location(loc: tuple[int | str, ...]) -> list[int | str]:
    """Where the setting stands; pydantic puts a source's kind into the way, which nobody wrote as a table."""
    is_source = loc[0] == "sources" and len(loc) > 2 if loc else False
    return [*loc[:2], *loc[3:]] if is_source else list(loc)


def _one_in_words(location: list[int | str], entry: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in location) or "settings"
    if entry["type"] == "missing" and location in (["device"], ["broker"]):
        return f'{name}: missing; set bundle_file = "…" (from `coordinator enrol`), or add device and a [broker] table'
    if entry["type"] == "missing":
        table, setting = ".".join(str(part) for part in location[:-1]), location[-1]
        return f"{name}: missing; add `{setting} = …`" + (f" under [{table}]" if table else f", or set {ENVIRONMENT_PREFIX}{str(setting).upper()}")
    if entry["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _all_names(AgentSettings), n=1)
        return f"{name}: there is no such setting" + (f"; did you mean '{close[0]}'?" if close else "; remove it")
    if entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{name}: kind must be one of file, folder, mqtt"
    message = str(entry["msg"]).removeprefix("Value error, ")
    value = entry.get("input")
    told_already = isinstance(value, str) and repr(value) in message
    shown = "" if isinstance(value, dict | BaseModel) or told_already or "password" in name else f" {value!r:.120}:"
    return f"{name}:{shown} {message[:1].lower()}{message[1:]}"


def _all_names(model: type[BaseModel]) -> list[str]:
    """Every setting's name, in all sections."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(name)
        for inner in _models_in(field.annotation):
            names.extend(_all_names(inner))
    return names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
