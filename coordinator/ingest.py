"""A message from a device becomes something to store, or a reason why not. Pure: no sockets, no SQL, no clock.

Rules: nothing here raises for what a device sent; a frame is accepted only if the tap plan and the backbone that it
names are known and every shape in it follows from them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import Frame, Part, decode, read_identity
from side_tuning.wire.messages import TapPlan
from side_tuning.wire.topics import Topic, check_device_name, parse_topic

MAX_REASON_CHARACTERS = 300  # reasons travel back to the device, 32 in a receipt
_SPOOL = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_SEQUENCE = 2**53


@dataclass(frozen=True)
class Registry:
    """What frames are checked against: every registered backbone, every tap plan ever given out, and who is shut out."""

    backbones: Mapping[str, BackboneManifest] = field(default_factory=dict)
    plans: Mapping[int, TapPlan] = field(default_factory=dict)
    revoked: Collection[str] = ()  # devices

    def knows(self, frame: Frame) -> bool:
        return frame.backbone in self.backbones and frame.plan_version in self.plans


@dataclass(frozen=True)
class Decoded:
    """A frame's payload, looked at: the frame or a part, or the reason why it is neither; and its name if readable."""

    device: str
    spool: str | None
    sequence: int | None
    frame: Frame | Part | None
    reason: str | None


@lru_cache(4096)
def device_of(topic: str, channel: str) -> str:
    """The device that may write to `topic`; raises `FrameError` for any topic that is not a device's own `channel`."""
    parsed: Topic = parse_topic(topic)
    if parsed.direction != "up" or parsed.channel != channel or parsed.arguments:
        raise FrameError(f"topic {topic[:200]!r} is not a device's {channel}")
    return check_device_name(parsed.owner)


def decode_payload(device: str, payload: bytes, properties: Mapping[str, str], *, max_body_bytes: int) -> Decoded:
    """Decode what `device` published, without judging it against plans.

    Args:
        device: from the topic, which the broker's access rules vouch for; a header may claim anything.
        payload: as received.
        properties: MQTT 5 user properties; name the frame where its header cannot be read.
        max_body_bytes: limit on the decompressed body.
    """
    try:
        frame = decode(payload, max_body_bytes=max_body_bytes)
    except FrameError as error:
        identity = read_identity(payload)
        if identity is not None:
            return Decoded(device, identity.spool, identity.sequence, None, shorten(str(error)))
        spool, sequence = _stated_identity(properties)
        return Decoded(device, spool, sequence, None, shorten(str(error)))
    if frame.device != device:
        reason = f"the frame says it is from {frame.device!r} but came from {device!r}"
        return Decoded(device, frame.spool, frame.sequence, None, reason)
    return Decoded(device, frame.spool, frame.sequence, frame, None)


def refusal(frame: Frame, registry: Registry) -> str | None:
    """Why `frame` is not wanted, or does not fit its plan and backbone; None if all is well.

    A revoked device's frames may still be on their way when it is thrown out. They are kept like every rejected one, so
    a revocation by mistake loses nothing: readmit the device and try them again.
    """
    if frame.device in registry.revoked:
        return f"device {frame.device!r} was revoked; if that was a mistake, let it in again, then `coordinator rejections retry`"
    manifest = registry.backbones.get(frame.backbone)
    if manifest is None:
        return f"backbone {frame.backbone} is not registered; run `coordinator backbone register FOLDER`"
    plan = registry.plans.get(frame.plan_version)
    if plan is None:
        return f"tap plan {frame.plan_version} was never given out by this database; put back the one that did, then `coordinator rejections retry`"
    if (frame.mode, frame.pooling) != (plan.mode, plan.pooling):
        return f"mode {frame.mode}/{frame.pooling}, tap plan {plan.version} says {plan.mode}/{plan.pooling}"
    if (frame.token_ids is not None) != (plan.task == "causal-lm"):
        return f"{'no ' if frame.token_ids is None else ''}token ids, tap plan {plan.version} is for {plan.task}"
    if plan.task != "regression" and any(sample.target is not None for sample in frame.samples):
        return f"targets of a regression, tap plan {plan.version} is for {plan.task}"
    if frame.summary_rows != (summary_rows := plan.summary_rows(manifest.width)):
        return f"{frame.summary_rows} rows of a summary, tap plan {plan.version} wants {summary_rows} of this backbone"
    layers = tuple(tap.layer for tap in frame.taps)
    if layers != (wanted := plan.taps(manifest.layers)):
        return f"layers {_list(layers)}, tap plan {plan.version} wants {_list(wanted)} of this backbone"
    sequence_mode = plan.mode == "sequence"
    for tap in frame.taps:
        codec, width = plan.codec_at(tap.layer, manifest.layers), plan.width_at(tap.layer, manifest.layers, manifest.width)
        if (tap.codec, tap.group) != (codec, plan.group):
            return f"layer {tap.layer}: codec {tap.codec} group {tap.group}, tap plan {plan.version} says {codec} group {plan.group}"
        if tap.width != width:
            return f"layer {tap.layer}: width {tap.width}, expected {width}"
        expected_map = manifest.maps.get(tap.layer) if sequence_mode else None
        if tap.map != expected_map:
            return f"layer {tap.layer}: map {tap.map}, expected {expected_map}"
    for sample in frame.samples:
        if sample.label is not None and sample.label >= len(plan.labels):
            return f"sample {sample.id}: label {sample.label}, tap plan {plan.version} has {len(plan.labels)} labels"
        if sequence_mode and sample.tokens > plan.max_tokens:
            return f"sample {sample.id}: {sample.tokens} tokens, tap plan {plan.version} allows {plan.max_tokens}"
    return None


def shorten(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON_CHARACTERS else reason[: MAX_REASON_CHARACTERS - 1] + "…"


def _list(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _stated_identity(properties: Mapping[str, str]) -> tuple[str | None, int | None]:
    spool, sequence = properties.get("spool", ""), properties.get("sequence", "")
    if not _SPOOL.fullmatch(spool) or not re.fullmatch(r"[0-9]{1,16}", sequence) or not 1 <= int(sequence) <= _MAX_SEQUENCE:
        return None, None
    return spool, int(sequence)
