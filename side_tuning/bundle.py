"""A device bundle: everything a fresh device needs to enrol, in one JSON file. Holds a secret until it is spent.

Written by `coordinator enrol`, read by `edge-agent enrol`. The claim's key inside is good for one certificate of one
device, until `expires_at`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.topics import check_claim_name, check_device_name

MAX_BUNDLE_BYTES = 262_144
GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class BundleError(ValueError):
    """A bundle file that cannot be used; the text says what is wrong and where to get a new one."""


def _device_name(value: str) -> str:
    try:
        return check_device_name(value)
    except FrameError as error:
        raise ValueError(str(error)) from error


def _claim_name(value: str) -> str:
    try:
        return check_claim_name(value)
    except FrameError as error:
        raise ValueError(str(error)) from error


class Bundle(BaseModel):
    """What `coordinator enrol DEVICE` hands out. PEM fields are text; times are seconds since 1970, UTC."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer coordinator may say more

    format: Literal["mobillm-fleet bundle 1"] = "mobillm-fleet bundle 1"
    device: Annotated[str, AfterValidator(_device_name)]
    claim: Annotated[str, AfterValidator(_claim_name)]
    group: str = Field(default="", max_length=64)  # as asked for with the claim; for people, no rule looks at it
    claim_certificate: str = Field(max_length=16_384)
    claim_key: str = Field(max_length=16_384, repr=False)
    host: str = Field(min_length=1, max_length=255)
    port: int = Field(ge=1, le=65_535)  # for enrolled devices
    claims_port: int = Field(ge=1, le=65_535)  # for claims alone
    authorities: str = Field(max_length=32_768)  # PEM: whom the broker's certificate must come from
    checkpoint_public_key: str = Field(default="", max_length=64)  # Ed25519, hexadecimal
    issued_at: float = Field(ge=0)
    expires_at: float = Field(ge=0)

    def to_text(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def read_bundle(path: Path) -> Bundle:
    """Read and check a bundle.

    Raises:
        BundleError: it cannot be read, is too large, or is no bundle.

    """
    cure = "make a new one with `coordinator enrol DEVICE`"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise BundleError(f"bundle {path} cannot be read: {error.strerror}; give the right path, or {cure}") from error
    if len(content) > MAX_BUNDLE_BYTES:
        raise BundleError(f"bundle {path} is larger than {MAX_BUNDLE_BYTES} bytes and so is none; {cure}")
    try:
        return Bundle.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(f"bundle {path} is no bundle: {where}: {first['msg']}; {cure}") from error
