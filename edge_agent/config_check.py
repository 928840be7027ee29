"""`edge-agent check-config`: the settings in effect with secrets masked, and the files they name looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from edge_agent.settings import AgentSettings, MqttSourceSettings
from side_tuning.backbone_manifest import BackboneError, read_manifest
from side_tuning.broker_settings import BrokerFilesError, read_password
from side_tuning.broker_tls import tls_context
from side_tuning.signatures import SignatureError, load_public_key

# Files named by the settings may be shown, their content never; no setting holds a secret itself, and if one
# ever does by such a name, it stays hidden.
_SECRET = re.compile(r"(password|secret|token|private)(?!.*_file$)")


def shown(settings: AgentSettings) -> Iterator[str]:
    """Each setting as `section.name = value`."""
    yield from _lines("", settings.model_dump(mode="json"))


def _lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _lines(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            yield from _lines(f"{name}[{number}]", inner)
    elif value is not None:
        hidden = _SECRET.search(name.rsplit(".", 1)[-1])
        yield f"{name} = {'********' if hidden else json.dumps(value, ensure_ascii=False)}"


def problems(settings: AgentSettings) -> list[str]:
    """What would keep the agent from starting, in words with the cure."""
    checks: list[Callable[[], object]] = [lambda: read_password(settings.broker)]
    if not settings.fetches_backbone or settings.backbone.folder.exists():
        checks.append(lambda: read_manifest(settings.backbone.folder))
    certificate = settings.broker.certificate_file
    to_be_enrolled = settings.uses_identity and certificate is not None and not certificate.exists()
    if not to_be_enrolled:
        checks.append(lambda: tls_context(settings.broker))
    if settings.checkpoint.public_key_file is not None and not to_be_enrolled:
        key_file = settings.checkpoint.public_key_file
        checks.append(lambda: load_public_key(key_file))
    for source in settings.sources:
        if isinstance(source, MqttSourceSettings):
            broker = source.broker()
            checks += [lambda broker=broker: tls_context(broker), lambda broker=broker: read_password(broker)]  # type: ignore[misc]
    found: list[str] = []
    for check in checks:
        try:
            check()
        except (BackboneError, BrokerFilesError, SignatureError) as error:
            found.append(str(error))
    return found
