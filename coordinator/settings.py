"""Settings of the coordinator's programs: one frozen model, read from a TOML file and the environment.

Precedence: environment (`COORDINATOR_BROKER__HOST=...`) over the file over defaults. Secrets stay in files that the
settings name, never in the TOML itself.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import tomllib
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from coordinator.training.settings import TrainingSettings
from side_tuning.broker_settings import BrokerSettings
from side_tuning.json_logs import json_handler
from side_tuning.wire.messages import MAX_BLOCKS, MAX_LABELS, MAX_RANK, CodecName, Mode, Pooling, Task

ENVIRONMENT_PREFIX = "COORDINATOR_"
EXIT_CONFIG = 78  # EX_CONFIG: a restart cannot help, so neither systemd nor the supervisor restarts on it

_MIB = 1024 * 1024
_LABEL_CHARACTERS = 128


class ConfigError(ValueError):
    """Settings that cannot work; the text names the setting and the cure."""


def _check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(f"label {repeated[0]!r} is listed twice; name every class once")
    if wrong := [label for label in labels if not 0 < len(label) <= _LABEL_CHARACTERS]:
        raise ValueError(f"label {wrong[0][:40]!r} has {len(wrong[0])} characters; use 1 to {_LABEL_CHARACTERS}")
    return labels


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskSettings(_Section):
    """What the side network learns (docs/tasks.md): classes, a number, or to go on with a text."""

    kind: Task = "classification"
    # `classification`: a class per label, in this order for ever, as a label travels as its index.
    labels: Annotated[tuple[str, ...], AfterValidator(_check_labels)] = Field(default=(), max_length=MAX_LABELS, validate_default=True)

    @field_validator("labels")
    @classmethod
    def _labels_of_the_kind(cls, labels: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        kind = info.data.get("kind")
        if kind == "classification" and len(labels) < 2:
            raise ValueError('classification takes two labels or more: name every class, or set task.kind to "regression" or "causal-lm"')
        if kind in ("regression", "causal-lm") and labels:
            raise ValueError(f'{kind} has no labels: take task.labels out, or set task.kind to "classification"')
        return labels


class PlanSettings(_Section):
    """What the devices send (METHOD: taps, codec). A change here becomes a new version of the fleet's tap plan."""

    blocks: int | None = Field(default=None, ge=1, le=MAX_BLOCKS)  # none: as deep as the shallowest registered backbone
    max_blocks: int = Field(default=2, ge=1, le=MAX_BLOCKS)  # the cap when `blocks` is chosen for you; bytes grow with it, accuracy hardly (docs/lab-notes.md)
    mode: Mode | None = None  # none: pooled; `causal-lm`: sequence
    pooling: Pooling = "mean"
    codec: CodecName | None = None  # none: rot4 in `pooled` mode, hardly told apart from int4 (docs/benchmarks.md), int4 in `sequence` mode
    group: int = Field(default=128, ge=0, le=128)
    rank: int | None = Field(default=None, ge=1, le=MAX_RANK)  # columns of the fixed map in `sequence` mode; none: 64; `causal-lm`: 128
    # `sequence` mode but for `causal-lm`: a pooled vector in full width beside the tokens (docs/lab-notes.md). None: yes, but for a
    # fleet that began without: switched on there, a new run begins, and what was stored without is of no use to it.
    summary: bool | None = None
    max_tokens: int = Field(default=128, ge=1, le=8192)
    frame_samples: int = Field(default=64, ge=1, le=4096)
    frame_bytes: int = Field(default=131_072, ge=1024, le=16 * _MIB)
    linger_seconds: float = Field(default=2.0, ge=0, le=3600)
    # `causal-lm` alone: of the last layer, which the frozen head reads; and of a prompt's tokens every k-th is kept, 0 none.
    # Of 768 values a token, 128 in int4 take 66 bytes and 176 take 92.
    last_rank: int = Field(default=176, ge=1, le=MAX_RANK)
    last_codec: CodecName = "int4"
    context_every: int = Field(default=1, ge=0, le=8192)


class GatewaySettings(_Section):
    """How messages become rows. Everything that waits is bounded."""

    client_id: str = Field(default="coordinator-gateway", min_length=1, max_length=64)
    session_expiry_seconds: int = Field(default=7 * 86_400, ge=0)  # how long the broker queues for an absent gateway
    receive_maximum: int = Field(default=256, ge=1, le=65_535)  # four batches under way, so that commits overlap with receiving
    queue_messages: int = Field(default=4096, ge=1)
    queue_bytes: int = Field(default=256 * _MIB, ge=_MIB)
    batch_frames: int = Field(default=64, ge=1, le=1024)
    batch_seconds: float = Field(default=0.02, ge=0, le=1)
    receipt_seconds: float = Field(default=0.05, ge=0, le=10)  # receipts of one device are at least this far apart
    report_seconds: float = Field(default=60.0, gt=0)
    max_body_bytes: int = Field(default=16 * _MIB, ge=1024, le=64 * _MIB)  # of one decoded frame


class RetentionSettings(_Section):
    """How long frame bodies are kept; nothing set means for ever (an activation never goes stale)."""

    max_age_days: float | None = Field(default=None, gt=0)
    max_bytes: int | None = Field(default=None, gt=0)
    every_seconds: float = Field(default=600.0, gt=0)


class PublishingSettings(_Section):
    """How plans, checkpoints and backbones go out."""

    poll_seconds: float = Field(default=1.0, gt=0)
    part_bytes: int = Field(default=131_072, ge=1024, le=16 * _MIB)  # passes every broker's default packet limit
    backbone_bytes_per_second: float = Field(default=8.0 * _MIB, ge=1024)  # to all devices together that fetch a backbone
    signing_key_file: Path | None = None  # of checkpoints and offers of backbones, for the gateway alone; none: data_directory / "checkpoint-signing.key"


class EnrolmentSettings(_Section):
    """How devices get their certificates (coordinator/enrolment.py)."""

    approval: Literal["automatic", "manual"] = "automatic"  # manual: a valid claim waits for `coordinator devices approve`
    claims_port: int = Field(default=8884, ge=1, le=65_535)  # the broker's listener for claims
    public_host: str = ""  # the broker as devices reach it; empty: broker.host
    public_port: int | None = Field(default=None, ge=1, le=65_535)  # none: broker.port
    public_claims_port: int | None = Field(default=None, ge=1, le=65_535)  # none: claims_port
    certificate_days: float = Field(default=90.0, gt=0, le=3650)  # of a device's certificate; it renews itself at two thirds
    authority_directory: Path | None = None  # the authorities' keys; none: data_directory / "authority"
    broker_directory: Path | None = None  # what the broker reads: its key, authorities, revocation lists; none: data_directory / "broker"


class DashboardSettings(_Section):
    """What `dashboards serve` shows, to whom, and who may do more than look."""

    host: str = "127.0.0.1"  # whoever reaches it can look: leave the loopback only behind something that asks who they are
    port: int = Field(default=8080, ge=1, le=65_535)
    allowed_hosts: tuple[str, ...] = ()  # names it answers to besides the loopback's; empty: any, once `host` is not the loopback
    password_file: Path | None = None  # the operator's password, first line; none: nobody can do more than look
    session_hours: float = Field(default=12.0, gt=0, le=720)
    every_seconds: float = Field(default=2.0, gt=0, le=60)  # how often open pages move, at most
    heartbeat_seconds: float = Field(default=30.0, gt=0)  # how often the devices report: `health.every_seconds` of their agents
    metrics_devices: int = Field(default=1000, ge=0)  # devices that /metrics lists one by one; the rest only counts in the sums


class CoordinatorSettings(BaseSettings):
    """Everything that `coordinator` programs can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", toml_file=None
    )

    data_directory: Path
    alive_directory: Path | None = None  # where programs say that they are alive; none: data_directory / "alive"
    database_url: str = Field(default="", validate_default=True)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    broker: BrokerSettings
    task: TaskSettings
    plan: PlanSettings = PlanSettings()
    training: TrainingSettings = TrainingSettings()
    gateway: GatewaySettings = GatewaySettings()
    publishing: PublishingSettings = PublishingSettings()
    retention: RetentionSettings = RetentionSettings()
    enrolment: EnrolmentSettings = EnrolmentSettings()
    dashboard: DashboardSettings = DashboardSettings()

    @field_validator("data_directory")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("plan")
    @classmethod
    def _mode_of_the_task(cls, plan: PlanSettings, info: ValidationInfo) -> PlanSettings:
        if plan.mode == "pooled" and "task" in info.data and info.data["task"].kind == "causal-lm":
            raise ValueError("causal-lm learns from every token: take plan.mode out, or set it to sequence")
        return plan

    @field_validator("database_url")
    @classmethod
    def _default_database(cls, value: str, info: ValidationInfo) -> str:
        if value or "data_directory" not in info.data:
            return value
        return f"sqlite:///{info.data['data_directory'] / 'coordinator.db'}"

    @property
    def signing_key_file(self) -> Path:
        return self.publishing.signing_key_file or self.data_directory / "checkpoint-signing.key"

    @property
    def public_key_file(self) -> Path:
        """The public half in hexadecimal: what goes to every device as `checkpoint.public_key_file`."""
        return self.data_directory / "checkpoint-signing.pub"

    @property
    def authority_directory(self) -> Path:
        return self.enrolment.authority_directory or self.data_directory / "authority"

    @property
    def broker_directory(self) -> Path:
        return self.enrolment.broker_directory or self.data_directory / "broker"

    @property
    def checkpoints_directory(self) -> Path:
        return self.data_directory / "checkpoints"

    def alive_file(self, program: str) -> Path:
        """Touched while the loops of `program` go round (side_tuning/alive.py)."""
        return (self.alive_directory or self.data_directory / "alive") / program

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the base class fixes the names
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load_settings` hands the file's content in as arguments; the environment goes before it.
        return env_settings, init_settings


def load_settings(path: Path | None) -> CoordinatorSettings:
    """The effective settings from `path` (if any) and the environment.

    Raises:
        ConfigError: the file is missing or no TOML, or a value is missing, unknown or out of range; names each one.

    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}; give the right path with --config") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration file {path} is no valid TOML: {error}") from error
    try:
        return CoordinatorSettings(**content)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc'])) or 'settings'}: {_complaint(item)}" for item in error.errors()]
        where = f"configuration file {path}" if path else "settings"
        raise ConfigError("\n".join([f"{where} cannot be used:", *lines])) from error


def _complaint(item: Any) -> str:
    if item["type"] == "missing":
        return "is missing; set it in the file or in the environment"
    if item["type"] == "extra_forbidden":
        return "is unknown; check the spelling"
    return f"{item['msg']} (got {item['input']!r:.80})"


def describe_settings(settings: CoordinatorSettings) -> str:
    """The effective settings as `name = value` lines. Passwords in a database URL are masked; files are only named."""
    lines: list[str] = []

    def walk(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(f"{prefix}{name}.", value)
            elif value is not None:
                lines.append(f"{prefix}{name} = {value!r}")

    shown = settings.model_dump(mode="json")
    shown["database_url"] = _mask_password(shown["database_url"])
    walk("", shown)
    return "\n".join(lines)


def _mask_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    login, at, host = rest.rpartition("@")
    if not at or ":" not in login:
        return url
    return f"{scheme}{separator}{login.split(':', 1)[0]}:***@{host}"


def configure_logging(settings: CoordinatorSettings, program: str) -> None:
    """One line per event on stderr, with the program's name; called once, in `main`."""
    if settings.log_format == "json":
        logging.basicConfig(level=settings.log_level.upper(), handlers=[json_handler(program)], force=True)
        return
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)-7s {program}: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
