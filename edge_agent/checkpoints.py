"""Fetch the newest checkpoint for this device's backbone: signed manifest, missing parts, hashes, swap.

Rules: nothing unsigned is interpreted; a generation is never followed by a lower one; whatever goes wrong is counted and
told, and the last good checkpoint stays in use. Parts are asked for a few at a time and kept, so that a restart or a
broken link costs only the parts under way.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.checkpoint_store import CheckpointError, CheckpointStore, StoredCheckpoint, part_size
from edge_agent.inference import load_networks
from edge_agent.taps import PlanError, check_plan
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.repeats import Repeats
from side_tuning.signatures import SignatureError, verify_manifest
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Blob, CheckpointManifest, SignedManifest

logger = logging.getLogger(__name__)

PARTS_AT_ONCE = 4  # bounds the memory and leaves the link to the frames
ASK_AGAIN_SECONDS = 20.0
TRY_AGAIN_SECONDS = 300.0  # after a checkpoint whose parts did not fit its manifest
TICK_SECONDS = 0.5


class CheckpointReceiver:
    """Owns the download; `run` is its thread, `offer` is called by the network thread."""

    def __init__(
        self,
        connection: BrokerConnection,
        store: CheckpointStore,
        backbone: BackboneManifest,
        public_key: Ed25519PublicKey | None,
        *,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._store = store
        self._backbone = backbone
        self._public_key = public_key
        self._on_change = on_change
        self._clock = clock
        self._inbox: queue.Queue[Message] = queue.Queue(maxsize=16)  # what does not fit is asked for again
        self._offered: bytes | None = None  # newest manifest; a newer one replaces it
        self._signed = b""
        self._wanted: CheckpointManifest | None = None
        self._reusable: set[str] = set()  # hashes of files that the current checkpoint already has
        self._asked: dict[str, tuple[Blob, int]] = {}
        self._progress_at = clock()
        self._failed_at: float | None = None
        self.topic = topics.checkpoint(backbone.fingerprint)
        self.generation = store.generation()
        self.error = ""
        self._repeats = Repeats()  # since the last checkpoint that came into use
        self.refused = 0
        self.ticked_at = clock()

    def offer(self, message: Message) -> bool:
        """Take a manifest or part; False if the topic is none of ours."""
        if message.topic == self.topic:
            self._offered = message.payload
        elif message.topic in self._asked:
            try:
                self._inbox.put_nowait(message)
            except queue.Full:
                logger.debug("a checkpoint part came too early; it is asked for again")
        else:
            return False
        return True

    def run(self, stop: threading.Event) -> None:
        """Fetch checkpoints until `stop`."""
        while not stop.is_set():
            self.ticked_at = self._clock()
            try:
                self._take_manifest()
                self._fetch()
            except OSError as error:
                self._refuse(f"checkpoint files in {self._store.folder} cannot be written: {error}; make room or repair the disk")
            try:
                message = self._inbox.get(timeout=TICK_SECONDS)
            except queue.Empty:
                self._ask_again()
                continue
            self._take_part(message)

    # The manifest.

    def _take_manifest(self) -> None:
        payload, self._offered = self._offered, None
        if not payload:
            if payload is None and self._failed_at is not None and self._clock() - self._failed_at > TRY_AGAIN_SECONDS:
                self._failed_at, self._offered = None, self._signed
            return
        try:
            manifest = self._verify(payload)
        except (FrameError, SignatureError, PlanError, CheckpointError) as error:
            self._refuse(str(error))
            return
        if manifest.generation == self.generation or (self._wanted and self._wanted.generation == manifest.generation):
            return  # retained: it comes again with every connection
        for topic in list(self._asked):
            self._connection.unsubscribe(topic)
        self._asked.clear()
        self._signed, self._wanted, self._failed_at = payload, manifest, None
        self._reusable = {b.sha256 for b in (manifest.ladder, manifest.alignment) if self._store.already_have(b) is not None}
        self._store.drop_parts_except([manifest.ladder, manifest.alignment])
        logger.info("fetching checkpoint %d (%d bytes)", manifest.generation, manifest.ladder.size + manifest.alignment.size)

    def _verify(self, payload: bytes) -> CheckpointManifest:
        if self._public_key is None:
            raise CheckpointError("a checkpoint was offered, but no key to check it: set checkpoint.public_key_file")
        manifest = verify_manifest(SignedManifest.from_bytes(payload), self._public_key)
        if manifest.fingerprint != self._backbone.fingerprint:
            raise CheckpointError(f"checkpoint {manifest.generation} on our topic is for backbone {manifest.fingerprint}")
        if manifest.generation < self.generation:
            raise CheckpointError(f"checkpoint {manifest.generation} is older than {self.generation}, which this device has")
        check_plan(manifest.plan, self._backbone)
        needed = 3 * (manifest.ladder.size + manifest.alignment.size)
        self._store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._store.folder).free
        if free < needed:
            raise CheckpointError(f"checkpoint {manifest.generation} needs {needed} bytes on the disk, {free} are free; make room")
        return manifest

    # The parts.

    def _fetch(self) -> None:
        manifest = self._wanted
        if manifest is None:
            return
        blobs = [blob for blob in (manifest.ladder, manifest.alignment) if blob.sha256 not in self._reusable]
        missing = [(blob, n) for blob in blobs for n in self._store.missing_parts(blob)]
        if not missing:
            self._install(manifest)
            return
        for blob, index in missing[:PARTS_AT_ONCE]:
            topic = topics.checkpoint_part(blob.sha256, index)
            if topic not in self._asked:
                self._asked[topic] = (blob, index)
                self._progress_at = self._clock()
                self._connection.subscribe(topic)

    def _take_part(self, message: Message) -> None:
        asked = self._asked.get(message.topic)
        if asked is None or not message.payload:
            return
        blob, index = asked
        if len(message.payload) != part_size(blob, index):
            self._refuse(f"part {index} of {blob.name} has {len(message.payload)} bytes instead of {part_size(blob, index)}")
            return
        self._store.keep_part(blob, index, message.payload)
        self._progress_at = self._clock()
        del self._asked[message.topic]
        self._connection.unsubscribe(message.topic)

    def _ask_again(self) -> None:
        if self._asked and self._connection.connected and self._clock() - self._progress_at > ASK_AGAIN_SECONDS:
            self._progress_at = self._clock()
            for topic in list(self._asked):
                self._connection.subscribe(topic)  # a repeated subscription brings the retained message again

    # The swap.

    def _install(self, manifest: CheckpointManifest) -> None:
        self._wanted = None
        try:
            ladder, alignment = (
                self._store.already_have(blob) or self._store.assemble(blob) for blob in (manifest.ladder, manifest.alignment)
            )
            staged = self._store.stage(self._signed, manifest, ladder, alignment)
            _check_networks(StoredCheckpoint(staged, manifest), self._backbone)
        except CheckpointError as error:
            self._failed_at = self._clock()
            self._refuse(str(error))
            return
        self._store.activate(staged, manifest.generation)
        self.generation, self.error = manifest.generation, ""
        self._repeats = Repeats()
        logger.info("checkpoint %d is in use (step %d of run %s)", manifest.generation, manifest.step, manifest.run)
        self._on_change()

    def _refuse(self, words: str) -> None:
        self.refused += 1
        if self._repeats.count(words) == 1:  # each new checkpoint meets the same full disk
            logger.error("%s; checkpoint %d stays in use", words, self.generation)
        self.error = words[:1000]
        self._on_change()


def _check_networks(checkpoint: StoredCheckpoint, backbone: BackboneManifest) -> None:
    """Raise `CheckpointError` unless the networks of its task are there and fit each other and this backbone."""
    if checkpoint.manifest.plan.task == "causal-lm":
        from edge_agent.language_model import load_side

        load_side(checkpoint, backbone)
    else:
        load_networks(checkpoint, backbone)
