"""What the coordinator's tests need: a store with a plan and a backbone, and a scripted device that keeps its frames until receipted."""

from __future__ import annotations

import threading
import time
import zlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store, open_store
from coordinator.store.registry import insert_plan, register_backbone
from coordinator.store.schema import upgrade
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.broker_settings import BrokerSettings
from side_tuning.wire import topics
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, SampleInfo, Tap, encode_frame
from side_tuning.wire.messages import Receipt, TapPlan
from tests.brokers import free_port

LABELS = ("red", "green", "blue")
PLAN = TapPlan(version=1, labels=LABELS, blocks=2)
MANIFEST = BackboneManifest(
    fingerprint="ab" * 16,
    source="made for tests",
    family="bert",
    kind="encoder",
    layers=4,
    layers_total=6,
    width=32,
    weights="float",
    max_tokens=64,
    vocabulary=100,
    maps={layer: f"{layer:032x}" for layer in range(1, 5)},
    map_rank=16,
)


def settings_for(folder: Path, broker: BrokerSettings | None = None, **more: object) -> CoordinatorSettings:
    content = {
        "data_directory": folder / "data",
        "broker": (broker or BrokerSettings(host="127.0.0.1", port=1883, tls=False)).model_dump(exclude_none=True),
        "task": {"labels": LABELS},
        "plan": {"blocks": 2},
        "publishing": {"poll_seconds": 0.1},
    }
    return CoordinatorSettings(**{**content, **more})


def settings_file(folder: Path, port: int, more: str = "") -> Path:
    """The same settings as a file, for processes of their own."""
    path = folder / "coordinator.toml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'data_directory = "{folder / "data"}"\n{more}\n'
        f'[broker]\nhost = "127.0.0.1"\nport = {port}\ntls = false\nreconnect_max_seconds = 0.5\n'
        '[task]\nlabels = ["red", "green", "blue"]\n[plan]\nblocks = 2\n[publishing]\npoll_seconds = 0.1\n'
        f"[dashboard]\nport = {free_port()}\n"
    )
    return path


def make_store(settings: CoordinatorSettings, *, registered: bool = True) -> Store:
    """A new store; `registered`: with PLAN and MANIFEST."""
    settings.data_directory.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    store = open_store(settings.database_url)
    with store.write() as session:
        insert_plan(session, PLAN)
        if registered:
            register_backbone(session, MANIFEST)
    return store


def make_payload(
    device: str,
    sequence: int,
    *,
    spool: str = "5b001",
    samples: int = 2,
    plan: TapPlan = PLAN,
    manifest: BackboneManifest = MANIFEST,
    labels: tuple[int | None, ...] | None = None,
    produced: int | None = None,
    layers: tuple[int, ...] | None = None,
    width: int | None = None,
) -> bytes:
    """A frame as a device would send it; the sample ids follow from device, spool and sequence."""
    width = width or manifest.width
    chance = np.random.default_rng(sequence)

    def vectors() -> bytes:
        return encode_vectors(chance.normal(size=(samples, width)).astype(np.float32), plan.codec, plan.group)

    owner = zlib.crc32((device + spool).encode())
    infos = tuple(
        SampleInfo(f"{owner:08x}{sequence:08x}{n:04x}", (labels or (n % 3,) * samples)[n], "train", 7)
        for n in range(samples)
    )
    taps = tuple(Tap(layer, samples, width, plan.codec, plan.group, None, vectors()) for layer in layers or plan.taps(manifest.layers))
    return encode_frame(
        Frame(
            device=device,
            spool=spool,
            sequence=sequence,
            captured_at=1_700_000_000.0 + sequence,
            backbone=manifest.fingerprint,
            plan_version=plan.version,
            mode=plan.mode,
            pooling=plan.pooling,
            produced=produced if produced is not None else sequence * samples,
            samples=infos,
            taps=taps,
        )
    )


@dataclass
class ScriptedDevice:
    """Publishes its payloads within a window and sends again what is not receipted: the agent's delivery, without an agent."""

    name: str
    broker: BrokerSettings
    payloads: dict[int, bytes]
    spool: str = "5b001"
    window: int = 16
    resend_seconds: float = 1.0
    pending: dict[int, bytes] = field(default_factory=dict)
    receipts: list[Receipt] = field(default_factory=list)
    sent: int = 0

    def __post_init__(self) -> None:
        self.pending = dict(sorted(self.payloads.items()))
        self._sent_at: dict[int, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._news = threading.Event()
        self.connection = BrokerConnection(
            self.broker,
            self.name,
            subscriptions=[topics.receipt(self.name)],
            on_message=self._on_receipt,
            on_connected=lambda _: self._forget_sent(),
        )
        self._thread = threading.Thread(target=self._publish, name=f"device-{self.name}", daemon=True)

    def start(self) -> None:
        self.connection.start()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._news.set()
        self._thread.join(10)
        self.connection.stop()

    @property
    def done(self) -> bool:
        return not self.pending

    def _forget_sent(self) -> None:
        with self._lock:
            self._sent_at.clear()
        self._news.set()

    def _on_receipt(self, message: Message) -> None:
        receipt = Receipt.from_bytes(message.payload)
        if receipt.spool != self.spool:
            return
        with self._lock:
            self.receipts.append(receipt)
            safe = set(receipt.stored_ahead)
            for sequence in [n for n in self.pending if n <= receipt.stored_through or n in safe]:
                del self.pending[sequence]
                self._sent_at.pop(sequence, None)
        self._news.set()

    def _publish(self) -> None:
        while not self._stop.is_set() and not self.done:
            now = time.monotonic()
            with self._lock:
                window = list(self.pending.items())[: self.window]
                due = [(n, payload) for n, payload in window if now - self._sent_at.get(n, -1e9) >= self.resend_seconds]
            if self.connection.connected:
                for sequence, payload in due:
                    self.connection.publish(
                        topics.activations(self.name), payload, properties={"spool": self.spool, "sequence": str(sequence)}
                    )
                    self.sent += 1
                    with self._lock:
                        self._sent_at[sequence] = now
            self._news.wait(0.1)
            self._news.clear()


def stored_frames(store: Store) -> list[tuple[str, int]]:
    """(spool, sequence) of every stored frame."""
    from sqlalchemy import select

    from coordinator.store.models import FrameRow, Spool

    with store.read() as session:
        return [(spool, sequence) for spool, sequence in session.execute(select(Spool.spool, FrameRow.sequence).join(Spool, Spool.id == FrameRow.spool_id))]


def now() -> datetime:
    return datetime.now(timezone.utc)
