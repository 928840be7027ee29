"""Typed payloads of every message that is not a frame: tap plan, receipt, health, command, checkpoint manifest.

Each is a frozen dataclass with `to_bytes()` and `from_bytes()`. Unknown fields are ignored, so either side may be
newer; missing or wrong fields raise `FrameError` and name the field. Times are seconds since 1970, UTC.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import msgpack

from side_tuning.wire.bounded import FrameError, unpack_bounded

Task = Literal["classification", "regression", "causal-lm"]
Mode = Literal["pooled", "sequence"]
Pooling = Literal["mean", "first", "last"]
CodecName = Literal["fp16", "int8", "int4", "int2", "rot4"]
Presence = Literal["online", "offline", "lost"]
CommandName = Literal["pause", "resume", "renew-certificate"]
DeviceStep = Literal["flashed", "booted", "configured", "network", "clock", "enrolled", "backbone", "stored"]

MODE_WITH_SUMMARY = "sequence+summary"  # on the wire
MAX_MESSAGE_BYTES = 65_536
MAX_MANIFEST_BYTES = 262_144
MAX_BLOCKS = 64
MAX_STEPS = 32
MAX_LABELS = 4096
MAX_RANK = 4096  # columns of a fixed map
MAX_BLOB_BYTES = 256 * 1024 * 1024
_HEX = re.compile(r"[0-9a-f]{16,64}")


def check_fingerprint(value: str) -> str:
    """Return `value` if it is 16 to 64 lower-case hexadecimal digits, else raise `FrameError`."""
    if not _HEX.fullmatch(value):
        raise FrameError(f"fingerprint {value[:80]!r} is not 16 to 64 lower-case hexadecimal digits")
    return value


class Fields:
    """Reads typed, bounded fields out of a decoded map; every complaint names the message and the field."""

    def __init__(self, body: object, message: str) -> None:
        if not isinstance(body, dict):
            raise FrameError(f"{message}: expected a map, got {type(body).__name__}")
        self._body: dict[str, Any] = body
        self._message = message

    def __len__(self) -> int:
        return len(self._body)

    def __contains__(self, name: object) -> bool:
        return name in self._body

    def _get(self, name: str, default: object = ...) -> Any:
        value = self._body.get(name, default)
        if value is ...:
            raise FrameError(f"{self._message}: field '{name}' is missing")
        return value

    def integer(self, name: str, low: int, high: int, default: object = ...) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise FrameError(f"{self._message}: {name} is {value!r:.80}, not a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: object = ...) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            raise FrameError(f"{self._message}: {name} is {value!r:.80}, not a number from {low} to {high}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return None if self._body.get(name) is None else self.number(name, low, high)

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self._body.get(name) is None else self.integer(name, low, high)

    def text(self, name: str, max_length: int = 256, default: object = ...) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or len(value) > max_length:
            raise FrameError(f"{self._message}: {name} is {value!r:.80}, not text of at most {max_length} characters")
        return value

    def optional_text(self, name: str, max_length: int = 256) -> str | None:
        return None if self._body.get(name) is None else self.text(name, max_length)

    def choice(self, name: str, choices: tuple[str, ...], default: object = ...) -> Any:
        value = self._get(name, default)
        if value not in choices:
            raise FrameError(f"{self._message}: {name} is {value!r:.80}, not one of {', '.join(choices)}")
        return value

    def flag(self, name: str, default: object = ...) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise FrameError(f"{self._message}: {name} is {value!r:.80}, not true or false")
        return value

    def items(self, name: str, max_items: int, default: object = ...) -> list[Any]:
        value = self._get(name, default)
        if not isinstance(value, list) or len(value) > max_items:
            raise FrameError(f"{self._message}: {name} is not a list of at most {max_items} entries")
        return value

    def binary(self, name: str, max_bytes: int) -> bytes:
        value = self._get(name)
        if not isinstance(value, bytes) or len(value) > max_bytes:
            raise FrameError(f"{self._message}: {name} is not binary of at most {max_bytes} bytes")
        return value

    def inner(self, name: str) -> Fields:
        return Fields(self._get(name), f"{self._message}.{name}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def pack_message(message: Any) -> bytes:
    return bytes(msgpack.packb(asdict(message)))


def folded_rows(summary_width: int, width: int) -> int:
    """Rows of `width` that a vector of `summary_width` is folded into; 0 without a summary."""
    return -(-summary_width // width)


@dataclass(frozen=True)
class TapPlan:
    """What the devices keep of their hidden states and how they send it (METHOD: taps, codec, labels).

    One plan serves backbones of every depth: it states the number of blocks, and `layers(depth)` says which layer
    of a backbone stands for each block.
    """

    version: int  # grows within one database; frames name the plan that they were made under
    labels: tuple[str, ...]  # class names; a sample's label travels as an index into them. None but for `classification`
    blocks: int
    mode: Mode = "pooled"
    pooling: Pooling = "mean"  # of a pooled vector or summary: mean over real tokens, or the first or last real token
    codec: CodecName = "int4"
    group: int = 128  # values that share a scale, 1 to 128; 0 means one scale per vector
    rank: int = 32  # `sequence` mode: columns of the fixed map
    max_tokens: int = 128
    frame_samples: int = 64
    frame_bytes: int = 131_072
    linger_seconds: float = 2.0  # a frame is closed this long after its first sample
    task: Task = "classification"
    # `causal-lm`: the tap of the last layer is what the frozen head reads, so it has a codec and a rank of its own.
    last_rank: int = 0
    last_codec: CodecName = "int4"
    context_every: int = 1  # of the prompt's tokens every k-th is kept, 0 none; those that the loss sits on always are
    # `sequence` mode but for `causal-lm`: the pooled vector in full width, folded into rows, goes before each sample's tokens.
    summary: bool = False

    def __post_init__(self) -> None:
        if self.summary and (self.mode != "sequence" or self.task == "causal-lm"):
            raise FrameError(f"tap plan: a summary in mode {self.mode} of {self.task}; only classification and regression in mode sequence have one")

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layer (1-based) that stands for each block in a backbone of `depth` layers: ceil(depth * b / blocks)."""
        return tuple(-(-depth * b // self.blocks) for b in range(1, self.blocks + 1))

    def taps(self, depth: int) -> tuple[int, ...]:
        """The distinct layers of `layers(depth)`, ascending: what a device sends."""
        return tuple(sorted(set(self.layers(depth))))

    def width_at(self, layer: int, depth: int, width: int) -> int:
        """Values per vector that a backbone of `depth` layers and `width` sends of `layer`."""
        if self.mode == "pooled":
            return width
        return min(width, max(self.rank, self.last_rank) if self.is_last(layer, depth) else self.rank)

    def summary_width(self, width: int) -> int:
        """Values of a summary on a backbone of this width; 0 without one."""
        return width if self.summary else 0

    def summary_rows(self, width: int) -> int:
        """Rows that a summary takes in every tap of a sample on a backbone of this width; 0 without one."""
        return folded_rows(self.summary_width(width), min(self.rank, width))

    def codec_at(self, layer: int, depth: int) -> CodecName:
        return self.last_codec if self.is_last(layer, depth) else self.codec

    def is_last(self, layer: int, depth: int) -> bool:
        """Whether `layer` is the one whose tap has a codec and a rank of its own."""
        return self.task == "causal-lm" and layer == depth

    def to_bytes(self) -> bytes:
        fields = asdict(self)
        if fields.pop("summary"):  # an agent that knows of no summaries must not take the plan up: its frames would be rejected
            fields["mode"] = MODE_WITH_SUMMARY
        return bytes(msgpack.packb(fields))

    @classmethod
    def from_bytes(cls, payload: bytes) -> TapPlan:
        return cls.from_fields(Fields(unpack_bounded(payload, max_bytes=MAX_MANIFEST_BYTES), "tap plan"))

    @classmethod
    def from_fields(cls, fields: Fields) -> TapPlan:
        labels = fields.items("labels", MAX_LABELS)
        if not all(isinstance(label, str) and 0 < len(label) <= 128 for label in labels):
            raise FrameError("tap plan: every label must be text of 1 to 128 characters")
        if len(set(labels)) != len(labels):
            raise FrameError("tap plan: labels repeat")
        task: Task = fields.choice("task", get_args(Task), "classification")
        named = fields.choice("mode", (*get_args(Mode), MODE_WITH_SUMMARY))
        mode: Mode = "sequence" if named == MODE_WITH_SUMMARY else named
        summary = named == MODE_WITH_SUMMARY or fields.flag("summary", False)
        if task != "classification" and labels:
            raise FrameError(f"tap plan: {len(labels)} labels, but the task {task} has none")
        last_rank = fields.integer("last_rank", 0, MAX_RANK, 0)
        if task == "causal-lm" and (mode != "sequence" or not last_rank):
            raise FrameError(f"tap plan: causal-lm needs mode sequence and a last_rank, not mode {mode} and last_rank {last_rank}")
        return cls(
            version=fields.integer("version", 1, 2**53),
            labels=tuple(labels),
            blocks=fields.integer("blocks", 1, MAX_BLOCKS),
            mode=mode,
            pooling=fields.choice("pooling", get_args(Pooling)),
            codec=fields.choice("codec", get_args(CodecName)),
            group=fields.integer("group", 0, 128),
            rank=fields.integer("rank", 1, MAX_RANK),
            max_tokens=fields.integer("max_tokens", 1, 8192),
            frame_samples=fields.integer("frame_samples", 1, 4096),
            frame_bytes=fields.integer("frame_bytes", 1024, 16 * 1024 * 1024),
            linger_seconds=fields.number("linger_seconds", 0.0, 3600.0),
            task=task,
            last_rank=last_rank,
            last_codec=fields.choice("last_codec", get_args(CodecName), "int4"),
            context_every=fields.integer("context_every", 0, 8192, 1),
            summary=summary,
        )


@dataclass(frozen=True)
class Receipt:
    """The coordinator's word: every frame of `spool` up to `stored_through` is safe, and so are those `stored_ahead`.

    Rejected frames count as safe too (they are kept, with their reason); `rejected` lists the latest ones.
    """

    spool: str
    stored_through: int
    stored_ahead: tuple[int, ...] = ()
    rejected: tuple[tuple[int, str], ...] = ()

    MAX_AHEAD = 1024
    MAX_REJECTED = 32

    def to_bytes(self) -> bytes:
        return bytes(msgpack.packb(vars(self)))  # flat: nothing in it that `asdict` would have to take apart

    @classmethod
    def from_bytes(cls, payload: bytes) -> Receipt:
        fields = Fields(unpack_bounded(payload, max_bytes=MAX_MESSAGE_BYTES), "receipt")
        ahead = fields.items("stored_ahead", cls.MAX_AHEAD, [])
        rejected = fields.items("rejected", cls.MAX_REJECTED, [])
        if not all(_is_count(n) for n in ahead):
            raise FrameError("receipt: stored_ahead holds something that is not a whole number of 0 or more")
        if not all(isinstance(r, list) and len(r) == 2 and _is_count(r[0]) and isinstance(r[1], str) for r in rejected):
            raise FrameError("receipt: rejected is not a list of (sequence, reason)")
        return cls(
            spool=fields.text("spool", 64),
            stored_through=fields.integer("stored_through", 0, 2**53),
            stored_ahead=tuple(ahead),
            rejected=tuple((n, reason) for n, reason in rejected),
        )


@dataclass(frozen=True)
class BackboneInfo:
    """What a device says about the backbone it runs; the fingerprint is what counts, the rest is for people."""

    fingerprint: str
    family: str
    layers: int
    width: int
    weights: str

    @classmethod
    def from_fields(cls, fields: Fields) -> BackboneInfo:
        return cls(
            fingerprint=check_fingerprint(fields.text("fingerprint", 64)),
            family=fields.text("family", 64),
            layers=fields.integer("layers", 1, 1024),
            width=fields.integer("width", 1, 65_536),
            weights=fields.text("weights", 16),
        )


@dataclass(frozen=True)
class SpoolCount:
    """The device's half of the loss ledger, in samples unless named otherwise.

    At any instant produced = receipted + spooled + dropped, over the whole life of this spool.
    """

    spool: str
    produced: int
    receipted: int
    spooled: int
    dropped: int
    spooled_frames: int
    spooled_bytes: int
    oldest_age_seconds: float
    floor: int  # lowest sequence that can still arrive: every lower one was receipted or dropped
    next_sequence: int
    refused: dict[str, int] = field(default_factory=dict)  # never produced: reason -> samples (no text, unknown label ...)

    @classmethod
    def from_fields(cls, fields: Fields) -> SpoolCount:
        refused = fields._get("refused", {})
        if not isinstance(refused, dict) or len(refused) > 64:
            raise FrameError("health.spool: refused is not a map of at most 64 reasons")
        if not all(isinstance(k, str) and _is_count(v) for k, v in refused.items()):
            raise FrameError("health.spool: refused is not a map of reason to count")
        count = {
            name: fields.integer(name, 0, 2**53)
            for name in (
                "produced", "receipted", "spooled", "dropped", "spooled_frames", "spooled_bytes", "floor", "next_sequence",
            )
        }
        age = fields.number("oldest_age_seconds", 0.0, 1e12)
        return cls(spool=fields.text("spool", 64), oldest_age_seconds=age, refused=refused, **count)


@dataclass(frozen=True)
class Health:
    """A device's state, retained. The last will is the same message with presence `lost` and the rest empty.

    `session` is drawn anew for each connection and stands in both the will and the messages of that connection, so
    an old will cannot declare a newer connection lost.
    """

    presence: Presence
    session: str
    at: float
    agent_version: str = ""
    started_at: float = 0.0
    reason: str = ""  # why offline or paused, or the newest trouble, in words
    backbone: BackboneInfo | None = None
    plan_version: int = 0
    plan_error: str = ""
    checkpoint: int = 0  # generation of the checkpoint in use; 0 is none
    checkpoint_error: str = ""
    spool: SpoolCount | None = None
    paused: bool = False
    forward_seconds: float | None = None  # mean per sample since the last report
    bytes_sent: int = 0  # frame payload bytes handed to the broker, resends included, since the spool was made
    temperature_celsius: float | None = None
    throttled: bool | None = None
    load_1m: float | None = None
    memory_available_bytes: int | None = None
    peak_rss_bytes: int | None = None
    disk_free_bytes: int | None = None
    certificate_serial: str = ""  # hexadecimal, of the client certificate in use; empty without one
    certificate_expires_at: float | None = None
    first_steps: dict[DeviceStep, float | None] | None = None
    """When each step of its first boot was, by the clock of `at` (`flashed`: of the computer that wrote the card); a step
    without a time came before there was a clock. Only in the first report of a connection, and in one that has news."""

    def to_bytes(self) -> bytes:
        return pack_message(self)

    def as_last_will(self) -> Health:
        """What the broker says in the device's name when the connection breaks."""
        return Health("lost", self.session, self.at, reason="connection lost without goodbye")

    @classmethod
    def from_bytes(cls, payload: bytes) -> Health:
        body = unpack_bounded(payload, max_bytes=MAX_MESSAGE_BYTES)
        fields = Fields(body, "health")
        return cls(
            presence=fields.choice("presence", get_args(Presence)),
            session=fields.text("session", 64),
            at=fields.number("at", 0.0, 1e12),
            agent_version=fields.text("agent_version", 64, ""),
            started_at=fields.number("started_at", 0.0, 1e12, 0.0),
            reason=fields.text("reason", 1000, ""),
            backbone=BackboneInfo.from_fields(fields.inner("backbone")) if body.get("backbone") else None,
            plan_version=fields.integer("plan_version", 0, 2**53, 0),
            plan_error=fields.text("plan_error", 1000, ""),
            checkpoint=fields.integer("checkpoint", 0, 2**53, 0),
            checkpoint_error=fields.text("checkpoint_error", 1000, ""),
            spool=SpoolCount.from_fields(fields.inner("spool")) if body.get("spool") else None,
            paused=fields.flag("paused", default=False),
            forward_seconds=fields.optional_number("forward_seconds", 0.0, 1e6),
            bytes_sent=fields.integer("bytes_sent", 0, 2**60, 0),
            temperature_celsius=fields.optional_number("temperature_celsius", -273.15, 1000.0),
            throttled=None if body.get("throttled") is None else fields.flag("throttled"),
            load_1m=fields.optional_number("load_1m", 0.0, 1e6),
            memory_available_bytes=fields.optional_integer("memory_available_bytes", 0, 2**60),
            peak_rss_bytes=fields.optional_integer("peak_rss_bytes", 0, 2**60),
            disk_free_bytes=fields.optional_integer("disk_free_bytes", 0, 2**60),
            certificate_serial=fields.text("certificate_serial", 40, ""),
            certificate_expires_at=fields.optional_number("certificate_expires_at", 0.0, 1e12),
            first_steps=_first_steps(fields.inner("first_steps")) if body.get("first_steps") is not None else None,
        )


def _first_steps(fields: Fields) -> dict[DeviceStep, float | None]:
    """Steps that this program does not know are left out: the agent may be newer."""
    if len(fields) > MAX_STEPS:
        raise FrameError(f"health.first_steps: {len(fields)} steps, more than {MAX_STEPS}")
    return {step: fields.optional_number(step, 0.0, 1e12) for step in get_args(DeviceStep) if step in fields}


@dataclass(frozen=True)
class Command:
    """An order to one device, not retained; the effect shows in its next health message."""

    id: str
    name: CommandName
    expires_at: float

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> Command:
        fields = Fields(unpack_bounded(payload, max_bytes=MAX_MESSAGE_BYTES), "command")
        return cls(
            id=fields.text("id", 64),
            name=fields.choice("name", get_args(CommandName)),
            expires_at=fields.number("expires_at", 0.0, 1e12),
        )


@dataclass(frozen=True)
class Blob:
    """A safetensors file that travels in parts of `part_bytes` each (the last may be shorter)."""

    name: str
    sha256: str
    size: int
    part_bytes: int

    @property
    def parts(self) -> int:
        return -(-self.size // self.part_bytes)

    @classmethod
    def from_fields(cls, fields: Fields) -> Blob:
        sha256 = fields.text("sha256", 64)
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise FrameError(f"checkpoint manifest: sha256 {sha256!r:.80} is not 64 hexadecimal digits")
        return cls(
            name=fields.text("name", 64),
            sha256=sha256,
            size=fields.integer("size", 1, MAX_BLOB_BYTES),
            part_bytes=fields.integer("part_bytes", 1024, 16 * 1024 * 1024),
        )


@dataclass(frozen=True)
class CheckpointManifest:
    """What a device needs to know of a checkpoint for its backbone: the shared ladder and one alignment.

    `generation` grows with every publication, a roll-back included, so an old manifest cannot be replayed.
    """

    generation: int
    run: str
    step: int
    created_at: float
    fingerprint: str
    plan: TapPlan  # the labels, pooling and codec that the side network was trained with
    side_width: int
    ladder: Blob
    alignment: Blob
    metrics: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> CheckpointManifest:
        fields = Fields(unpack_bounded(payload, max_bytes=MAX_MANIFEST_BYTES), "checkpoint manifest")
        metrics = fields._get("metrics", {})
        if not isinstance(metrics, dict) or not all(isinstance(k, str) and isinstance(v, int | float) for k, v in metrics.items()):
            raise FrameError("checkpoint manifest: metrics is not a map of name to number")
        return cls(
            generation=fields.integer("generation", 1, 2**53),
            run=fields.text("run", 64),
            step=fields.integer("step", 0, 2**53),
            created_at=fields.number("created_at", 0.0, 1e12),
            fingerprint=check_fingerprint(fields.text("fingerprint", 64)),
            plan=TapPlan.from_fields(fields.inner("plan")),
            side_width=fields.integer("side_width", 1, 16_384),
            ladder=Blob.from_fields(fields.inner("ladder")),
            alignment=Blob.from_fields(fields.inner("alignment")),
            metrics={k: float(v) for k, v in metrics.items()},
        )


@dataclass(frozen=True)
class SignedManifest:
    """The bytes of a `CheckpointManifest` (or a `BackboneOffer`) with an Ed25519 signature over its domain + manifest.

    The manifest stays bytes until the signature is checked: nothing unsigned is interpreted.
    """

    manifest: bytes
    signature: bytes

    SIGNATURE_DOMAIN = b"mobillm-fleet checkpoint v1\0"

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> SignedManifest:
        fields = Fields(unpack_bounded(payload, max_bytes=MAX_MANIFEST_BYTES + 1024), "signed manifest")
        signature = fields.binary("signature", 64)
        if len(signature) != 64:
            raise FrameError(f"signed manifest: the signature has {len(signature)} bytes, not 64")
        return cls(fields.binary("manifest", MAX_MANIFEST_BYTES), signature)
