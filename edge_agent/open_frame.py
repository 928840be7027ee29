"""The frame being filled: samples with their taps, until it is full, has lingered long enough, or the plan changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_agent.taps import TapMatrices, to_wire_taps
from side_tuning.wire.codecs import encoded_bytes
from side_tuning.wire.frame import MIN_PART_BYTES, Frame, SampleInfo, encode_frame, split_frame
from side_tuning.wire.messages import TapPlan
from side_tuning.wire.token_ids import TokenIds

SAMPLE_HEADER_BYTES = 80  # id, label, split and token count in the header
FRAME_HEADER_BYTES = 512
TAP_HEADER_BYTES = 120


@dataclass(frozen=True)
class TappedSample:
    """One sample after its forward pass. `rows` is (1, width) in `pooled` mode, (tokens, rank) in `sequence` mode, its summary's rows before them."""

    info: SampleInfo
    rows: dict[int, np.ndarray[Any, Any]]  # by layer
    maps: dict[int, str | None]
    depth: int  # layers of the backbone
    token_ids: TokenIds | None = None  # `causal-lm`: of the rows, and the one after the last
    summary_rows: int = 0

    def encoded_bytes(self, plan: TapPlan) -> int:
        taps = sum(encoded_bytes(rows.shape[0], rows.shape[1], plan.codec_at(layer, self.depth), plan.group) for layer, rows in self.rows.items())
        return SAMPLE_HEADER_BYTES + taps + (len(self.token_ids.data) if self.token_ids else 0)


@dataclass
class OpenFrame:
    """Samples under one plan."""

    plan: TapPlan
    captured_at: float  # UTC, of the first sample
    opened_at: float  # monotonic
    samples: list[TappedSample] = field(default_factory=list)
    payload_bytes: int = FRAME_HEADER_BYTES  # what it will about be, before lz4

    def has_room_for(self, sample: TappedSample, frame_bytes: int) -> bool:
        """Whether it can take one more. An empty frame always can: a sample that is too large alone travels in parts."""
        if not self.samples:
            return True
        if len(self.samples) >= self.plan.frame_samples:
            return False
        taps = TAP_HEADER_BYTES * len(sample.rows)
        return self.payload_bytes + sample.encoded_bytes(self.plan) + taps <= frame_bytes

    def add(self, sample: TappedSample) -> None:
        self.samples.append(sample)
        self.payload_bytes += sample.encoded_bytes(self.plan)

    def is_due(self, now: float) -> bool:
        """Whether it need not wait for another sample: it is full, or has waited for long enough."""
        return len(self.samples) >= self.plan.frame_samples or (bool(self.samples) and now - self.opened_at >= self.plan.linger_seconds)

    def payloads(self, identity: tuple[str, str, int], produced: int, fingerprint: str, frame_bytes: int) -> list[bytes]:
        """The frame's payload, or its parts. `identity` is device, spool and sequence."""
        device, spool, sequence = identity
        first = self.samples[0]
        ids = [s.token_ids for s in self.samples if s.token_ids is not None]
        values = {layer: np.concatenate([s.rows[layer] for s in self.samples]) for layer in first.rows}
        frame = Frame(
            device=device,
            spool=spool,
            sequence=sequence,
            captured_at=self.captured_at,
            backbone=fingerprint,
            plan_version=self.plan.version,
            mode=self.plan.mode,
            pooling=self.plan.pooling,
            produced=produced,
            samples=tuple(s.info for s in self.samples),
            taps=to_wire_taps(TapMatrices(values, [s.info.tokens for s in self.samples], first.maps, first.depth), self.plan),
            token_ids=TokenIds(ids[0].bytes_each, b"".join(part.data for part in ids)) if ids else None,
            summary_rows=first.summary_rows,
        )
        return split_frame(encode_frame(frame), max(frame_bytes, MIN_PART_BYTES))
