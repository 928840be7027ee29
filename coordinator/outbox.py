"""Plans, checkpoints and offers of backbones out to the devices, as retained messages.

Declarative: each round compares what the broker should hold with what was published on this connection and sends the
difference. A new connection starts from nothing, so a broker that lost its retained messages gets them again.
Rule: a manifest goes out only after the broker acknowledged all of its parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.backbone_offers import BackboneOffers
from coordinator.files import write_atomically
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.registry import plans
from coordinator.store.training import (
    StoredCheckpoint,
    checkpoints_to_publish,
    latest_checkpoint,
    mark_published,
)
from side_tuning.broker_connection import BrokerConnection, PayloadTooLarge, PublishHandle
from side_tuning.signatures import load_signing_key, make_key, public_key_hex, sign_manifest
from side_tuning.wire import topics
from side_tuning.wire.messages import Blob, CheckpointManifest, Fields, TapPlan

logger = logging.getLogger(__name__)

ACK_SECONDS = 30.0
PARTS_UNDER_WAY = 8  # 1 MiB at a time: small in memory here, and receipts still get through in between
LADDER = "ladder.safetensors"
_PARTS_FILE = "published-parts.json"


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be published; the text names the file and what is wrong."""


@dataclass(frozen=True)
class Offer:
    """A checkpoint folder, read: a manifest per backbone and the parts that they need."""

    generation: int
    manifests: dict[str, CheckpointManifest]  # by fingerprint
    parts: dict[str, tuple[Path, int, int]]  # topic -> file, offset, bytes


def ensure_signing_key(settings: CoordinatorSettings) -> Ed25519PrivateKey:
    """The key that signs checkpoints, made on first use, with its public half beside it for the devices."""
    if not settings.signing_key_file.exists():
        make_key(settings.signing_key_file)
        logger.info("made a signing key; give %s to every device", settings.public_key_file)
    key = load_signing_key(settings.signing_key_file)
    public = f"{public_key_hex(key)}\n".encode()
    if not settings.public_key_file.exists() or settings.public_key_file.read_bytes() != public:
        write_atomically(settings.public_key_file, public)
    return key


def read_offer(folder: Path, checkpoint: StoredCheckpoint, part_bytes: int) -> Offer:
    """Read the checkpoint in `folder`, check its hashes and cut it into parts.

    Raises:
        CheckpointError: a file is missing, damaged or empty.
    """
    description = _read_description(folder)
    fields = Fields(description, f"{folder / 'checkpoint.json'}")
    plan = TapPlan.from_fields(fields.inner("plan"))
    side_width = fields.integer("side_width", 1, 16_384)
    hashes = description.get("sha256", {})
    parts: dict[str, tuple[Path, int, int]] = {}

    def blob(name: str) -> Blob:
        path = folder / name
        try:
            digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"checkpoint file {path} cannot be read: {error.strerror}") from error
        if hashes.get(name, digest) != digest:
            raise CheckpointError(f"checkpoint file {path} is damaged: its sha256 is not the one in checkpoint.json")
        made = Blob(name, digest, size, part_bytes)
        for index in range(made.parts):
            start = index * part_bytes
            parts[topics.checkpoint_part(digest, index)] = (path, start, min(part_bytes, size - start))
        return made

    ladder = blob(LADDER)
    manifests = {}
    for path in sorted(folder.glob("alignment-*.safetensors")):
        fingerprint = path.stem.removeprefix("alignment-")
        manifests[fingerprint] = CheckpointManifest(
            generation=checkpoint.generation,
            run=checkpoint.run,
            step=checkpoint.step,
            created_at=checkpoint.created_at.timestamp(),
            fingerprint=fingerprint,
            plan=plan,
            side_width=side_width,
            ladder=ladder,
            alignment=blob(path.name),
            metrics={name: float(value) for name, value in checkpoint.metrics.items() if isinstance(value, int | float)},
        )
    if not manifests:
        raise CheckpointError(f"checkpoint {folder} holds no alignment; there is no backbone to publish it for")
    return Offer(checkpoint.generation, manifests, parts)


class Outbox:
    """Keeps the broker's retained messages as they should be; one thread calls `run_once` again and again."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        store: Store,
        connection: BrokerConnection,
        key: Ed25519PrivateKey,
        now: Callable[[], datetime],
        *,
        backbones: BackboneOffers,
    ) -> None:
        self._settings = settings
        self._store = store
        self._connection = connection
        self._key = key
        self._now = now
        self._backbones = backbones
        self._epoch = 0
        self._published: dict[str, bytes] = {}  # topic -> digest, on this connection
        self._offer: Offer | None = None
        self._complete = 0  # the generation that is all out on this connection
        self._previous_parts: set[str] = set()
        self._parts_path = settings.data_directory / _PARTS_FILE
        self._believed_parts = _read_parts(self._parts_path)  # part topics that the broker may still hold
        self._bad_checkpoints: set[int] = set()

    def run_once(self) -> None:
        """Publish what is missing. Store errors are the caller's; a broken connection ends the round quietly."""
        if not self._connection.connected:
            return
        if self._connection.epoch != self._epoch:
            self._epoch = self._connection.epoch
            self._published.clear()
            self._complete = 0
        self._publish_plans()
        self._send(self._backbones.messages(self._connection.max_packet_bytes))
        offer = self._current_offer()
        if offer is not None:
            self._publish_offer(offer)

    def _publish_plans(self) -> None:
        with self._store.read() as session:
            newest: dict[str | None, TapPlan] = {}
            for row in plans(session):
                if row.device not in newest or newest[row.device].version < row.version:
                    newest[row.device] = row.plan
        self._send((topics.fleet_plan() if owner is None else topics.device_plan(owner), plan.to_bytes()) for owner, plan in newest.items())

    def _current_offer(self) -> Offer | None:
        with self._store.read() as session:
            newest = latest_checkpoint(session)
        if newest is None or (self._offer is not None and newest.generation <= self._offer.generation):
            return self._offer
        if newest.generation not in self._bad_checkpoints:
            try:
                offer = read_offer(Path(newest.folder), newest, self._part_bytes())
            except ValueError as error:
                self._bad_checkpoints.add(newest.generation)
                logger.error("checkpoint %d is not published: %s", newest.generation, error)
            else:
                self._previous_parts = set(self._offer.parts) if self._offer else set(self._believed_parts)
                self._offer = offer
        return self._offer

    def _part_bytes(self) -> int:
        limit = self._connection.max_packet_bytes
        wanted = self._settings.publishing.part_bytes
        return wanted if limit is None else max(1024, min(wanted, limit - 1024))

    def _publish_offer(self, offer: Offer) -> None:
        if self._complete == offer.generation:
            return
        missing = [topic for topic in offer.parts if topic not in self._published]
        if missing:
            self._remember_parts(self._believed_parts | set(offer.parts))
            for start in range(0, len(missing), PARTS_UNDER_WAY):
                if not self._send((topic, _read_part(*offer.parts[topic])) for topic in missing[start : start + PARTS_UNDER_WAY]):
                    return
        manifests = [(topics.checkpoint(name), sign_manifest(manifest, self._key).to_bytes()) for name, manifest in offer.manifests.items()]
        if not self._send(manifests):
            return
        with self._store.read() as session:
            waiting = [checkpoint.generation for checkpoint in checkpoints_to_publish(session)]
        with self._store.write() as session:
            for generation in waiting:
                if generation <= offer.generation:
                    mark_published(session, generation, self._now())
        logger.info("published checkpoint %d for %d backbones in %d parts", offer.generation, len(manifests), len(offer.parts))
        if self._clear_old_parts(offer):
            self._complete = offer.generation

    def _clear_old_parts(self, offer: Offer) -> bool:
        """Forget parts of generations before the previous one, which a slow device may still be fetching."""
        obsolete = self._believed_parts - set(offer.parts) - self._previous_parts
        if not self._send((topic, b"") for topic in sorted(obsolete)):
            return False
        for topic in obsolete:
            self._published.pop(topic, None)
        self._remember_parts(self._believed_parts - obsolete)
        return True

    def _remember_parts(self, parts: set[str]) -> None:
        if parts != self._believed_parts:
            self._believed_parts = parts
            write_atomically(self._parts_path, json.dumps(sorted(parts)).encode())

    def _send(self, messages: Iterable[tuple[str, bytes]]) -> bool:
        """Publish retained what is not yet there; True when the broker has acknowledged all of it."""
        sent: list[tuple[str, bytes, PublishHandle]] = []
        for topic, payload in messages:
            digest = hashlib.sha256(payload).digest()
            if self._published.get(topic) == digest:
                continue
            try:
                sent.append((topic, digest, self._connection.publish(topic, payload, retain=True)))
            except PayloadTooLarge as error:
                logger.error("not published: %s", error)
                return False
        complete = True
        for topic, digest, handle in sent:
            if handle.wait(ACK_SECONDS) and self._connection.epoch == self._epoch:
                self._published[topic] = digest
            else:
                complete = False
        return complete


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoint.json"
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return description


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _read_parts(path: Path) -> set[str]:
    try:
        return set(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):
        return set()
