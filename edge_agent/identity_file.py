"""Where the device's identity lies, and what it says beside the certificate: read when the settings are.

STATE/identity -> identities/SERIAL            moved as one to a renewed certificate
STATE/identities/SERIAL/   client.key client.pem authorities.pem checkpoint.pub identity.json
STATE/identities/next/     client.key, kept until there is an answer to it
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from side_tuning.broker_settings import BrokerSettings
from side_tuning.bundle import Bundle, BundleError, read_bundle
from side_tuning.wire.topics import check_device_name

IDENTITY = "identity"
KEY = "client.key"
CERTIFICATE = "client.pem"
AUTHORITIES = "authorities.pem"
CHECKPOINT_KEY = "checkpoint.pub"
FACTS = "identity.json"


class IdentityError(ValueError):
    """The identity folder cannot be used; the text says why and the cure."""


class IdentityFacts(BaseModel):
    """identity.json: who this device is and where its broker stands."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal["mobillm-fleet identity 1"] = "mobillm-fleet identity 1"
    device: Annotated[str, AfterValidator(check_device_name)]
    host: str = Field(min_length=1, max_length=255)
    port: int = Field(ge=1, le=65_535)
    claim: str = Field(max_length=64)  # that it began with
    checkpoint_key: bool  # whether there is a checkpoint.pub

    @classmethod
    def of(cls, bundle: Bundle) -> IdentityFacts:
        return cls(
            device=bundle.device, host=bundle.host, port=bundle.port, claim=bundle.claim, checkpoint_key=bool(bundle.checkpoint_public_key)
        )


def read_facts(state_directory: Path) -> IdentityFacts | None:
    """None: this device is not enrolled. Raises `IdentityError` if the file is there and cannot be used."""
    path = state_directory / IDENTITY / FACTS
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}; make it readable for this user") from error
    try:
        return IdentityFacts.model_validate_json(content)
    except ValidationError as error:
        raise IdentityError(f"{path} is damaged: {error.errors()[0]['msg']}; remove {path.parent} and enrol anew") from error


def fill_in(values: dict[str, Any], default_state: Path) -> dict[str, Any]:
    """Agent settings with device, broker and checkpoint key from the identity, or from the bundle that will become one.

    A [broker] table with a host stands as it is.
    """
    broker = values.get("broker") or {}
    if isinstance(broker, BrokerSettings) or not isinstance(broker, dict) or broker.get("host"):
        return values
    state = Path(values.get("state_directory") or default_state)
    facts = read_facts(state)
    bundle_file = values.get("bundle_file")
    if bundle_file and (facts is None or Path(bundle_file).exists()):
        try:
            bundle = IdentityFacts.of(read_bundle(Path(bundle_file)))
        except BundleError:
            if facts is None:
                raise
            bundle = facts  # half wiped, say: no reason not to start with the identity that there is
        if facts is None or bundle.claim != facts.claim:  # the first, or a new one after a certificate that is no good any more
            facts = bundle
    if facts is None:
        return values
    device = values.get("device")
    if device not in (None, facts.device):
        raise IdentityError(f"device is {device!r}, but this device's identity or bundle is for {facts.device!r}; drop the setting, or enrol anew")
    folder = state / IDENTITY
    files = {"ca_file": folder / AUTHORITIES, "certificate_file": folder / CERTIFICATE, "key_file": folder / KEY}
    checkpoint = values.get("checkpoint") or {}
    if facts.checkpoint_key and isinstance(checkpoint, dict):
        checkpoint = {"public_key_file": folder / CHECKPOINT_KEY, **checkpoint}
    return {
        **values, "device": facts.device, "broker": {"host": facts.host, "port": facts.port, **files, **broker}, "checkpoint": checkpoint,
    }
