"""Where the broker is and how to prove who we are: settings shared by both programs, and the files that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self


class BrokerSettings(BaseModel):
    """Where the broker is and how to prove who we are. Shared by the agent's and the coordinator's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(min_length=1)
    port: int = Field(default=8883, ge=1, le=65_535)
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    tls: bool = True
    keepalive_seconds: int = Field(default=60, ge=5, le=3600)
    reconnect_max_seconds: float = Field(default=30.0, gt=0, le=600)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("broker: certificate_file and key_file go together; give both or neither")
        if not self.tls and (self.ca_file or self.certificate_file):
            raise ValueError("broker: tls is false but certificate files are given; set tls = true or drop the files")
        if self.password_file and not self.username:
            raise ValueError("broker: password_file needs a username")
        return self


class BrokerFilesError(ValueError):
    """A certificate, key or password file that the settings name cannot be used; the text says which and why."""


def read_password(settings: BrokerSettings) -> str | None:
    if settings.password_file is None:
        return None
    try:
        return settings.password_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerFilesError(
            f"password_file {settings.password_file} cannot be read: {error}; create it, readable by this user only"
        ) from error
